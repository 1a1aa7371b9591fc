#include "properties/stored_checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <set>

#include "harness/base/check.h"
#include "harness/base/user_checkpoint.h"
#include "properties/stored_tensors.h"

namespace tp::stored_linear {

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

}  // namespace

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

namespace {

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

namespace {

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

}  // namespace

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

}  // namespace tp::stored_linear
