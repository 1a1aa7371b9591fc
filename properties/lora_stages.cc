#include "properties/lora_stages.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>

#include "harness/base/philox.h"
#include "kernels/lora_layer.h"
#include "properties/linear.h"
#include "properties/lora_layers.h"
#include "reference/checkpoint.h"
#include "reference/lora.h"
#include "reference/row_linear.h"

namespace tp::lora {

namespace {

// ---- Tensors and where they lie.

std::string stored_name(std::size_t adapter, const std::string& module, std::string_view what) {
  return "adapter" + std::to_string(adapter) + "." + module + "." + std::string(what);
}
std::string slots_name(const char* what, const std::string& part) {
  return std::string(what) + "." + part;
}

// The modules of an adapter: index of the part whose rank and alpha they have, name, rows of B.
struct StoredModule {
  std::size_t part;
  std::string name;
  std::int64_t rows;
};
std::vector<StoredModule> stored_modules(const Layer& layer, const Adapter& adapter) {
  if (adapter.is_fused) {
    std::int64_t rows = 0;
    for (const std::int64_t r : layer.rows) rows += r;
    return {{0, layer.fused, rows}};
  }
  std::vector<StoredModule> all;
  for (std::size_t p = 0; p < layer.parts.size(); ++p) {
    if (adapter.modules[p].rank > 0) all.push_back({p, layer.parts[p], layer.rows[p]});
  }
  return all;
}

std::int64_t rotation(const Case& c, const Variation& v) {
  return v.law == "slots" ? 1 % slots(c) : 0;
}
// Which slot an adapter is loaded into.
std::int64_t slot_of_adapter(const Case& c, const Variation& v, std::int64_t adapter) {
  return (adapter + rotation(c, v)) % slots(c);
}

std::vector<std::int32_t> tokens_of(const Case& c, const Variation& v, const ShardingRules& rules) {
  std::vector<std::int32_t> of = slot_of_token(c, v.rotate_rows);
  for (std::int32_t& slot : of) {
    if (slot < 0) continue;
    if (v.law == "merged" || (v.law == "alone" && slot != v.argument)) {
      slot = -1;
    } else {
      slot = rules.lora.slot_of_token(std::int32_t(slot_of_adapter(c, v, slot)),
                                      std::int32_t(slots(c)));
    }
  }
  return of;
}

// Small integers of both signs, or random numbers whose rows and columns have scales of their own
// within a factor of 4, so that no two of them can be taken for each other. Never zero.
double drawn_value(bool is_exact, std::uint32_t largest, std::uint32_t bits, std::int64_t row,
                   std::int64_t col) {
  const double sign = bits >> 31 ? -1 : 1;
  if (is_exact) return sign * double(1 + (bits & 0xFFFF) % largest);
  const double of_row = 1 + 0.125 * double(row * 5 % 8), of_col = 1 + 0.125 * double(col * 3 % 8);
  return sign * (0.25 + double(bits & 0xFFFFFF) * 0x1p-24) * of_row * of_col;
}
constexpr std::uint32_t kLargest = 3;
constexpr std::string_view kA = "lora_A.weight", kB = "lora_B.weight";

// About the square root of n, and a power of two.
double root(std::int64_t n) { return std::ldexp(1.0, std::ilogb(double(n)) / 2); }

// The base's output where no stage before makes it: of each rank's tokens, tokens being rotated.
TensorSpec base_tensor(const Case& c, const std::string& name, DType dtype, std::int64_t rows,
                       std::int64_t cols) {
  TensorSpec t{name, dtype, rows, cols, Role::activation};
  t.value = [=, is_exact = c.fill == Fill::exact, tokens = c.num_tokens](
                const DataRegime& g, std::int64_t row, std::int64_t col) {
    const std::int64_t from = row / tokens * tokens + (row % tokens + g.rotate_rows) % tokens;
    const Random4 bits = philox(g.seed, stream_of(name), std::uint64_t(from * cols + col));
    return drawn_value(is_exact, linear::kLargestBias, bits[0], from, col);
  };
  return t;
}

struct StoredSpec {
  TensorSpec spec;
  StoredInput stored;
};

// The adapters' files.
std::vector<StoredSpec> stored_tensors(const Case& c, const Layer& layer, const Variation& v) {
  std::vector<StoredSpec> all;
  const std::vector<Adapter> of_case = adapters(c, layer);
  for (std::size_t i = 0; i < of_case.size(); ++i) {
    for (const StoredModule& m : stored_modules(layer, of_case[i])) {
      const std::int64_t rank = of_case[i].modules[m.part].rank;
      const auto add = [&](std::string_view what, std::vector<std::int64_t> shape) {
        const bool is_a = what == kA;
        double factor = c.fill == Fill::exact || !is_a ? 1 : 1 / root(layer.in_features);
        if (v.law == "alpha" && what != kB) factor /= 2;
        if (v.law == "zero_b" && !is_a && std::int64_t(i) == v.argument) factor = 0;
        TensorSpec t{stored_name(i, m.name, what), file_dtype(c), shape.size() == 1 ? 1 : shape[0],
                     shape.back(), Role::weight};
        t.drawn = [=, is_exact = c.fill == Fill::exact](const DataRegime&, std::uint32_t bits,
                                                        std::int64_t row, std::int64_t col) {
          return factor * drawn_value(is_exact, kLargest, bits, row, col);
        };
        all.push_back(
            {t,
             {.tensor = t.name,
              .shape = std::move(shape),
              .name = "base_model.model." + layer.prefix + m.name + "." + std::string(what),
              .checkpoint = int(i)}});
      };
      add(kA, {rank, layer.in_features});
      add(kB, {m.rows, rank});
      if (has_bias(c)) add("lora_B.bias", {m.rows});
    }
  }
  return all;
}

// What the slots of all ranks are parts of.
struct SlotTensors {
  std::vector<TensorSpec> a, b, bias;  // of each part
  TensorSpec ranks, scales;

