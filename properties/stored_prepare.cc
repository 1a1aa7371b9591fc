#include <algorithm>

#include "kernels/quantise.h"
#include "kernels/quantised_linear.h"
#include "properties/stored_layout.h"
#include "properties/stored_stages.h"
#include "properties/stored_tensors.h"
#include "reference/checkpoint.h"
#include "reference/quantise.h"

namespace tp::stored_linear {

bool is_prepared(const Case& c, const Layer& layer) {
  return prepared_kind(c, layer, 0).has_value() || has_fixed_scale(c);
}

namespace {

std::vector<std::int32_t> slots_of_rows(const Layer& layer, int tp_rank) {
  std::vector<std::int32_t> slots;
  const std::vector<Shard> rows = own_rows(layer, tp_rank);
  const Places places = places_of(layer, tp_rank);
  slots.resize(std::size_t(places.rows));  // padding has the first one's
  for (std::size_t p = 0; p < rows.size(); ++p)
    std::fill_n(slots.begin() + places.first[p], rows[p].size, std::int32_t(p));
  return slots;
}

void run_prepare(RankRun& run, const Case& c, const Layer& layer, const ShardingRules& rules) {
  const SlotReduction reduction = rules.quant.slots(is_fused(c, layer));
  if (has_fixed_scale(c)) {
    const View<float> slots = run.view<float>("input_slots");
    reduce_slots(slots.data, slots.cols, reduction, run.view<float>("input_scale").data,
                 run.stream);
  }
  switch (format_of(c).scheme) {
    case Scheme::fp8_tensor: {
      const View<float> slots = run.view<float>("slots"), scale = run.view<float>("weight_scale");
      reduce_slots(slots.data, slots.cols, reduction, scale.data, run.stream);
      requantise(run.view<e4m3>("weight"), run.integers("slot_of_row"), slots.data, scale.data,
                 run.view<e4m3>("codes"), run.stream);
      break;
    }
    case Scheme::nvfp4:
      global_factors(run.view<float>("slots"), run.integers("slot_of_row"),
                     run.view<float>("factors"), rules, run.stream);
      break;
    case Scheme::gptq:
      transpose_words(run.view<std::int32_t>("weight"), run.view<std::int32_t>("codes"),
                      run.stream);
      break;
    default:
      break;
  }
}

double largest(const Matrix& slots) {
  return *std::max_element(slots.values.begin(), slots.values.end());
}

std::vector<Budget> prepare_reference(const Case& c, const Layer& layer, const WholeInputs& in) {
  std::vector<Budget> all;
  const auto one = [&](double value) { all.emplace_back(1, 1).r[0] = value; };
  for (std::size_t p = 0; p < layer.parts.size(); ++p) {
    const std::string& part = layer.parts[p];
    const std::vector<std::int32_t> slot(std::size_t(layer.rows[p]), std::int32_t(p));
    switch (format_of(c).scheme) {
      case Scheme::fp8_tensor:
        all.push_back(reference::requantised(in[part + ".codes"], slot, in["slots"].values,
                                             largest(in["slots"])));
        break;
      case Scheme::nvfp4: {
        Matrix factors(layer.rows[p], 1);
        std::fill(factors.values.begin(), factors.values.end(), in["slots"].values[p]);
        all.push_back(reference::exactly(factors));
        break;
      }
      case Scheme::gptq:
        all.push_back(reference::exactly(reference::transposed(in[part + ".qweight"])));
        break;
      default:
        break;
    }
  }
  if (const std::int64_t rows = padding_rows(c, layer); rows > 0 && !all.empty()) {
    all.emplace_back(rows, all.back().cols);
    if (format_of(c).scheme == Scheme::nvfp4)
      std::fill(all.back().r.begin(), all.back().r.end(), in["slots"].values[0]);
  }
  if (has_weight_scale(c)) one(largest(in["slots"]));
  if (has_fixed_scale(c)) one(largest(in["input_slots"]));
  return all;
}

}  // namespace

Stage prepare_stage(const Case& c, const Layer& layer, bool bias, const ShardingRules& rules) {
  Stage stage{.name = "prepare"};
  stage.inputs = loaded(c, layer, bias, Use::input, 0).specs;
  if (const auto kind = prepared_kind(c, layer, 0)) stage.outputs = tensors(c, layer, *kind);
  if (has_weight_scale(c)) stage.outputs.push_back(shared("weight_scale", 1));
  if (has_fixed_scale(c)) stage.outputs.push_back(shared("input_scale", 1));
  stage.buffers = [=](int tp_rank) {
    std::vector<LocalBuffer> all = loaded(c, layer, bias, Use::input, tp_rank).buffers;
    if (const auto kind = prepared_kind(c, layer, tp_rank))
      all.push_back(buffer(layer, *kind, Use::output, tp_rank));
    if (has_weight_scale(c)) all.push_back(shared_buffer("weight_scale", 1, Use::output));
    if (has_fixed_scale(c)) all.push_back(shared_buffer("input_scale", 1, Use::output));
    if (has_slots(c)) all.push_back(local_values("slot_of_row", slots_of_rows(layer, tp_rank)));
    return all;
  };
  stage.run = [=](RankRun& run) { run_prepare(run, c, layer, rules); };
  stage.reference = [=](const WholeInputs& in) { return prepare_reference(c, layer, in); };
  return stage;
}

}  // namespace tp::stored_linear
