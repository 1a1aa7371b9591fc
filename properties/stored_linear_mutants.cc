#include "properties/stored_linear_mutants.h"

#include <algorithm>

#include "properties/stored_tensors.h"

namespace tp::stored_linear {

namespace {

using FirstGroup = LoaderRules::FirstGroup;

Mutant mutant(Differs differs, std::string id, std::string what, std::string upstream,
              void (*change)(ShardingRules&)) {
  Mutant m{std::move(id), std::move(what), std::move(upstream), sharding_rules()};
  change(m.rules);
  m.decides = [differs, rules = m.rules](const Case& c) { return differs(c, rules); };
  return m;
}

// The stored tensor cut into equal runs of rows, as far as it goes.
std::int64_t in_equal_runs(const FusedRows& fused, const LocalRow& at) {
  return std::min(at.tp_rank * (fused.total() / at.tp_size) + at.local, fused.total() - 1);
}

// Offset and size of a part, in blocks of rows, each rounded by itself.
std::int64_t rounded_by_itself(const FusedRows& fused, const LocalRow& at, std::int64_t block_rows,
                               std::int64_t (*divide)(std::int64_t, std::int64_t)) {
  if (at.own.size == 0) return 0;
  std::int64_t offset = 0;
  for (int before = 0; before < at.part; ++before) offset += fused.parts[std::size_t(before)];
  const std::int64_t row = divide(offset, block_rows) +
                           at.own.offset / at.own.size * divide(at.own.size, block_rows) +
                           (at.row - at.own.offset) / block_rows;
  return std::min(row, ceil_div(fused.total(), block_rows) - 1);
}

Mutant slot_zero(Differs differs, std::string variant, SlotReduction reduction,
                 void (*change)(ShardingRules&)) {
  static constexpr const char* kNames[] = {"largest", "smallest", "first", "last", "mean"};
  return mutant(
      differs, "fused-scale-slot-uninit:" + std::move(variant),
      std::string("of a tensor that is fused on disk the scale is written to slot 0 only; "
                  "the layer takes the ") +
          kNames[int(reduction)] + " of all slots",
      "vllm-project/vllm#39765", change);
}

template <SlotReduction reduction>
void only_slot_zero(ShardingRules& r) {
  r.loader.slots_of_fused = [](int) { return Shard{0, 1}; };
  r.quant.slots = [](bool is_fused) { return is_fused ? reduction : SlotReduction::max; };
}

template <SlotReduction reduction>
void one_global_scale(ShardingRules& r) {
  r.quant.own_global_scale = false;
  r.quant.global_scale = reduction;
}

// Scales of checkpoints that store their inverse.
Mutant not_inverted(Differs differs) {
  return mutant(
      differs, "own:global-scale-not-inverted",
      "global scales are taken as they are stored, though this writer stores 1/scale", "-",
      [](ShardingRules& r) { r.loader.factor = [](float stored, bool) { return stored; }; });
}

}  // namespace

std::vector<Mutant> fused_mutants(Differs differs) {
  return {
      mutant(differs, "interleaved-ba-midpoint-split:as-blocks",
             "a tensor fused in stripes is read as if its matrices lay one below the other",
             "vllm-project/vllm#36242",
             [](ShardingRules& r) {
               r.loader.stored_row = [](const FusedRows& fused, const LocalRow& at) {
                 return FusedRows{fused.parts, 1}.stored(at.part, at.row);
               };
             }),
      mutant(differs, "packed-concat-contiguous-colwise:stored",
             "a tensor fused matrix by matrix is cut into equal runs of rows",
             "NVIDIA-NeMo/Automodel#1324",
             [](ShardingRules& r) {
               r.loader.stored_row = [](const FusedRows& fused, const LocalRow& at) {
                 const bool blocks = fused.stripes == 1 && fused.parts.size() > 1;
                 return blocks ? in_equal_runs(fused, at) : fused.stored(at.part, at.row);
               };
             }),
      mutant(differs, "striped-fused-qkv:chunk",
             "a tensor fused in stripes is cut into equal runs of rows, which is right for as many "
             "ranks as stripes only",
             "vllm-project/vllm#45200",
             [](ShardingRules& r) {
               r.loader.stored_row = [](const FusedRows& fused, const LocalRow& at) {
                 return fused.stripes > 1 ? in_equal_runs(fused, at)
                                          : fused.stored(at.part, at.row);
               };
             }),
      mutant(differs, "striped-fused-qkv:scale-floor",
             "block scales are cut by stripe, as many rows each as whole blocks fit into one",
             "vllm-project/vllm#53242",
             [](ShardingRules& r) {
               r.loader.scale_row = [](const FusedRows& fused, const LocalRow&, std::int64_t stored,
                                       std::int64_t block_rows) {
                 if (fused.stripes == 1) return stored / block_rows;
                 const std::int64_t stripe = fused.stripe_rows();
                 return stored / stripe * (stripe / block_rows) + stored % stripe / block_rows;
               };
             }),
      mutant(differs, "block-scale-ceil-ceil:ceil",
             "offset and size of a rank's block scales are each rounded up by themselves",
             "vllm-project/vllm#52997",
             [](ShardingRules& r) {
               r.loader.scale_row = [](const FusedRows& fused, const LocalRow& at,
                                       std::int64_t stored, std::int64_t block_rows) {
                 if (fused.stripes > 1) return stored / block_rows;
                 return rounded_by_itself(fused, at, block_rows, ceil_div);
               };
             }),
      mutant(differs, "block-scale-ceil-ceil:floor",
             "offset and size of a rank's block scales are each rounded down by themselves",
             "vllm-project/vllm#52997",
             [](ShardingRules& r) {
               r.loader.scale_row = [](const FusedRows& fused, const LocalRow& at,
                                       std::int64_t stored, std::int64_t block_rows) {
                 if (fused.stripes > 1) return stored / block_rows;
                 return rounded_by_itself(fused, at, block_rows,
                                          [](std::int64_t a, std::int64_t b) { return a / b; });
               };
             }),
      mutant(differs, "block-scale-ceil-ceil:local-row",
             "the block of a row is that of its place in the rank's weight, not in the stored one",
             "vllm-project/vllm#52997",
             [](ShardingRules& r) {
               r.loader.scale_row = [](const FusedRows& fused, const LocalRow& at, std::int64_t,
                                       std::int64_t block_rows) {
                 return std::min(at.local / block_rows, ceil_div(fused.total(), block_rows) - 1);
               };
             }),
      slot_zero(differs, "max", SlotReduction::max, only_slot_zero<SlotReduction::max>),
      slot_zero(differs, "min", SlotReduction::min, only_slot_zero<SlotReduction::min>),
      slot_zero(differs, "last", SlotReduction::last, only_slot_zero<SlotReduction::last>),
      mutant(differs, "fused-global-scale-max:max",
             "all matrices of a fused layer take the largest of their global scales",
             "NVIDIA/TensorRT-LLM#14199", one_global_scale<SlotReduction::max>),
      mutant(differs, "fused-global-scale-max:min",
             "all matrices of a fused layer take the smallest of their global scales, the largest "
             "as it is stored",
             "vllm-project/vllm#47515", one_global_scale<SlotReduction::min>),
      mutant(differs, "fused-global-scale-max:first",
             "all matrices of a fused layer take the first one's global scale",
             "NVIDIA/TensorRT-LLM#14199", one_global_scale<SlotReduction::first>),
      mutant(differs, "fused-global-scale-max:mean",
             "all matrices of a fused layer take the mean of their global scales",
             "NVIDIA/TensorRT-LLM#14199", one_global_scale<SlotReduction::mean>),
      mutant(
          differs, "wrong-tensor-cast-fp8:own-scale",
          "ranks scale gathered codes by their own tokens' largest element, and unscale all by it",
          "NVIDIA/TransformerEngine#74",
          [](ShardingRules& r) { r.quant.gathered_scale = GatheredScale::own; }),
      mutant(differs, "wrong-tensor-cast-fp8:scale-of-rank-0",
             "ranks scale gathered codes by their own tokens' largest element, and unscale all by "
             "rank 0's",
             "vllm-project/vllm#54683",
             [](ShardingRules& r) { r.quant.gathered_scale = GatheredScale::of_rank_0; }),
      not_inverted(differs),
  };
}

std::vector<Mutant> column_mutants(Differs differs) {
  return {
      mutant(differs, "group-straddles-rank:floor",
             "a rank's scales begin at tp_rank * (columns / group), its values where they do",
             "vllm-project/vllm#49949",
             [](ShardingRules& r) {
               r.loader.first_group = [](const LocalColumns& at, std::int64_t group) {
                 return FirstGroup{at.tp_rank * (at.own.size / group), 0};
               };
             }),
      mutant(differs, "group-straddles-rank:ceil",
             "a rank's scales begin at tp_rank * ceil(columns / group), its values where they do",
             "vllm-project/vllm#49949",
             [](ShardingRules& r) {
               r.loader.first_group = [](const LocalColumns& at, std::int64_t group) {
                 return FirstGroup{at.tp_rank * ceil_div(at.own.size, group), 0};
               };
             }),
      mutant(differs, "group-straddles-rank:whole-groups",
             "a rank has every scale that it needs, but counts groups from its own first column",
             "vllm-project/vllm#49949",
             [](ShardingRules& r) {
               r.loader.first_group = [](const LocalColumns& at, std::int64_t group) {
                 return FirstGroup{at.own.offset / group, 0};
               };
             }),
      mutant(differs, "actorder-scale-inverted:table-cut",
             "the table of scales is cut although the groups of the columns are anywhere in it",
             "sgl-project/sglang#35955",
             [](ShardingRules& r) {
               r.loader.groups_loaded = [](const LocalColumns& at, std::int64_t group,
                                           std::int64_t groups, bool act_order) {
                 const Shard part = sharding_rules().loader.groups_loaded(at, group, groups, false);
                 return act_order ? part : Shard{0, groups};
               };
             }),
      mutant(differs, "actorder-scale-inverted:global-index",
             "a rank has its own part of the table of scales, but the groups of its columns are "
             "counted in the whole one",
             "sgl-project/sglang#35955",
             [](ShardingRules& r) {
               r.loader.loaded_group = [](std::int64_t group, Shard loaded, const LocalColumns&) {
                 return std::min(group, loaded.size - 1);
               };
             }),
      mutant(differs, "actorder-scale-inverted:subtracted",
             "groups that are anywhere in the table are counted from the rank's share of it",
             "sgl-project/sglang#35955",
             [](ShardingRules& r) {
               r.loader.loaded_group = [](std::int64_t group, Shard loaded,
                                          const LocalColumns& at) {
                 if (loaded.offset > 0) return group - loaded.offset;
                 const std::int64_t first = at.tp_rank * (loaded.size / at.tp_size);
                 return (group - first + loaded.size) % loaded.size;
               };
             }),
      not_inverted(differs),
  };
}

std::vector<Mutant> padding_mutants(Differs differs) {
  return {mutant(differs, "gated-end-padding:weight-not-scale",
                 "the weight is padded with zeros, and its scales are not",
                 "vllm-project/vllm#55649",
                 [](ShardingRules& r) { r.loader.pads_scales = false; })};
}

}  // namespace tp::stored_linear