  std::vector<TensorSpec> all() const {
    std::vector<TensorSpec> list = a;
    list.insert(list.end(), b.begin(), b.end());
    list.insert(list.end(), bias.begin(), bias.end());
    list.push_back(ranks);
    list.push_back(scales);
    return list;
  }
};
SlotTensors slot_tensors(const Case& c, const Layer& layer) {
  const std::int64_t n = slots(c), room = max_rank(c, layer),
                     parts = std::int64_t(layer.parts.size());
  // Not tokens' but weights: laws leave their rows where they are.
  SlotTensors t{.ranks = {"lora_ranks", DType::i32, n, parts, Role::weight},
                .scales = {"lora_scales", DType::f32, n, parts, Role::weight}};
  for (std::size_t p = 0; p < layer.parts.size(); ++p) {
    t.a.push_back(
        {slots_name("lora_a", layer.parts[p]), c.dtype, n * room, layer.in_features, Role::weight});
    t.b.push_back(
        {slots_name("lora_b", layer.parts[p]), c.dtype, n * layer.rows[p], room, Role::weight});
    if (has_bias(c))
      t.bias.push_back(
          {slots_name("lora_bias", layer.parts[p]), c.dtype, n, layer.rows[p], Role::weight});
  }
  return t;
}

std::int64_t total_rows(const LoraLayer& layer) {
  return sharding_rules().lora.slot_rows(layer.base);
}

// A rank's slots. The memory is as large as the rules want it, and no smaller than is right.
std::vector<LocalBuffer> slot_buffers(const Case& c, const Layer& layer, const ShardingRules& rules,
                                      Use use, int tp_rank) {
  const LoraLayer of_rank = lora_layer(c, layer, tp_rank);
  const ShardingRules& right = sharding_rules();
  const std::int64_t n = slots(c), room = of_rank.max_rank,
                     parts = std::int64_t(layer.parts.size()), rows = total_rows(of_rank);
  const Shard a_rows = lora_own_a(of_rank, right), columns = right.lora.a_columns(of_rank.base);
  LocalBuffer a{"lora_a", use, c.dtype, n * parts * a_rows.size, columns.size},
      b{"lora_b", use, c.dtype, n * std::max(rows, rules.lora.slot_rows(of_rank.base)), room},
      bias{"lora_bias", use, c.dtype, n, rows};
  for (std::int64_t slot = 0; slot < n; ++slot) {
    std::int64_t at = 0;
    for (std::int64_t p = 0; p < parts; ++p) {
      const Shard own = of_rank.base.own[std::size_t(p)];
      const std::string& part = layer.parts[std::size_t(p)];
      a.pieces.push_back({slots_name("lora_a", part), columns, 0,
                          Shard{slot * room + a_rows.offset, a_rows.size},
                          (slot * parts + p) * a_rows.size});
      b.pieces.push_back({slots_name("lora_b", part),
                          {0, room},
                          0,
                          Shard{slot * layer.rows[std::size_t(p)] + own.offset, own.size},
                          slot * rows + at});
      if (slot == 0) bias.pieces.push_back({slots_name("lora_bias", part), own, at});
      at += own.size;
    }
  }
  std::vector<LocalBuffer> all = {
      a,
      b,
      {"lora_ranks", use, DType::i32, n, parts, {{"lora_ranks", {0, parts}}}},
      {"lora_scales", use, DType::f32, n, parts, {{"lora_scales", {0, parts}}}}};
  if (has_bias(c)) all.push_back(bias);
  return all;
}

template <typename T>
View<T> first_rows(View<T> view, std::int64_t rows) {
  view.rows = rows;
  return view;
}

// ---- lora_load.

template <typename T>
void run_load(RankRun& run, const Case& c, const Layer& layer, const ShardingRules& rules,
              const Variation& v) {
  const LoraLayer of_rank = lora_layer(c, layer, run.group.tp_rank());
  const std::int64_t n = slots(c);
  const std::vector<Adapter> of_case = adapters(c, layer);
  const auto adapter = [&](std::size_t i) {
    const double alpha_times = v.law == "alpha" ? 2 : 1;
    return PeftAdapter(
        parse_peft_config(config_text(c, layer, of_case[i], alpha_times), "adapter_config.json"),
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
      const auto stored = [&](const char* what) -> const Matrix& {
        return in[stored_name(std::size_t(i), name, what)];
      };
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
              rounded(stored("lora_A.weight").row(r)[k]);
        }
        for (std::int64_t row = 0; row < layer.rows[p]; ++row) {
          b[p].r[std::size_t((slot * layer.rows[p] + row) * room + r)] =
              scaled(stored("lora_B.weight").row(first + row)[r]);
        }
      }
      for (std::int64_t row = 0; has_bias(c) && row < layer.rows[p]; ++row) {
        bias[p].r[std::size_t(slot * layer.rows[p] + row)] =
            scaled(stored("lora_B.bias").row(0)[first + row]);
      }
    }
  }
  std::vector<Budget> all = std::move(a);
  for (auto* more : {&b, &bias}) all.insert(all.end(), more->begin(), more->end());
  all.push_back(ranks);
  all.push_back(scales);
  return all;
}

