#pragma once
// The fused query, key and value projection on one rank: a column-parallel linear layer (vLLM's
// QKVParallelLinear). Every rank has all of x and makes the columns of its own heads; nothing is
// communicated.

#include "harness/base/shape.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

// Columns of the fused row q | k | v of a rank.
std::int64_t qkv_width(const ModelShape& model, const RankShape& rank);

// x [tokens, hidden_size]; weight [rows this rank loaded of q_proj, then of k_proj, then of v_proj,
// hidden_size]; bias [1, the same rows], or no rows: none; qkv [tokens, qkv_width]. Any row
// strides. Throws Fault(BadLaunch) where the sizes do not fit each other.
template <typename T>
void qkv_linear(View<const T> x, View<const T> weight, View<const T> bias, View<T> qkv,
                const ModelShape& model, const RankShape& rank, Stream& stream);

}  // namespace tp
