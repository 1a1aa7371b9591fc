#include "kernels/weight_loader.h"

#include <fmt/format.h>

#include <cmath>
#include <cstring>

#include "harness/base/check.h"
#include "harness/device/buffer.h"
#include "harness/device/fault.h"

namespace tp {

namespace {

constexpr std::int64_t kNvfp4Group = 16;
constexpr std::int64_t kPackedColumns = 8;  // of gptq's i32
// Eight zero points 8, less one as AutoGPTQ stores them.
constexpr std::uint32_t kZerosLessOne = 0x77777777;

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Element `i` of a tensor, which a file may hold at any address.
template <typename T>
T element(const StoredTensor& t, std::int64_t i) {
  T value;
  std::memcpy(&value, t.data + i * std::int64_t(sizeof(T)), sizeof(T));
  return value;
}

std::vector<std::int64_t> shape(std::int64_t rows, std::int64_t columns) { return {rows, columns}; }

std::int64_t columns_of(const StoredTensor& t) {
  return t.shape.size() > 1 ? t.shape.back() : t.shape.empty() ? 1 : t.elements();
}

void require_inside(const StoredTensor& t, const char* what, Shard taken, std::int64_t size) {
  if (taken.offset >= 0 && taken.end() <= size) return;
  throw Fault{Outcome::OutOfBounds, fmt::format("takes {} {} .. {} of {}, which has {}", what,
                                                taken.offset, taken.end(), t.name, size)};
}

// A scale of zero, a negative one or none at all says that the file is not what it seems. Blocks of
// zeros may have a scale of zero where scales are codes, too.
void check_scale(const Checkpoint& checkpoint, const StoredTensor& t, std::int64_t i, float scale,
                 bool may_be_zero) {
  if (std::isfinite(scale) && (scale > 0 || (may_be_zero && scale == 0))) return;
  throw BadInput(fmt::format("{}: {}, element {} is {}, but a scale is positive and finite",
                             checkpoint.path_of(t), t.name, i, scale));
}

}  // namespace

std::int64_t groups_touched(const LocalColumns& columns, std::int64_t group,
                            const ShardingRules& rules) {
  return ceil_div(rules.loader.first_group(columns, group).column + columns.own.size, group);
}

FusedRows stored_rows(const StoredLinear& layer, std::size_t tensor) {
  if (layer.is_fused()) return layer.rows;
  return {{layer.rows.parts[tensor]}, 1};
}

LocalRow local_row(const StoredLinear& layer, std::size_t matrix, std::int64_t row, Shard taken) {
  return {.part = layer.is_fused() ? int(matrix) : 0,
          .row = row,
          .local = layer.first[matrix] + row - taken.offset,
          .own = taken,
          .all = layer.local_rows,
          .tp_size = layer.columns.tp_size,
          .tp_rank = layer.columns.tp_rank};
}

std::vector<Shard> padding_of(const StoredLinear& layer) {
  std::vector<Shard> runs;
  std::int64_t end = 0;
  for (std::size_t m = 0; m <= layer.first.size(); ++m) {
    const std::int64_t next = m < layer.first.size() ? layer.first[m] : layer.local_rows;
    if (next > end) runs.push_back({end, next - end});
    if (m < layer.first.size()) end = layer.first[m] + layer.taken[m].size;
  }
  return runs;
}

WeightLoader::WeightLoader(const Checkpoint& checkpoint, const StoredLinear& layer,
                           const ShardingRules& rules, Stream& stream)
    : checkpoint_(checkpoint),
      layer_(layer),
      rules_(rules),
      stream_(stream),
      names_(tensor_names(layer.format)),
      runs_(runs(layer.taken)) {}

std::vector<WeightLoader::Run> WeightLoader::runs(const std::vector<Shard>& taken) const {
  std::vector<Run> all;
  for (std::size_t m = 0; m < taken.size(); ++m) {
    const std::size_t tensor = layer_.is_fused() ? 0 : m;
    const FusedRows stored = stored_rows(layer_, tensor);
    const std::int64_t end = m + 1 < layer_.first.size() ? layer_.first[m + 1] : layer_.local_rows;
    if (layer_.first[m] + taken[m].size > end) {
      throw Fault{Outcome::BadLaunch,
                  fmt::format("{} rows of {} are loaded, but the rank has room for {}",
                              taken[m].size, layer_.prefixes[tensor], end - layer_.first[m])};
    }
    for (std::int64_t i = 0; i < taken[m].size; ++i) {
      const LocalRow at = local_row(layer_, m, taken[m].offset + i, taken[m]);
      const std::int64_t row = rules_.loader.stored_row(stored, at);
      if (i > 0 && all.back().stored + all.back().size == row) {
        ++all.back().size;
      } else {
        all.push_back({tensor, row, at.local, 1});
      }
    }
  }
  return all;
}

// Calls f(run, the stored tensor that it is of, the rows of its matrices) for every run;
// shape(rows): the one that the tensor must have.
template <typename Shape, typename F>
void WeightLoader::for_each_run(const std::vector<Run>& runs, const std::string& suffix, DType type,
                                Shape shape, F f) const {
  const StoredTensor* stored = nullptr;
  std::size_t tensor = 0;
  std::int64_t rows = 0;
  for (const Run& run : runs) {
    if (stored == nullptr || run.tensor != tensor) {
      tensor = run.tensor;
      rows = stored_rows(layer_, tensor).total();
      stored = &checkpoint_.at(name(tensor, suffix), type, shape(rows));
    }
    f(run, *stored, rows);
  }
}

std::string WeightLoader::name(std::size_t tensor, const std::string& suffix) const {
  return layer_.prefixes[tensor] + "." + suffix;
}

void WeightLoader::copy(void* to, const std::byte* from, std::int64_t bytes) const {
  from_host_when_reached(stream_, to, from, std::size_t(bytes));
}

// The run's rows of a stored matrix, `columns` of them, elements of so many bytes, to rows that are
// `stride` bytes apart.
void WeightLoader::copy_block(const StoredTensor& from, std::int64_t rows, Shard columns,
                              std::int64_t element, const Run& run, std::byte* to,
                              std::int64_t stride) const {
  const std::int64_t all = columns_of(from), bytes = columns.size * element;
  require_inside(from, "rows", {run.stored, run.size}, rows);
  require_inside(from, "columns", columns, all);
  const std::byte* source = from.data + (run.stored * all + columns.offset) * element;
  std::byte* target = to + run.local * stride;
  if (columns.size == all && stride == bytes) return copy(target, source, run.size * bytes);
  for (std::int64_t i = 0; i < run.size; ++i)
    copy(target + i * stride, source + i * all * element, bytes);
}

void WeightLoader::require_rows(std::int64_t rows, const char* what) const {
  if (rows == layer_.local_rows) return;
  throw Fault{Outcome::BadLaunch,
              fmt::format("{} {} of {} are loaded, but the rank has room for {}", layer_.local_rows,
                          what, layer_.prefixes.front(), rows)};
}

// Rows of so many bytes, `stride` bytes apart.
void WeightLoader::zero_rows(void* data, std::int64_t row_bytes, std::int64_t stride) const {
  const std::vector<std::byte> zeros(static_cast<std::size_t>(row_bytes));
  for (const Shard& run : padding_of(layer_)) {
    for (std::int64_t i = run.offset; i < run.end(); ++i) {
      from_host(stream_, static_cast<std::byte*>(data) + i * stride, zeros.data(), zeros.size());
    }
  }
}

void WeightLoader::zero_columns(void* data, std::int64_t rows, std::int64_t row_stride,
                                std::int64_t element) const {
  for (const Shard& run : padding_of(layer_)) {
    const std::vector<std::byte> zeros(std::size_t(run.size * element));
    for (std::int64_t i = 0; i < rows; ++i) {
      from_host(stream_, static_cast<std::byte*>(data) + (i * row_stride + run.offset) * element,
                zeros.data(), zeros.size());
    }
  }
}

template <typename T>
void WeightLoader::weight(View<T> out) const {
  const std::int64_t packed = layer_.format.scheme == Scheme::nvfp4 ? 2 : 1;
  const Shard own = layer_.columns.own;
  if (own.offset % packed != 0 || (own.size % packed != 0 && own.end() != layer_.in_features)) {
    throw Fault{Outcome::BadLaunch, fmt::format("columns {} .. {} of {} begin or end within a byte",
                                                own.offset, own.end(), layer_.prefixes.front())};
  }
  const Shard columns{own.offset / packed, ceil_div(own.size, packed)};
  require_rows(out.rows, "rows");
  if (out.cols != columns.size) {
    throw Fault{Outcome::BadLaunch, fmt::format("{} columns of {} are loaded, but the rank has "
                                                "room for {}",
                                                columns.size, layer_.prefixes.front(), out.cols)};
  }
  constexpr auto kBytes = std::int64_t(sizeof(T));
  const std::int64_t width = ceil_div(layer_.in_features, packed);
  for_each_run(
      runs_, names_.weight, dtype_of<T>::value,
      [&](std::int64_t rows) { return shape(rows, width); },
      [&](const Run& run, const StoredTensor& stored, std::int64_t rows) {
        copy_block(stored, rows, columns, kBytes, run, reinterpret_cast<std::byte*>(out.data),
                   out.row_stride * kBytes);
      });
  zero_rows(out.data, out.cols * kBytes, out.row_stride * kBytes);
}

void WeightLoader::packed_columns(View<std::int32_t> out) const {
  const Shard own = layer_.columns.own;
  if (own.offset % kPackedColumns != 0 || own.size % kPackedColumns != 0) {
    throw Fault{Outcome::BadLaunch,
                fmt::format("columns {} .. {} of {} are not whole words of {}", own.offset,
                            own.end(), layer_.prefixes.front(), kPackedColumns)};
  }
  require_rows(out.cols, "rows");
  const std::int64_t words = layer_.in_features / kPackedColumns;
  for_each_run(
      runs_, names_.weight, DType::i32, [&](std::int64_t rows) { return shape(words, rows); },
      [&](const Run& run, const StoredTensor& stored, std::int64_t rows) {
        // What is a row elsewhere is a column here.
        require_inside(stored, "rows", {run.stored, run.size}, rows);
        for (std::int64_t i = 0; i < own.size / kPackedColumns; ++i) {
          const std::int64_t from = (own.offset / kPackedColumns + i) * rows + run.stored;
          copy(out.data + i * out.row_stride + run.local, stored.data + from * 4, run.size * 4);
        }
      });
  zero_columns(out.data, out.rows, out.row_stride, 4);
}

template <typename T>
void WeightLoader::bias(View<T> out) const {
  require_rows(out.cols, "elements of the bias");
  constexpr auto kBytes = std::int64_t(sizeof(T));
  for_each_run(
      runs(layer_.bias_taken), "bias", dtype_of<T>::value,
      [](std::int64_t rows) { return std::vector{rows}; },
      [&](const Run& run, const StoredTensor& stored, std::int64_t rows) {
        require_inside(stored, "elements", {run.stored, run.size}, rows);
        copy(out.data + run.local, stored.data + run.stored * kBytes, run.size * kBytes);
      });
  zero_columns(out.data, 1, out.cols, sizeof(T));
}

void WeightLoader::row_scales(View<float> out) const {
  require_rows(out.rows, "rows of scales");
  const bool blocks = layer_.format.scheme == Scheme::fp8_block;
  const std::int64_t block_rows = blocks ? layer_.format.block_rows : 1,
                     block_cols = blocks ? layer_.format.block_cols : layer_.in_features;
  const auto first = rules_.loader.first_group(layer_.columns, block_cols);
  const Shard columns =
      blocks ? Shard{first.group, groups_touched(layer_.columns, block_cols, rules_)} : Shard{0, 1};
  if (out.cols != columns.size) {
    throw Fault{Outcome::BadLaunch,
                fmt::format("{} blocks of columns of {} are loaded, but the rank has room for {}",
                            columns.size, layer_.prefixes.front(), out.cols)};
  }
  const std::int64_t width = blocks ? ceil_div(layer_.in_features, block_cols) : 1;
  for (std::size_t m = 0; m < layer_.taken.size(); ++m) {
    const std::size_t tensor = layer_.is_fused() ? 0 : m;
    const FusedRows rows = stored_rows(layer_, tensor);
    const std::int64_t height = ceil_div(rows.total(), block_rows);
    const std::string called = name(tensor, names_.scale);
    // One scale a row is stored as [rows, 1] or as [rows].
    const StoredTensor* scalars = blocks ? nullptr : checkpoint_.find(called);
    const StoredTensor& stored = scalars != nullptr && scalars->shape.size() == 1
                                     ? checkpoint_.at(called, DType::f32, {height})
                                     : checkpoint_.at(called, DType::f32, {height, width});
    // A row for each row of the weight, many of them the same: put together here, for one copy.
    const std::int64_t count = layer_.taken[m].size;
    std::vector<float> scales(std::size_t(count * columns.size));
    std::int64_t checked = -1;
    for (std::int64_t i = 0; i < count; ++i) {
      const LocalRow at = local_row(layer_, m, layer_.taken[m].offset + i, layer_.taken[m]);
      const std::int64_t row =
          rules_.loader.scale_row(rows, at, rules_.loader.stored_row(rows, at), block_rows);
      require_inside(stored, "rows", {row, 1}, height);
      require_inside(stored, "columns", columns, width);
      float* mine = scales.data() + i * columns.size;
      std::memcpy(mine, stored.data + (row * width + columns.offset) * 4,
                  std::size_t(columns.size) * 4);
      for (std::int64_t k = 0; k < columns.size && row != checked; ++k)
        check_scale(checkpoint_, stored, row * width + columns.offset + k, mine[k], false);
      checked = row;  // and so are the scales of the next row, if it is of the same block
    }
    const bool dense = out.row_stride == columns.size;
    for (std::int64_t i = 0; i < count; i += dense ? count : 1) {
      from_host(stream_, out.data + (layer_.first[m] + i) * out.row_stride,
                scales.data() + i * columns.size,
                std::size_t((dense ? count : 1) * columns.size) * 4);
    }
  }
  if (rules_.loader.pads_scales) zero_rows(out.data, out.cols * 4, out.row_stride * 4);
}

void WeightLoader::group_scales(View<e4m3> out) const {
  require_rows(out.rows, "rows of scales");
  const auto first = rules_.loader.first_group(layer_.columns, kNvfp4Group);
  const Shard columns{first.group, groups_touched(layer_.columns, kNvfp4Group, rules_)};
  if (out.cols != columns.size) {
    throw Fault{Outcome::BadLaunch,
                fmt::format("{} groups of columns of {} are loaded, but the rank has room for {}",
                            columns.size, layer_.prefixes.front(), out.cols)};
  }
  const std::int64_t width = ceil_div(layer_.in_features, kNvfp4Group);
  for_each_run(
      runs_, names_.scale, DType::e4m3, [&](std::int64_t rows) { return shape(rows, width); },
      [&](const Run& run, const StoredTensor& stored, std::int64_t rows) {
        copy_block(stored, rows, columns, 1, run, reinterpret_cast<std::byte*>(out.data),
                   out.row_stride);
        for (std::int64_t i = 0; i < run.size; ++i) {
          for (std::int64_t k = 0; k < columns.size; ++k) {
            const std::int64_t at = (run.stored + i) * width + columns.offset + k;
            check_scale(checkpoint_, stored, at, to_float(element<e4m3>(stored, at)), true);
          }
        }
      });
  if (rules_.loader.pads_scales) zero_rows(out.data, out.cols, out.row_stride);
}

void WeightLoader::group_scales(View<f16> out) const {
  require_rows(out.cols, "rows");
  const std::int64_t group = layer_.format.block_cols, groups = ceil_div(layer_.in_features, group);
  const Shard loaded = rules_.loader.groups_loaded(layer_.columns, group, groups, layer_.act_order);
  if (out.rows != loaded.size) {
    throw Fault{Outcome::BadLaunch,
                fmt::format("{} groups of {} are loaded, but the rank has room for {}", loaded.size,
                            layer_.prefixes.front(), out.rows)};
  }
  check_zeros(loaded, groups);
  for_each_run(
      runs_, names_.scale, DType::f16, [&](std::int64_t rows) { return shape(groups, rows); },
      [&](const Run& run, const StoredTensor& stored, std::int64_t rows) {
        require_inside(stored, "rows", loaded, groups);
        require_inside(stored, "columns", {run.stored, run.size}, rows);
        for (std::int64_t i = 0; i < loaded.size; ++i) {
          const std::int64_t from = (loaded.offset + i) * rows + run.stored;
          copy(out.data + i * out.row_stride + run.local, stored.data + from * 2, run.size * 2);
          for (std::int64_t k = 0; k < run.size; ++k) {
            const float scale = to_float(element<f16>(stored, from + k));
            check_scale(checkpoint_, stored, from + k, scale, false);
          }
        }
      });
  if (rules_.loader.pads_scales) zero_columns(out.data, out.rows, out.row_stride, 2);
}

// The zero points of the rank's rows in these groups, eight to a word: the product takes them for
// the middle of int4.
void WeightLoader::check_zeros(Shard loaded, std::int64_t groups) const {
  const auto words_of = [](std::int64_t rows) { return ceil_div(rows, kPackedColumns); };
  for_each_run(
      runs_, names_.zeros, DType::i32,
      [&](std::int64_t rows) { return shape(groups, words_of(rows)); },
      [&](const Run& run, const StoredTensor& stored, std::int64_t rows) {
        const std::int64_t words = words_of(rows), first = run.stored / kPackedColumns,
                           end = words_of(run.stored + run.size);
        require_inside(stored, "rows", loaded, groups);
        require_inside(stored, "words", {first, end - first}, words);
        for (std::int64_t i = loaded.offset; i < loaded.end(); ++i) {
          for (std::int64_t k = first; k < end; ++k) {
            const auto word = element<std::uint32_t>(stored, i * words + k);
            if (word == kZerosLessOne) continue;
            throw BadInput(fmt::format(
                "{}: {}, element {} is {:#010x}, but only symmetric codes "
                "are supported, whose zero points are all {:#010x}",
                checkpoint_.path_of(stored), stored.name, i * words + k, word, kZerosLessOne));
          }
        }
      });
}

void WeightLoader::groups(View<std::int32_t> out) const {
  const std::int64_t group = layer_.format.block_cols, count = ceil_div(layer_.in_features, group);
  const Shard own = layer_.columns.own,
              loaded = rules_.loader.groups_loaded(layer_.columns, group, count, layer_.act_order);
  if (out.cols != own.size) {
    throw Fault{Outcome::BadLaunch, fmt::format("groups of {} columns of {} are loaded, but the "
                                                "rank has room for {}",
                                                own.size, layer_.prefixes.front(), out.cols)};
  }
  const auto order = [&](std::size_t tensor) -> const StoredTensor& {
    return checkpoint_.at(name(tensor, names_.group_of_column), DType::i32, {layer_.in_features});
  };
  // Matrices that are multiplied with one input have one order of its columns.
  const StoredTensor& stored = order(0);
  std::vector<std::int32_t> local;
  for (std::int64_t k = own.offset; k < own.end(); ++k) {
    const std::int64_t of = element<std::int32_t>(stored, k);
    if (of < 0 || of >= count) {
      throw BadInput(fmt::format("{}: {}, element {} is {}, but there are {} groups",
                                 checkpoint_.path_of(stored), stored.name, k, of, count));
    }
    if (!layer_.act_order && of != k / group) {
      throw BadInput(fmt::format("{}: {}, element {} is group {}, but without act-order it is {}",
                                 checkpoint_.path_of(stored), stored.name, k, of, k / group));
    }
    const std::int64_t row = rules_.loader.loaded_group(of, loaded, layer_.columns);
    require_inside(stored, "groups", {row, 1}, loaded.size);
    local.push_back(std::int32_t(row));
  }
  for (std::size_t tensor = 1; tensor < layer_.prefixes.size(); ++tensor) {
    const StoredTensor& other = order(tensor);
    if (std::memcmp(stored.data, other.data, stored.bytes) == 0) continue;
    throw BadInput(
        fmt::format("{}: {} has other groups than {}, but both are multiplied with one "
                    "input",
                    checkpoint_.path_of(other), other.name, stored.name));
  }
  from_host(stream_, out.data, local.data(), local.size() * sizeof(local[0]));
}

void WeightLoader::slots(View<float> out) const {
  const bool global = layer_.format.scheme == Scheme::nvfp4;
  fill_slots(global ? names_.global_scale : names_.scale, global && names_.global_is_inverse, out);
}

void WeightLoader::input_slots(View<float> out) const {
  fill_slots(names_.input_scale, names_.global_is_inverse, out);
}

void WeightLoader::fill_slots(const std::string& suffix, bool is_inverse, View<float> out) const {
  const int slots = int(layer_.rows.parts.size());
  for (std::size_t tensor = 0; tensor < layer_.prefixes.size(); ++tensor) {
    const StoredTensor& stored = checkpoint_.at(name(tensor, suffix), DType::f32, {});
    const float value = element<float>(stored, 0);
    check_scale(checkpoint_, stored, 0, value, false);
    const float factor = rules_.loader.factor(value, is_inverse);
    const Shard filled =
        layer_.is_fused() ? rules_.loader.slots_of_fused(slots) : Shard{std::int64_t(tensor), 1};
    if (out.cols < filled.end()) {
      throw Fault{Outcome::BadLaunch, fmt::format("{} has {} scales, but the rank has room for {}",
                                                  layer_.prefixes[tensor], filled.end(), out.cols)};
    }
    for (std::int64_t slot = filled.offset; slot < filled.end(); ++slot)
      from_host(stream_, out.data + slot, &factor, sizeof(factor));
  }
}

template <typename T>
void load_vector(const Checkpoint& checkpoint, const std::string& name, Shard taken, View<T> out,
                 Stream& stream) {
  const StoredTensor& found = checkpoint.at(name);
  const StoredTensor& stored = checkpoint.at(name, dtype_of<T>::value, {found.elements()});
  require_inside(stored, "elements", taken, stored.elements());
  if (out.cols != taken.size) {
    throw Fault{Outcome::BadLaunch,
                fmt::format("{} elements of {} are loaded, but the rank has room for {}",
                            taken.size, name, out.cols)};
  }
  from_host_when_reached(stream, out.data, stored.data + taken.offset * std::int64_t(sizeof(T)),
                         std::size_t(taken.size) * sizeof(T));
}

template void load_vector(const Checkpoint&, const std::string&, Shard, View<float>, Stream&);
template void load_vector(const Checkpoint&, const std::string&, Shard, View<f16>, Stream&);
template void load_vector(const Checkpoint&, const std::string&, Shard, View<bf16>, Stream&);
template void WeightLoader::weight(View<float>) const;
template void WeightLoader::weight(View<f16>) const;
template void WeightLoader::weight(View<bf16>) const;
template void WeightLoader::weight(View<e4m3>) const;
template void WeightLoader::weight(View<std::uint8_t>) const;
template void WeightLoader::bias(View<float>) const;
template void WeightLoader::bias(View<f16>) const;
template void WeightLoader::bias(View<bf16>) const;

}  // namespace tp
