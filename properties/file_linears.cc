#include "properties/file_linears.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <mutex>
#include <optional>
#include <set>
#include <string_view>
#include <tuple>

#include "harness/base/user_checkpoint.h"

namespace tp {

namespace {

// One way of naming the matrices of a linear.
struct Naming {
  std::vector<std::string_view> leaves;
  bool is_striped = false;
  bool only_beside_others = false;  // too common a name to say by itself whose it is
};

const std::vector<Naming>& namings(LinearKind kind) {
  static const std::vector<Naming> all[] = {
      {{{"q_proj", "k_proj", "v_proj"}},
       {{"qkv_proj"}},
       {{"query_key_value"}, true},
       {{"wq", "wk", "wv"}},
       {{"wqkv"}, true},
       {{"Wqkv"}},
       {{"W_pack"}}},
      {{{"o_proj"}}, {{"wo"}}, {{"dense"}, false, true}, {{"out_proj"}, false, true}},
      {{{"gate_proj", "up_proj"}}, {{"gate_up_proj"}}, {{"w1", "w3"}}},
      {{{"down_proj"}}, {{"w2"}}},
  };
  return all[int(kind)];
}

bool is_attention(LinearKind kind) {
  return kind == LinearKind::qkv || kind == LinearKind::attention_out;
}

// Whether the leaf says that its parent is an attention (or an MLP).
bool is_telling(bool attention, std::string_view leaf) {
  for (const LinearKind kind : attention ? std::array{LinearKind::qkv, LinearKind::attention_out}
                                         : std::array{LinearKind::gate_up, LinearKind::mlp_out}) {
    for (const Naming& naming : namings(kind)) {
      if (naming.only_beside_others) continue;
      if (std::find(naming.leaves.begin(), naming.leaves.end(), leaf) != naming.leaves.end())
        return true;
    }
  }
  return false;
}

std::optional<int> number(std::string_view word) {
  int value = 0;
  const auto [end, error] = std::from_chars(word.data(), word.data() + word.size(), value);
  if (word.empty() || error != std::errc() || end != word.data() + word.size()) return std::nullopt;
  return value;
}

// A module that linears are in: "model.layers.0.self_attn".
struct Parent {
  std::string name;
  std::string stem;  // what is before the layer's number: "model.layers"
  int layer = 0;
  int numbers = 0;  // in the name: an expert has two
  std::set<std::string, std::less<>> leaves;
};

std::optional<Parent> parent_called(std::string_view name) {
  Parent parent{.name = std::string(name)};
  for (std::size_t begin = 0; begin <= name.size();) {
    const std::size_t end = std::min(name.find('.', begin), name.size());
    if (const auto n = number(name.substr(begin, end - begin)); n && parent.numbers++ == 0) {
      parent.layer = *n;
      parent.stem = name.substr(0, begin);
    }
    begin = end + 1;
  }
  if (parent.numbers == 0) return std::nullopt;
  return parent;
}

bool has_all(const Parent& parent, const Naming& naming) {
  return std::all_of(naming.leaves.begin(), naming.leaves.end(),
                     [&](std::string_view leaf) { return parent.leaves.contains(leaf); });
}
bool has_any(const Parent& parent, const Naming& naming) {
  return std::any_of(naming.leaves.begin(), naming.leaves.end(),
                     [&](std::string_view leaf) { return parent.leaves.contains(leaf); });
}

// Whether some weight of the module is as wide as the residual stream, packed or not.
bool is_as_wide(const Checkpoint& checkpoint, const std::string& module, std::int64_t hidden) {
  for (const char* suffix : {".weight", ".weight_packed", ".qweight"}) {
    const StoredTensor* weight = checkpoint.find(module + suffix);
    if (weight == nullptr || weight->shape.size() != 2) continue;
    for (const std::int64_t n : weight->shape) {
      if (n == hidden || 2 * n == hidden || 8 * n == hidden) return true;
    }
  }
  return false;
}

using Layers = std::map<int, Parent>;  // the module of each layer

// Whose module of a layer it is: dense before experts, the first expert before the others.
bool comes_first(const Parent& a, const Parent& b) {
  return std::forward_as_tuple(a.numbers, a.name.size(), a.name) <
         std::forward_as_tuple(b.numbers, b.name.size(), b.name);
}

std::map<std::string, Layers> decoders(const Checkpoint& checkpoint, bool attention) {
  std::map<std::string, std::set<std::string, std::less<>>> leaves;
  for (const Safetensors& file : checkpoint.files()) {
    for (const StoredTensor& t : file.tensors()) {
      const std::string_view name = t.name;
      const std::size_t end = name.rfind('.');
      if (end == name.npos || end == 0) continue;
      const std::size_t dot = name.rfind('.', end - 1);
      if (dot == name.npos) continue;
      leaves[std::string(name.substr(0, dot))].emplace(name.substr(dot + 1, end - dot - 1));
    }
  }
  std::map<std::string, Layers> all;
  for (auto& [name, of] : leaves) {
    if (std::none_of(of.begin(), of.end(),
                     [&](const std::string& leaf) { return is_telling(attention, leaf); }))
      continue;
    std::optional<Parent> parent = parent_called(name);
    if (!parent) continue;
    parent->leaves = std::move(of);
    Layers& layers = all[parent->stem];
    const auto [it, is_first] = layers.try_emplace(parent->layer, *parent);
    if (!is_first && comes_first(*parent, it->second)) it->second = *parent;
  }
  return all;
}

std::map<int, FileLinear> linears_in(const Layers& layers, LinearKind kind) {
  // Names that nobody has all of are of another sort of attention or MLP.
  std::vector<const Naming*> known;
  for (const Naming& naming : namings(kind)) {
    if (std::any_of(layers.begin(), layers.end(),
                    [&](const auto& layer) { return has_all(layer.second, naming); }))
      known.push_back(&naming);
  }
  std::map<int, FileLinear> all;
  for (const auto& [layer, parent] : layers) {
    if (known.empty()) break;
    const auto own = std::find_if(known.begin(), known.end(),
                                  [&](const Naming* naming) { return has_any(parent, *naming); });
    const Naming& naming = own == known.end() ? *known.front() : **own;
    FileLinear linear{.is_striped = naming.is_striped};
    for (const std::string_view leaf : naming.leaves)
      linear.modules.push_back(parent.name + "." + std::string(leaf));
    all.emplace(layer, std::move(linear));
  }
  return all;
}

}  // namespace

std::map<int, FileLinear> linears_of(const Checkpoint& checkpoint, LinearKind kind,
                                     std::int64_t hidden_size) {
  std::map<int, FileLinear> best;
  std::int64_t wide_in_best = -1;
  for (const auto& [stem, layers] : decoders(checkpoint, is_attention(kind))) {
    std::map<int, FileLinear> linears = linears_in(layers, kind);
    const std::int64_t wide = std::count_if(linears.begin(), linears.end(), [&](const auto& l) {
      return is_as_wide(checkpoint, l.second.modules.front(), hidden_size);
    });
    if (wide <= wide_in_best) continue;
    wide_in_best = wide;
    best = std::move(linears);
  }
  return best;
}

const std::map<int, FileLinear>& file_linears(LinearKind kind) {
  static std::mutex mutex;
  static std::map<LinearKind, std::map<int, FileLinear>> found;
  static std::uint64_t version = 0;
  const std::lock_guard lock(mutex);
  if (version != user_checkpoint_version()) found.clear();
  version = user_checkpoint_version();
  const auto known = found.find(kind);
  if (known != found.end()) return known->second;
  const Checkpoint* checkpoint = user_checkpoint();
  return found[kind] = checkpoint == nullptr
                           ? std::map<int, FileLinear>{}
                           : linears_of(*checkpoint, kind, user_model()->shape.hidden_size);
}

std::string usual_names(LinearKind kind) {
  static constexpr const char* kNames[] = {"q_proj, k_proj and v_proj", "o_proj",
                                           "gate_proj and up_proj", "down_proj"};
  return kNames[int(kind)];
}

}  // namespace tp
