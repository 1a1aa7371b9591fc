#include "kernels/lora_layer.h"

#include "harness/device/require.h"

namespace tp {

template <typename T, typename H>
void lora_shrink_over_ranks(View<const T> x, View<const T> a, const LoraBatch& batch,
                            const LoraLayer& layer, DeltaJoins joins, const LoraScratch<H>& scratch,
                            LoraIntermediate<H> h, const ShardingRules& rules, TpGroup& group,
                            Stream& stream) {
  const Shard rows = lora_own_a(layer, rules);
  const ShrinkCollective collective =
      rules.lora.shrink_collective(layer.base.cuts_columns, layer.shares_out_rank, joins);
  const std::int64_t ranks = collective == ShrinkCollective::gather ? group.tp_size() : 1;
  require(rows.size * ranks == h.cols, "lora_shrink",
          "{} times {} LoRA ranks are not the {} that B is multiplied with",
          {ranks, rows.size, h.cols});
  if (collective == ShrinkCollective::none) {
    lora_shrink<T, H>(x, a, batch, rows.offset, h, stream);
    return;
  }
  const std::int64_t elements = batch.parts * h.tokens * rows.size;
  lora_shrink<T, H>(x, a, batch, rows.offset,
                    {.data = scratch.mine,
                     .tokens = h.tokens,
                     .cols = rows.size,
                     .part_stride = h.tokens * rows.size,
                     .token_stride = rows.size},
                    stream);
  if (collective == ShrinkCollective::sum) {
    group.all_reduce_sum(scratch.mine, elements, stream);
    lora_join<H>(scratch.mine, 1, batch.parts, h, stream);
  } else {
    group.all_gather(static_cast<const H*>(scratch.mine), scratch.gathered, elements, stream);
    lora_join<H>(scratch.gathered, group.tp_size(), batch.parts, h, stream);
  }
}

template void lora_shrink_over_ranks(View<const float>, View<const float>, const LoraBatch&,
                                     const LoraLayer&, DeltaJoins, const LoraScratch<float>&,
                                     LoraIntermediate<float>, const ShardingRules&, TpGroup&,
                                     Stream&);
template void lora_shrink_over_ranks(View<const f16>, View<const f16>, const LoraBatch&,
                                     const LoraLayer&, DeltaJoins, const LoraScratch<float>&,
                                     LoraIntermediate<float>, const ShardingRules&, TpGroup&,
                                     Stream&);
template void lora_shrink_over_ranks(View<const f16>, View<const f16>, const LoraBatch&,
                                     const LoraLayer&, DeltaJoins, const LoraScratch<f16>&,
                                     LoraIntermediate<f16>, const ShardingRules&, TpGroup&,
                                     Stream&);
template void lora_shrink_over_ranks(View<const bf16>, View<const bf16>, const LoraBatch&,
                                     const LoraLayer&, DeltaJoins, const LoraScratch<float>&,
                                     LoraIntermediate<float>, const ShardingRules&, TpGroup&,
                                     Stream&);
template void lora_shrink_over_ranks(View<const bf16>, View<const bf16>, const LoraBatch&,
                                     const LoraLayer&, DeltaJoins, const LoraScratch<bf16>&,
                                     LoraIntermediate<bf16>, const ShardingRules&, TpGroup&,
                                     Stream&);

}  // namespace tp
