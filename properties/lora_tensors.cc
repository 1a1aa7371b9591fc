#include "properties/lora_tensors.h"

#include <algorithm>
#include <cmath>

#include "properties/lora_user.h"

namespace tp::lora {

std::string stored_name(std::size_t adapter, const std::string& module, std::string_view what) {
  return "adapter" + std::to_string(adapter) + "." + module + "." + std::string(what);
}
std::string slots_name(const char* what, const std::string& part) {
  return std::string(what) + "." + part;
}

double drawn_value(bool is_exact, std::uint32_t largest, std::uint32_t bits, std::int64_t row,
                   std::int64_t col) {
  const double sign = bits >> 31 ? -1 : 1;
  if (is_exact) return sign * double(1 + (bits & 0xFFFF) % largest);
  const double of_row = 1 + 0.125 * double(row * 5 % 8), of_col = 1 + 0.125 * double(col * 3 % 8);
  return sign * (0.25 + double(bits & 0xFFFFFF) * 0x1p-24) * of_row * of_col;
}

namespace {

constexpr std::uint32_t kLargest = 3;

// About the square root of n, and a power of two.
double root(std::int64_t n) { return std::ldexp(1.0, std::ilogb(double(n)) / 2); }

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

}  // namespace

std::int64_t slot_of_adapter(const Case& c, const Variation& v, std::int64_t adapter) {
  return (adapter + (v.law == "slots" ? 1 : 0)) % slots(c);
}

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
        if (v.law == "zero_b" && !is_a) factor = 0;
        const std::string name = stored_name(i, m.name, what);
        if (i == 0 && is_users(c)) {
          all.push_back({user_tensor(name, layer.prefix + m.name, what),
                         {.tensor = name, .shape = std::move(shape)}});
          return;
        }
        TensorSpec t{name, file_dtype(c), shape.size() == 1 ? 1 : shape[0], shape.back(),
                     Role::weight};
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
      if (of_case[i].has_bias) add(kBias, {m.rows});
    }
  }
  return all;
}

std::vector<TensorSpec> SlotTensors::all() const {
  std::vector<TensorSpec> list = a;
  list.insert(list.end(), b.begin(), b.end());
  list.insert(list.end(), bias.begin(), bias.end());
  list.push_back(ranks);
  list.push_back(scales);
  return list;
}

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

std::vector<LocalBuffer> slot_buffers(const Case& c, const Layer& layer, const ShardingRules& rules,
                                      Use use, int tp_rank) {
  const LoraLayer of_rank = lora_layer(c, layer, tp_rank);
  const ShardingRules& right = sharding_rules();
  const std::int64_t n = slots(c), room = of_rank.max_rank,
                     parts = std::int64_t(layer.parts.size()),
                     rows = right.lora.slot_rows(of_rank.base);
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

}  // namespace tp::lora