Stage load_stage(const Case& c, const Layer& layer, const ShardingRules& rules,
                 const Variation& v) {
  Stage stage{.name = "lora_load"};
  for (StoredSpec& t : stored_tensors(c, layer, v)) {
    stage.inputs.push_back(std::move(t.spec));
    stage.stored.push_back(std::move(t.stored));
  }
  stage.outputs = slot_tensors(c, layer).all();
  stage.buffers = [=](int tp_rank) { return slot_buffers(c, layer, rules, Use::output, tp_rank); };
  stage.run = [=](RankRun& run) {
    try {
      dispatch(c.dtype, [&]<typename T>(T) { run_load<T>(run, c, layer, rules, v); });
    } catch (const BadInput& e) {
      // Files that were made for the case are legal, so it is the loader that is wrong.
      throw Fault{Outcome::BadLaunch, e.what(), run.group.tp_rank()};
    }
  };
  stage.reference = [=](const WholeInputs& in) { return load_reference(c, layer, v, in); };
  return stage;
}

// ---- What both kernels are told.

std::vector<LocalBuffer> batch_buffers(const Case& c, const Variation& v,
                                       const ShardingRules& rules) {
  const LoraPlan plan = lora_plan(tokens_of(c, v, rules), std::int32_t(slots(c)));
  std::vector<std::int32_t> tiles(plan.tiles.size() * sizeof(LoraTile) / sizeof(std::int32_t));
  std::memcpy(tiles.data(), plan.tiles.data(), plan.tiles.size() * sizeof(LoraTile));
  return {local_values("lora_order", plan.order), local_values("lora_tiles", tiles)};
}

