#include "properties/stored_linear.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <set>

#include "harness/base/check.h"
#include "harness/base/philox.h"
#include "harness/base/user_checkpoint.h"
#include "harness/device/fault.h"
#include "kernels/quantise.h"
#include "reference/checkpoint.h"
#include "reference/quantise.h"
#include "reference/scaled_product.h"

namespace tp::stored_linear {

namespace {

enum class Weights : std::int64_t { given, split, fused, striped };

constexpr int kNvfp4Group = 16, kWord = 8;  // columns

Weights weights_of(const Case& c) { return Weights(c.options.at("weights")); }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::vector<std::string> words(const std::string_view* first, std::size_t count) {
  return {first, first + count};
}

// ---- What a checkpoint holds.

bool is_fused(const Case& c, const Layer& layer) {
  return layer.parts.size() > 1 && weights_of(c) != Weights::split;
}

FusedRows fused_rows(const Case& c, const Layer& layer) {
  return {layer.rows, weights_of(c) == Weights::striped ? layer.stripes : 1};
}

// The number of the layer in the user's checkpoint; nothing: the case's tensors are made.
std::optional<int> layer_in_file(const Case& c) {
  const std::int64_t layer = c.options.at("layer");
  return layer > 0 ? std::optional(int(layer - 1)) : std::nullopt;
}

std::vector<std::string> prefixes(const Case& c, const Layer& layer) {
  std::vector<std::string> all;
  if (const auto number = layer_in_file(c)) return file_linears(layer.kind).at(*number).modules;
  if (is_fused(c, layer)) return {layer.prefix + layer.fused};
  for (const std::string& part : layer.parts) all.push_back(layer.prefix + part);
  return all;
}

// 1/4, 1/2, 2, 4: not 1, which is its own inverse.
double power_of_two(int step) { return std::ldexp(1.0, step < 2 ? step - 2 : step - 1); }

// Numbers that differ from one index to the next: mix-ups show whatever else the data are. `exact`:
// powers of two.
double scale_value(const DataRegime& g, std::uint32_t bits, std::int64_t index, double unit) {
  const int step = int((std::uint64_t(index) + g.seed) % 4);
  if (g.fill == Fill::exact) return power_of_two(step);
  return unit * (1 + 0.25 * step + 0.2 * double(bits >> 9) * 0x1p-23);
}

TensorSpec scales(std::string name, DType dtype, std::int64_t rows, std::int64_t cols, double unit,
                  std::int64_t first_index, bool is_inverse = false) {
  TensorSpec t{std::move(name), dtype, rows, cols, Role::weight};
  t.drawn = [=](const DataRegime& g, std::uint32_t bits, std::int64_t row, std::int64_t col) {
    const double value = scale_value(g, bits, first_index + row + 2 * col, unit);
    return is_inverse ? 1 / value : value;
  };
  return t;
}

// e4m3 but NaN; of exact data small integers.
double drawn_code(const DataRegime& g, std::uint32_t bits, std::int64_t, std::int64_t) {
  if (g.fill == Fill::exact) {
    const double magnitude = double(1 + (bits & 0xFF) % linear::kLargestWeight);
    return bits >> 31 ? -magnitude : magnitude;
  }
  // One in eight is any of them: zeros, subnormal ones, the largest. The others are of seven
  // binades around 1, so that no element is lost beside another one.
  const std::uint32_t any = (bits >> 8) % 0x7F, usual = 0x20 + (bits >> 8) % 0x38;
  return to_float(e4m3{std::uint8_t((bits & 0x80) | (bits >> 29 == 0 ? any : usual))});
}

// Two e2m1 that are not zero.
double drawn_pair(const DataRegime&, std::uint32_t bits, std::int64_t, std::int64_t) {
  const std::uint32_t low = 1 + (bits & 0xFF) % 7, high = 1 + (bits >> 8 & 0xFF) % 7;
  return double(low | (bits >> 16 & 1) << 3 | high << 4 | (bits >> 17 & 1) << 7);
}

double drawn_word(const DataRegime&, std::uint32_t bits, std::int64_t, std::int64_t) {
  return double(std::int32_t(bits));
}

// A scale as e4m3, away from the ends.
double drawn_group_scale(const DataRegime& g, std::uint32_t bits, std::int64_t row,
                         std::int64_t col) {
  const int step = int((std::uint64_t(row + 2 * col) + g.seed) % 4);
  if (g.fill == Fill::exact) return power_of_two(step);
  // A block of zeros, or of next to nothing, may have a scale of zero, or a subnormal one.
  if (bits >> 26 == 0) return to_float(e4m3{std::uint8_t(bits & 7)});
  return to_float(e4m3{std::uint8_t(0x28 + 8 * step + (bits & 7))});
}

// Element `i` of a tensor, which a file may hold at any address.
double element(const StoredTensor& t, DType type, std::int64_t i) {
  alignas(8) std::byte copy[8];
  std::memcpy(copy, t.data + i * size_of(type), std::size_t(size_of(type)));
  return load(type, copy, 0);
}

// The group of a column in act-order: anywhere.
std::int64_t group_of_column(const Case& c, const Layer& layer, std::int64_t k) {
  const std::int64_t group = format_of(c).block_cols, groups = ceil_div(layer.in_features, group);
  if (c.options.at("act_order") == 0) return k / group;
  if (layer_in_file(c)) {
    const std::string name =
        prefixes(c, layer).front() + "." + tensor_names(format_of(c)).group_of_column;
    return std::int64_t(element(user_checkpoint()->at(name), DType::i32, k));
  }
  return std::int64_t((std::uint64_t(k) * 7 + c.seed % 1024) % std::uint64_t(groups));
}

// A tensor of a checkpoint, and the shape that the file gives it.
struct InFile {
  TensorSpec spec;
  std::vector<std::int64_t> shape;
  bool may_be_flat = false;  // [rows] instead of [rows, 1], as it pleases the writer
};

// A scale has no dimensions, or one of one element, as different writers have it.
std::vector<std::int64_t> scalar_shape(const Case& c, const std::string& name) {
  switch ((stream_of(name) + c.seed) % 3) {
    case 0:
      return {};
    case 1:
      return {1};
    default:
      return {1, 1};
  }
}

// Everything stored under one prefix. `index`: which of the layer's stored tensors it is.
std::vector<InFile> tensors_of(const Case& c, const Layer& layer, const std::string& prefix,
                               std::int64_t rows, std::int64_t index, bool bias) {
  const QuantFormat f = format_of(c);
  const TensorNames names = tensor_names(f);
  const std::int64_t in = layer.in_features;
  const auto named = [&](const std::string& suffix) { return prefix + "." + suffix; };
  std::vector<InFile> all;
  const auto add = [&](TensorSpec spec, std::vector<std::int64_t> shape) {
    all.push_back({std::move(spec), std::move(shape)});
  };
  const auto matrix = [&](const std::string& suffix, DType dtype, std::int64_t height,
                          std::int64_t width, auto drawn) {
    TensorSpec t{named(suffix), dtype, height, width, Role::weight};
    t.drawn = drawn;
    add(std::move(t), {height, width});
  };
  switch (f.scheme) {
    case Scheme::none:
      add(linear::tensor(c, named(names.weight), rows, in, Role::weight, linear::kLargestWeight),
          {rows, in});
      break;
    case Scheme::fp8_tensor:
    case Scheme::fp8_channel:
    case Scheme::fp8_block:
      matrix(names.weight, DType::e4m3, rows, in, drawn_code);
      break;
    case Scheme::nvfp4: {
      const std::int64_t groups = ceil_div(in, kNvfp4Group);
      matrix(names.weight, DType::u8, rows, ceil_div(in, 2), drawn_pair);
      matrix(names.scale, DType::e4m3, rows, groups, drawn_group_scale);
      add(scales(named(names.global_scale), DType::f32, 1, 1, 0.06, index, names.global_is_inverse),
          scalar_shape(c, named(names.global_scale)));
      break;
    }
    case Scheme::gptq: {
      const std::int64_t groups = ceil_div(in, f.block_cols);
      matrix(names.weight, DType::i32, in / kWord, rows, drawn_word);
      add(scales(named(names.scale), DType::f16, groups, rows, 0.06, index), {groups, rows});
      // The zero point 8 of symmetric codes, less one as AutoGPTQ stores it.
      matrix(names.zeros, DType::i32, groups, ceil_div(rows, kWord),
             [](const DataRegime&, std::uint32_t, std::int64_t, std::int64_t) {
               return double(0x77777777);
             });
      TensorSpec order{named(names.group_of_column), DType::i32, 1, in, Role::weight};
      order.value = [c, layer](const DataRegime&, std::int64_t, std::int64_t k) {
        return double(group_of_column(c, layer, k));
      };
      add(std::move(order), {in});
      break;
    }
  }
  if (f.scheme == Scheme::fp8_tensor) {
    add(scales(named(names.scale), DType::f32, 1, 1, 0.06, index),
        scalar_shape(c, named(names.scale)));
  } else if (f.scheme == Scheme::fp8_channel) {
    const bool flat = f.dialect == Dialect::modelopt;
    add(scales(named(names.scale), DType::f32, rows, 1, 0.06, index),
        flat ? std::vector{rows} : std::vector{rows, std::int64_t{1}});
    all.back().may_be_flat = true;
  } else if (f.scheme == Scheme::fp8_block) {
    const std::int64_t down = ceil_div(rows, f.block_rows), across = ceil_div(in, f.block_cols);
    add(scales(named(names.scale), DType::f32, down, across, 0.06, index), {down, across});
  }
  if (f.activations == Activations::fixed) {
    // Dense activations are some units large: of the largest ones, some are beyond 448 of these.
    add(scales(named(names.input_scale), DType::f32, 1, 1, 0.006, index, names.global_is_inverse),
        scalar_shape(c, named(names.input_scale)));
  }
  if (bias) {
    TensorSpec elements =
        linear::tensor(c, named("bias"), 1, rows, Role::weight, linear::kLargestBias);
    add(std::move(elements), {rows});
  }
  return all;
}

std::vector<InFile> checkpoint_of(const Case& c, const Layer& layer, bool bias) {
  const std::vector<std::string> stored = prefixes(c, layer);
  std::vector<InFile> all;
  for (std::size_t i = 0; i < stored.size(); ++i) {
    const std::int64_t rows = is_fused(c, layer) ? fused_rows(c, layer).total() : layer.rows[i];
    for (InFile& t : tensors_of(c, layer, stored[i], rows, std::int64_t(i), bias))
      all.push_back(std::move(t));
  }
  return all;
}

// The tensor of the user's checkpoint that `t` is. Throws BadInput if it is another.
const StoredTensor& stored_as(const InFile& t) {
  const Checkpoint& checkpoint = *user_checkpoint();
  const StoredTensor* found = checkpoint.find(t.spec.name);
  if (t.may_be_flat && found != nullptr && found->shape.size() == 1)
    return checkpoint.at(t.spec.name, t.spec.dtype, {t.spec.rows});
  if (t.may_be_flat)
    return checkpoint.at(t.spec.name, t.spec.dtype, {t.spec.rows, std::int64_t{1}});
  return checkpoint.at(t.spec.name, t.spec.dtype, t.shape);
}

// The case's tensors as the user's checkpoint has them.
std::vector<InFile> tensors_in_file(const Case& c, const Layer& layer, bool bias) {
  std::vector<InFile> all = checkpoint_of(c, layer, bias);
  for (InFile& t : all) {
    const StoredTensor& stored = stored_as(t);
    t.shape = stored.shape;
    t.spec.drawn = {};
    t.spec.value = [&stored, type = t.spec.dtype, cols = t.spec.cols](
                       const DataRegime&, std::int64_t row, std::int64_t col) {
      return element(stored, type, row * cols + col);
    };
  }
  return all;
}

// ---- What a rank has.

// Where a rank's columns are: plain arithmetic, and nothing that is under test.
LocalColumns columns_of(const Case& c, const Layer& layer, int tp_rank) {
  const std::int64_t size =
      layer.cuts_columns() ? div_exact(layer.in_features, c.tp_size) : layer.in_features;
  return {{layer.cuts_columns() ? tp_rank * size : 0, size}, c.tp_size, tp_rank};
}
// Those that it loads under these rules.
LocalColumns loaded_columns(const Case& c, const Layer& layer, int tp_rank,
                            const ShardingRules& rules) {
  LocalColumns columns = columns_of(c, layer, tp_rank);
  if (layer.cuts_columns()) columns.own = layer.columns(rules, tp_rank);
  return columns;
}

std::vector<Shard> own_rows(const Layer& layer, int tp_rank) {
  return layer.taken(sharding_rules(), tp_rank);
}

// How a rank's weight is laid out.
struct Places {
  std::vector<std::int64_t> first;  // row of each part
  std::int64_t rows = 0;
  std::vector<Shard> padding;
};
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
// Rows of padding on all ranks together: the tensor that they are judged as.
std::int64_t padding_rows(const Case& c, const Layer& layer) {
  std::int64_t sum = 0;
  for (const Shard& run : places_of(layer, 0).padding) sum += run.size;
  return sum * c.tp_size;
}

// Groups of `group` columns that a rank's own columns touch.
Shard touched(const LocalColumns& columns, std::int64_t group) {
  const std::int64_t first = columns.own.offset / group;
  return {first, ceil_div(columns.own.end(), group) - first};
}

// A tensor that each part has one of, cut as the parts' rows are: rows of the tensor, or its
// columns where it is stored that way round.
struct Kind {
  std::string buffer;
  std::string suffix;  // of the tensors' names, behind the part's
  DType dtype = DType::f32;
  std::int64_t other = 1;  // the tensor's other dimension
  bool rows_are_columns = false;
  Shard own = {};  // of the other dimension, on this rank
};

std::string tensor_name(const Layer& layer, const Kind& kind, std::size_t part) {
  if (kind.buffer == "bias") return layer.biases[part];
  return layer.parts[part] + kind.suffix;
}

std::string padding_name(const Kind& kind) { return kind.buffer + ".padding"; }

// Of each part, and last, if there is any, the padding on all ranks: as wide as the first rank's.
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

// The scales that are not slots; nothing: there are none.
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

// What the product multiplies with: the weight as it was loaded, or what was made of it.
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

bool has_slots(const Case& c) {
  const Scheme s = format_of(c).scheme;
  return s == Scheme::fp8_tensor || s == Scheme::nvfp4;
}
bool has_fixed_scale(const Case& c) { return format_of(c).activations == Activations::fixed; }
bool quantises(const Case& c) { return format_of(c).activations != Activations::plain; }

// A small tensor that all ranks have whole.
TensorSpec shared(const std::string& name, std::int64_t cols) {
  return {name, DType::f32, 1, cols, Role::weight};
}
LocalBuffer shared_buffer(const std::string& name, std::int64_t cols, Use use) {
  return {name, use, DType::f32, 1, cols, {{name, {0, cols}}}};
}

// gptq: which of the rank's groups a column has.
TensorSpec groups_spec(const Layer& layer) {
  return {"groups", DType::i32, 1, layer.in_features, Role::weight};
}
LocalBuffer groups_buffer(const Case& c, const Layer& layer, Use use, int tp_rank) {
  const Shard own = columns_of(c, layer, tp_rank).own;
  return {"groups", use, DType::i32, 1, own.size, {{"groups", own}}};
}

bool is_gptq(const Case& c) { return format_of(c).scheme == Scheme::gptq; }

// ---- load

struct LoadOutputs {
  std::vector<TensorSpec> specs;
  std::vector<LocalBuffer> buffers;
};

// What ranks have after loading, as outputs of that stage or as inputs of a later one.
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

void run_load(RankRun& run, const Case& c, const Layer& layer, bool bias,
              const ShardingRules& rules) {
  const StoredLinear stored = stored_linear(c, layer, rules, run.group.tp_rank());
  try {
    run.checkpoint().check_unchanged();
    const WeightLoader loader(run.checkpoint(), stored, rules, run.stream);
    switch (stored.format.scheme) {
      case Scheme::none:
        dispatch(c.dtype, [&]<typename T>(T) { loader.weight(run.view<T>("weight")); });
        break;
      case Scheme::nvfp4:
        loader.weight(run.view<std::uint8_t>("weight"));
        loader.group_scales(run.view<e4m3>("scales"));
        break;
      case Scheme::gptq:
        loader.packed_columns(run.view<std::int32_t>("weight"));
        loader.group_scales(run.view<f16>("scales"));
        loader.groups(run.view<std::int32_t>("groups"));
        break;
      default:
        loader.weight(run.view<e4m3>("weight"));
        if (stored.format.scheme != Scheme::fp8_tensor)
          loader.row_scales(run.view<float>("scales"));
        break;
    }
    if (has_slots(c)) loader.slots(run.view<float>("slots"));
    if (has_fixed_scale(c)) loader.input_slots(run.view<float>("input_slots"));
    if (bias) dispatch(c.dtype, [&]<typename T>(T) { loader.bias(run.view<T>("bias")); });
    run.stream.synchronize();
    run.checkpoint().check_unchanged();  // while it was read
  } catch (const BadInput& e) {
    // A file that was made for the case is legal, so it is the loader that is wrong.
    const bool is_users = c.options.at("layer") > 0;
    throw Fault{is_users ? Outcome::Refused : Outcome::BadLaunch, e.what(), run.group.tp_rank()};
  }
}

// What is right, from the tensors as they are stored.
class LoadReference {
 public:
  LoadReference(const Case& c, const Layer& layer, const WholeInputs& in)
      : c_(c),
        layer_(layer),
        in_(in),
        names_(tensor_names(format_of(c))),
        prefixes_(prefixes(c, layer)) {}

