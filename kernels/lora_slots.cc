#include "kernels/lora_slots.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstddef>
#include <cstring>

#include "harness/base/check.h"
#include "harness/device/buffer.h"
#include "harness/device/fault.h"

namespace tp {

namespace {

int parts_of(const LoraLayer& layer) { return int(layer.base.rows.size()); }

// Host memory of a slot's rows, zeros at first.
template <typename T>
struct Staged {
  std::int64_t rows, cols;
  std::vector<T> values = std::vector<T>(std::size_t(rows * cols));

  T* row(std::int64_t i) { return values.data() + i * cols; }
};

// Rows [first, first + rows) of the slot that begins at row `slot` of `to`, in their first columns.
template <typename T>
void copy_rows(Stream& stream, Staged<T>& from, std::int64_t first, std::int64_t rows,
               std::int64_t cols, const View<T>& to, std::int64_t slot) {
  if (rows == 0 || cols == 0) return;
  T* target = to.data + (slot + first) * to.row_stride;
  const bool is_dense = cols == from.cols && cols == to.row_stride;
  const std::int64_t copies = is_dense ? 1 : rows, elements = is_dense ? rows * cols : cols;
  for (std::int64_t i = 0; i < copies; ++i) {
    from_host(stream, target + i * to.row_stride, from.row(first + i),
              std::size_t(elements) * sizeof(T));
  }
}

// Elements [first, first + count) of a tensor, which a file may hold at any address, rounded to T
// and, if they are scaled, multiplied by the factor and rounded again.
template <typename Stored, typename T>
void convert(const StoredTensor& t, std::int64_t first, std::int64_t count, float factor, T* to) {
  for (std::int64_t i = 0; i < count; ++i) {
    Stored value;
    std::memcpy(&value, t.data + (first + i) * std::int64_t(sizeof(Stored)), sizeof(Stored));
    to[i] = from_float<T>(to_float(value));
    if (factor != 1.0f) to[i] = from_float<T>(to_float(to[i]) * factor);
  }
}

// A tensor of an adapter, which must have this shape.
class Source {
 public:
  Source(const Checkpoint& file, const StoredTensor& tensor, const std::vector<std::int64_t>& shape)
      : tensor_(tensor), type_(tensor.type().value_or(DType::u8)) {
    if (type_ != DType::f32 && type_ != DType::f16 && type_ != DType::bf16) {
      throw BadInput(fmt::format("{}: {} is {}, but adapters are F32, F16 or BF16",
                                 file.path_of(tensor), tensor.name, tensor.dtype));
    }
    if (tensor.shape != shape) {
      throw BadInput(fmt::format("{}: {} is {}, but the layer's is {}", file.path_of(tensor),
                                 tensor.name, shape_text(tensor.shape), shape_text(shape)));
    }
  }
  std::int64_t rows() const { return tensor_.shape.front(); }
  std::int64_t cols() const { return tensor_.shape.size() > 1 ? tensor_.shape.back() : 1; }

  void require_inside(const char* what, Shard taken, std::int64_t size) const {
    if (taken.offset >= 0 && taken.size >= 0 && taken.end() <= size) return;
    throw Fault{Outcome::OutOfBounds, fmt::format("takes {} {} .. {} of {}, which has {}", what,
                                                  taken.offset, taken.end(), tensor_.name, size)};
  }
  template <typename T>
  void read(std::int64_t first, std::int64_t count, float factor, T* to) const {
    if (type_ == DType::f32) return convert<float>(tensor_, first, count, factor, to);
    if (type_ == DType::f16) return convert<f16>(tensor_, first, count, factor, to);
    convert<bf16>(tensor_, first, count, factor, to);
  }

