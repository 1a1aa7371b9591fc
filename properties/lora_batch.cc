#include "properties/lora_batch.h"

#include <cstring>

#include "properties/lora_tensors.h"

namespace tp::lora {

namespace {

constexpr std::int64_t kTileIntegers = sizeof(LoraTile) / sizeof(std::int32_t);

}  // namespace

std::vector<std::int32_t> tokens_of(const Case& c, const Variation& v) {
  std::vector<std::int32_t> of = slot_of_token(c, v.rotate_rows);
  for (std::int32_t& slot : of) {
    if (slot < 0) continue;
    const bool has_none = v.law == "merged" || (v.law == "alone" && slot != v.argument);
    slot = has_none ? -1 : std::int32_t(slot_of_adapter(c, v, slot));
  }
  return of;
}

std::vector<LocalBuffer> batch_buffers(const Case& c, const Variation& v,
                                       const ShardingRules& rules) {
  const auto n = std::int32_t(slots(c));
  std::vector<std::int32_t> slot_of = tokens_of(c, v);
  for (std::int32_t& slot : slot_of) {
    if (slot >= 0) slot = rules.lora.slot_of_token(slot, n);
  }
  const LoraPlan plan = lora_plan(slot_of, n);
  std::vector<std::int32_t> tiles(plan.tiles.size() * std::size_t(kTileIntegers));
  std::memcpy(tiles.data(), plan.tiles.data(), plan.tiles.size() * sizeof(LoraTile));
  return {local_values("lora_order", plan.order), local_values("lora_tiles", tiles)};
}

LoraBatch batch_of(RankRun& run, const Case& c, const Layer& layer) {
  return {.order = run.integers("lora_order"),
          .tiles = reinterpret_cast<const LoraTile*>(run.integers("lora_tiles")),
          .num_tiles = std::int32_t(run.view<float>("lora_tiles").cols / kTileIntegers),
          .ranks = run.view<std::int32_t>("lora_ranks").data,
          .scales = run.view<float>("lora_scales").data,
          .slots = std::int32_t(slots(c)),
          .parts = std::int32_t(layer.parts.size())};
}

Places places(const Case& c, const Layer& layer) {
  const std::int64_t parts = std::int64_t(layer.parts.size()), tokens = c.num_tokens,
                     room = max_rank(c, layer);
  switch (layout(c)) {
    case Layout::parts:
      return {parts * tokens, room, tokens * room, room, 1};
    case Layout::tokens:
      return {tokens * parts, room, room, parts * room, 1};
    case Layout::ranks:
      break;
  }
  return {room, parts * tokens, tokens, 1, parts * tokens};
}

bool has_own_part(const Case& c, const Layer& layer) {
  return joins(c, layer) == DeltaJoins::partial && !shares_out_rank(c);
}

TensorSpec h_spec(const Case& c, const Layer& layer) {
  const Places at = places(c, layer);
  const std::int64_t ranks = has_own_part(c, layer) ? c.tp_size : 1;
  return {"lora_h", intermediate_dtype(c), ranks * at.rows, at.cols};
}
LocalBuffer h_buffer(const Case& c, const Layer& layer, Use use, int tp_rank) {
  const Places at = places(c, layer);
  const std::int64_t first = has_own_part(c, layer) ? tp_rank * at.rows : 0;
  return {"lora_h",    use,     intermediate_dtype(c),
          2 * at.rows, at.cols, {{"lora_h", {0, at.cols}, 0, Shard{first, at.rows}}}};
}

std::int64_t columns_of_x(const Case& c, const Layer& layer) {
  return layer.cuts_columns ? layer.in_features / c.tp_size : layer.in_features;
}
std::vector<LocalBuffer> shrink_buffers(const Case& c, const Layer& layer, int tp_rank) {
  const std::int64_t width = columns_of_x(c, layer), elements = std::int64_t(layer.parts.size()) *
                                                                c.num_tokens * max_rank(c, layer);
  const Shard own{layer.cuts_columns ? tp_rank * width : 0, width};
  return {{"x", Use::input, c.dtype, c.num_tokens, width + c.options.at("pad"), {{"x", own}}},
          {"lora_mine", Use::workspace, intermediate_dtype(c), 1, elements},
          {"lora_gathered", Use::workspace, intermediate_dtype(c), 1, elements}};
}
ShrinkCollective collective_of(const Case& c, const Layer& layer, const ShardingRules& rules) {
  return rules.lora.shrink_collective(layer.cuts_columns, shares_out_rank(c), joins(c, layer));
}

Matrix h_of_part(const Case& c, const Layer& layer, const Matrix& h, std::size_t part,
                 int tp_rank) {
  const Places at = places(c, layer);
  Matrix m(c.num_tokens, max_rank(c, layer));
  const double* own = h.row(has_own_part(c, layer) ? tp_rank * at.rows : 0);
  for (std::int64_t t = 0; t < m.rows; ++t) {
    for (std::int64_t j = 0; j < m.cols; ++j) m.row(t)[j] = own[at.at(std::int64_t(part), t, j)];
  }
  return m;
}

}  // namespace tp::lora