LoraBatch batch_of(RankRun& run, const Case& c, const Layer& layer, const Variation& v,
                   const ShardingRules& rules) {
  return {.order = run.integers("lora_order"),
          .tiles = reinterpret_cast<const LoraTile*>(run.integers("lora_tiles")),
          .num_tiles =
              std::int32_t(lora_plan(tokens_of(c, v, rules), std::int32_t(slots(c))).tiles.size()),
          .ranks = run.view<std::int32_t>("lora_ranks").data,
          .scales = run.view<float>("lora_scales").data,
          .slots = std::int32_t(slots(c)),
          .parts = std::int32_t(layer.parts.size())};
}

// Where part p, token t, LoRA rank j of a rank's shrunk activations are in the buffer.
struct Places {
  std::int64_t rows = 0, cols = 0;
  std::int64_t part = 0, token = 0, rank = 0;  // strides, the buffer being dense
  std::int64_t at(std::int64_t p, std::int64_t t, std::int64_t j) const {
    return p * part + t * token + j * rank;
  }
};
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

template <typename H>
LoraIntermediate<H> intermediate(const View<H>& view, const Case& c, const Layer& layer) {
  const Places at = places(c, layer);
  return {.data = view.data,
          .tokens = c.num_tokens,
          .cols = max_rank(c, layer),
          .part_stride = at.part,
          .token_stride = at.token,
          .col_stride = at.rank};
}

// Whether ranks have shrunk activations of their own: those of their columns.
bool has_own_part(const Case& c, const Layer& layer) {
  return sharding_rules().lora.shrink_collective(layer.cuts_columns, shares_out_rank(c),
                                                 joins(c, layer)) == ShrinkCollective::none &&
         layer.cuts_columns;
}

TensorSpec h_spec(const Case& c, const Layer& layer) {
  const Places at = places(c, layer);
  const std::int64_t ranks = has_own_part(c, layer) ? c.tp_size : 1;
  return {"lora_h", intermediate_dtype(c), ranks * at.rows, at.cols};
}
// With as many rows again that are nobody's: where a wrong stride leads to.
LocalBuffer h_buffer(const Case& c, const Layer& layer, Use use, int tp_rank) {
  const Places at = places(c, layer);
  const std::int64_t first = has_own_part(c, layer) ? tp_rank * at.rows : 0;
  return {"lora_h",    use,     intermediate_dtype(c),
          2 * at.rows, at.cols, {{"lora_h", {0, at.cols}, 0, Shard{first, at.rows}}}};
}

// [tokens, room] of one part, as rank `tp_rank` has it.
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

// Calls f with values of the type of the activations and of that of the intermediate.
template <typename F>
void with_types(const Case& c, F f) {
  dispatch(c.dtype, [&]<typename T>(T) {
    if (intermediate_dtype(c) == c.dtype) {
      f(T{}, T{});
    } else {
      f(T{}, float{});
    }
  });
}

// ---- lora_shrink.

