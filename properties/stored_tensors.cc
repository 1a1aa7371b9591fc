#include "properties/stored_tensors.h"

#include <cmath>
#include <cstring>

#include "harness/base/philox.h"
#include "harness/base/user_checkpoint.h"

namespace tp::stored_linear {

Weights weights_of(const Case& c) { return Weights(c.options.at("weights")); }

bool is_fused(const Case& c, const Layer& layer) {
  return layer.parts.size() > 1 && weights_of(c) != Weights::split;
}

FusedRows fused_rows(const Case& c, const Layer& layer) {
  return {layer.rows, weights_of(c) == Weights::striped ? layer.stripes : 1};
}

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

double element(const StoredTensor& t, DType type, std::int64_t i) {
  alignas(8) std::byte copy[8];
  std::memcpy(copy, t.data + i * size_of(type), std::size_t(size_of(type)));
  return load(type, copy, 0);
}

namespace {

// Of a tensor that is made.
std::int64_t made_group(const Case& c, std::int64_t in_features, std::int64_t k) {
  const std::int64_t group = format_of(c).block_cols, groups = ceil_div(in_features, group);
  if (c.options.at("act_order") == 0) return k / group;
  return std::int64_t((std::uint64_t(k) * 7 + c.seed % 1024) % std::uint64_t(groups));
}

}  // namespace

std::vector<std::int64_t> groups_of_columns(const Case& c, const Layer& layer) {
  const StoredTensor* order = nullptr;
  if (layer_in_file(c) && c.options.at("act_order") == 1) {
    order = &user_checkpoint()->at(prefixes(c, layer).front() + "." +
                                   tensor_names(format_of(c)).group_of_column);
  }
  std::vector<std::int64_t> groups;
  for (std::int64_t k = 0; k < layer.in_features; ++k) {
    groups.push_back(order != nullptr ? std::int64_t(element(*order, DType::i32, k))
                                      : made_group(c, layer.in_features, k));
  }
  return groups;
}

namespace {

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
      order.value = [c, in](const DataRegime&, std::int64_t, std::int64_t k) {
        return double(made_group(c, in, k));
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

}  // namespace

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

const StoredTensor& stored_as(const InFile& t) {
  const Checkpoint& checkpoint = *user_checkpoint();
  const StoredTensor* found = checkpoint.find(t.spec.name);
  if (t.may_be_flat && found != nullptr && found->shape.size() == 1)
    return checkpoint.at(t.spec.name, t.spec.dtype, {t.spec.rows});
  if (t.may_be_flat)
    return checkpoint.at(t.spec.name, t.spec.dtype, {t.spec.rows, std::int64_t{1}});
  return checkpoint.at(t.spec.name, t.spec.dtype, t.shape);
}

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

}  // namespace tp::stored_linear
