#include <algorithm>

#include "kernels/lora_layer.h"
#include "properties/linear.h"
#include "properties/lora_batch.h"
#include "properties/lora_stages.h"
#include "properties/lora_tensors.h"
#include "reference/checkpoint.h"
#include "reference/lora.h"
#include "reference/row_linear.h"

namespace tp::lora {

namespace {

std::vector<Budget> shrink_reference(const Case& c, const Layer& layer, const Variation& v,
                                     const WholeInputs& in) {
  const std::int64_t room = max_rank(c, layer), in_features = layer.in_features;
  const std::vector<std::int32_t> slot_of = tokens_of(c, v);
  const Places at = places(c, layer);
  const TensorSpec spec = h_spec(c, layer);
  const bool own = has_own_part(c, layer);
  Budget h(spec.rows, spec.cols);
  const std::int64_t width = layer.cuts_columns ? in_features / c.tp_size : in_features;
  const Accumulation accumulation = lora_shrink_accumulation(c.dtype, width);
  for (std::size_t p = 0; p < layer.parts.size(); ++p) {
    std::vector<Matrix> a;
    for (std::int64_t slot = 0; slot < slots(c); ++slot) {
      const std::int64_t rank = std::int64_t(in["lora_ranks"].row(slot)[p]);
      std::vector<std::int64_t> rows;
      for (std::int64_t r = 0; r < rank; ++r) rows.push_back(slot * room + r);
      a.push_back(reference::taken_rows(in[slots_name("lora_a", layer.parts[p])], rows));
    }
    std::vector<Budget> runs;
    for (std::int64_t first = 0; first < in_features; first += width)
      runs.push_back(reference::lora_shrink(in["x"], a, slot_of, {first, width}, accumulation));
    if (!own) {
      const DType t = intermediate_dtype(c);
      runs = {reference::sum_of_runs(runs, {.partial = t, .out = t})};
    }
    for (std::size_t run = 0; run < runs.size(); ++run) {
      const std::int64_t first = std::int64_t(run) * at.rows * at.cols;
      for (std::int64_t t = 0; t < c.num_tokens; ++t) {
        for (std::int64_t j = 0; j < runs[run].cols; ++j) {
          const std::size_t to = std::size_t(first + at.at(std::int64_t(p), t, j)),
                            from = std::size_t(t * runs[run].cols + j);
          h.r[to] = runs[run].r[from];
          h.rho[to] = runs[run].rho[from];
        }
      }
    }
  }
  return {h};
}

}  // namespace

Stage shrink_stage(const Case& c, const Layer& layer, const TensorSpec& x,
                   const ShardingRules& rules, const Variation& v) {
  const std::int64_t tokens = c.num_tokens, parts = std::int64_t(layer.parts.size());
  const std::int64_t width = columns_of_x(c, layer);
  Stage stage{.name = "lora_shrink"};
  const SlotTensors slots_of = slot_tensors(c, layer);
  stage.inputs = slots_of.a;
  stage.inputs.insert(stage.inputs.end(), {x, slots_of.ranks, slots_of.scales});
  stage.outputs = {h_spec(c, layer)};
  stage.buffers = [=](int tp_rank) {
    std::vector<LocalBuffer> all = batch_buffers(c, v, rules);
    for (LocalBuffer& b : slot_buffers(c, layer, rules, Use::input, tp_rank)) {
      if (b.name != "lora_b" && b.name != "lora_bias") all.push_back(std::move(b));
    }
    for (LocalBuffer& b : shrink_buffers(c, layer, tp_rank)) all.push_back(std::move(b));
    all.push_back(h_buffer(c, layer, Use::output, tp_rank));
    return all;
  };
  stage.run = [=](RankRun& run) {
    with_types(
        c, [&]<typename T, typename H>(T, H) { run_shrink<T, H>(run, c, layer, rules, "lora_h"); });
  };
  stage.cost = [=](int) -> Cost {
    const double ranks = double(max_rank(c, layer) * parts);
    return linear::cost(c, double(tokens * width) + double(slots(c)) * ranks * double(width),
                        double(tokens) * ranks * double(width));
  };
  stage.reference = [=](const WholeInputs& in) { return shrink_reference(c, layer, v, in); };
  return stage;
}

}  // namespace tp::lora
