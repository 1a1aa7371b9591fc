#include <algorithm>
#include <cmath>
#include <functional>

#include "kernels/weight_loader.h"
#include "properties/stored_layout.h"
#include "properties/stored_linear.h"
#include "properties/stored_tensors.h"

namespace tp::stored_linear {

namespace {

// Whether the rules load other rows, or other scales for them, on this rank.
bool other_rows(const StoredLinear& layer, bool has_bias, const ShardingRules& rules,
                const StoredLinear& right) {
  const ShardingRules& good = sharding_rules();
  if (layer.taken != right.taken) return true;
  if (has_bias && layer.bias_taken != right.bias_taken) return true;
  const bool has_row_scales =
      layer.format.scheme == Scheme::fp8_channel || layer.format.scheme == Scheme::fp8_block;
  const std::int64_t block = layer.format.scheme == Scheme::fp8_block ? layer.format.block_rows : 1;
  for (std::size_t m = 0; m < layer.taken.size(); ++m) {
    const FusedRows stored = stored_rows(layer, layer.is_fused() ? 0 : m);
    for (std::int64_t i = layer.taken[m].offset; i < layer.taken[m].end(); ++i) {
      const LocalRow at = local_row(layer, m, i, layer.taken[m]);
      const std::int64_t row = rules.loader.stored_row(stored, at),
                         right_row = good.loader.stored_row(stored, at);
      if (row != right_row) return true;
      if (has_row_scales && rules.loader.scale_row(stored, at, row, block) !=
                                good.loader.scale_row(stored, at, right_row, block))
        return true;
    }
  }
  return false;
}

bool other_columns(const Case& c, const Layer& of, const StoredLinear& layer,
                   const ShardingRules& rules, const StoredLinear& right) {
  const ShardingRules& good = sharding_rules();
  if (layer.columns.own != right.columns.own) return true;
  const std::int64_t group = layer.format.block_cols;
  if (layer.format.scheme == Scheme::fp8_block || layer.format.scheme == Scheme::nvfp4) {
    const auto mine = rules.loader.first_group(layer.columns, group),
               theirs = good.loader.first_group(layer.columns, group);
    // Columns that are all of one group have its scale wherever in it they begin.
    const std::int64_t last = std::max(mine.column, theirs.column) + layer.columns.own.size - 1;
    return mine.group != theirs.group || (mine.column != theirs.column && last >= group);
  }
  if (layer.format.scheme != Scheme::gptq) return false;
  const std::int64_t groups = ceil_div(layer.in_features, group);
  const Shard loaded = rules.loader.groups_loaded(layer.columns, group, groups, layer.act_order);
  if (loaded != good.loader.groups_loaded(layer.columns, group, groups, layer.act_order))
    return true;
  const std::vector<std::int64_t> group_of = groups_of_columns(c, of);
  for (std::int64_t k = layer.columns.own.offset; k < layer.columns.own.end(); ++k) {
    if (rules.loader.loaded_group(group_of[std::size_t(k)], loaded, layer.columns) !=
        good.loader.loaded_group(group_of[std::size_t(k)], loaded, layer.columns))
      return true;
  }
  return false;
}

// Whether ranks' largest elements differ: then it matters whose they scale by.
bool ranks_differ(const Case& c, const TensorSpec& x, const DataRegime& regime) {
  std::vector<double> largest(std::size_t(c.tp_size));
  std::vector<std::byte> row(std::size_t(x.cols * size_of(x.dtype)));
  for (int rank = 0; rank < c.tp_size; ++rank) {
    const Shard own = own_tokens(c, rank);
    for (std::int64_t i = own.offset; i < own.end(); ++i) {
      fill_block(x, regime, {i, 1}, {0, x.cols}, row.data(), x.cols);
      for (std::int64_t k = 0; k < x.cols; ++k) {
        largest[std::size_t(rank)] =
            std::max(largest[std::size_t(rank)], std::fabs(load(x.dtype, row.data(), k)));
      }
    }
  }
  return std::adjacent_find(largest.begin(), largest.end(), std::not_equal_to<>()) != largest.end();
}

}  // namespace

bool differs(const Case& c, const Layer& layer, const TensorSpec& x, const DataRegime& regime,
             const ShardingRules& rules) {
  if (!is_loaded(c)) return false;
  const QuantRules &mine = rules.quant, &right = sharding_rules().quant;
  const bool fused = is_fused(c, layer), several = layer.parts.size() > 1,
             fixed = has_fixed_scale(c), slots = has_slots(c);
  const int parts = int(layer.parts.size());
  if (fused && (slots || fixed) &&
      rules.loader.slots_of_fused(parts) != sharding_rules().loader.slots_of_fused(parts))
    return true;
  if (slots && tensor_names(format_of(c)).global_is_inverse && rules.loader.factor(2, true) != 0.5f)
    return true;
  if (!rules.loader.pads_scales && scales_kind(c, layer, 0) && padding_rows(c, layer) > 0)
    return true;
  // One scale for all parts on disk is the same in all slots, whatever is made of them.
  if (several && !fused) {
    if ((has_weight_scale(c) || fixed) && mine.slots(false) != right.slots(false)) return true;
    if (format_of(c).scheme == Scheme::nvfp4 && !mine.own_global_scale) return true;
  }
  if (is_gathered(c) && format_of(c).activations == Activations::tensor &&
      mine.gathered_scale != right.gathered_scale && ranks_differ(c, x, regime))
    return true;
  for (int rank = 0; rank < c.tp_size; ++rank) {
    const StoredLinear stored = stored_linear(c, layer, rules, rank),
                       good = stored_linear(c, layer, sharding_rules(), rank);
    if (other_rows(stored, linear::has_bias(c), rules, good) ||
        other_columns(c, layer, stored, rules, good))
      return true;
  }
  return false;
}

}  // namespace tp::stored_linear