std::vector<Budget> shrink_reference(const Case& c, const Layer& layer, const Variation& v,
                                     const WholeInputs& in) {
  const std::int64_t room = max_rank(c, layer), in_features = layer.in_features;
  const std::vector<std::int32_t> slot_of = tokens_of(c, v, sharding_rules());
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

Stage shrink_stage(const Case& c, const Layer& layer, const TensorSpec& x,
                   const ShardingRules& rules, const Variation& v) {
  const std::int64_t tokens = c.num_tokens, parts = std::int64_t(layer.parts.size());
  const std::int64_t width = layer.cuts_columns ? layer.in_features / c.tp_size : layer.in_features;
  Stage stage{.name = "lora_shrink"};
  const SlotTensors slots_of = slot_tensors(c, layer);
  stage.inputs = slots_of.a;
  stage.inputs.insert(stage.inputs.end(), {x, slots_of.ranks, slots_of.scales});
  stage.outputs = {h_spec(c, layer)};
  stage.buffers = [=](int tp_rank) {
    const Shard own{layer.cuts_columns ? tp_rank * width : 0, width};
    std::vector<LocalBuffer> all = batch_buffers(c, v, rules);
    for (LocalBuffer& b : slot_buffers(c, layer, rules, Use::input, tp_rank)) {
      if (b.name != "lora_b" && b.name != "lora_bias") all.push_back(std::move(b));
    }
    all.push_back({"x", Use::input, c.dtype, tokens, width + c.options.at("pad"), {{"x", own}}});
    all.push_back(h_buffer(c, layer, Use::output, tp_rank));
    const std::int64_t elements = parts * tokens * max_rank(c, layer);
    all.push_back({"lora_mine", Use::workspace, intermediate_dtype(c), 1, elements});
    all.push_back({"lora_gathered", Use::workspace, intermediate_dtype(c), c.tp_size, elements});
    return all;
  };
  stage.run = [=](RankRun& run) {
    with_types(c, [&]<typename T, typename H>(T, H) {
      lora_shrink_over_ranks<T, H>(
          run.view<T>("x").columns(0, width), run.view<T>("lora_a"),
          batch_of(run, c, layer, v, rules), lora_layer(c, layer, run.group.tp_rank()),
          joins(c, layer), {run.view<H>("lora_mine").data, run.view<H>("lora_gathered").data},
          intermediate(run.view<H>("lora_h"), c, layer), rules, run.group, run.stream);
    });
  };
  stage.cost = [=](int) -> Cost {
    const double ranks = double(max_rank(c, layer) * parts);
    return linear::cost(c, double(tokens * width) + double(slots(c)) * ranks * double(width),
                        double(tokens) * ranks * double(width));
  };
  stage.reference = [=](const WholeInputs& in) { return shrink_reference(c, layer, v, in); };
  return stage;
}

// ---- lora_expand.

// A bias of the delta joins a sum of the ranks once.
bool adds_bias(const Case& c, const Layer& layer, const ShardingRules& rules, int tp_rank) {
  const bool is_in_sum = joins(c, layer) == DeltaJoins::partial && !shares_out_rank(c);
  return has_bias(c) && (!is_in_sum || rules.linear.row_adds_bias(tp_rank));
}

std::string of_lora(const std::string& base) { return base + "_lora"; }

std::vector<Budget> expand_reference(const Case& c, const Layer& layer, DType base_dtype,
                                     const Variation& v, const WholeInputs& in) {
  const std::int64_t tokens = c.num_tokens;
  const bool partial = joins(c, layer) == DeltaJoins::partial;
  const std::vector<std::int32_t> slot_of = tokens_of(c, v, sharding_rules());
  const Accumulation accumulation = lora_expand_accumulation(c.dtype, max_rank(c, layer));
  std::vector<Budget> all;
  for (std::size_t p = 0; p < layer.parts.size(); ++p) {
    const Matrix& base = in[layer.outputs[p]];
    Budget whole(base.rows, base.cols);
    for (int rank = 0; rank < (partial ? c.tp_size : 1); ++rank) {
      // The columns that this part of the sum has a delta for.
      const Shard cols = lora_layer(c, layer, rank).base.own[p],
                  of_part = partial ? cols : Shard{0, base.cols};
      Matrix mine(tokens, of_part.size);
      for (std::int64_t t = 0; t < tokens; ++t) {
        const double* row = base.row(rank * tokens + t);
        std::copy_n(row + of_part.offset, of_part.size, mine.row(t));
        std::copy_n(row, base.cols, whole.r.data() + (rank * tokens + t) * base.cols);
      }
      std::vector<Matrix> b, biases;
      for (std::int64_t slot = 0; slot < slots(c); ++slot) {
        std::vector<std::int64_t> rows;
        for (std::int64_t row = of_part.offset; row < of_part.end(); ++row)
          rows.push_back(slot * layer.rows[p] + row);
        b.push_back(reference::columns(
            reference::taken_rows(in[slots_name("lora_b", layer.parts[p])], rows), 0,
            std::int64_t(in["lora_ranks"].row(slot)[p])));
        if (!has_bias(c)) continue;
        biases.push_back(reference::columns(
            reference::taken_rows(in[slots_name("lora_bias", layer.parts[p])], {slot}),
            of_part.offset, of_part.size));
      }
      std::vector<reference::LoraDelta> deltas;
      for (std::int64_t slot = 0; slot < slots(c); ++slot) {
        const auto s = std::size_t(slot);
        const bool bias = adds_bias(c, layer, sharding_rules(), rank);
        deltas.push_back({.b = b[s].cols > 0 ? &b[s] : nullptr,
                          .bias = bias ? &biases[s] : nullptr,
                          .scale = float(in["lora_scales"].row(slot)[p])});
      }
      const Budget part =
          reference::lora_expand(mine, h_of_part(c, layer, in["lora_h"], p, rank), deltas, slot_of,
                                 c.dtype, accumulation, base_dtype);
      for (std::int64_t t = 0; t < tokens; ++t) {
        const std::size_t to = std::size_t((rank * tokens + t) * base.cols + of_part.offset),
                          from = std::size_t(t * of_part.size);
        std::copy_n(part.r.begin() + std::int64_t(from), of_part.size,
                    whole.r.begin() + std::int64_t(to));
        std::copy_n(part.rho.begin() + std::int64_t(from), of_part.size,
                    whole.rho.begin() + std::int64_t(to));
      }
    }
    all.push_back(std::move(whole));
  }
  return all;
}

Stage expand_stage(const Case& c, const Layer& layer, DType base_dtype, const ShardingRules& rules,
                   const Variation& v) {
  const std::int64_t tokens = c.num_tokens;
  const bool partial = joins(c, layer) == DeltaJoins::partial;
  Stage stage{.name = "lora_expand"};
  const SlotTensors slots_of = slot_tensors(c, layer);
  stage.inputs = slots_of.b;
  stage.inputs.insert(stage.inputs.end(), slots_of.bias.begin(), slots_of.bias.end());
  stage.inputs.insert(stage.inputs.end(), {slots_of.ranks, slots_of.scales, h_spec(c, layer)});
  for (std::size_t p = 0; p < layer.parts.size(); ++p) {
    const std::int64_t rows = partial ? c.tp_size * tokens : tokens;
    stage.inputs.push_back(base_tensor(c, layer.outputs[p], base_dtype, rows, layer.rows[p]));
    stage.outputs.push_back({of_lora(layer.outputs[p]), base_dtype, rows, layer.rows[p]});
  }
  // The rows of the base, and of what they become.
  const auto rows_of = [=](int tp_rank, Use use) {
    const bool is_base = use == Use::input;
    LocalBuffer y{is_base ? layer.buffer : of_lora(layer.buffer), use, base_dtype, tokens, 0};
    const std::vector<Shard> own = layer.own(tp_rank);
    for (std::size_t p = 0; p < layer.parts.size(); ++p) {
      Piece piece{is_base ? layer.outputs[p] : of_lora(layer.outputs[p]), own[p], y.cols};
      if (partial) piece.rows = Shard{tp_rank * tokens, tokens};
      y.pieces.push_back(piece);
      y.cols += own[p].size;
    }
    if (!partial) y.cols += c.options.at("pad");
    return y;
  };
  stage.buffers = [=](int tp_rank) {
    std::vector<LocalBuffer> all = batch_buffers(c, v, rules);
    for (LocalBuffer& b : slot_buffers(c, layer, rules, Use::input, tp_rank)) {
      if (b.name != "lora_a") all.push_back(std::move(b));
    }
    all.push_back(h_buffer(c, layer, Use::input, tp_rank));
    all.push_back(rows_of(tp_rank, Use::input));
    all.push_back(rows_of(tp_rank, Use::output));
    return all;
  };
  stage.run = [=](RankRun& run) {
    const int tp_rank = run.group.tp_rank();
    const LoraLayer of_rank = lora_layer(c, layer, tp_rank);
    const bool is_fused = adapters(c, layer).front().is_fused;
    const std::vector<std::int64_t> b_rows = lora_b_parts(of_rank, rules, is_fused);
    LoraColumns columns{.parts = std::int32_t(layer.parts.size())};
    std::int64_t width = 0;
    for (std::size_t p = 0; p < layer.parts.size(); ++p) {
      columns.rows[p] = b_rows[p];
      // A share of the columns of a row-parallel layer begins within them.
      columns.at[p] = width + (layer.cuts_columns ? of_rank.base.own[p].offset : 0);
      width += layer.own(tp_rank)[p].size;
    }
    const bool bias = adds_bias(c, layer, rules, tp_rank);
    with_types(c, [&]<typename T, typename H>(T, H) {
      const auto expand = [&]<typename Out>(Out) {
        LoraIntermediate<const H> h = intermediate<const H>(run.view<H>("lora_h"), c, layer);
        h.part_stride =
            rules.lora.slice_stride(h.part_stride, columns.parts * tokens * h.cols, columns.parts);
        lora_expand<T, H, Out>(
            h, first_rows<const T>(run.view<T>("lora_b"), slots(c) * lora_b_rows(of_rank, rules)),
            bias ? View<const T>(run.view<T>("lora_bias")) : View<const T>{},
            batch_of(run, c, layer, v, rules), columns,
            run.view<Out>(layer.buffer).columns(0, width),
            run.view<Out>(of_lora(layer.buffer)).columns(0, width), run.stream);
      };
      if (base_dtype == c.dtype) {
        expand(T{});
      } else {
        expand(float{});
      }
    });
  };
  stage.cost = [=](int tp_rank) -> Cost {
    double rows = 0;
    for (const Shard& own : layer.own(tp_rank)) rows += double(own.size);
    const double ranks = double(max_rank(c, layer));
    return linear::cost(c, 2 * double(tokens) * rows + double(slots(c)) * ranks * rows,
                        double(tokens) * ranks * rows);
  };
  stage.reference = [=](const WholeInputs& in) {
    return expand_reference(c, layer, base_dtype, v, in);
  };
  return stage;
}

// ---- Laws.

// Of outputs that have a row a token.
bool is_by_token(const Case& c, const TensorSpec& t) {
  const std::string& name = t.name;
  return t.rows == c.num_tokens &&
         (name == "out" || (name.size() > 5 && name.substr(name.size() - 5) == "_lora"));
}
std::optional<Place> same_place(const Case& c, const Variation&, const TensorSpec& t,
                                std::int64_t row, std::int64_t col) {
  if (!is_by_token(c, t)) return std::nullopt;
  return Place{row, col};
}

// Where the element of lora_h is that stands to token `other(token)` as this one to its own;
// nothing if there is no such token.
template <typename Other>
std::optional<Place> of_other_token(const Case& c, const TensorSpec& h, std::int64_t row,
                                    std::int64_t col, Other other) {
  const std::int64_t tokens = c.num_tokens;
  const bool has_own_parts = is_partial(c) && !shares_out_rank(c);
  // Elements from a token to the next one, in rows or in columns.
  const bool in_columns = layout(c) == Layout::ranks;
  const std::int64_t step =
      layout(c) == Layout::tokens ? h.rows / (tokens * (has_own_parts ? c.tp_size : 1)) : 1;
  const std::int64_t token = (in_columns ? col : row) / step % tokens;
  const std::optional<std::int64_t> to = other(token);
  if (!to) return std::nullopt;
  const std::int64_t move = (*to - token) * step;
  return in_columns ? Place{row, col + move} : Place{row + move, col};
}

// The place of another token's element, of the outputs that have elements of tokens: what comes of
// the layer, and the shrunk activations, whose bits the sum with the base may hide.
template <typename Other>
std::optional<Place> of_token(const Case& c, const TensorSpec& t, std::int64_t row,
                              std::int64_t col, Other other) {
  if (t.name == "lora_h") return of_other_token(c, t, row, col, other);
  if (!is_by_token(c, t)) return std::nullopt;
  const std::optional<std::int64_t> to = other(row);
  if (!to) return std::nullopt;
  return Place{*to, col};
}

// slot_of_token() of the case that was asked about last: twins ask element by element.
class SlotOfToken {
 public:
  std::int32_t operator()(const Case& c, std::int64_t token) {
    const Key key{std::int64_t(c.seed), c.num_tokens, slots(c), c.options.at("segments")};
    if (of_.empty() || key != key_) {
      of_ = slot_of_token(c, 0);
      key_ = key;
    }
    return of_[std::size_t(token)];
  }

 private:
  using Key = std::array<std::int64_t, 4>;  // what it depends on
  Key key_{};
  std::vector<std::int32_t> of_;
};

// The adapter of the last token that has one.
std::int64_t last_used(const Case& c) {
  std::int64_t used = 0;
  for (const std::int32_t slot : slot_of_token(c, 0)) {
    if (slot >= 0) used = slot;
  }
  return used;
}

// Twins of the tokens that use adapter Variation::argument, or of those that do not.
auto twin_of_users(bool are_users) {
  return [are_users, slot_of = std::make_shared<SlotOfToken>()](
             const Case& c, const Variation& v, const TensorSpec& t, std::int64_t row,
             std::int64_t col) {
    return of_token(c, t, row, col, [&](std::int64_t token) {
      const bool is_user = (*slot_of)(c, token) == v.argument;
      return is_user == are_users ? std::optional(token) : std::nullopt;
    });
  };
}

}  // namespace

