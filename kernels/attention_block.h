#pragma once
// What an attention block has beside its projections, norms, rotation and attention: the output
// gate of Qwen3-Next and Qwen3.5.

#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

// out = x * sigmoid(gate), element by element, in fp32 with one rounding at the end. All
// [tokens, local heads * v_head_dim], any row strides; out must not overlap the others. Throws
// Fault(BadLaunch) where the sizes do not fit each other.
template <typename T>
void output_gate(View<const T> x, View<const T> gate, View<T> out, Stream& stream);

}  // namespace tp