  std::vector<Budget> budgets(bool bias) const {
    const QuantFormat f = format_of(c_);
    std::vector<Budget> all;
    const auto of_parts = [&](const std::string& suffix, bool by_columns, std::int64_t per = 1) {
      for (std::size_t p = 0; p < layer_.parts.size(); ++p) {
        const Matrix& stored = in_[prefix(p) + "." + suffix];
        all.push_back(reference::exactly(by_columns ? reference::taken_columns(stored, rows(p))
                                                    : reference::taken_rows(stored, rows(p), per)));
      }
      if (const std::int64_t rows = padding_rows(c_, layer_); rows > 0)
        all.push_back(by_columns ? Budget(all.back().rows, rows) : Budget(rows, all.back().cols));
    };
    const bool is_columns = f.scheme == Scheme::gptq;
    of_parts(names_.weight, is_columns);
    if (f.scheme != Scheme::none && f.scheme != Scheme::fp8_tensor)
      of_parts(names_.scale, is_columns, f.scheme == Scheme::fp8_block ? f.block_rows : 1);
    if (bias) of_parts("bias", true);
    if (has_slots(c_)) {
      const bool global = f.scheme == Scheme::nvfp4;
      all.push_back(
          slots(global ? names_.global_scale : names_.scale, global && names_.global_is_inverse));
    }
    if (has_fixed_scale(c_)) all.push_back(slots(names_.input_scale, names_.global_is_inverse));
    if (is_columns) all.push_back(groups());
    return all;
  }