std::vector<Stage> stages(const Case& c, const Layer& layer, const TensorSpec& x, DType base_dtype,
                          const ShardingRules& rules, const Variation& variation) {
  return {load_stage(c, layer, rules, variation), shrink_stage(c, layer, x, rules, variation),
          expand_stage(c, layer, base_dtype, rules, variation)};
}

Delta first_delta(const Case& c, const Layer& layer, std::size_t part) {
  const Adapter adapter = adapters(c, layer).front();
  const Module& m = adapter.modules[part];
  Delta delta{.scale = adapter.use_rslora ? m.alpha / std::sqrt(double(m.rank))
                                          : m.alpha / double(m.rank)};
  for (const StoredSpec& t : stored_tensors(c, layer, {})) {
    if (t.spec.name == stored_name(0, layer.parts[part], kA)) delta.a = t.spec;
    if (t.spec.name == stored_name(0, layer.parts[part], kB)) delta.b = t.spec;
  }
  return delta;
}

double work(const Case& c, const Layer& layer) {
  double rows = 0;
  for (std::size_t p = 0; p < layer.parts.size(); ++p)
    rows += double(layer.rows[p]) * layer.replicas[p] * (layer.cuts_columns ? c.tp_size : 1);
  const double room = double(max_rank(c, layer)), parts = double(layer.parts.size()),
               in = double(layer.in_features) * (layer.cuts_columns ? 1 : c.tp_size);
  const double elements = double(slots(c) + 1) * room * (rows + parts * in);
  return linear::kProductsOfWeight * elements +
         2 * double(c.num_tokens) * room * (rows + parts * in);
}

