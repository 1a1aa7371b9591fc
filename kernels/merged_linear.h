#pragma once
// The first half of a gated MLP on one rank: the fused gate and up projection, a column-parallel
// linear layer (vLLM's MergedColumnParallelLinear), and its activation (SiluAndMul). Every rank has
// all of x and makes its own columns of gate and of up; nothing is communicated.

#include "harness/base/sharding_rules.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

// x [tokens, hidden_size]; weight [the rows this rank has of gate_proj and of up_proj, and of
// padding, hidden_size]; bias [1, the same rows], or no rows: none; gate_up [tokens, those rows].
// Any row strides. Throws Fault(BadLaunch) where the sizes do not fit each other.
template <typename T>
void merged_linear(View<const T> x, View<const T> weight, View<const T> bias, View<T> gate_up,
                   Stream& stream);

// out = silu(gate) * up, element by element, in fp32 with one rounding at the end. gate_up
// [tokens, an even number]: gate and up begin where rules.gated.halves says; out [tokens, columns
// of each]. Any row strides; out must not overlap gate_up. Throws Fault(BadLaunch) where the sizes
// do not fit each other.
template <typename T>
void silu_and_mul(View<const T> gate_up, View<T> out, const ShardingRules& rules, Stream& stream);

}  // namespace tp