 private:
  std::string prefix(std::size_t part) const { return prefixes_[is_fused(c_, layer_) ? 0 : part]; }
  // The stored rows of a part.
  std::vector<std::int64_t> rows(std::size_t part) const {
    if (is_fused(c_, layer_))
      return reference::rows_of_matrix(layer_.rows, fused_rows(c_, layer_).stripes, part);
    return reference::rows_of_matrix({layer_.rows[part]}, 1, 0);
  }
  Budget slots(const std::string& suffix, bool is_inverse) const {
    Budget all(1, std::int64_t(layer_.parts.size()));
    for (std::size_t p = 0; p < layer_.parts.size(); ++p) {
      const double stored = in_[prefix(p) + "." + suffix].values[0];
      all.r[p] = is_inverse ? double(1.0f / float(stored)) : stored;
    }
    return all;
  }
  // A rank counts its groups from the first that it has.
  Budget groups() const {
    Budget all = reference::exactly(in_[prefix(0) + "." + names_.group_of_column]);
    if (c_.options.at("act_order") == 1) return all;
    const std::int64_t width =
        layer_.cuts_columns() ? layer_.in_features / c_.tp_size : layer_.in_features;
    for (std::int64_t k = 0; k < layer_.in_features; ++k)
      all.r[std::size_t(k)] -= double(k / width * width / format_of(c_).block_cols);
    return all;
  }

