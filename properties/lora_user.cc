#include "properties/lora_user.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstring>
#include <map>

#include "harness/base/check.h"
#include "harness/base/models.h"
#include "harness/base/user_adapter.h"

namespace tp::lora {

namespace {

// The last parts of modules' names.
struct Names {
  Base base;
  std::vector<std::string> parts;
  std::vector<std::string> fused;
};
const std::vector<Names>& names() {
  static const std::vector<Names> all = {
      {Base::qkv, {"q_proj", "k_proj", "v_proj"}, {"qkv_proj", "query_key_value"}},
      {Base::gate_up, {"gate_proj", "up_proj"}, {"gate_up_proj"}},
      {Base::o_proj, {"o_proj"}, {}},
      {Base::down_proj, {"down_proj"}, {}}};
  return all;
}

bool contains(const std::vector<std::string>& list, const std::string& text) {
  return std::find(list.begin(), list.end(), text) != list.end();
}

// The first part of a module's name that is a number: that of the layer.
std::optional<std::int64_t> number_in(const std::string& module) {
  for (std::size_t at = 0; at < module.size();) {
    const std::size_t end = std::min(module.find('.', at), module.size());
    std::int64_t number = 0;
    const auto [stop, error] = std::from_chars(module.data() + at, module.data() + end, number);
    if (error == std::errc{} && stop == module.data() + end && number >= 0) return number;
    at = end + 1;
  }
  return std::nullopt;
}

std::optional<UserLayer> layer_of_module(const std::string& module) {
  const std::size_t dot = module.rfind('.');
  const std::optional<std::int64_t> number = number_in(module);
  if (dot == module.npos || !number) return std::nullopt;
  const std::string last = module.substr(dot + 1);
  for (const Names& n : names()) {
    const bool is_fused = contains(n.fused, last);
    if (is_fused || contains(n.parts, last))
      return UserLayer{n.base, *number, module.substr(0, dot + 1), is_fused ? last : ""};
  }
  return std::nullopt;
}

using Layers = std::map<std::pair<Base, std::int64_t>, UserLayer>;

// What was found in the adapter that is open now.
const Layers& layers() {
  static Layers found;
  static std::uint64_t version = 0;
  if (version == user_adapter_version()) return found;
  found.clear();
  for (const PeftModule& m : user_adapter()->modules()) {
    if (const std::optional<UserLayer> layer = layer_of_module(m.name))
      found.insert({{layer->base, layer->number}, *layer});
  }
  version = user_adapter_version();
  return found;
}

const UserLayer* find_layer(const Case& c) {
  const auto found = layers().find({base_of(c), c.options.at("layer") - 1});
  return found == layers().end() ? nullptr : &found->second;
}

const StoredTensor* tensor_of(const PeftModule& m, std::string_view what) {
  return what == "lora_A.weight" ? m.a : what == "lora_B.weight" ? m.b : m.bias;
}

// Columns of gate, and of up, that the modules of a layer have.
std::int64_t intermediate_of(const UserLayer& layer) {
  const auto rows = [&](const std::string& last) -> std::int64_t {
    const PeftModule* m = user_adapter()->find(layer.prefix + last);
    return m == nullptr ? 0 : m->b->shape[0];
  };
  if (layer.base == Base::down_proj)
    return user_adapter()->find(layer.prefix + "down_proj")->a->shape[1];
  if (!layer.fused.empty()) return rows(layer.fused) / 2;
  return std::max(rows("gate_proj"), rows("up_proj"));
}

// Throws BadInput where the layer's A and B are not of the base that the case has.
void check_fits(const Case& c) {
  const Layer layer = layer_of(c);
  const PeftAdapter& adapter = *user_adapter();
  const auto check = [&](const PeftModule& m, std::int64_t rows) {
    if (m.a->shape[1] != layer.in_features || m.b->shape[0] != rows) {
      throw BadInput(
          fmt::format("{}: {} is {} and {} is {}, but the base layer has {} columns and {} rows",
                      adapter.tensors().path_of(*m.a), m.a->name, shape_text(m.a->shape), m.b->name,
                      shape_text(m.b->shape), layer.in_features, rows));
    }
  };
  std::int64_t all = 0;
  for (std::size_t p = 0; p < layer.parts.size(); ++p) {
    all += layer.rows[p];
    if (const PeftModule* m = adapter.find(layer.prefix + layer.parts[p])) check(*m, layer.rows[p]);
  }
  if (const UserLayer& of_user = user_layer(c); !of_user.fused.empty())
    check(*adapter.find(layer.prefix + of_user.fused), all);
}

}  // namespace

Key layer_key() {
  return {.name = "layer",
          .help =
              "0: adapters made from the seed; k: in the first slot, what the adapter that the "
              "run was given (--adapter DIR) has for layer k-1",
          .min = 0,
          .max = 1 << 16,
          .of_checkpoint = true,
          .is_drawn = false};
}

bool is_users(const Case& c) {
  const auto layer = c.options.find("layer");
  return c.op == "lora" && layer != c.options.end() && layer->second > 0;
}

std::optional<std::string> refuse_users(const Case& c) {
  const std::int64_t layer = c.options.at("layer");
  if (user_adapter() == nullptr) {
    return fmt::format("layer={} is of an adapter, and the run was given none (--adapter DIR)",
                       layer);
  }
  if (find_layer(c) == nullptr) {
    return fmt::format("the adapter has no module of such a base layer in layer {} (layer={})",
                       layer - 1, layer);
  }
  try {
    check_fits(c);
  } catch (const BadInput& e) {
    return e.what();
  }
  const Layer of_case = layer_of(c);
  for (const Module& m : user_modules(of_case).modules) {
    if (m.rank > c.options.at("max_rank")) {
      return fmt::format("the adapter has LoRA rank {}, above a slot's max_rank={}", m.rank,
                         c.options.at("max_rank"));
    }
  }
  if ((c.options.at("lora_bias") == 1) != user_adapter()->config().lora_bias)
    return "lora_bias is the adapter's own: 1 if its B has a bias, else 0";
  return std::nullopt;
}

const UserLayer& user_layer(const Case& c) {
  const UserLayer* found = find_layer(c);
  TP_CHECK(found != nullptr, "a layer that the adapter does not have");
  return *found;
}

Adapter user_modules(const Layer& layer) {
  const PeftAdapter& adapter = *user_adapter();
  Adapter all{.use_rslora = adapter.config().use_rslora, .has_bias = adapter.config().lora_bias};
  const PeftModule* fused =
      layer.fused.empty() ? nullptr : adapter.find(layer.prefix + layer.fused);
  all.is_fused = fused != nullptr;
  for (const std::string& part : layer.parts) {
    const PeftModule* m = fused ? fused : adapter.find(layer.prefix + part);
    all.modules.push_back(m == nullptr ? Module{} : Module{m->rank, m->alpha});
  }
  return all;
}

TensorSpec user_tensor(const std::string& name, const std::string& module, std::string_view what) {
  const StoredTensor& stored = *tensor_of(*user_adapter()->find(module), what);
  const DType type = *stored.type();
  TensorSpec t{name, type, stored.shape.size() == 1 ? 1 : stored.shape[0], stored.shape.back(),
               Role::weight};
  t.value = [&stored, type, cols = t.cols](const DataRegime&, std::int64_t row, std::int64_t col) {
    // A file may have it at any address.
    std::array<std::byte, 8> element;
    const auto size = std::size_t(size_of(type));
    std::memcpy(element.data(), stored.data + std::size_t(row * cols + col) * size, size);
    return load(type, element.data(), 0);
  };
  return t;
}

CheckpointCases adapter_cases(int tp_size) {
  const Operator& op = find_operator("lora");
  CheckpointCases all;
  const auto leave_out = [&](const std::string& why) {
    if (all.left_out.empty()) all.left_out = why;
  };
  if (layers().empty()) {
    leave_out(
        fmt::format("{} is no module of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, "
                    "down_proj in a numbered layer",
                    user_adapter()->modules().front().name));
  }
  const ModelShape& shape = user_adapter_base()->shape;
  for (const auto& [key, layer] : layers()) {
    Case c = op.blank();
    c.tp_size = tp_size;
    c.model = shape;
    c.model.attn_output_gate = false;  // a key of its own
    const auto set = [&](const char* name, std::int64_t value) { c.options.at(name) = value; };
    set("module", std::int64_t(layer.base));
    set("layer", layer.number + 1);
    set("output_gate", shape.attn_output_gate);
    set("lora_bias", user_adapter()->config().lora_bias);
    if (layer.base == Base::gate_up || layer.base == Base::down_proj) {
      const std::int64_t width = intermediate_of(layer);
      if (width % tp_size != 0) {
        leave_out(fmt::format("{} columns of the MLP are not {} equal parts", width, tp_size));
        continue;
      }
      set("intermediate_per_rank", width / tp_size);
    } else if (const auto why = partitionable(shape, tp_size)) {
      leave_out(*why);
      continue;
    }
    check_fits(c);
    std::int64_t rank = 1;
    for (const Module& m : user_modules(layer_of(c)).modules) rank = std::max(rank, m.rank);
    set("max_rank", rank);
    if (const auto why = op.refuse(c)) {
      leave_out(*why);
    } else {
      all.cases.push_back(std::move(c));
    }
  }
  return all;
}

}  // namespace tp::lora
