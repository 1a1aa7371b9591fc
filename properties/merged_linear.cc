// merged_linear: the fused gate and up projection of a gated MLP, and its activation. Which rows of
// the two weights a rank loads, where the rows of zeros go that a kernel's tiles want, and where
// the fused row is split again: that is where gate and up come to be paired wrongly; and scaled
// wrongly, if their scales are not those of their rows.

#include "kernels/merged_linear.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "harness/base/models.h"
#include "harness/device/matmul.h"
#include "properties/linear.h"
#include "properties/lora_laws.h"
#include "properties/lora_option.h"
#include "properties/lora_stages.h"
#include "properties/run/stage.h"
#include "properties/stages.h"
#include "properties/stored_linear.h"
#include "properties/stored_linear_mutants.h"
#include "reference/merged_linear.h"
#include "reference/qkv_linear.h"

namespace tp {

namespace {

// Words of the key `tile`, and the rows that they stand for.
constexpr const char* kTileWords[] = {"none", "16", "32", "128"};
constexpr std::int64_t kTileRows[] = {1, 16, 32, 128};

std::int64_t tile_of(const Case& c) { return kTileRows[c.options.at("tile")]; }
// Columns of gate, and of up: of a rank, and of all.
std::int64_t own_size(const Case& c) { return c.options.at("intermediate_per_rank"); }
std::int64_t intermediate(const Case& c) { return own_size(c) * c.tp_size; }
// Of both halves of a rank's fused row.
std::int64_t fused_width(const Case& c) {
  return sharding_rules().gated.layout(own_size(c), tile_of(c)).width;
}

bool other_rows(const Case& c, const ShardingRules& rules) {
  const ShardingRules& right = sharding_rules();
  for (int rank = 0; rank < c.tp_size; ++rank) {
    if (rules.gated.weight_rows(intermediate(c), c.tp_size, rank) !=
        right.gated.weight_rows(intermediate(c), c.tp_size, rank))
      return true;
    if (linear::has_bias(c) && rules.gated.bias_rows(intermediate(c), c.tp_size, rank) !=
                                   right.gated.bias_rows(intermediate(c), c.tp_size, rank))
      return true;
  }
  return false;
}

bool other_places(const Case& c, const ShardingRules& rules) {
  const ShardingRules& right = sharding_rules();
  const GatedLayout layout = rules.gated.layout(own_size(c), tile_of(c));
  return layout != right.gated.layout(own_size(c), tile_of(c)) ||
         rules.gated.halves(layout.width) != right.gated.halves(layout.width);
}

bool no_padding(const Case& c, const ShardingRules& rules) {
  // What is loaded is padded by the loader.
  return !stored_linear::is_loaded(c) && !rules.gated.writes_padding &&
         fused_width(c) > 2 * own_size(c);
}

Mutant mutant(std::string id, std::string what, std::string upstream, void (*change)(GatedRules&)) {
  Mutant m{std::move(id), std::move(what), std::move(upstream), sharding_rules()};
  change(m.rules.gated);
  m.decides = [rules = m.rules](const Case& c) {
    return other_rows(c, rules) || other_places(c, rules) || no_padding(c, rules);
  };
  return m;
}

// Equal runs of rows of [gate_proj; up_proj].
GatedRows contiguous_cut(std::int64_t intermediate, int tp_size, int tp_rank) {
  const std::int64_t size = div_exact(intermediate, tp_size);
  return {{2 * tp_rank * size, size}, {(2 * tp_rank + 1) * size, size}};
}

const std::vector<Mutant>& mutants() {
  static const std::vector<Mutant> all = {
      mutant("packed-concat-contiguous-colwise:gate-up",
             "the fused weight [gate; up] cut into equal runs of rows, not half by half",
             "NVIDIA-NeMo/Automodel#1324",
             [](GatedRules& r) { r.weight_rows = r.bias_rows = contiguous_cut; }),
      mutant("gated-end-padding:weight-end",
             "the rows of zeros are all behind gate and up, but the row is split at half of the "
             "padded width",
             "NVIDIA/TensorRT-LLM#18520",
             [](GatedRules& r) {
               r.layout = [](std::int64_t size, std::int64_t tile) {
                 return GatedLayout{0, size, 2 * padded_to(tile, size)};
               };
             }),
      mutant("gated-end-padding:gate-not-up",
             "gate is padded and up is not, but the row is split at half of its width",
             "vllm-project/vllm#48624",
             [](GatedRules& r) {
               r.layout = [](std::int64_t size, std::int64_t tile) {
                 const std::int64_t half = padded_to(tile, size);
                 return GatedLayout{0, half, half + size};
               };
             }),
      mutant("own:gated-padding-not-written",
             "the rows between gate and up are what memory held when it was allocated", "-",
             [](GatedRules& r) { r.writes_padding = false; }),
      mutant("own:gated-halves-swapped", "the activation gates the gate with up", "-",
             [](GatedRules& r) {
               r.halves = [](std::int64_t width) { return GatedHalves{width / 2, 0}; };
             }),
      mutant("own:gated-up-of-next-rank", "the rows of up are those of the next rank", "-",
             [](GatedRules& r) {
               r.weight_rows =
                   r.bias_rows = [](std::int64_t intermediate, int tp_size, int tp_rank) {
                     return GatedRows{
                         rows_of_own_columns(intermediate, tp_size, tp_rank).gate,
                         rows_of_own_columns(intermediate, tp_size, (tp_rank + 1) % tp_size).up};
                   };
             }),
      mutant("own:gated-bias-of-rank-0", "every rank adds the bias of rank 0's rows", "-",
             [](GatedRules& r) {
               r.bias_rows = [](std::int64_t intermediate, int tp_size, int) {
                 return rows_of_own_columns(intermediate, tp_size, 0);
               };
             }),
  };
  return all;
}

// The rows of a fused weight that are neither gate's nor up's.
std::vector<Shard> padding_of(const GatedLayout& layout, std::int64_t size) {
  std::vector<Shard> runs = {{layout.gate + size, layout.up - layout.gate - size},
                             {layout.up + size, layout.width - layout.up - size}};
  std::erase_if(runs, [](const Shard& run) { return run.size == 0; });
  return runs;
}

// One rank's fused rows of the two projections, or of their biases: whose they are, and where they
// go.
struct FusedRun {
  enum Source { gate, up, zeros } source;
  Shard rows;  // of the source
  std::int64_t at;
};

std::vector<FusedRun> fused_runs(const Case& c, const GatedRules& rules, const GatedRows& rows) {
  const GatedLayout layout = rules.layout(own_size(c), tile_of(c));
  std::vector<FusedRun> runs;
  const auto add = [&](Shard taken, std::int64_t at) {
    const bool of_up = taken.offset >= intermediate(c);
    if (of_up) taken.offset -= intermediate(c);
    runs.push_back({of_up ? FusedRun::up : FusedRun::gate, taken, at});
  };
  add(rows.gate, layout.gate);
  add(rows.up, layout.up);
  if (!rules.writes_padding) return runs;
  for (const Shard& run : padding_of(layout, own_size(c)))
    runs.push_back({FusedRun::zeros, {0, run.size}, run.offset});
  return runs;
}

// Zeros, in whatever data the case has.
TensorSpec zeros(const Case& c, const char* name, std::int64_t rows, std::int64_t cols) {
  TensorSpec t{name, c.dtype, rows, cols, Role::weight};
  t.value = [](const DataRegime&, std::int64_t, std::int64_t) { return 0.0; };
  return t;
}

// Whether the data would have shown that ranks load other rows: some element of what they make of
// these is outside the budget of the element that it stands for. The reference's own values say so:
// a row of the weight gives the column that is known by it, wherever it was loaded to.
bool shows_rows(const Case& c, const ShardingRules& rules, const WholeInputs& in,
                const std::vector<Budget>& budgets) {
  const std::int64_t cols = intermediate(c);
  // `row` of [gate_proj; up_proj] gives this element of the row of `token`.
  const auto part = [&](std::int64_t row) -> const Budget& { return budgets[row >= cols]; };
  const auto at = [&](std::int64_t token, std::int64_t row) {
    return std::size_t(token * cols + row % cols);
  };
  const auto bias = [&](std::int64_t row) {
    return linear::has_bias(c) ? in[row >= cols ? "up_bias" : "gate_bias"].row(0)[row % cols] : 0;
  };
  for (int rank = 0; rank < c.tp_size; ++rank) {
    const auto halves = [](const GatedRows& rows) { return std::array{rows.gate, rows.up}; };
    const auto right = halves(sharding_rules().gated.weight_rows(cols, c.tp_size, rank)),
               weight = halves(rules.gated.weight_rows(cols, c.tp_size, rank)),
               biases = halves(rules.gated.bias_rows(cols, c.tp_size, rank));
    for (int half = 0; half < 2; ++half) {
      for (std::int64_t j = 0; j < own_size(c); ++j) {
        const std::int64_t here = right[half].offset + j, taken = weight[half].offset + j;
        const double change = bias(biases[half].offset + j) - bias(taken);
        for (std::int64_t i = 0; i < c.num_tokens; ++i) {
          if (!accepts(c.dtype, part(taken).r[at(i, taken)] + change, part(here).r[at(i, here)],
                       part(here).rho[at(i, here)]))
            return true;
        }
      }
    }
  }
  return false;
}

// The same of an activation that finds gate and up elsewhere in the fused row.
bool shows_places(const Case& c, const ShardingRules& rules, const WholeInputs& in,
                  const Budget& right) {
  const std::int64_t size = own_size(c);
  const GatedLayout layout = rules.gated.layout(size, tile_of(c));
  if (layout.width % 2 != 0) return true;  // it does not run at all
  const GatedHalves halves = rules.gated.halves(layout.width);
  Matrix fused(1, layout.width), gate(1, size), up(1, size);
  for (int rank = 0; rank < c.tp_size; ++rank) {
    for (std::int64_t i = 0; i < c.num_tokens; ++i) {
      const std::int64_t own = rank * size;
      std::copy_n(in["gate"].row(i) + own, size, fused.row(0) + layout.gate);
      std::copy_n(in["up"].row(i) + own, size, fused.row(0) + layout.up);
      std::copy_n(fused.row(0) + halves.gate, size, gate.row(0));
      std::copy_n(fused.row(0) + halves.up, size, up.row(0));
      const Budget altered = reference::silu_and_mul(gate, up, {}, c.dtype);
      for (std::int64_t j = 0; j < size; ++j) {
        const std::size_t at = std::size_t(i * right.cols + own + j);
        if (!accepts(c.dtype, altered.r[std::size_t(j)], right.r[at], right.rho[at])) return true;
      }
    }
  }
  return false;
}

// The first mistake that decides differently in this case and that these data would not show.
std::optional<std::string> blind_to(bool (*decides)(const Case&, const ShardingRules&),
                                    const Case& c,
                                    const std::function<bool(const ShardingRules&)>& shows) {
  for (const Mutant& m : mutants()) {
    if (decides(c, m.rules) && !shows(m.rules)) return m.id;
  }
  return std::nullopt;
}

// Stripes on disk are rows of gate and up in turn.
stored_linear::Layer layer_of(const Case& c, const ShardingRules& rules) {
  const GatedLayout layout = rules.gated.layout(own_size(c), tile_of(c));
  stored_linear::Layer layer{.prefix = "model.layers.0.mlp.",
                             .parts = {"gate_proj", "up_proj"},
                             .biases = {"gate_bias", "up_bias"},
                             .fused = "gate_up_proj",
                             .kind = LinearKind::gate_up,
                             .rows = {intermediate(c), intermediate(c)},
                             .stripes = intermediate(c),
                             .in_features = c.model.hidden_size,
                             .first = {layout.gate, layout.up},
                             .local_rows = layout.width};
  // A part's own rows: what a wrong cut takes of the other one is beyond them.
  const auto parts = [cols = intermediate(c)](const GatedRows& rows) {
    return std::vector<Shard>{{rows.gate.offset % cols, rows.gate.size},
                              {rows.up.offset % cols, rows.up.size}};
  };
  layer.taken = [=, cols = intermediate(c), tp_size = c.tp_size](const ShardingRules& rules,
                                                                 int tp_rank) {
    return parts(rules.gated.weight_rows(cols, tp_size, tp_rank));
  };
  layer.bias_taken = [=, cols = intermediate(c), tp_size = c.tp_size](const ShardingRules& rules,
                                                                      int tp_rank) {
    return parts(rules.gated.bias_rows(cols, tp_size, tp_rank));
  };
  return layer;
}
stored_linear::Layer right_layer_of(const Case& c) { return layer_of(c, sharding_rules()); }

TensorSpec x_of(const Case& c) {
  return linear::tensor(c, "x", c.num_tokens, c.model.hidden_size, Role::activation,
                        linear::kLargestX);
}

std::vector<TensorSpec> biases_of(const Case& c) {
  std::vector<TensorSpec> all;
  for (const char* name : {"gate_bias", "up_bias"}) {
    if (!linear::has_bias(c)) break;
    all.push_back(linear::tensor(c, name, 1, intermediate(c), Role::weight, linear::kLargestBias));
  }
  return all;
}

// Of a rank: what both stages have of the fused row.
LocalBuffer fused_row(const Case& c, const GatedLayout& layout, int tp_rank, Use use) {
  const Shard own{tp_rank * own_size(c), own_size(c)};
  return {"gate_up",
          use,
          c.dtype,
          c.num_tokens,
          layout.width + c.options.at("pad"),
          {{"gate", own, layout.gate}, {"up", own, layout.up}}};
}

// The same with its padding: whatever reads whole rows relies on zeros there.
LocalBuffer written_row(const Case& c, const GatedLayout& layout, int tp_rank) {
  LocalBuffer row = fused_row(c, layout, tp_rank, Use::output);
  std::int64_t first = tp_rank * (layout.width - 2 * own_size(c));
  for (const Shard& run : padding_of(layout, own_size(c))) {
    row.pieces.push_back({"padding", {first, run.size}, run.offset});
    first += run.size;
  }
  return row;
}

std::vector<TensorSpec> gate_up_outputs(const Case& c, const GatedLayout& layout) {
  std::vector<TensorSpec> all = {{"gate", c.dtype, c.num_tokens, intermediate(c)},
                                 {"up", c.dtype, c.num_tokens, intermediate(c)}};
  const std::int64_t padding = layout.width - 2 * own_size(c);
  if (padding > 0) all.push_back({"padding", c.dtype, c.num_tokens, padding * c.tp_size});
  return all;
}

// gate and up of weights that are not quantised.
std::vector<Budget> plain_budgets(const Case& c, const GatedLayout& layout, const WholeInputs& in) {
  const auto projection = [&](const char* weight, const char* bias) {
    return reference::projection(in["x"], in[weight], linear::has_bias(c) ? &in[bias] : nullptr,
                                 matmul_accumulation(c.dtype, c.model.hidden_size), c.dtype);
  };
  std::vector<Budget> budgets = {projection("gate_proj", "gate_bias"),
                                 projection("up_proj", "up_bias")};
  const std::int64_t padding = layout.width - 2 * own_size(c);
  if (padding > 0) budgets.emplace_back(c.num_tokens, padding * c.tp_size);
  return budgets;
}

// The product of weights that came from a checkpoint.
Stage loaded_gate_up_stage(const Case& c, const ShardingRules& rules) {
  const stored_linear::Layer layer = layer_of(c, rules);
  const GatedLayout layout = rules.gated.layout(own_size(c), tile_of(c));
  const bool bias = linear::has_bias(c), quantised = stored_linear::is_quantised(c);
  const std::int64_t tokens = c.num_tokens, hidden = c.model.hidden_size;
  Stage stage{.name = "gate_up"};
  stage.own_bits = stage.bits_by_size =
      stored_linear::product_has_own_bits(c, hidden, linear::has_bias(c));
  stage.inputs = stored_linear::product_inputs(c, layer, x_of(c));
  for (TensorSpec& t : stored_linear::bias_inputs(c, layer)) {
    if (bias) stage.inputs.push_back(std::move(t));
  }
  stage.outputs = gate_up_outputs(c, layout);
  stage.buffers = [=](int tp_rank) {
    std::vector<LocalBuffer> all = stored_linear::product_buffers(c, layer, tp_rank);
    all.push_back(written_row(c, layout, tp_rank));
    if (bias) all.push_back(stored_linear::bias_buffer(c, layer, tp_rank));
    return all;
  };
  stage.run = [=](RankRun& run) {
    dispatch(c.dtype, [&]<typename T>(T) {
      const View<T> b = bias ? run.view<T>("bias") : View<T>{},
                    row = run.view<T>("gate_up").columns(0, layout.width);
      if (quantised) {
        stored_linear::product<T, T>(run, c, layer, b, row, rules);
      } else {
        merged_linear<T>(run.view<T>("x").columns(0, hidden), run.view<T>("weight"), b, row,
                         run.stream);
      }
    });
  };
  stage.cost = [=](int tp_rank) -> Cost {
    const double width = double(layout.width);
    return {.bytes = stored_linear::weight_bytes(c, layer, tp_rank) +
                     double(tokens) * (double(hidden) + width) * size_of(c.dtype),
            .matrix_flops = 2 * double(tokens) * double(hidden) * width};
  };
  stage.reference = [=](const WholeInputs& in) {
    if (!quantised) return plain_budgets(c, layout, in);
    std::vector<Budget> budgets;
    for (std::size_t p = 0; p < 2; ++p) {
      budgets.push_back(stored_linear::product_reference(
          c, layer, in, p, 0, bias ? &in[layer.biases[p]] : nullptr, c.dtype == DType::f32));
    }
    const std::int64_t padding = layout.width - 2 * own_size(c);
    if (padding > 0) budgets.emplace_back(tokens, padding * c.tp_size);
    return budgets;
  };
  return stage;
}

Stage gate_up_stage(const Case& c, const ShardingRules& rules) {
  const std::int64_t tokens = c.num_tokens, hidden = c.model.hidden_size, cols = intermediate(c),
                     pad = c.options.at("pad");
  const GatedLayout layout = rules.gated.layout(own_size(c), tile_of(c));
  const std::int64_t padding = layout.width - 2 * own_size(c);
  const bool bias = linear::has_bias(c);
  Stage stage{.name = "gate_up"};
  stage.own_bits = stage.bits_by_size =
      stored_linear::product_has_own_bits(c, hidden, linear::has_bias(c));
  stage.inputs = biases_of(c);
  stage.inputs.push_back(x_of(c));
  for (const char* name : {"gate_proj", "up_proj"}) {
    stage.inputs.push_back(
        linear::tensor(c, name, cols, hidden, Role::weight, linear::kLargestWeight));
  }
  stage.outputs = gate_up_outputs(c, layout);
  if (padding > 0) {
    stage.inputs.push_back(zeros(c, "zero_rows", padding, hidden));
    if (bias) stage.inputs.push_back(zeros(c, "zero_bias", 1, padding));
  }
  stage.buffers = [=](int tp_rank) -> std::vector<LocalBuffer> {
    LocalBuffer weight{"weight", Use::input, c.dtype, layout.width, hidden},
        biases{"bias", Use::input, c.dtype, 1, layout.width};
    const auto weight_rows = rules.gated.weight_rows(cols, c.tp_size, tp_rank),
               bias_rows = rules.gated.bias_rows(cols, c.tp_size, tp_rank);
    constexpr const char *kWeights[] = {"gate_proj", "up_proj", "zero_rows"},
                         *kBiases[] = {"gate_bias", "up_bias", "zero_bias"};
    for (const FusedRun& run : fused_runs(c, rules.gated, weight_rows))
      weight.pieces.push_back({kWeights[run.source], {0, hidden}, 0, run.rows, run.at});
    for (const FusedRun& run : fused_runs(c, rules.gated, bias_rows))
      biases.pieces.push_back({kBiases[run.source], run.rows, run.at});
    std::vector<LocalBuffer> all = {
        {"x", Use::input, c.dtype, tokens, hidden + pad, {{"x", {0, hidden}}}},
        weight,
        written_row(c, layout, tp_rank)};
    if (bias) all.push_back(biases);
    return all;
  };
  stage.run = [=](RankRun& run) {
    dispatch(c.dtype, [&]<typename T>(T) {
      merged_linear<T>(run.view<T>("x").columns(0, hidden), run.view<T>("weight"),
                       bias ? run.view<T>("bias") : View<T>{},
                       run.view<T>("gate_up").columns(0, layout.width), run.stream);
    });
  };
  stage.cost = [=](int) -> Cost {
    const double width = double(layout.width);
    return linear::cost(c, double(tokens) * (double(hidden) + width) + width * double(hidden),
                        double(tokens) * double(hidden) * width);
  };
  stage.reference = [=](const WholeInputs& in) { return plain_budgets(c, layout, in); };
  stage.blind_to = [=](const WholeInputs& in, const std::vector<Budget>& budgets) {
    return blind_to(other_rows, c,
                    [&](const ShardingRules& r) { return shows_rows(c, r, in, budgets); });
  };
  return stage;
}

Stage silu_and_mul_stage(const Case& c, const ShardingRules& rules) {
  const std::int64_t tokens = c.num_tokens, size = own_size(c), cols = intermediate(c);
  const GatedLayout layout = rules.gated.layout(size, tile_of(c));
  Stage stage{.name = "silu_and_mul"};
  stage.inputs = {{"gate", c.dtype, tokens, cols}, {"up", c.dtype, tokens, cols}};
  stage.outputs = {{"out", c.dtype, tokens, cols}};
  stage.buffers = [=](int tp_rank) -> std::vector<LocalBuffer> {
    return {fused_row(c, layout, tp_rank, Use::input),
            {"out",
             Use::output,
             c.dtype,
             tokens,
             size + c.options.at("pad"),
             {{"out", {tp_rank * size, size}}}}};
  };
  stage.run = [=](RankRun& run) {
    dispatch(c.dtype, [&]<typename T>(T) {
      silu_and_mul<T>(run.view<T>("gate_up").columns(0, layout.width),
                      run.view<T>("out").columns(0, size), rules, run.stream);
    });
  };
  stage.cost = [=](int) -> Cost {
    const double elements = double(tokens * size);
    return {.bytes = 3 * elements * size_of(c.dtype), .flops = 4 * elements};
  };
  stage.own_bits = true;
  stage.reference = [=](const WholeInputs& in) -> std::vector<Budget> {
    return {reference::silu_and_mul(in["gate"], in["up"], {}, c.dtype)};
  };
  stage.blind_to = [=](const WholeInputs& in, const std::vector<Budget>& budgets) {
    return blind_to(other_places, c, [&](const ShardingRules& r) {
      return shows_places(c, r, in, budgets.front());
    });
  };
  return stage;
}

Case as_lora(const Case& c) {
  return lora::as_lora(c, lora::Base::gate_up,
                       {{"intermediate_per_rank", c.options.at("intermediate_per_rank")}});
}

std::vector<Stage> stages(const Case& c, const ShardingRules& rules, const Variation& variation) {
  std::vector<Stage> all;
  if (stored_linear::is_loaded(c)) {
    all = stored_linear::stages(c, layer_of(c, rules), x_of(c), biases_of(c), rules, variation);
    all.push_back(loaded_gate_up_stage(c, rules));
  } else {
    all.push_back(gate_up_stage(c, rules));
  }
  Stage activation = silu_and_mul_stage(c, rules);
  if (lora::has_adapters(c)) {
    const Case of_lora = as_lora(c);
    all = lora::followed_by(std::move(all), lora::stages(of_lora, lora::layer_of(of_lora), x_of(c),
                                                         c.dtype, rules, variation));
    activation = renamed(std::move(activation), activation.name,
                         {.tensors = {{"gate", "gate_lora"}, {"up", "up_lora"}},
                          .buffers = {{"gate_up", {"gate_up_lora"}}}});
  }
  all.push_back(std::move(activation));
  return all;
}

// Gates about zero, where silu bends: x is scaled so that the sum of hidden_size products is about
// as large as one of them; and of other seeds 4 and 32 times as large, which opens gates and closes
// them, some so far that exp(-gate) leaves fp32.
DataRegime regime(const Case& c, const Variation& v) {
  constexpr int kLarger[] = {0, 0, 2, 5};
  DataRegime g = linear::regime(c, v);
  g.scale_log2 = v.scale_log2 + kLarger[c.seed % 4] - std::ilogb(double(c.model.hidden_size)) / 2;
  if (c.fill == Fill::wide) g.scale_log2 -= 7;  // its 17 binades end at 2^9
  return g;
}

// Of outputs that a law has nothing to say of there is no twin: how much padding there is is
// decided by the tile and by tp_size.
std::optional<Place> twin(const Case&, const Variation&, const TensorSpec& t, std::int64_t row,
                          std::int64_t col) {
  if (t.name.ends_with("padding")) return std::nullopt;
  return Place{row, col};
}

// One rank with all the columns.
LawRun law_one_rank() {
  LawRun law = law_tp1();
  law.law.what = "one rank computes what tp_size ranks do, bit for bit";
  law.always_bitwise = true;
  law.vary = [](const Case& c) {
    Case one = c;
    one.tp_size = 1;
    one.options["intermediate_per_rank"] = intermediate(c);
    return std::pair{one, Variation{}};
  };
  law.twin = twin;
  return law;
}

LawRun law_tile() {
  return {.law = {"tile", "padded to other tiles, gate and up have the same bits"},
          .vary =
              [](const Case& c) {
                Case other = c;
                // The next one that pads otherwise, if there is one.
                for (std::size_t step = 1; step < std::size(kTileRows); ++step) {
                  other.options["tile"] = (c.options.at("tile") + std::int64_t(step)) %
                                          std::int64_t(std::size(kTileRows));
                  if (fused_width(other) != fused_width(c)) break;
                }
                return std::pair{other, Variation{}};
              },
          .twin = twin,
          .refuse = [](const Case& c) -> std::optional<std::string> {
            if (!lora::has_adapters(c)) return std::nullopt;
            return "law=tile pads gate and up, and adapters are for rows without padding";
          }};
}

bool adapters_fit(const Case& c, std::int64_t adapters) {
  return adapters == 0 || (lora::fits_gather(c, adapters) && c.options.at("tile") == 0);
}

std::vector<Key> keys() {
  Key tile{.name = "tile",
           .help =
               "rows that the kernel takes at once: gate and up are padded with zeros to a "
               "multiple of it each",
           .min = 0,
           .max = std::ssize(kTileWords) - 1,
           .words = {std::begin(kTileWords), std::end(kTileWords)},
           .weights = {35, 35, 20, 10}};
  std::vector<Key> all = {
      linear::width_key("hidden_size"),
      linear::per_rank_key("intermediate_per_rank",
                           "columns of gate, and of up, that each rank has", 1024, 64),
      shared_key("tp_size"),
      linear::tokens_key(),
      shared_key("dtype"),
      shared_key("fill"),
      shared_key("seed"),
      linear::bias_key(),
      tile,
      pad_key("x, of the fused row and of out")};
  for (auto& more : {stored_linear::keys(true), lora::option_keys(adapters_fit)})
    all.insert(all.end(), more.begin(), more.end());
  stored_linear::mark_keys_of_checkpoint(all);
  return all;
}

stored_linear::OfCheckpoint of_checkpoint() {
  return {.op = "merged_linear",
          .kinds = {LinearKind::gate_up},
          .layer = right_layer_of,
          .set_shape = [](Case& c, const ModelShape& model, LinearKind,
                          std::int64_t width) -> std::optional<std::string> {
            c.model.hidden_size = model.hidden_size;
            if (width % c.tp_size != 0)
              return fmt::format("{} rows of gate_proj are not {} equal parts", width, c.tp_size);
            c.options.at("intermediate_per_rank") = width / c.tp_size;
            return std::nullopt;
          }};
}

void adopt(Case& c, const Model& model) {
  if (model.intermediate_size % c.tp_size == 0 && model.intermediate_size > 0)
    c.options.at("intermediate_per_rank") = model.intermediate_size / c.tp_size;
}

bool differs(const Case& c, const ShardingRules& rules) {
  return stored_linear::differs(c, right_layer_of(c), x_of(c), regime(c, {}), rules);
}

std::vector<Mutant> all_mutants() {
  std::vector<Mutant> all = mutants();
  for (const auto& more :
       {stored_linear::fused_mutants(differs), stored_linear::padding_mutants(differs)})
    all.insert(all.end(), more.begin(), more.end());
  return all;
}

}  // namespace

Operator make_merged_linear() {
  return make_operator({
      .name = "merged_linear",
      .what = "fused gate and up projection, column-parallel, and silu(gate) * up",
      .keys = keys(),
      .laws = {lora::with_adapters(stored_linear::without_local_scales(law_one_rank())),
               lora::with_adapters(stored_linear::law_tokens()), law_tile(),
               stored_linear::law_files(), lora::law_zero_b(lora::has_adapters)},
      .mutants = all_mutants(),
      .refuse = [](const Case& c) -> std::optional<std::string> {
        const std::int64_t width = fused_width(c) * c.tp_size, hidden = c.model.hidden_size;
        if (auto reason = stored_linear::refuse(c, right_layer_of(c))) return reason;
        if (lora::has_adapters(c)) {
          if (c.options.at("tile") != 0)
            return fmt::format("adapters are for rows without padding, not of tiles of {}",
                               tile_of(c));
          if (auto reason = lora::refuse_option(c, as_lora(c))) return reason;
        }
        if (auto reason = too_large(width, hidden)) return reason;
        return too_large(c.num_tokens, std::max(width, hidden));
      },
      .work =
          [](const Case& c) {
            return linear::work(c, double(fused_width(c)) * c.tp_size, c.model.hidden_size) +
                   (lora::has_adapters(c) ? lora::work(as_lora(c)) : 0);
          },
      .adopt = adopt,
      .checkpoint_cases =
          [](int tp_size) { return stored_linear::checkpoint_cases(of_checkpoint(), tp_size); },
      .check_checkpoint = [] { stored_linear::check_checkpoint(of_checkpoint()); },
      .regime = regime,
      .stages = stages,
  });
}

}  // namespace tp
