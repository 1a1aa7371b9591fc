#include "properties/lora_mutants.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "properties/lora_batch.h"

namespace tp::lora {

namespace {

// ---- The rows of B.

std::int64_t rows_before(const LoraBase& base, int part) {
  return std::accumulate(base.rows.begin(), base.rows.begin() + part, std::int64_t{0});
}
// As Python slices: what is beyond the end is not there.
Shard sliced(Shard s, std::int64_t rows) {
  const std::int64_t begin = std::min(s.offset, rows);
  return {begin, std::min(s.end(), rows) - begin};
}

Shard right_rows(const LoraBase& base, int part, bool is_fused) {
  return sharding_rules().lora.b_rows(base, part, is_fused);
}
// As if no row were on several ranks.
std::int64_t even_rows(const LoraBase& base) {
  const bool is_shared =
      std::any_of(base.replicas.begin(), base.replicas.end(), [](int n) { return n > 1; });
  return is_shared ? base.total_rows() / base.tp_size : sharding_rules().lora.slot_rows(base);
}

// Each block begins where the base layer's own sizes, which count replicas, put it.
Shard after_replicas(const LoraBase& base, int part, bool is_fused) {
  if (!is_fused) return right_rows(base, part, false);
  Shard own = base.own[std::size_t(part)];
  for (int before = 0; before < part; ++before)
    own.offset += base.rows[std::size_t(before)] * base.replicas[std::size_t(before)];
  return sliced(own, base.total_rows());
}
// The same, moved back to where the tensor still has as many rows.
Shard after_replicas_clamped(const LoraBase& base, int part, bool is_fused) {
  const Shard own = base.own[std::size_t(part)];
  const Shard rows = after_replicas(base, part, is_fused);
  return {std::min(rows.offset, base.total_rows() - own.size), own.size};
}

// Of KV heads: another block of the part, of those that replicas share.
template <typename Block>
Shard other_block(const LoraBase& base, int part, bool is_fused, Block block) {
  const Shard right = right_rows(base, part, is_fused);
  if (base.replicas[std::size_t(part)] == 1 || right.size == 0) return right;
  const std::int64_t blocks = base.rows[std::size_t(part)] / right.size;
  const std::int64_t first = is_fused ? rows_before(base, part) : 0;
  return {first + std::min(block(base.tp_rank, blocks), blocks - 1) * right.size, right.size};
}
Shard block_of_rank(const LoraBase& base, int part, bool is_fused) {
  return other_block(base, part, is_fused, [](std::int64_t rank, std::int64_t) { return rank; });
}
Shard block_modulo(const LoraBase& base, int part, bool is_fused) {
  return other_block(base, part, is_fused,
                     [](std::int64_t rank, std::int64_t blocks) { return rank % blocks; });
}

// K's rows for V and V's for K: of a fused tensor, and where they are equally many.
Shard k_and_v_swapped(const LoraBase& base, int part, bool is_fused) {
  const bool has_kv = base.rows.size() == 3 && base.rows[1] == base.rows[2];
  if (!is_fused || !has_kv || part == 0) return right_rows(base, part, is_fused);
  return right_rows(base, 3 - part, is_fused);
}

// One run of rows a rank, cut as if the tensor were one matrix.
Shard contiguous(const LoraBase& base, int part, bool is_fused) {
  if (!is_fused) return right_rows(base, part, false);
  std::int64_t first = base.tp_rank * (base.total_rows() / base.tp_size);
  for (int before = 0; before < part; ++before) first += base.own[std::size_t(before)].size;
  const std::int64_t size = base.own[std::size_t(part)].size;
  return {std::min(first, base.total_rows() - size), size};
}

Shard of_next_rank(const LoraBase& base, int part, bool is_fused) {
  const Shard right = right_rows(base, part, is_fused);
  if (base.cuts_columns || right.size == base.rows[std::size_t(part)]) return right;
  const std::int64_t first = is_fused ? rows_before(base, part) : 0;
  return {first + (right.offset - first + right.size) % base.rows[std::size_t(part)], right.size};
}

// The other operand's part of the sum of x's columns.
Shard columns_of_next_rank(const LoraBase& base) {
  if (!base.cuts_columns) return {0, base.in_features};
  const std::int64_t size = div_exact(base.in_features, base.tp_size);
  return {(base.tp_rank + 1) % base.tp_size * size, size};
}

Shard a_rows_of_rank_0(std::int64_t max_rank, bool is_shared_out, int tp_size, int) {
  return sharding_rules().lora.a_rows(max_rank, is_shared_out, tp_size, 0);
}

Mutant mutant(const LayerOf& layer_of, std::string id, std::string what, std::string upstream,
              const ShardingRules& rules) {
  Mutant m{std::move(id), std::move(what), std::move(upstream), rules};
  m.decides = [layer_of, rules](const Case& c) { return differs(c, layer_of(c), rules); };
  return m;
}
Mutant mutant(const LayerOf& layer_of, std::string id, std::string what, std::string upstream,
              void (*change)(LoraRules&)) {
  ShardingRules rules = sharding_rules();
  change(rules.lora);
  return mutant(layer_of, std::move(id), std::move(what), std::move(upstream), rules);
}

// Every rank adds the bias of the delta to its part of the sum.
ShardingRules bias_on_every_rank() {
  ShardingRules rules = sharding_rules();
  rules.linear.row_adds_bias = [](int) { return true; };
  return rules;
}

// ---- What differs.

// Without the one that slots had before, which leaves nothing.
std::vector<Adapter> own_adapters(const Case& c, const Layer& layer) {
  std::vector<Adapter> all = adapters(c, layer);
  all.resize(std::size_t(slots(c)));
  return all;
}

// Whether a token has an adapter that changes any of the matrices from `first` on.
bool any_token_uses(const Case& c, const Layer& layer, std::int64_t first = 0) {
  const std::vector<Adapter> all = adapters(c, layer);
  const std::vector<std::int32_t> slot_of = slot_of_token(c, 0);
  return std::any_of(slot_of.begin(), slot_of.end(), [&](std::int32_t slot) {
    if (slot < 0) return false;
    const std::vector<Module>& modules = all[std::size_t(slot)].modules;
    return std::any_of(modules.begin() + first, modules.end(),
                       [](const Module& m) { return m.rank > 0; });
  });
}

bool slots_differ(const Case& c, const Layer& layer, const ShardingRules& mine) {
  const LoraRules &rules = mine.lora, &right = sharding_rules().lora;
  const std::vector<Adapter> all = own_adapters(c, layer);
  for (int rank = 0; rank < c.tp_size; ++rank) {
    const LoraLayer l = lora_layer(c, layer, rank);
    if (rules.slot_rows(l.base) != right.slot_rows(l.base) ||
        lora_own_a(l, mine) != lora_own_a(l, sharding_rules()) ||
        rules.a_columns(l.base) != right.a_columns(l.base))
      return true;
    for (const Adapter& adapter : all) {
      for (int part = 0; part < int(layer.parts.size()); ++part) {
        if (adapter.modules[std::size_t(part)].rank > 0 &&
            rules.b_rows(l.base, part, adapter.is_fused) !=
                right.b_rows(l.base, part, adapter.is_fused))
          return true;
      }
    }
  }
  return false;
}

bool scales_differ(const Case& c, const Layer& layer, const LoraRules& rules) {
  // What B is multiplied by when it is loaded, and the delta in each call.
  const auto factors = [&](const LoraRules& r, const Module& m, bool use_rslora) {
    const auto factor = float(r.scale(m.alpha, m.rank, max_rank(c, layer), use_rslora));
    return std::pair{r.scales_b(merges_scale(c)) ? factor : 1.0f,
                     r.scales_delta(merges_scale(c)) ? factor : 1.0f};
  };
  for (const Adapter& adapter : own_adapters(c, layer)) {
    for (const Module& m : adapter.modules) {
      if (m.rank > 0 && factors(rules, m, adapter.use_rslora) !=
                            factors(sharding_rules().lora, m, adapter.use_rslora))
        return true;
    }
  }
  return false;
}

// Whether an adapter does not cover all of its slot, in which there is something else: the adapter
// before it, or, where there was none, what memory held.
bool leaves_former(const Case& c, const Layer& layer) {
  const std::vector<Adapter> all = own_adapters(c, layer);
  const bool reload = c.options.at("reload") == 1;
  // Of those that held others, every second one was unloaded, which leaves zeros.
  for (std::size_t slot = 0; slot < all.size(); slot += reload ? 2 : 1) {
    const bool has_room = std::any_of(all[slot].modules.begin(), all[slot].modules.end(),
                                      [&](const Module& m) { return m.rank < max_rank(c, layer); });
    if (has_room || has_bias(c) != all[slot].has_bias) return true;
  }
  return false;
}

// Whether other ranks than the right ones add a bias of the delta to their part of a sum.
bool biases_differ(const Case& c, const Layer& layer, const ShardingRules& rules) {
  const std::vector<Adapter> all = adapters(c, layer);
  const std::vector<std::int32_t> slot_of = slot_of_token(c, 0);
  const bool is_added = std::any_of(slot_of.begin(), slot_of.end(), [&](std::int32_t slot) {
    return slot >= 0 && all[std::size_t(slot)].has_bias;
  });
  if (!is_added || joins(c, layer) != DeltaJoins::partial || shares_out_rank(c)) return false;
  for (int rank = 0; rank < c.tp_size; ++rank) {
    if (rules.linear.row_adds_bias(rank) != sharding_rules().linear.row_adds_bias(rank))
      return true;
  }
  return false;
}

}  // namespace

bool differs(const Case& c, const Layer& layer, const ShardingRules& rules) {
  const LoraRules &mine = rules.lora, &right = sharding_rules().lora;
  if (slots_differ(c, layer, rules) || scales_differ(c, layer, mine)) return true;
  if (mine.zeroes_slots != right.zeroes_slots && leaves_former(c, layer)) return true;
  for (const std::int32_t slot : slot_of_token(c, 0)) {
    if (slot >= 0 && mine.slot_of_token(slot, std::int32_t(slots(c))) != slot) return true;
  }
  if (!any_token_uses(c, layer)) return false;
  if (biases_differ(c, layer, rules)) return true;
  if (mine.shrink_collective(layer.cuts_columns, shares_out_rank(c), joins(c, layer)) !=
          right.shrink_collective(layer.cuts_columns, shares_out_rank(c), joins(c, layer)) &&
      c.tp_size > 1)
    return true;
  const std::int64_t parts = std::int64_t(layer.parts.size()), tokens = c.num_tokens,
                     room = max_rank(c, layer);
  const std::int64_t stride = places(c, layer).part;
  // It leads to the second matrix and on from there.
  return any_token_uses(c, layer, 1) &&
         mine.slice_stride(stride, parts * tokens * room, int(parts)) != stride;
}

std::vector<Mutant> mutants(const LayerOf& of) {
  return {
      mutant(of, "lora-qkv-kv-replica-sizing:as-shipped",
             "slots have an equal share of B's rows, and a fused adapter's blocks begin where the "
             "base's own sizes, which count replicas, put them",
             "sgl-project/sglang#24420",
             [](LoraRules& r) {
               r.slot_rows = even_rows;
               r.b_rows = after_replicas;
             }),
      mutant(of, "lora-qkv-kv-replica-sizing:even-slots", "slots have an equal share of B's rows",
             "sgl-project/sglang#24420", [](LoraRules& r) { r.slot_rows = even_rows; }),
      mutant(of, "lora-qkv-kv-replica-sizing:v-clamped",
             "slots are right, but the V block of a fused adapter begins behind as many K rows as "
             "the replicas have, or as far as there are rows",
             "sgl-project/sglang#24420", [](LoraRules& r) { r.b_rows = after_replicas_clamped; }),
      mutant(of, "lora-qkv-kv-replica-sizing:kv-of-rank",
             "K and V rows of KV block tp_rank, not tp_rank / replicas", "sgl-project/sglang#24420",
             [](LoraRules& r) { r.b_rows = block_of_rank; }),
      mutant(of, "lora-qkv-kv-replica-sizing:kv-modulo",
             "K and V rows of KV block tp_rank % num_kv_heads, not tp_rank / replicas",
             "sgl-project/sglang#24420", [](LoraRules& r) { r.b_rows = block_modulo; }),
      mutant(of, "lora-qkv-kv-replica-sizing:k-v-swapped",
             "a fused adapter's K rows are taken for V's, and V's for K's",
             "sgl-project/sglang#24420", [](LoraRules& r) { r.b_rows = k_and_v_swapped; }),
      mutant(of, "lora-fused-adapter-contiguous-split:b",
             "a fused adapter's B is cut into one run of rows a rank, not block by block",
             "NVIDIA/TensorRT-LLM#8063", [](LoraRules& r) { r.b_rows = contiguous; }),
      mutant(of, "lora-slice-stride-assumption:packed",
             "the expanding kernel takes the shrunk activations of the matrices to lie one after "
             "another without gaps",
             "vllm-project/vllm#42718",
             [](LoraRules& r) {
               r.slice_stride = [](std::int64_t, std::int64_t elements, int parts) {
                 return elements / parts;
               };
             }),
      mutant(of, "lora-gather-when-replicated:gather",
             "shrunk activations are gathered though every rank has all of them",
             "vllm-project/vllm#45715",
             [](LoraRules& r) {
               r.shrink_collective = [](bool cuts_columns, bool shares_out, DeltaJoins joins) {
                 return cuts_columns
                            ? sharding_rules().lora.shrink_collective(true, shares_out, joins)
                            : ShrinkCollective::gather;
               };
             }),
      mutant(of, "lora-gather-when-replicated:sum",
             "shrunk activations are added up though every rank has all of them",
             "vllm-project/vllm#45715",
             [](LoraRules& r) {
               r.shrink_collective = [](bool cuts_columns, bool shares_out, DeltaJoins joins) {
                 return cuts_columns || shares_out ? sharding_rules().lora.shrink_collective(
                                                         cuts_columns, shares_out, joins)
                                                   : ShrinkCollective::sum;
               };
             }),
      mutant(of, "lora-gather-when-replicated:gather-for-sum",
             "parts of shrunk activations are gathered, not added up", "vllm-project/vllm#45715",
             [](LoraRules& r) {
               r.shrink_collective = [](bool cuts_columns, bool shares_out, DeltaJoins joins) {
                 const ShrinkCollective right =
                     sharding_rules().lora.shrink_collective(cuts_columns, shares_out, joins);
                 return right == ShrinkCollective::sum ? ShrinkCollective::gather : right;
               };
             }),
      mutant(of, "rslora-scale:not-rs", "alpha / rank, though the adapter says alpha / sqrt(rank)",
             "sgl-project/sglang#40835",
             [](LoraRules& r) {
               r.scale = [](double alpha, std::int64_t rank, std::int64_t, bool) {
                 return alpha / double(rank);
               };
             }),
      mutant(of, "rslora-scale:always-rs", "alpha / sqrt(rank), though the adapter says nothing",
             "NVIDIA/TensorRT-LLM#1668",
             [](LoraRules& r) {
               r.scale = [](double alpha, std::int64_t rank, std::int64_t, bool) {
                 return alpha / std::sqrt(double(rank));
               };
             }),
      mutant(of, "rslora-scale:max-rank", "alpha / the rank that slots have room for",
             "vllm-project/vllm#55545",
             [](LoraRules& r) {
               r.scale = [](double alpha, std::int64_t rank, std::int64_t max_rank, bool rs) {
                 return sharding_rules().lora.scale(alpha, std::max(rank, max_rank), 0, rs);
               };
             }),
      mutant(of, "rslora-scale:alpha", "alpha is the factor", "vllm-project/vllm#55545",
             [](LoraRules& r) {
               r.scale = [](double alpha, std::int64_t, std::int64_t, bool) { return alpha; };
             }),
      mutant(of, "rslora-scale:twice", "B and the delta are both multiplied by the factor",
             "vllm-project/vllm#55545",
             [](LoraRules& r) { r.scales_b = r.scales_delta = [](bool) { return true; }; }),
      mutant(of, "lora-delta-wrong-parallel-state:whole-on-partial",
             "every rank adds the whole delta to its part of the base, which is then added up",
             "NVIDIA-NeMo/Megatron-Bridge#5635",
             [](LoraRules& r) {
               r.shrink_collective = [](bool cuts_columns, bool shares_out, DeltaJoins joins) {
                 return cuts_columns ? ShrinkCollective::sum
                                     : sharding_rules().lora.shrink_collective(cuts_columns,
                                                                               shares_out, joins);
               };
             }),
      mutant(of, "lora-delta-wrong-parallel-state:partial-on-whole",
             "every rank adds its part of the delta to the sum of the base",
             "NVIDIA-NeMo/Megatron-Bridge#5635",
             [](LoraRules& r) {
               r.shrink_collective = [](bool cuts_columns, bool shares_out, DeltaJoins joins) {
                 return cuts_columns ? ShrinkCollective::none
                                     : sharding_rules().lora.shrink_collective(cuts_columns,
                                                                               shares_out, joins);
               };
             }),
      mutant(of, "own:lora-slot-of-former",
             "a slot keeps what the adapter before it had and the new one does not cover", "-",
             [](LoraRules& r) { r.zeroes_slots = false; }),
      mutant(of, "own:lora-b-of-next-rank", "the rows of B are those of the next rank", "-",
             [](LoraRules& r) { r.b_rows = of_next_rank; }),
      mutant(of, "own:lora-a-columns-of-next-rank", "the columns of A are those of the next rank",
             "-", [](LoraRules& r) { r.a_columns = columns_of_next_rank; }),
      mutant(of, "own:lora-a-rows-of-rank-0", "every rank has the first share of A's rows", "-",
             [](LoraRules& r) { r.a_rows = a_rows_of_rank_0; }),
      mutant(of, "own:lora-bias-on-every-rank",
             "every rank adds the bias of the delta to its part of the sum, not rank 0 alone", "-",
             bias_on_every_rank()),
      mutant(of, "own:lora-next-slot", "tokens get the adapter of the next slot", "-",
             [](LoraRules& r) {
               r.slot_of_token = [](std::int32_t slot, std::int32_t slots) {
                 return (slot + 1) % slots;
               };
             }),
  };
}

}  // namespace tp::lora