 private:
  const StoredTensor& tensor_;
  DType type_;
};

// Of each matrix the module that has its adapter: nullptr if none has.
std::vector<const PeftModule*> modules_of(const LoraLayer& layer, const PeftModule* fused,
                                          const PeftAdapter& adapter) {
  std::vector<const PeftModule*> modules;
  for (const std::string& part : layer.parts) {
    const PeftModule* own = adapter.find(layer.prefix + part);
    if (fused != nullptr && own != nullptr) {
      throw BadInput(fmt::format("{}: {} and {} are adapters of the same weights",
                                 adapter.tensors().path_of(*own->a), fused->name, own->name));
    }
    modules.push_back(fused != nullptr ? fused : own);
  }
  return modules;
}

}  // namespace

Shard lora_own_a(const LoraLayer& layer, const ShardingRules& rules) {
  const bool is_shared_out = layer.shares_out_rank && !layer.base.cuts_columns;
  return rules.lora.a_rows(layer.max_rank, is_shared_out, layer.base.tp_size, layer.base.tp_rank);
}

std::int64_t lora_a_rows(const LoraLayer& layer, const ShardingRules& rules) {
  return lora_own_a(layer, rules).size;
}

std::int64_t lora_b_rows(const LoraLayer& layer, const ShardingRules& rules) {
  return rules.lora.slot_rows(layer.base);
}

std::vector<std::int64_t> lora_b_parts(const LoraLayer& layer, const ShardingRules& rules,
                                       bool is_fused) {
  std::vector<std::int64_t> rows;
  for (int p = 0; p < parts_of(layer); ++p)
    rows.push_back(rules.lora.b_rows(layer.base, p, is_fused).size);
  return rows;
}

template <typename T>
LoraSlots<T>::LoraSlots(const LoraLayer& layer, const ShardingRules& rules, View<T> a, View<T> b,
                        View<T> bias, Stream& stream)
    : layer_(layer), rules_(rules), a_(a), b_(b), bias_(bias), stream_(stream) {
  const std::int64_t a_rows = parts_of(layer) * lora_a_rows(layer, rules),
                     b_rows = lora_b_rows(layer, rules), in = rules.lora.a_columns(layer.base).size;
  const std::int64_t slots = a_rows > 0 ? a.rows / a_rows : 0;
  if (slots < 1 || a.rows != slots * a_rows || a.cols != in || b.rows != slots * b_rows ||
      b.cols != layer.max_rank || (bias.rows != 0 && (bias.rows != slots || bias.cols != b_rows))) {
    throw Fault{Outcome::BadLaunch,
                fmt::format("slots of A [{}, {}] and of B [{}, {}] do not fill [{}, {}] and [{}, "
                            "{}], or the bias [{}, {}]",
                            a_rows, in, b_rows, layer.max_rank, a.rows, a.cols, b.rows, b.cols,
                            bias.rows, bias.cols)};
  }
  slots_ = int(slots);
}

template <typename T>
void LoraSlots<T>::require_slot(int slot) const {
  if (slot >= 0 && slot < slots_) return;
  throw Fault{Outcome::BadLaunch, fmt::format("slot {} of {}", slot, slots_)};
}

template <typename T>
LoraSlotState LoraSlots<T>::load(int slot, const PeftAdapter& adapter) {
  require_slot(slot);
  const LoraBase& base = layer_.base;
  const LoraRules& rules = rules_.lora;
  const Checkpoint& file = adapter.tensors();
  const PeftModule* fused =
      layer_.fused.empty() ? nullptr : adapter.find(layer_.prefix + layer_.fused);
  const std::vector<const PeftModule*> modules = modules_of(layer_, fused, adapter);
  const Shard a_rows = lora_own_a(layer_, rules_), a_cols = rules.a_columns(base);
  const int parts = parts_of(layer_);
  const std::int64_t b_rows = lora_b_rows(layer_, rules_);

  std::vector<Shard> taken;  // of each matrix's B
  std::int64_t all_taken = 0;
  for (int p = 0; p < parts; ++p) {
    taken.push_back(rules.b_rows(base, p, fused != nullptr));
    all_taken += taken.back().size;
  }
  if (all_taken != b_rows) {
    throw Fault{Outcome::BadLaunch,
                fmt::format("B of {}{} is loaded as [{}, {}] into a slot of [{}, {}]",
                            layer_.prefix, fused != nullptr ? layer_.fused : layer_.parts.front(),
                            all_taken, layer_.max_rank, b_rows, layer_.max_rank)};
  }

  LoraSlotState state;
  Staged<T> a{parts * a_rows.size, a_cols.size}, b{b_rows, layer_.max_rank},
      bias{1, bias_.rows == 0 ? 0 : b_rows};
  const auto copy_a = [&](std::int64_t first, std::int64_t rows) {
    copy_rows(stream_, a, first, rows, a.cols, a_, slot * a.rows);
  };
  const auto copy_b = [&](std::int64_t first, std::int64_t rows, std::int64_t cols) {
    copy_rows(stream_, b, first, rows, cols, b_, slot * b.rows);
  };
  std::int64_t b_first = 0;
  for (int p = 0; p < parts; b_first += taken[std::size_t(p++)].size) {
    const PeftModule* module = modules[std::size_t(p)];
    state.ranks.push_back(module == nullptr ? 0 : std::int32_t(module->rank));
    state.scales.push_back(1.0f);
    if (module == nullptr) continue;
    const std::int64_t rank = module->rank,
                       out = fused != nullptr ? base.total_rows() : base.rows[std::size_t(p)];
    if (rank > layer_.max_rank) {
      throw BadInput(fmt::format("{}: {} has LoRA rank {}, but slots have {}",
                                 file.path_of(*module->a), module->name, rank, layer_.max_rank));
    }
    const auto factor =
        float(rules.scale(module->alpha, rank, layer_.max_rank, adapter.config().use_rslora));
    const float merged = rules.scales_b(layer_.merges_scale) ? factor : 1.0f;
    if (rules.scales_delta(layer_.merges_scale)) state.scales.back() = factor;

    // Rows of the slot's A for which the adapter has any: what ranks share out is max_rank.
    const Source stored_a(file, *module->a, {rank, base.in_features});
    const std::int64_t a_count =
        std::clamp<std::int64_t>(rank - a_rows.offset, 0, std::max<std::int64_t>(a_rows.size, 0));
    stored_a.require_inside("rows", {a_rows.offset, 0}, layer_.max_rank);
    stored_a.require_inside("columns", a_cols, base.in_features);
    for (std::int64_t i = 0; i < a_count; ++i) {
      stored_a.read((a_rows.offset + i) * base.in_features + a_cols.offset, a_cols.size, 1.0f,
                    a.row(p * a_rows.size + i));
    }

    const Shard rows = taken[std::size_t(p)];
    const Source stored_b(file, *module->b, {out, rank});
    stored_b.require_inside("rows", rows, out);
    for (std::int64_t i = 0; i < rows.size; ++i)
      stored_b.read((rows.offset + i) * rank, rank, merged, b.row(b_first + i));
    if (module->bias != nullptr) {
      const Source stored_bias(file, *module->bias, {out});
      if (bias_.rows == 0) {
        throw BadInput(fmt::format("{}: {}, but slots have no room for biases",
                                   file.path_of(*module->bias), module->bias->name));
      }
      stored_bias.read(rows.offset, rows.size, merged, bias.row(0) + b_first);
    }
    if (!rules.zeroes_slots) {
      copy_a(p * a_rows.size, a_count);
      copy_b(b_first, rows.size, rank);
      if (module->bias != nullptr) {
        from_host(stream_, bias_.data + slot * bias_.row_stride + b_first, bias.row(0) + b_first,
                  std::size_t(rows.size) * sizeof(T));
      }
    }
  }
  if (rules.zeroes_slots) {
    copy_a(0, a.rows);
    copy_b(0, b.rows, b.cols);
    copy_rows(stream_, bias, 0, 1, bias.cols, bias_, slot);
  }
  return state;
}

template <typename T>
void LoraSlots<T>::unload(int slot) {
  require_slot(slot);
  const std::int64_t b_rows = lora_b_rows(layer_, rules_);
  Staged<T> a{a_.rows / slots_, a_.cols}, b{b_rows, b_.cols}, bias{1, bias_.rows == 0 ? 0 : b_rows};
  copy_rows(stream_, a, 0, a.rows, a.cols, a_, slot * a.rows);
  copy_rows(stream_, b, 0, b.rows, b.cols, b_, slot * b.rows);
  copy_rows(stream_, bias, 0, 1, bias.cols, bias_, slot);
}

template class LoraSlots<float>;
template class LoraSlots<f16>;
template class LoraSlots<bf16>;

}  // namespace tp
