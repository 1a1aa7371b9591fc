#pragma once
// A row-parallel linear layer on one rank (vLLM's RowParallelLinear; o_proj and down_proj): the
// rank has some columns of the input and of the weight, and what it makes of them is a partial sum
// that has to be added up over the ranks: by the layer, or by its caller.

#include "harness/base/sharding_rules.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"
#include "harness/group/tp_group.h"

namespace tp {

// sums [tokens, out_features], dense, becomes what this rank adds to the sum: x weight^T, plus the
// bias on the one rank that adds it, in type R (T or float). x [tokens, local in_features], weight
// [out_features, local in_features]; bias [1, out_features], or no rows: none. Throws
// Fault(BadLaunch) where the sizes do not fit each other. Layers with other weights than these have
// products of their own (quantised_linear.h), and go on as this one does.
template <typename T, typename R>
void partial_sums(View<const T> x, View<const T> weight, View<const T> bias, View<R> sums,
                  const ShardingRules& rules, const TpGroup& group, Stream& stream);

// Adds the partial sums up over the group, in type R, if the layer is to (`reduce_results`).
template <typename R>
void reduce_results(View<R> sums, bool reduce_results, const ShardingRules& rules, TpGroup& group,
                    Stream& stream);

// The same for sequence parallelism: the tokens are shared out, ceil(tokens / tp_size) to each
// rank. sums [tp_size * that, out_features] has the partial sums in its first `tokens` rows; the
// others become zeros. mine [ceil(tokens / tp_size), out_features], dense, becomes this rank's rows
// of the sum.
template <typename R>
void scatter_results(View<R> sums, std::int64_t tokens, View<R> mine, TpGroup& group,
                     Stream& stream);

// What a caller does to the sums that the layer left to it, or did not.
template <typename R>
void reduce_row_linear(View<R> sums, bool reduced_results, const ShardingRules& rules,
                       TpGroup& group, Stream& stream);

// out = the first out.rows rows of sums, rounded to T. Any row stride of out.
template <typename T, typename R>
void store_sums(View<const R> sums, View<T> out, Stream& stream);

}  // namespace tp