LawRun law_tokens() {
  LawRun law = tp::law_tokens();
  law.twin = [](const Case& c, const Variation& v, const TensorSpec& t, std::int64_t row,
                std::int64_t col) {
    return of_token(c, t, row, col, [&](std::int64_t token) {
      return std::optional((token + v.rotate_rows) % c.num_tokens);
    });
  };
  return law;
}

LawRun law_alpha() {
  return {.law = {"alpha", "twice the alpha and half of A (and of B's bias) give the same bits"},
          .vary =
              [](const Case& c) {
                return std::pair{c, Variation{.law = "alpha"}};
              },
          .twin = same_place,
          .refuse = [](const Case& c) -> std::optional<std::string> {
            if (c.dtype == DType::f16 && c.fill != Fill::exact)
              return "halves of f16 numbers may be subnormal";
            return std::nullopt;
          }};
}

LawRun law_slots() {
  return {.law = {"slots", "adapters in other slots give the same bits"},
          .vary =
              [](const Case& c) {
                return std::pair{c, Variation{.law = "slots"}};
              },
          .twin =
              [](const Case& c, const Variation&, const TensorSpec& t, std::int64_t row,
                 std::int64_t col) {
                return of_token(c, t, row, col,
                                [](std::int64_t token) { return std::optional(token); });
              }};
}

LawRun law_alone() {
  return {.law = {"alone", "an adapter's tokens have the same bits where no other token has one"},
          .vary =
              [](const Case& c) {
                return std::pair{c, Variation{.law = "alone", .argument = last_used(c)}};
              },
          .twin = twin_of_users(true)};
}

LawRun law_zero_b() {
  return {.law = {"zero_b",
                  "where an adapter's B is zero its tokens have the base's outputs, and the others "
                  "the bits that they had"},
          .vary =
              [](const Case& c) {
                return std::pair{c, Variation{.law = "zero_b", .argument = last_used(c)}};
              },
          // Of its own tokens the original has another B: there the varied run is judged by itself,
          // and nothing but the base's outputs is within its budget.
          .twin = twin_of_users(false)};
}

LawRun law_tp1() {
  LawRun law = tp::law_tp1();
  law.twin = same_place;
  law.refuse = [](const Case& c) -> std::optional<std::string> {
    const auto module = c.options.find("module");
    if (module != c.options.end() && module->second >= 2 && c.options.at("joins") == 0)
      return "ranks whose parts are rounded add up to something else than one rank has";
    return std::nullopt;
  };
  return law;
}

}  // namespace tp::lora
