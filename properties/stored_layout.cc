#include "properties/stored_layout.h"

#include "properties/stored_tensors.h"

namespace tp::stored_linear {

bool has_slots(const Case& c) {
  const Scheme s = format_of(c).scheme;
  return s == Scheme::fp8_tensor || s == Scheme::nvfp4;
}
bool has_fixed_scale(const Case& c) { return format_of(c).activations == Activations::fixed; }
bool quantises(const Case& c) { return format_of(c).activations != Activations::plain; }
bool has_weight_scale(const Case& c) { return format_of(c).scheme == Scheme::fp8_tensor; }
bool is_gptq(const Case& c) { return format_of(c).scheme == Scheme::gptq; }
bool makes_scales(const Case& c) { return quantises(c) && !has_fixed_scale(c); }

LocalColumns columns_of(const Case& c, const Layer& layer, int tp_rank) {
  const std::int64_t size =
      layer.cuts_columns() ? div_exact(layer.in_features, c.tp_size) : layer.in_features;
  return {{layer.cuts_columns() ? tp_rank * size : 0, size}, c.tp_size, tp_rank};
}

Shard touched(const LocalColumns& columns, std::int64_t group) {
  const std::int64_t first = columns.own.offset / group;
  return {first, ceil_div(columns.own.end(), group) - first};
}

std::vector<Shard> own_rows(const Layer& layer, int tp_rank) {
  return layer.taken(sharding_rules(), tp_rank);
}

Places places_of(const Layer& layer, int tp_rank) {
  const std::vector<Shard> own = own_rows(layer, tp_rank);
  Places places{layer.first, layer.local_rows, {}};
  for (const Shard& part : own) {
    if (!layer.first.empty()) break;
    places.first.push_back(places.rows);
    places.rows += part.size;
  }
  places.padding = padding_of({.taken = own, .first = places.first, .local_rows = places.rows});
  return places;
}

std::int64_t padding_rows(const Case& c, const Layer& layer) {
  std::int64_t sum = 0;
  for (const Shard& run : places_of(layer, 0).padding) sum += run.size;
  return sum * c.tp_size;
}

namespace {

std::string tensor_name(const Layer& layer, const Kind& kind, std::size_t part) {
  if (kind.buffer == "bias") return layer.biases[part];
  return layer.parts[part] + kind.suffix;
}

std::string padding_name(const Kind& kind) { return kind.buffer + ".padding"; }

}  // namespace

std::vector<TensorSpec> tensors(const Case& c, const Layer& layer, const Kind& kind) {
  std::vector<TensorSpec> all;
  const auto add = [&](std::string name, std::int64_t rows, std::int64_t other) {
    all.push_back({std::move(name), kind.dtype, kind.rows_are_columns ? other : rows,
                   kind.rows_are_columns ? rows : other, Role::weight});
  };
  for (std::size_t p = 0; p < layer.parts.size(); ++p)
    add(tensor_name(layer, kind, p), layer.rows[p], kind.other);
  if (const std::int64_t rows = padding_rows(c, layer); rows > 0)
    add(padding_name(kind), rows, kind.other);
  return all;
}

LocalBuffer buffer(const Layer& layer, const Kind& kind, Use use, int tp_rank) {
  const std::vector<Shard> rows = own_rows(layer, tp_rank);
  const Places places = places_of(layer, tp_rank);
  LocalBuffer b{kind.buffer, use, kind.dtype, places.rows, kind.own.size};
  if (kind.rows_are_columns) std::swap(b.rows, b.cols);
  const auto add = [&](const std::string& name, Shard of_tensor, std::int64_t at) {
    if (of_tensor.size == 0) return;
    if (!kind.rows_are_columns) {
      b.pieces.push_back({name, kind.own, 0, of_tensor, at});
      return;
    }
    // Row by row: ranks may share some of them.
    for (std::int64_t i = 0; i < kind.own.size; ++i)
      b.pieces.push_back({name, of_tensor, at, Shard{kind.own.offset + i, 1}, i});
  };
  for (std::size_t p = 0; p < rows.size(); ++p)
    add(tensor_name(layer, kind, p), rows[p], places.first[p]);
  std::int64_t padding = 0;
  for (const Shard& run : places.padding) padding += run.size;
  std::int64_t at = tp_rank * padding;
  for (const Shard& run : places.padding) {
    add(padding_name(kind), {at, run.size}, run.offset);
    at += run.size;
  }
  return b;
}

Kind weight_kind(const Case& c, const Layer& layer, int tp_rank) {
  const Shard own = columns_of(c, layer, tp_rank).own;
  const std::int64_t in = layer.in_features;
  switch (format_of(c).scheme) {
    case Scheme::none:
      return {"weight", "", c.dtype, in, false, own};
    case Scheme::nvfp4:
      return {"weight",        ".packed", DType::u8,
              ceil_div(in, 2), false,     {own.offset / 2, ceil_div(own.size, 2)}};
    case Scheme::gptq:
      return {"weight",   ".qweight", DType::i32,
              in / kWord, true,       {own.offset / kWord, own.size / kWord}};
    default:
      return {"weight", ".codes", DType::e4m3, in, false, own};
  }
}

std::optional<Kind> scales_kind(const Case& c, const Layer& layer, int tp_rank) {
  const QuantFormat f = format_of(c);
  const LocalColumns columns = columns_of(c, layer, tp_rank);
  const std::int64_t groups = ceil_div(layer.in_features, f.block_cols);
  switch (f.scheme) {
    case Scheme::fp8_channel:
      return Kind{"scales", ".scales", DType::f32, 1, false, {0, 1}};
    case Scheme::fp8_block:
      return Kind{"scales", ".scales", DType::f32, groups, false, touched(columns, f.block_cols)};
    case Scheme::nvfp4:
      return Kind{"scales", ".scales", DType::e4m3, groups, false, touched(columns, f.block_cols)};
    case Scheme::gptq:
      return Kind{
          "scales",
          ".scales",
          DType::f16,
          groups,
          true,
          c.options.at("act_order") == 1 ? Shard{0, groups} : touched(columns, f.block_cols)};
    default:
      return std::nullopt;
  }
}

Kind bias_kind(const Case& c) { return {"bias", "", c.dtype, 1, true, {0, 1}}; }

std::optional<Kind> prepared_kind(const Case& c, const Layer& layer, int tp_rank) {
  const Shard own = columns_of(c, layer, tp_rank).own;
  switch (format_of(c).scheme) {
    case Scheme::fp8_tensor:
      return Kind{"codes", ".requantised", DType::e4m3, layer.in_features, false, own};
    case Scheme::gptq:
      return Kind{"codes",    ".rows",
                  DType::i32, layer.in_features / kWord,
                  false,      {own.offset / kWord, own.size / kWord}};
    case Scheme::nvfp4:
      return Kind{"factors", ".factors", DType::f32, 1, false, {0, 1}};
    default:
      return std::nullopt;
  }
}

TensorSpec shared(const std::string& name, std::int64_t cols) {
  return {name, DType::f32, 1, cols, Role::weight};
}
LocalBuffer shared_buffer(const std::string& name, std::int64_t cols, Use use) {
  return {name, use, DType::f32, 1, cols, {{name, {0, cols}}}};
}

TensorSpec groups_spec(const Layer& layer) {
  return {"groups", DType::i32, 1, layer.in_features, Role::weight};
}
LocalBuffer groups_buffer(const Case& c, const Layer& layer, Use use, int tp_rank) {
  const Shard own = columns_of(c, layer, tp_rank).own;
  return {"groups", use, DType::i32, 1, own.size, {{"groups", own}}};
}

LoadOutputs loaded(const Case& c, const Layer& layer, bool bias, Use use, int tp_rank) {
  LoadOutputs all;
  const auto add = [&](const Kind& kind) {
    for (TensorSpec& t : tensors(c, layer, kind)) all.specs.push_back(std::move(t));
    all.buffers.push_back(buffer(layer, kind, use, tp_rank));
  };
  const auto add_shared = [&](const std::string& name) {
    all.specs.push_back(shared(name, std::int64_t(layer.parts.size())));
    all.buffers.push_back(shared_buffer(name, std::int64_t(layer.parts.size()), use));
  };
  add(weight_kind(c, layer, tp_rank));
  if (const auto kind = scales_kind(c, layer, tp_rank)) add(*kind);
  if (bias) add(bias_kind(c));
  if (has_slots(c)) add_shared("slots");
  if (has_fixed_scale(c)) add_shared("input_slots");
  if (is_gptq(c)) {
    all.specs.push_back(groups_spec(layer));
    all.buffers.push_back(groups_buffer(c, layer, use, tp_rank));
  }
  return all;
}

ScaleColumns scale_columns(const Case& c, const Layer& layer) {
  const QuantFormat f = format_of(c);
  ScaleColumns all;
  if (f.activations != Activations::tensor) all.rows = c.num_tokens;
  for (int rank = 0; rank < c.tp_size; ++rank) {
    const std::int64_t count = f.activations == Activations::token_groups
                                   ? touched(columns_of(c, layer, rank), f.block_cols).size
                                   : 1;
    if (!layer.cuts_columns()) {
      all.of_rank.push_back({0, count});
      all.total = count;
      continue;
    }
    all.of_rank.push_back({all.total, count});
    all.total += count;
  }
  return all;
}

TensorSpec codes_spec(const TensorSpec& x) {
  return {"x_codes", DType::e4m3, x.rows, x.cols, Role::activation};
}
TensorSpec x_scale_spec(const Case& c, const Layer& layer) {
  const ScaleColumns columns = scale_columns(c, layer);
  return {"x_scale", DType::f32, columns.rows, columns.total, Role::activation};
}
LocalBuffer codes_buffer(const Case& c, const Layer& layer, Use use, int tp_rank) {
  const Shard own = columns_of(c, layer, tp_rank).own;
  return {"x_codes", use, DType::e4m3, c.num_tokens, own.size, {{"x_codes", own}}};
}
LocalBuffer x_scale_buffer(const Case& c, const Layer& layer, Use use, int tp_rank) {
  const ScaleColumns columns = scale_columns(c, layer);
  const Shard own = columns.of_rank[std::size_t(tp_rank)];
  return {"x_scale", use, DType::f32, columns.rows, own.size, {{"x_scale", own}}};
}

Shard own_tokens(const Case& c, int tp_rank) {
  if (!is_gathered(c)) return {0, c.num_tokens};
  const std::int64_t share = div_exact(c.num_tokens, c.tp_size);
  return {tp_rank * share, share};
}

LocalBuffer x_buffer(const Case& c, const Layer& layer, int tp_rank) {
  const Shard own = columns_of(c, layer, tp_rank).own, tokens = own_tokens(c, tp_rank);
  return {"x",
          Use::input,
          c.dtype,
          tokens.size,
          own.size + c.options.at("pad"),
          {{"x", own, 0, tokens}}};
}

namespace {

// Those that it loads under these rules.
LocalColumns loaded_columns(const Case& c, const Layer& layer, int tp_rank,
                            const ShardingRules& rules) {
  LocalColumns columns = columns_of(c, layer, tp_rank);
  if (layer.cuts_columns()) columns.own = layer.columns(rules, tp_rank);
  return columns;
}

}  // namespace

StoredLinear stored_linear(const Case& c, const Layer& layer, const ShardingRules& rules,
                           int tp_rank) {
  const Places places = places_of(layer, tp_rank);
  return {.format = format_of(c),
          .prefixes = prefixes(c, layer),
          .rows = fused_rows(c, layer),
          .taken = layer.taken(rules, tp_rank),
          .bias_taken = (layer.bias_taken ? layer.bias_taken : layer.taken)(rules, tp_rank),
          .first = places.first,
          .local_rows = places.rows,
          .in_features = layer.in_features,
          .columns = loaded_columns(c, layer, tp_rank, rules),
          .act_order = is_gptq(c) && c.options.at("act_order") == 1};
}

}  // namespace tp::stored_linear
