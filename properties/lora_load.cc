#include <algorithm>
#include <cmath>

#include "harness/base/user_adapter.h"
#include "harness/device/buffer.h"
#include "properties/lora_stages.h"
#include "properties/lora_tensors.h"
#include "properties/lora_user.h"

namespace tp::lora {

namespace {

template <typename T>
void run_load(RankRun& run, const Case& c, const Layer& layer, const ShardingRules& rules,
              const Variation& v) {
  const LoraLayer of_rank = lora_layer(c, layer, run.group.tp_rank());
  const std::int64_t n = slots(c);
  const std::vector<Adapter> of_case = adapters(c, layer);
  const auto adapter = [&](std::size_t i) {
    if (i == 0 && is_users(c)) return *user_adapter();
    const double alpha_times = v.law == "alpha" ? 2 : 1;
    return PeftAdapter(
        parse_peft_config(config_text(layer, of_case[i], alpha_times), "adapter_config.json"),
        run.checkpoint(i));
  };
  LoraSlots<T> all(of_rank, rules, run.view<T>("lora_a"),
                   first_rows(run.view<T>("lora_b"), n * lora_b_rows(of_rank, rules)),
                   has_bias(c) ? run.view<T>("lora_bias") : View<T>{}, run.stream);
  for (std::int64_t slot = 0; slot < n && of_case.size() > std::size_t(n); ++slot) {
    all.load(int(slot), adapter(std::size_t(n)));
    if (slot % 2 == 1) all.unload(int(slot));
  }
  std::vector<std::int32_t> ranks(std::size_t(n) * layer.parts.size());
  std::vector<float> scales(ranks.size());
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t slot = slot_of_adapter(c, v, i);
    const LoraSlotState state = all.load(int(slot), adapter(std::size_t(i)));
    std::copy(state.ranks.begin(), state.ranks.end(),
              ranks.begin() + slot * std::int64_t(layer.parts.size()));
    std::copy(state.scales.begin(), state.scales.end(),
              scales.begin() + slot * std::int64_t(layer.parts.size()));
  }
  from_host(run.stream, run.view<std::int32_t>("lora_ranks").data, ranks.data(),
            ranks.size() * sizeof(std::int32_t));
  from_host(run.stream, run.view<float>("lora_scales").data, scales.data(),
            scales.size() * sizeof(float));
}

// What is right, from the adapters as they are stored.
std::vector<Budget> load_reference(const Case& c, const Layer& layer, const Variation& v,
                                   const WholeInputs& in) {
  const SlotTensors specs = slot_tensors(c, layer);
  const std::vector<Adapter> of_case = adapters(c, layer);
  const std::int64_t n = slots(c), room = max_rank(c, layer);
  const auto budget = [](const TensorSpec& t) { return Budget(t.rows, t.cols); };
  std::vector<Budget> a, b, bias;
  Budget ranks = budget(specs.ranks), scales = budget(specs.scales);
  for (std::size_t p = 0; p < layer.parts.size(); ++p) {
    a.push_back(budget(specs.a[p]));
    b.push_back(budget(specs.b[p]));
    if (has_bias(c)) bias.push_back(budget(specs.bias[p]));
    for (std::int64_t i = 0; i < n; ++i) {
      const Adapter& adapter = of_case[std::size_t(i)];
      const Module& module = adapter.modules[p];
      const std::int64_t slot = slot_of_adapter(c, v, i);
      const std::size_t at = std::size_t(slot) * layer.parts.size() + p;
      scales.r[at] = 1;
      if (module.rank == 0) continue;
      const double alpha = module.alpha * (v.law == "alpha" ? 2 : 1);
      const float scale = float(adapter.use_rslora ? alpha / std::sqrt(double(module.rank))
                                                   : alpha / double(module.rank));
      ranks.r[at] = double(module.rank);
      if (!merges_scale(c)) scales.r[at] = scale;
      const std::string& name = adapter.is_fused ? layer.fused : layer.parts[p];
      const auto stored = [&](std::string_view what) -> const Matrix& {
        return in[stored_name(std::size_t(i), name, what)];
      };
      const Matrix &stored_a = stored(kA), &stored_b = stored(kB);
      const auto rounded = [&](double value) { return round_to(c.dtype, value); };
      const auto scaled = [&](double value) {
        // A product of floats rounds once, to float, before it does to the type.
        return merges_scale(c) ? rounded(float(rounded(value)) * scale) : rounded(value);
      };
      std::int64_t first = 0;
      for (std::size_t before = 0; adapter.is_fused && before < p; ++before)
        first += layer.rows[before];
      for (std::int64_t r = 0; r < module.rank; ++r) {
        for (std::int64_t k = 0; k < layer.in_features; ++k) {
          a[p].r[std::size_t((slot * room + r) * layer.in_features + k)] =
              rounded(stored_a.row(r)[k]);
        }
        for (std::int64_t row = 0; row < layer.rows[p]; ++row) {
          b[p].r[std::size_t((slot * layer.rows[p] + row) * room + r)] =
              scaled(stored_b.row(first + row)[r]);
        }
      }
      if (!adapter.has_bias) continue;
      const Matrix& stored_bias = stored(kBias);
      for (std::int64_t row = 0; row < layer.rows[p]; ++row) {
        bias[p].r[std::size_t(slot * layer.rows[p] + row)] =
            scaled(stored_bias.row(0)[first + row]);
      }
    }
  }
  std::vector<Budget> all = std::move(a);
  for (auto* more : {&b, &bias}) all.insert(all.end(), more->begin(), more->end());
  all.push_back(ranks);
  all.push_back(scales);
  return all;
}

}  // namespace

Stage load_stage(const Case& c, const Layer& layer, const ShardingRules& rules,
                 const Variation& v) {
  Stage stage{.name = "lora_load"};
  for (StoredSpec& t : stored_tensors(c, layer, v)) {
    stage.inputs.push_back(std::move(t.spec));
    stage.stored.push_back(std::move(t.stored));
  }
  if (is_users(c)) stage.checkpoints = {&user_adapter()->tensors()};
  stage.outputs = slot_tensors(c, layer).all();
  stage.buffers = [=](int tp_rank) { return slot_buffers(c, layer, rules, Use::output, tp_rank); };
  stage.run = [=](RankRun& run) {
    try {
      if (is_users(c)) run.checkpoint().check_unchanged();
      dispatch(c.dtype, [&]<typename T>(T) { run_load<T>(run, c, layer, rules, v); });
      if (is_users(c)) run.checkpoint().check_unchanged();  // while it was read
    } catch (const BadInput& e) {
      // Files that were made for the case are legal, so it is the loader that is wrong.
      throw Fault{is_users(c) ? Outcome::Refused : Outcome::BadLaunch, e.what(),
                  run.group.tp_rank()};
    }
  };
  stage.reference = [=](const WholeInputs& in) { return load_reference(c, layer, v, in); };
  return stage;
}

}  // namespace tp::lora