  const Case& c_;
  const Layer& layer_;
  const WholeInputs& in_;
  TensorNames names_;
  std::vector<std::string> prefixes_;
};

Stage load_stage(const Case& c, const Layer& layer, const std::vector<TensorSpec>& biases,
                 const ShardingRules& rules, const Variation& variation) {
  const bool bias = !biases.empty();
  Stage stage{.name = "load"};
  // Which file has which tensor, and where in it, is nothing to any rank.
  const bool other_order = variation.law == "files";
  const std::int64_t files = other_order ? 5 - c.options.at("files") : c.options.at("files");
  const bool from_file = layer_in_file(c).has_value();
  if (from_file) stage.checkpoint = user_checkpoint();
  std::vector<InFile> all =
      from_file ? tensors_in_file(c, layer, bias) : checkpoint_of(c, layer, bias);
  if (other_order) std::reverse(all.begin(), all.end());
  for (std::size_t i = 0; i < all.size(); ++i) {
    stage.stored.push_back({all[i].spec.name, all[i].shape,
                            int(std::min<std::int64_t>(files, std::int64_t(all.size())) *
                                std::int64_t(i) / std::int64_t(all.size()))});
    stage.inputs.push_back(std::move(all[i].spec));
  }
  stage.outputs = loaded(c, layer, bias, Use::output, 0).specs;
  stage.buffers = [=](int tp_rank) { return loaded(c, layer, bias, Use::output, tp_rank).buffers; };
  stage.run = [=](RankRun& run) { run_load(run, c, layer, bias, rules); };
  stage.reference = [=](const WholeInputs& in) {
    return LoadReference(c, layer, in).budgets(bias);
  };
  return stage;
}

// ---- prepare

std::vector<std::int32_t> slots_of_rows(const Layer& layer, int tp_rank) {
  std::vector<std::int32_t> slots;
  const std::vector<Shard> rows = own_rows(layer, tp_rank);
  const Places places = places_of(layer, tp_rank);
  slots.resize(std::size_t(places.rows));  // padding has the first one's
  for (std::size_t p = 0; p < rows.size(); ++p)
    std::fill_n(slots.begin() + places.first[p], rows[p].size, std::int32_t(p));
  return slots;
}

bool has_weight_scale(const Case& c) { return format_of(c).scheme == Scheme::fp8_tensor; }

bool is_prepared(const Case& c, const Layer& layer) {
  return prepared_kind(c, layer, 0).has_value() || has_fixed_scale(c);
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

// ---- quantise

// Scales of activations that a call makes: of each rank's own columns where these are cut.
struct ScaleColumns {
  std::int64_t rows = 1;  // tokens, or 1
  std::vector<Shard> of_rank;
  std::int64_t total = 0;
};
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
bool makes_scales(const Case& c) { return quantises(c) && !has_fixed_scale(c); }

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
// The tokens that a rank has of x before it is gathered: all, or an equal share.
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

// Where the rank's first column lies in its group, as the rank has it.
std::int64_t first_column(const Case& c, const Layer& layer, const ShardingRules& rules,
                          int tp_rank) {
  return rules.loader.first_group(columns_of(c, layer, tp_rank), format_of(c).block_cols).column;
}

// Ranks have some of the tokens each, quantise them, and gather the codes.
template <typename T>
void run_gathered(RankRun& run, const Case& c, View<const T> x, const ShardingRules& rules) {
  const View<e4m3> mine = run.view<e4m3>("own_codes");
  const View<float> scale = run.view<float>("x_scale");
  if (format_of(c).activations == Activations::token) {
    const View<float> own = run.view<float>("own_scales");
    quantise_token(x, mine, own.data, run.stream);
    run.group.all_gather(own.data, scale.data, own.rows, run.stream);
  } else {
    float* largest = run.view<float>("largest").data;
    absolute_maximum(x, largest, run.stream);
    if (rules.quant.gathered_scale == GatheredScale::of_all)
      run.group.all_reduce_max(largest, 1, run.stream);
    quantise_by_maximum(x, largest, mine, scale.data, run.stream);
    if (rules.quant.gathered_scale == GatheredScale::of_rank_0)
      run.group.broadcast(scale.data, 1, 0, run.stream);
  }
  run.group.all_gather(mine.data, run.view<e4m3>("x_codes").data, mine.rows * mine.cols,
                       run.stream);
}

void run_quantise(RankRun& run, const Case& c, const Layer& layer, const ShardingRules& rules) {
  const QuantFormat f = format_of(c);
  const View<e4m3> codes = run.view<e4m3>("x_codes");
  dispatch(c.dtype, [&]<typename T>(T) {
    const View<const T> x = run.view<T>("x").columns(0, codes.cols);
    if (is_gathered(c)) return run_gathered<T>(run, c, x, rules);
    switch (f.activations) {
      case Activations::fixed:
        quantise_fixed(x, run.view<float>("input_scale").data, codes, run.stream);
        break;
      case Activations::tensor: {
        const View<float> maximum = run.view<float>("largest");
        absolute_maximum(x, maximum.data, run.stream);
        quantise_by_maximum(x, maximum.data, codes, run.view<float>("x_scale").data, run.stream);
        break;
      }
      case Activations::token:
        quantise_token(x, codes, run.view<float>("x_scale").data, run.stream);
        break;
      default:
        quantise_token_groups(x, f.block_cols, first_column(c, layer, rules, run.group.tp_rank()),
                              codes, run.view<float>("x_scale"), run.stream);
        break;
    }
  });
}

// Puts `part` into columns [first, ...) of `whole`.
void put(const Budget& part, std::int64_t first, Budget& whole) {
  for (std::int64_t i = 0; i < part.rows; ++i) {
    for (std::int64_t j = 0; j < part.cols; ++j) {
      whole.r[std::size_t(i * whole.cols + first + j)] = part.r[std::size_t(i * part.cols + j)];
      whole.rho[std::size_t(i * whole.cols + first + j)] = part.rho[std::size_t(i * part.cols + j)];
    }
  }
}

Matrix matrix_of(const Budget& b) {
  Matrix m(b.rows, b.cols);
  m.values = b.r;
  return m;
}
// The factors of a rank's activations: of its part of x_scale, or the one that was known.
reference::Factors x_factors(const Case& c, const Layer& layer, const Matrix& values, int tp_rank) {
  const QuantFormat f = format_of(c);
  if (f.activations != Activations::token_groups) return {.values = &values};
  return {.values = &values,
          .cols_per = f.block_cols,
          .first_col = columns_of(c, layer, tp_rank).own.offset % f.block_cols};
}

std::vector<Budget> quantise_reference(const Case& c, const Layer& layer, const WholeInputs& in) {
  const QuantFormat f = format_of(c);
  const Matrix& x = in["x"];
  const ScaleColumns columns = scale_columns(c, layer);
  Budget codes(x.rows, x.cols), scales(columns.rows, std::max<std::int64_t>(1, columns.total));
  for (int rank = 0; rank < (layer.cuts_columns() ? c.tp_size : 1); ++rank) {
    const Shard own = columns_of(c, layer, rank).own;
    const Matrix part = reference::columns(x, own.offset, own.size);
    Matrix values(1, 1);
    if (f.activations == Activations::fixed) {
      values.values[0] = in["input_scale"].values[0];
    } else {
      Budget made(1, 1);
      if (f.activations == Activations::tensor) {
        made.r[0] = reference::scale_of(reference::absolute_maximum(part));
      } else {
        const bool groups = f.activations == Activations::token_groups;
        made = reference::token_scales(part, groups ? f.block_cols : part.cols,
                                       groups ? own.offset % f.block_cols : 0);
      }
      put(made, columns.of_rank[std::size_t(rank)].offset, scales);
      values = matrix_of(made);
    }
    put(reference::quantised(part, x_factors(c, layer, values, rank)), own.offset, codes);
  }
  std::vector<Budget> all = {codes};
  if (makes_scales(c)) all.push_back(scales);
  return all;
}

Stage quantise_stage(const Case& c, const Layer& layer, const TensorSpec& x,
                     const ShardingRules& rules) {
  Stage stage{.name = "quantise"};
  stage.inputs = {x};
  if (has_fixed_scale(c)) stage.inputs.push_back(shared("input_scale", 1));
  stage.outputs = {codes_spec(x)};
  if (makes_scales(c)) stage.outputs.push_back(x_scale_spec(c, layer));
  stage.buffers = [=](int tp_rank) {
    std::vector<LocalBuffer> all = {x_buffer(c, layer, tp_rank),
                                    codes_buffer(c, layer, Use::output, tp_rank)};
    if (has_fixed_scale(c)) all.push_back(shared_buffer("input_scale", 1, Use::input));
    if (makes_scales(c)) all.push_back(x_scale_buffer(c, layer, Use::output, tp_rank));
    if (format_of(c).activations == Activations::tensor)
      all.push_back({"largest", Use::workspace, DType::f32, 1, 1});
    if (is_gathered(c)) {
      const std::int64_t share = own_tokens(c, tp_rank).size;
      all.push_back({"own_codes", Use::workspace, DType::e4m3, share, x.cols});
      all.push_back({"own_scales", Use::workspace, DType::f32, share, 1});
    }
    return all;
  };
  stage.run = [=](RankRun& run) { run_quantise(run, c, layer, rules); };
  stage.reference = [=](const WholeInputs& in) { return quantise_reference(c, layer, in); };
  return stage;
}

// A weight before it meets activations, and what its products are multiplied with then.
struct Dequantised {
  Matrix values;
  Matrix scales{1, 1};
  reference::Factors factors;
};

}  // namespace

namespace {

// What is drawn beside the keys before: else the rarer formats would hardly ever be.
bool quant_fits(const Case& c, std::int64_t scheme) {
  const bool is_packed = Scheme(scheme) == Scheme::nvfp4 || Scheme(scheme) == Scheme::gptq;
  return scheme == 0 || (is_loaded(c) && !(is_packed && c.dtype == DType::f32));
}
QuantFormat drawn_format(const Case& c, Dialect dialect, Activations activations) {
  const auto scheme = Scheme(c.options.at("quant"));
  return {.scheme = scheme,
          .dialect = dialect,
          .activations = activations,
          .block_cols = scheme == Scheme::nvfp4 ? kNvfp4Group : 128};
}
bool dialect_fits(const Case& c, std::int64_t dialect) {
  if (c.options.at("quant") == 0) return dialect == 0;
  return !illegal(drawn_format(c, Dialect(dialect), Activations::plain));
}
bool activations_fit(const Case& c, std::int64_t activations) {
  const QuantFormat f = drawn_format(c, Dialect(c.options.at("dialect")), Activations(activations));
  const bool is_plain = f.activations == Activations::plain;
  if (f.scheme == Scheme::none || f.scheme == Scheme::nvfp4) return is_plain;
  return !illegal(f) && !(is_plain && c.dtype == DType::f32);
}
bool act_order_fits(const Case& c, std::int64_t on) {
  return on == 0 || Scheme(c.options.at("quant")) == Scheme::gptq;
}
bool gather_fits(const Case& c, std::int64_t on) {
  const auto a = Activations(c.options.at("activations"));
  return on == 0 ||
         ((a == Activations::tensor || a == Activations::token) && c.num_tokens % c.tp_size == 0);
}
bool files_fit(const Case& c, std::int64_t files) { return files == 1 || is_loaded(c); }

}  // namespace

std::vector<Key> keys(bool can_be_fused) {
  Key weights{.name = "weights",
              .help =
                  "where weights come from: they are there, or a checkpoint has them matrix by "
                  "matrix",
              .min = 0,
              .max = 1,
              .words = {"given", "split"},
              .weights = {20, 80}};
  if (can_be_fused) {
    weights.help += ", fused one below the other, or fused in stripes";
    weights.max = 3;
    weights.words = {"given", "split", "fused", "striped"};
    weights.weights = {20, 25, 30, 25};
  }
  std::vector<Key> all = {
      weights,
      {.name = "quant",
       .help = "how the weights are quantised",
       .min = 0,
       .max = 5,
       .words = words(kSchemeWords, std::size(kSchemeWords)),
       .weights = {15, 22, 14, 19, 17, 13},
       .fits = quant_fits},
      {.name = "dialect",
       .help = "whose names, shapes and senses the quantised tensors have",
       .min = 0,
       .max = 2,
       .words = words(kDialectWords, std::size(kDialectWords)),
       .fits = dialect_fits},
      {.name = "activations",
       .help = "what is multiplied with quantised weights: activations as they are, or codes and a "
               "scale that is known, or made of the call, of each token, of each block of it",
       .min = 0,
       .max = 4,
       .words = words(kActivationsWords, std::size(kActivationsWords)),
       .weights = {20, 20, 25, 15, 20},
       .fits = activations_fit},
      {.name = "act_order",
       .help = "1: gptq's groups of columns are in any order",
       .min = 0,
       .max = 1,
       .words = {"0", "1"},
       .fits = act_order_fits},
      {.name = "block",
       .help = "rows and columns of a block of fp8_block, columns of a group of gptq",
       .min = 0,
       .max = 3,
       .fallback = 3,
       .words = {"16", "32", "64", "128"},
       .shrink = Shrink::to_fallback},
      {.name = "files",
       .help = "files that a checkpoint is spread over",
       .min = 1,
       .max = 4,
       .fallback = 1,
       .words = {"1", "2", "3", "4"},
       .fits = files_fit},
      {.name = "layer",
       .help =
           "0: tensors made from the seed; k: those of layer k-1 of the checkpoint that the run "
           "was given (--model DIR)",
       .min = 0,
       .max = 1 << 16,
       .is_drawn = false}};
  // Row-parallel layers have all tokens on each rank.
  if (can_be_fused) {
    all.push_back({.name = "gather",
                   .help = "1: ranks have a share of the tokens each, and gather the codes of them",
                   .min = 0,
                   .max = 1,
                   .words = {"0", "1"},
                   .weights = {40, 60},
                   .fits = gather_fits});
  }
  return all;
}

void mark_keys_of_checkpoint(std::vector<Key>& keys) {
  static const std::set<std::string> names = {"hidden_size",
                                              "num_heads",
                                              "num_kv_heads",
                                              "head_dim",
                                              "v_head_dim",
                                              "in_per_rank",
                                              "intermediate_per_rank",
                                              "dtype",
                                              "bias",
                                              "dialect",
                                              "activations",
                                              "act_order",
                                              "block",
                                              "files",
                                              "layer",
                                              "module",
                                              "quant",
                                              "weights",
                                              "output_gate"};
  for (Key& key : keys) key.of_checkpoint = names.contains(key.name);
}

bool is_loaded(const Case& c) { return weights_of(c) != Weights::given; }
bool is_quantised(const Case& c) { return format_of(c).scheme != Scheme::none; }
bool is_gathered(const Case& c) {
  const auto key = c.options.find("gather");
  return key != c.options.end() && key->second == 1;
}

QuantFormat format_of(const Case& c) {
  const auto option = [&](const char* name) { return c.options.at(name); };
  QuantFormat f{.scheme = Scheme(option("quant")),
                .dialect = Dialect(option("dialect")),
                .activations = Activations(option("activations"))};
  f.block_rows = f.block_cols = 16 << option("block");
  if (f.scheme == Scheme::nvfp4) f.block_cols = kNvfp4Group;
  return f;
}

// ---- The user's checkpoint.

namespace {

// How the config says that the linear is stored, which is in one way. Throws BadInput.
QuantFormat format_in_config(const FileLinear& linear) {
  const Quantization& quantization = user_model()->quantization;
  const QuantFormat first = quantization.format_of(linear.modules.front());
  for (const std::string& module : linear.modules) {
    const QuantFormat f = quantization.format_of(module);
    if (f == first) continue;
    throw BadInput(fmt::format("{}: {} is {}, but {} is {}: what is fused is quantised in one way",
                               user_checkpoint()->path(), linear.modules.front(),
                               kSchemeWords[int(first.scheme)], module,
                               kSchemeWords[int(f.scheme)]));
  }
  return first;
}

bool has_bias_in_file(const FileLinear& linear) {
  return std::any_of(linear.modules.begin(), linear.modules.end(), [](const std::string& module) {
    return user_checkpoint()->find(module + ".bias") != nullptr;
  });
}

// Whether the groups of gptq's columns are anywhere.
bool is_act_order(const FileLinear& linear, const QuantFormat& f) {
  if (f.scheme != Scheme::gptq) return false;
  const StoredTensor* order =
      user_checkpoint()->find(linear.modules.front() + "." + tensor_names(f).group_of_column);
  if (order == nullptr || order->type() != DType::i32) return false;
  for (std::int64_t k = 0; k < order->elements(); ++k) {
    if (element(*order, DType::i32, k) != double(k / f.block_cols)) return true;
  }
  return false;
}

// In which of its two senses the case takes what the config says of activations: whoever has no
// product of codes dequantises, and nobody here has one of nvfp4.
Activations activations_in_file(const QuantFormat& f) {
  return f.scheme == Scheme::nvfp4 ? Activations::plain : f.activations;
}

// Why the format of the case is not that of the file; nothing if it is.
std::optional<std::string> other_format(const Case& c, const FileLinear& linear) {
  const QuantFormat mine = format_of(c), stored = format_in_config(linear);
  const std::string& module = linear.modules.front();
  const auto differ = [&](const char* key, std::string_view case_has, std::string_view file_has) {
    return fmt::format("{} is {}, and the case has {}={}", module, file_has, key, case_has);
  };
  if (mine.scheme != stored.scheme)
    return differ("quant", kSchemeWords[int(mine.scheme)], kSchemeWords[int(stored.scheme)]);
  if (stored.scheme == Scheme::none) return std::nullopt;
  if (mine.dialect != stored.dialect)
    return differ("dialect", kDialectWords[int(mine.dialect)], kDialectWords[int(stored.dialect)]);
  if (mine.activations != Activations::plain && mine.activations != stored.activations)
    return differ(
        "activations", kActivationsWords[int(mine.activations)],
        fmt::format("multiplied with activations {}", kActivationsWords[int(stored.activations)]));
  const bool blocks = stored.scheme == Scheme::fp8_block, groups = stored.scheme == Scheme::gptq;
  if ((blocks && mine.block_rows != stored.block_rows) ||
      ((blocks || groups) && mine.block_cols != stored.block_cols)) {
    return differ("block", std::to_string(mine.block_cols),
                  blocks ? fmt::format("in blocks of {} x {}", stored.block_rows, stored.block_cols)
                         : fmt::format("in groups of {}", stored.block_cols));
  }
  if (groups && is_act_order(linear, stored) != (c.options.at("act_order") == 1))
    return differ("act_order", std::to_string(c.options.at("act_order")),
                  is_act_order(linear, stored) ? "in act-order" : "in the order of its columns");
  return std::nullopt;
}

// Throws BadInput where the user's checkpoint has not the tensors that the case needs.
void check_tensors(const Case& c, const Layer& layer) {
  for (const InFile& t : checkpoint_of(c, layer, linear::has_bias(c))) stored_as(t);
}

std::optional<std::string> why_not_in_file(const Case& c, const Layer& layer, int number) {
  const Checkpoint* checkpoint = user_checkpoint();
  if (checkpoint == nullptr) return "it is of a checkpoint, and the run has none (--model DIR)";
  const auto& linears = file_linears(layer.kind);
  const auto found = linears.find(number);
  if (found == linears.end())
    return fmt::format("{} has no {} in its layer {}", checkpoint->path(), usual_names(layer.kind),
                       number);
  const FileLinear& linear = found->second;
  const bool fused = linear.modules.size() < layer.parts.size();
  if (!is_loaded(c) || fused != is_fused(c, layer))
    return fmt::format("the checkpoint has {}, which weights={} is not", linear.modules.front(),
                       is_loaded(c) ? (fused ? "split" : "fused") : "given");
  if (c.options.at("files") != 1) return "its tensors are in files of their own, as files=1 has it";
  if (auto why = other_format(c, linear)) return why;
  if (!linear::has_bias(c) && has_bias_in_file(linear))
    return fmt::format("{} has a bias, and the case bias=none", linear.modules.front());
  check_tensors(c, layer);
  return std::nullopt;
}

// Why the case is not one on the user's checkpoint, though it says so.
std::optional<std::string> refuse_file(const Case& c, const Layer& layer) {
  const auto number = layer_in_file(c);
  if (!number) return std::nullopt;
  std::optional<std::string> why;
  try {
    why = why_not_in_file(c, layer, *number);
  } catch (const BadInput& e) {
    why = e.what();
  }
  if (why) why = fmt::format("layer={}: {}", c.options.at("layer"), *why);
  return why;
}

// Throws BadInput for a scale that is none: as WeightLoader does, which meets it later.
void check_scales(const InFile& t) {
  const StoredTensor& stored = stored_as(t);
  const bool codes = t.spec.dtype == DType::e4m3;  // blocks of zeros may have one of zero
  for (std::int64_t i = 0; i < t.spec.rows * t.spec.cols; ++i) {
    const double scale = element(stored, t.spec.dtype, i);
    if (std::isfinite(scale) && (scale > 0 || (codes && scale == 0))) continue;
    throw BadInput(fmt::format("{}: {}, element {} is {}, but a scale is positive and finite",
                               user_checkpoint()->path_of(stored), stored.name, i, scale));
  }
}

// gptq's zero points must be those of symmetric codes, which is all that kernels take, and the
// groups some of those there are.
void check_integers(const InFile& t, std::int64_t least, std::int64_t most) {
  const StoredTensor& stored = stored_as(t);
  for (std::int64_t i = 0; i < t.spec.rows * t.spec.cols; ++i) {
    const double value = element(stored, DType::i32, i);
    if (double(least) <= value && value <= double(most)) continue;
    throw BadInput(fmt::format("{}: {}, element {} is {}, but known is {} .. {}",
                               user_checkpoint()->path_of(stored), stored.name, i, value, least,
                               most));
  }
}

// Matrices that are multiplied with one input have one order of its columns: that of the first.
void check_order(const InFile& t, const Layer& layer, const std::string& first) {
  const StoredTensor &mine = stored_as(t), &theirs = user_checkpoint()->at(first);
  for (std::int64_t k = 0; k < layer.in_features; ++k) {
    const double a = element(mine, DType::i32, k), b = element(theirs, DType::i32, k);
    if (a == b) continue;
    throw BadInput(fmt::format("{}: {}, element {} is {}, and of {} it is {}",
                               user_checkpoint()->path_of(mine), mine.name, k, a, first, b));
  }
}

// All values of the layer but codes and biases.
void check_values(const Case& c, const Layer& layer) {
  const QuantFormat f = format_of(c);
  const TensorNames names = tensor_names(f);
  const std::set<std::string> scales = {names.scale, names.global_scale, names.input_scale};
  for (const InFile& t : checkpoint_of(c, layer, false)) {
    const std::string suffix = t.spec.name.substr(t.spec.name.rfind('.') + 1);
    if (scales.contains(suffix)) check_scales(t);
    if (suffix == names.zeros) check_integers(t, 0x77777777, 0x77777777);
    if (suffix != names.group_of_column) continue;
    check_integers(t, 0, ceil_div(layer.in_features, f.block_cols) - 1);
    check_order(t, layer, prefixes(c, layer).front() + "." + suffix);
  }
}

// Rows and columns of the matrices in a stored module, whatever else is wrong with it.
struct Size {
  std::int64_t rows = 0, cols = 0;
};
Size size_in_file(const std::string& module) {
  const Checkpoint& checkpoint = *user_checkpoint();
  for (const auto& [suffix, packed] : {std::pair{".weight", 1}, {".weight_packed", 2}}) {
    const StoredTensor* t = checkpoint.find(module + suffix);
    if (t == nullptr || t->shape.size() != 2) continue;
    return {t->shape[0], t->shape[1] * (t->type() == DType::u8 ? 2 : packed)};
  }
  const StoredTensor* t = checkpoint.find(module + ".qweight");
  if (t == nullptr || t->shape.size() != 2) return {};
  return {t->shape[1], kWord * t->shape[0]};
}

// Between up and down projection of a layer; 1 where the checkpoint does not say.
std::int64_t width_in_file(int number) {
  const auto& ups = file_linears(LinearKind::gate_up);
  if (const auto up = ups.find(number); up != ups.end()) {
    for (const std::string& module : up->second.modules) {
      const std::int64_t rows = size_in_file(module).rows;
      if (rows > 0)
        return up->second.modules.size() == 1 ? std::max<std::int64_t>(1, rows / 2) : rows;
    }
  }
  const auto& downs = file_linears(LinearKind::mlp_out);
  const auto down = downs.find(number);
  if (down == downs.end()) return 1;
  return std::max<std::int64_t>(1, size_in_file(down->second.modules.front()).cols);
}

DType dtype_in_file(const FileLinear& linear, const QuantFormat& f) {
  const char* suffix = f.scheme == Scheme::none ? ".weight" : ".bias";
  const StoredTensor* t = user_checkpoint()->find(linear.modules.front() + suffix);
  const auto type = t == nullptr ? std::nullopt : t->type();
  if (type == DType::f32 || type == DType::f16 || type == DType::bf16) return *type;
  return user_model()->dtype.value_or(DType::bf16);
}

// The case that a linear of the file is; the sentence why it cannot be cut into so many parts.
struct FileCase {
  Case c;
  std::optional<std::string> why_not;
};
FileCase case_of(const OfCheckpoint& of, std::size_t kind, int number, const FileLinear& linear,
                 int tp_size) {
  FileCase made{find_operator(of.op).blank(), std::nullopt};
  Case& c = made.c;
  const QuantFormat f = format_in_config(linear);
  c.tp_size = tp_size;
  c.dtype = dtype_in_file(linear, f);
  auto& options = c.options;
  options["layer"] = number + 1;
  if (options.contains("module")) options["module"] = std::int64_t(kind);
  options["quant"] = std::int64_t(f.scheme);
  options["dialect"] = std::int64_t(f.dialect);
  options["activations"] = std::int64_t(activations_in_file(f));
  const bool has_blocks = f.scheme == Scheme::fp8_block || f.scheme == Scheme::gptq;
  for (std::int64_t block = 0; block < 4; ++block) {
    if (has_blocks && f.block_cols == 16 << block) options["block"] = block;
  }
  options["act_order"] = is_act_order(linear, f);
  options["bias"] = has_bias_in_file(linear);
  made.why_not = of.set_shape(c, user_model()->shape, of.kinds[kind], width_in_file(number));
  Weights weights = Weights::split;
  if (linear.modules.size() < of.layer(c).parts.size())
    weights = linear.is_striped ? Weights::striped : Weights::fused;
  options["weights"] = std::int64_t(weights);
  return made;
}

// Where a fused q, k and v is something else, too.
bool is_other_attention(LinearKind kind) { return kind == LinearKind::qkv && user_model()->mla; }

}  // namespace

CheckpointCases checkpoint_cases(const OfCheckpoint& of, int tp_size) {
  CheckpointCases all;
  const Operator& op = find_operator(of.op);
  const auto leave_out = [&](const std::string& why) {
    if (all.left_out.empty()) all.left_out = why;
  };
  for (std::size_t kind = 0; kind < of.kinds.size(); ++kind) {
    if (is_other_attention(of.kinds[kind])) {
      leave_out("the model's attention is another one");
      continue;
    }
    if (file_linears(of.kinds[kind]).empty())
      leave_out(
          fmt::format("{} has no {}", user_checkpoint()->path(), usual_names(of.kinds[kind])));
    for (const auto& [number, linear] : file_linears(of.kinds[kind])) {
      FileCase made = case_of(of, kind, number, linear, tp_size);
      if (!made.why_not) made.why_not = op.refuse(made.c);
      if (made.why_not) {
        leave_out(*made.why_not);
      } else {
        all.cases.push_back(std::move(made.c));
      }
    }
  }
  return all;
}

void check_checkpoint(const OfCheckpoint& of) {
  for (std::size_t kind = 0; kind < of.kinds.size(); ++kind) {
    if (is_other_attention(of.kinds[kind])) continue;
    for (const auto& [number, linear] : file_linears(of.kinds[kind])) {
      const Case c = case_of(of, kind, number, linear, 1).c;
      // Nobody runs what no case can say.
      if (illegal(format_of(c)) || other_format(c, linear)) continue;
      const Layer layer = of.layer(c);
      check_tensors(c, layer);
      check_values(c, layer);
    }
  }
}

std::optional<std::string> refuse(const Case& c, const Layer& layer) {
  const QuantFormat f = format_of(c);
  if (auto why = illegal(f)) return why;
  if (auto why = refuse_file(c, layer)) return why;
  if (is_gathered(c)) {
    if (f.activations != Activations::tensor && f.activations != Activations::token)
      return fmt::format("gather=1 is about activations scaled by the call or by the token, not {}",
                         kActivationsWords[int(f.activations)]);
    if (c.num_tokens % c.tp_size != 0)
      return fmt::format("{} tokens are not shared out evenly to {} ranks, as gather=1 wants them",
                         c.num_tokens, c.tp_size);
  }
  if (c.options.at("act_order") == 1 && f.scheme != Scheme::gptq)
    return "act_order=1 is gptq's, and the weights are not";
  if (f.scheme == Scheme::none) return std::nullopt;
  if (!is_loaded(c)) return "quantised weights come from a checkpoint: weights=given has none";
  const std::int64_t in = layer.in_features, width = layer.cuts_columns() ? in / c.tp_size : in;
  if (f.scheme == Scheme::nvfp4) {
    if (f.activations != Activations::plain)
      return "nvfp4 weights are dequantised here: their activations stay plain";
    if (width % 2 != 0)
      return fmt::format("nvfp4 has two columns a byte, and a rank {} of them", width);
  }
  if (f.scheme == Scheme::gptq && width % kWord != 0)
    return fmt::format("gptq has {} columns a word, and a rank {} of them", kWord, width);
  if (f.activations == Activations::plain && c.dtype == DType::f32)
    return "dequantised weights are multiplied by tensor cores, which take f16 or bf16, not f32";
  return std::nullopt;
}

std::vector<Stage> stages(const Case& c, const Layer& layer, const TensorSpec& x,
                          const std::vector<TensorSpec>& biases, const ShardingRules& rules,
                          const Variation& variation) {
  std::vector<Stage> all;
  if (!is_loaded(c)) return all;
  all.push_back(load_stage(c, layer, biases, rules, variation));
  if (is_prepared(c, layer)) all.push_back(prepare_stage(c, layer, !biases.empty(), rules));
  if (quantises(c)) all.push_back(quantise_stage(c, layer, x, rules));
  return all;
}

std::vector<TensorSpec> product_inputs(const Case& c, const Layer& layer, const TensorSpec& x) {
  std::vector<TensorSpec> all = {quantises(c) ? codes_spec(x) : x};
  const auto add = [&](const Kind& kind) {
    for (TensorSpec& t : tensors(c, layer, kind)) all.push_back(std::move(t));
  };
  const auto prepared = prepared_kind(c, layer, 0);
  if (!prepared || prepared->buffer != "codes") add(weight_kind(c, layer, 0));
  if (prepared) add(*prepared);
  if (const auto kind = scales_kind(c, layer, 0)) add(*kind);
  if (has_weight_scale(c)) all.push_back(shared("weight_scale", 1));
  if (has_fixed_scale(c)) all.push_back(shared("input_scale", 1));
  if (makes_scales(c)) all.push_back(x_scale_spec(c, layer));
  if (is_gptq(c)) all.push_back(groups_spec(layer));
  return all;
}

std::vector<LocalBuffer> product_buffers(const Case& c, const Layer& layer, const TensorSpec&,
                                         int tp_rank) {
  std::vector<LocalBuffer> all = {quantises(c) ? codes_buffer(c, layer, Use::input, tp_rank)
                                               : x_buffer(c, layer, tp_rank)};
  const auto add = [&](const Kind& kind) {
    all.push_back(buffer(layer, kind, Use::input, tp_rank));
  };
  const auto prepared = prepared_kind(c, layer, tp_rank);
  if (!prepared || prepared->buffer != "codes") add(weight_kind(c, layer, tp_rank));
  if (prepared) add(*prepared);
  if (const auto kind = scales_kind(c, layer, tp_rank)) add(*kind);
  if (has_weight_scale(c)) all.push_back(shared_buffer("weight_scale", 1, Use::input));
  if (has_fixed_scale(c)) all.push_back(shared_buffer("input_scale", 1, Use::input));
  if (makes_scales(c)) all.push_back(x_scale_buffer(c, layer, Use::input, tp_rank));
  if (is_gptq(c)) all.push_back(groups_buffer(c, layer, Use::input, tp_rank));
  return all;
}

std::vector<TensorSpec> bias_inputs(const Case& c, const Layer& layer) {
  return tensors(c, layer, bias_kind(c));
}
LocalBuffer bias_buffer(const Case& c, const Layer& layer, int tp_rank) {
  return buffer(layer, bias_kind(c), Use::input, tp_rank);
}

template <typename T, typename Out>
void product(RankRun& run, const Case& c, const Layer& layer, View<const T> bias, View<Out> out,
             const ShardingRules& rules) {
  const int tp_rank = run.group.tp_rank();
  const std::int64_t width = columns_of(c, layer, tp_rank).own.size;
  QuantisedWeight w{.format = format_of(c), .cols = width};
  w.first_col = first_column(c, layer, rules, tp_rank);
  switch (w.format.scheme) {
    case Scheme::fp8_tensor:
      w.codes = run.view<e4m3>("codes");
      w.factors = run.view<float>("weight_scale");
      break;
    case Scheme::nvfp4:
      w.packed = run.view<std::uint8_t>("weight");
      w.group_scales = run.view<e4m3>("scales");
      w.factors = run.view<float>("factors");
      break;
    case Scheme::gptq:
      w.words = run.view<std::int32_t>("codes");
      w.table = run.view<f16>("scales");
      w.groups = run.view<std::int32_t>("groups").data;
      break;
    default:
      w.codes = run.view<e4m3>("weight");
      w.factors = run.view<float>("scales");
      break;
  }
  if (!quantises(c)) {
    if constexpr (std::is_same_v<T, float>) {
      TP_CHECK(false, "refuse() lets no dequantised f32 pass");
    } else {
      quantised_product<T, Out>(run.view<T>("x").columns(0, width), w, bias, out, run.stream);
    }
    return;
  }
  Scales scales;
  if (has_fixed_scale(c)) {
    scales.data = run.view<float>("input_scale").data;
  } else {
    const View<float> made = run.view<float>("x_scale");
    scales.data = made.data;
    if (w.format.activations != Activations::tensor) scales.row_stride = made.row_stride;
    if (w.format.activations == Activations::token_groups) {
      scales.cols_per = w.format.block_cols;
      scales.first_col = w.first_col;
    }
  }
  quantised_product<T, Out>(run.view<e4m3>("x_codes"), scales, w, bias, out, run.stream);
}

template void product(RankRun&, const Case&, const Layer&, View<const float>, View<float>,
                      const ShardingRules&);
template void product(RankRun&, const Case&, const Layer&, View<const f16>, View<f16>,
                      const ShardingRules&);
template void product(RankRun&, const Case&, const Layer&, View<const f16>, View<float>,
                      const ShardingRules&);
template void product(RankRun&, const Case&, const Layer&, View<const bf16>, View<bf16>,
                      const ShardingRules&);
template void product(RankRun&, const Case&, const Layer&, View<const bf16>, View<float>,
                      const ShardingRules&);

Budget product_reference(const Case& c, const Layer& layer, const WholeInputs& in, std::size_t part,
                         int tp_rank, const Matrix* bias, bool is_last) {
  const QuantFormat f = format_of(c);
  const Shard own = columns_of(c, layer, tp_rank).own;
  const std::string& name = layer.parts[part];
  const auto cut = [&](const Matrix& m) { return reference::columns(m, own.offset, own.size); };
  Dequantised w{.values = Matrix(1, 1)};
  switch (f.scheme) {
    case Scheme::fp8_tensor:
      w.values = cut(in[name + ".requantised"]);
      w.scales = in["weight_scale"];
      w.factors = {.values = &w.scales};
      break;
    case Scheme::fp8_channel:
      w.values = cut(in[name + ".codes"]);
      w.scales = in[name + ".scales"];
      w.factors = {.values = &w.scales};
      break;
    case Scheme::fp8_block: {
      const Shard blocks = touched(columns_of(c, layer, tp_rank), f.block_cols);
      w.values = cut(in[name + ".codes"]);
      w.scales = reference::columns(in[name + ".scales"], blocks.offset, blocks.size);
      w.factors = {
          .values = &w.scales, .cols_per = f.block_cols, .first_col = own.offset % f.block_cols};
      break;
    }
    case Scheme::nvfp4: {
      const Matrix codes = reference::unpacked_e2m1(in[name + ".packed"], layer.in_features);
      const reference::Factors groups{.values = &in[name + ".scales"], .cols_per = kNvfp4Group};
      w.values = cut(reference::dequantised(c.dtype, codes, groups));
      w.scales = in[name + ".factors"];
      w.factors = {.values = &w.scales};
      break;
    }
    case Scheme::gptq: {
      const Matrix codes = reference::unpacked_int4(in[name + ".rows"]);
      // Which scale a column has, as the checkpoint has it: the rank's own count of groups was
      // judged where it was loaded.
      Matrix scales(layer.rows[part], layer.in_features);
      for (std::int64_t k = 0; k < layer.in_features; ++k) {
        const double* of_rows = in[name + ".scales"].row(group_of_column(c, layer, k));
        for (std::int64_t j = 0; j < scales.rows; ++j) scales.row(j)[k] = of_rows[j];
      }
      w.values = cut(reference::dequantised(c.dtype, codes, {.values = &scales, .cols_per = 1}));
      break;
    }
    case Scheme::none:
      TP_CHECK(false, "weights that are not quantised have a reference of their own");
  }
  const DType x_type = quantises(c) ? DType::e4m3 : c.dtype;
  Matrix x = cut(in[quantises(c) ? "x_codes" : "x"]), scales(1, 1);
  reference::Factors of_x;
  if (has_fixed_scale(c)) {
    scales = in["input_scale"];
  } else if (makes_scales(c)) {
    const Shard mine = scale_columns(c, layer).of_rank[std::size_t(tp_rank)];
    scales = reference::columns(in["x_scale"], mine.offset, mine.size);
  }
  if (quantises(c)) of_x = x_factors(c, layer, scales, tp_rank);
  const std::int64_t longest =
      f.scheme == Scheme::fp8_block ? std::min<std::int64_t>(own.size, f.block_cols) : own.size;
  return reference::scaled_product(x, of_x, w.values, w.factors, {0, own.size}, bias,
                                   scaled_accumulation(x_type, longest), is_last);
}

double weight_bytes(const Case& c, const Layer& layer, int tp_rank) {
  const LoadOutputs all = loaded(c, layer, false, Use::input, tp_rank);
  double bytes = 0;
  for (const LocalBuffer& b : all.buffers) bytes += double(b.rows * b.cols) * size_of(b.dtype);
  return bytes;
}

namespace {

// Whether the rules load other rows, or other scales for them, on this rank.
bool other_rows(const StoredLinear& layer, bool has_bias, const ShardingRules& rules,
                const StoredLinear& right) {
  const ShardingRules& good = sharding_rules();
  if (layer.taken != right.taken) return true;
  if (has_bias && layer.bias_taken != right.bias_taken) return true;
  const bool has_row_scales =
      layer.format.scheme == Scheme::fp8_channel || layer.format.scheme == Scheme::fp8_block;
  const std::int64_t block = layer.format.scheme == Scheme::fp8_block ? layer.format.block_rows : 1;
  for (std::size_t m = 0; m < layer.taken.size(); ++m) {
    const FusedRows stored = stored_rows(layer, layer.is_fused() ? 0 : m);
    for (std::int64_t i = layer.taken[m].offset; i < layer.taken[m].end(); ++i) {
      const LocalRow at = local_row(layer, m, i, layer.taken[m]);
      const std::int64_t row = rules.loader.stored_row(stored, at),
                         right_row = good.loader.stored_row(stored, at);
      if (row != right_row) return true;
      if (has_row_scales && rules.loader.scale_row(stored, at, row, block) !=
                                good.loader.scale_row(stored, at, right_row, block))
        return true;
    }
  }
  return false;
}

bool other_columns(const Case& c, const Layer& of, const StoredLinear& layer,
                   const ShardingRules& rules, const StoredLinear& right) {
  const ShardingRules& good = sharding_rules();
  if (layer.columns.own != right.columns.own) return true;
  const std::int64_t group = layer.format.block_cols;
  if (layer.format.scheme == Scheme::fp8_block || layer.format.scheme == Scheme::nvfp4) {
    const auto mine = rules.loader.first_group(layer.columns, group),
               theirs = good.loader.first_group(layer.columns, group);
    // Columns that are all of one group have its scale wherever in it they begin.
    const std::int64_t last = std::max(mine.column, theirs.column) + layer.columns.own.size - 1;
    return mine.group != theirs.group || (mine.column != theirs.column && last >= group);
  }
  if (layer.format.scheme != Scheme::gptq) return false;
  const std::int64_t groups = ceil_div(layer.in_features, group);
  const Shard loaded = rules.loader.groups_loaded(layer.columns, group, groups, layer.act_order);
  if (loaded != good.loader.groups_loaded(layer.columns, group, groups, layer.act_order))
    return true;
  for (std::int64_t k = layer.columns.own.offset; k < layer.columns.own.end(); ++k) {
    const std::int64_t group_of_k = group_of_column(c, of, k);
    if (rules.loader.loaded_group(group_of_k, loaded, layer.columns) !=
        good.loader.loaded_group(group_of_k, loaded, layer.columns))
      return true;
  }
  return false;
}

// Whether ranks' largest elements differ: then it matters whose they scale by.
bool ranks_differ(const Case& c, const TensorSpec& x, const DataRegime& regime) {
  std::vector<double> largest(std::size_t(c.tp_size));
  std::vector<std::byte> row(std::size_t(x.cols * size_of(x.dtype)));
  for (int rank = 0; rank < c.tp_size; ++rank) {
    const Shard own = own_tokens(c, rank);
    for (std::int64_t i = own.offset; i < own.end(); ++i) {
      fill_block(x, regime, {i, 1}, {0, x.cols}, row.data(), x.cols);
      for (std::int64_t k = 0; k < x.cols; ++k) {
        largest[std::size_t(rank)] =
            std::max(largest[std::size_t(rank)], std::fabs(load(x.dtype, row.data(), k)));
      }
    }
  }
  return std::adjacent_find(largest.begin(), largest.end(), std::not_equal_to<>()) != largest.end();
}

}  // namespace

bool differs(const Case& c, const Layer& layer, const TensorSpec& x, const DataRegime& regime,
             const ShardingRules& rules) {
  if (!is_loaded(c)) return false;
  const QuantRules &mine = rules.quant, &right = sharding_rules().quant;
  const bool fused = is_fused(c, layer), several = layer.parts.size() > 1,
             fixed = has_fixed_scale(c), slots = has_slots(c);
  const int parts = int(layer.parts.size());
  if (fused && (slots || fixed) &&
      rules.loader.slots_of_fused(parts) != sharding_rules().loader.slots_of_fused(parts))
    return true;
  if (slots && tensor_names(format_of(c)).global_is_inverse && rules.loader.factor(2, true) != 0.5f)
    return true;
  if (!rules.loader.pads_scales && scales_kind(c, layer, 0) && padding_rows(c, layer) > 0)
    return true;
  // One scale for all parts on disk is the same in all slots, whatever is made of them.
  if (several && !fused) {
    if ((has_weight_scale(c) || fixed) && mine.slots(false) != right.slots(false)) return true;
    if (format_of(c).scheme == Scheme::nvfp4 && !mine.own_global_scale) return true;
  }
  if (is_gathered(c) && format_of(c).activations == Activations::tensor &&
      mine.gathered_scale != right.gathered_scale && ranks_differ(c, x, regime))
    return true;
  for (int rank = 0; rank < c.tp_size; ++rank) {
    const StoredLinear stored = stored_linear(c, layer, rules, rank),
                       good = stored_linear(c, layer, sharding_rules(), rank);
    if (other_rows(stored, linear::has_bias(c), rules, good) ||
        other_columns(c, layer, stored, rules, good))
      return true;
  }
  return false;
}

LawRun law_tokens() {
  LawRun law = tp::law_tokens();
  law.twin = [](const Case&, const Variation& v, const TensorSpec& t, std::int64_t row,
                std::int64_t col) -> std::optional<Place> {
    if (t.role == Role::weight) return Place{row, col};
    return Place{(row + v.rotate_rows) % t.rows, col};
  };
  return law;
}

LawRun law_files() {
  return {
      .law = {"files", "a checkpoint's tensors in other files and another order: the same bits"},
      .vary =
          [](const Case& c) {
            return std::pair{c, Variation{.law = "files"}};
          },
      .refuse = [](const Case& c) -> std::optional<std::string> {
        if (!layer_in_file(c)) return std::nullopt;
        return fmt::format("law=files spreads tensors over other files: layer={} has its own",
                           c.options.at("layer"));
      }};
}

LawRun without_local_scales(LawRun law) {
  law.twin = [twin = law.twin](const Case& c, const Variation& v, const TensorSpec& t,
                               std::int64_t row, std::int64_t col) -> std::optional<Place> {
    if (t.name == "x_scale" || t.name == "groups") return std::nullopt;
    if (twin) return twin(c, v, t, row, col);
    return Place{row, col};
  };
  return law;
}

}  // namespace tp::stored_linear
