#pragma once
// A row-parallel linear layer on one rank (vLLM's RowParallelLinear; o_proj and down_proj): the
// rank has some columns of the input and of the weight, and what it makes of them is a partial sum
// that has to be added up over the ranks: by the layer, or by its caller.

#include "harness/base/sharding_rules.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"
#include "harness/group/tp_group.h"

namespace tp {

// sums [tokens, out_features], dense, becomes x weight^T, plus the bias on the one rank that adds
// it, added up over the group in type R (T or float) if `reduce_results`. x [tokens, local
// in_features], weight [out_features, local in_features]; bias [1, out_features], or no rows: none.
// Throws Fault(BadLaunch) where the sizes do not fit each other.
template <typename T, typename R>
void row_linear(View<const T> x, View<const T> weight, View<const T> bias, View<R> sums,
                bool reduce_results, const ShardingRules& rules, TpGroup& group, Stream& stream);

// The same for sequence parallelism: the tokens are shared out, too, ceil(tokens / tp_size) to each
// rank, and sums [tp_size * that, out_features] is workspace, whose rows beyond the tokens are
// zeros. mine [ceil(tokens / tp_size), out_features], dense, becomes this rank's rows of the sum.
template <typename T, typename R>
void row_linear_scattered(View<const T> x, View<const T> weight, View<const T> bias, View<R> sums,
                          View<R> mine, const ShardingRules& rules, TpGroup& group, Stream& stream);

// What a caller does to the sums that row_linear left to it, or did not.
template <typename R>
void reduce_row_linear(View<R> sums, bool reduced_results, const ShardingRules& rules,
                       TpGroup& group, Stream& stream);

// out = the first out.rows rows of sums, rounded to T. Any row stride of out.
template <typename T, typename R>
void store_sums(View<const R> sums, View<T> out, Stream& stream);

}  // namespace tp
