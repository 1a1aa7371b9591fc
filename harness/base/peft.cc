#include "harness/base/peft.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>

#include "harness/base/check.h"
#include "harness/base/config_json.h"
#include "harness/base/json.h"
#include "harness/base/mapped_file.h"
#include "harness/base/peft_pattern.h"
#include "harness/base/text.h"

namespace tp {

namespace {

namespace fs = std::filesystem;

constexpr const char* kConfigFile = "adapter_config.json";
constexpr const char* kTensorFile = "adapter_model.safetensors";
constexpr std::size_t kMaxConfigBytes = 16 << 20;
constexpr std::int64_t kMaxRank = 1 << 16;
constexpr double kMaxAlpha = 1e9;
constexpr std::string_view kAllLinear = "all-linear";
constexpr std::string_view kPrefix = "base_model.model.";
constexpr std::string_view kA = ".lora_A.weight", kB = ".lora_B.weight", kBias = ".lora_B.bias";

// Numbers --------------------------------------------------------------------------------------

std::int64_t rank_of(const std::string& where, const Json& value) {
  const std::int64_t* rank = value.as<std::int64_t>();
  if (!rank) throw BadInput(fmt::format("{} is {}, not a whole number", where, value.describe()));
  if (*rank < 1 || *rank > kMaxRank)
    throw BadInput(fmt::format("{}={} is not a rank in 1..{}", where, *rank, kMaxRank));
  return *rank;
}

double alpha_of(const std::string& where, const Json& value) {
  const std::int64_t* whole = value.as<std::int64_t>();
  const double* real = value.as<double>();
  if (!whole && !real) {
    // Python's NaN and Infinity are read as null.
    const bool null = value.as<std::nullptr_t>();
    throw BadInput(fmt::format("{} is {}, not a number", where,
                               null ? "null, NaN or Infinity" : value.describe()));
  }
  const double alpha = whole ? double(*whole) : *real;
  if (!(std::abs(alpha) <= kMaxAlpha))
    throw BadInput(
        fmt::format("{}={} is not within -{:g} .. {:g}", where, alpha, kMaxAlpha, kMaxAlpha));
  return alpha;
}

// Members --------------------------------------------------------------------------------------

void require_understood(std::string_view key, const std::string& pattern) {
  if (const auto why = not_understood(pattern))
    throw BadInput(fmt::format("{}: the pattern \"{}\" {}", key, printable(pattern), *why));
}

// A list of names or one pattern.
void read_modules(const Json& config, std::string_view key, std::vector<std::string>& names,
                  std::string& pattern) {
  const Json* value = member(config, key);
  if (!value) return;
  if (const std::string* text = value->as<std::string>()) {
    pattern = *text;
    require_understood(key, pattern);
    return;
  }
  if (!value->as<Json::Array>())
    throw BadInput(
        fmt::format("{} is {}, neither a list of names nor a pattern", key, value->describe()));
  names = words_at(config, key);
  for (const std::string& name : names) {
    if (name.empty()) throw BadInput(fmt::format("{} has an empty name", key));
  }
}

template <typename T>
std::vector<std::pair<std::string, T>> read_patterns(const Json& config, std::string_view key,
                                                     T (*read)(const std::string&, const Json&)) {
  const Json* value = member(config, key);
  if (!value) return {};
  const Json::Object* all = value->as<Json::Object>();
  if (!all) throw BadInput(fmt::format("{} is {}, not an object", key, value->describe()));
  std::vector<std::pair<std::string, T>> patterns;
  for (const auto& [pattern, number] : *all) {
    require_understood(key, pattern);
    patterns.emplace_back(pattern,
                          read(fmt::format("{}: \"{}\"", key, printable(pattern)), number));
  }
  return patterns;
}

void read_layers(const Json& config, PeftConfig& read) {
  constexpr const char *kLayers = "layers_to_transform", *kPattern = "layers_pattern";
  if (const Json* layers = member(config, kLayers)) {
    const auto layer_of = [&](const Json& value) {
      const std::int64_t* layer = value.as<std::int64_t>();
      if (!layer || *layer < 0)
        throw BadInput(fmt::format("{} has {}, not a layer's number", kLayers, value.describe()));
      return *layer;
    };
    if (const Json::Array* list = layers->as<Json::Array>()) {
      for (const Json& entry : *list) read.layers_to_transform.push_back(layer_of(entry));
    } else if (layers->as<std::int64_t>()) {
      read.layers_to_transform.push_back(layer_of(*layers));
    } else {
      throw BadInput(fmt::format("{} is {}, neither a number nor a list of them", kLayers,
                                 layers->describe()));
    }
  }
  const Json* pattern = member(config, kPattern);
  if (const std::string* name = pattern ? pattern->as<std::string>() : nullptr) {
    if (!name->empty()) read.layers_pattern.push_back(*name);  // empty: as if left out
  } else {
    read.layers_pattern = words_at(config, kPattern);
  }
  for (const std::string& name : read.layers_pattern) {
    const auto of_a_name = [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
             c == '_' || c == '-' || c == '.';
    };
    if (name.empty() || !std::all_of(name.begin(), name.end(), of_a_name))
      throw BadInput(
          fmt::format("{} has \"{}\", which is not known (known are names of a list of "
                      "layers)",
                      kPattern, printable(name)));
  }
  const char* given = !read.layers_to_transform.empty() ? kLayers
                      : !read.layers_pattern.empty()    ? kPattern
                                                        : nullptr;
  if (given && !read.target_pattern.empty())
    throw BadInput(
        fmt::format("{} goes with a list of target_modules only, not with a pattern", given));
  if (!read.layers_pattern.empty() && !member(config, kLayers))
    throw BadInput(fmt::format("{} is of no use without {}", kPattern, kLayers));
}

// What makes an adapter more, or other, than A and B of linears.
void require_plain_lora(const Json& config) {
  const std::optional<std::string> type = word_at(config, "peft_type");
  if (!type) throw BadInput("peft_type is left out (known is \"LORA\")");
  if (*type != "LORA")
    throw BadInput(
        fmt::format("peft_type=\"{}\" is not known (known is \"LORA\")", printable(*type)));
  const std::string bias = word_at(config, "bias").value_or("none");
  if (bias != "none")
    throw BadInput(
        fmt::format("bias=\"{}\" trains biases of the base, which is not known (known is "
                    "\"none\")",
                    printable(bias)));
  const struct {
    const char* key;
    const char* what;
  } refused[] = {
      {"use_dora", "DoRA"},
      {"use_qalora", "QALoRA"},
      {"use_bdlora", "block-diagonal LoRA"},
      {"fan_in_fan_out", "weights stored as [in, out]"},
      {"modules_to_save", "modules that are trained whole"},
      {"layer_replication", "layers that are there twice"},
      {"target_parameters", "LoRA of parameters that are no module"},
      {"trainable_token_indices", "trained rows of embeddings"},
      {"alora_invocation_tokens", "activated LoRA"},
      {"arrow_config", "Arrow's routing"},
      {"kasa_config", "KaSA"},
      {"monteclora_config", "MonteCLoRA"},
  };
  for (const auto& [key, what] : refused) {
    const Json* value = member(config, key);
    if (!value) continue;
    const bool* flag = value->as<bool>();
    const Json::Array* list = value->as<Json::Array>();
    if ((flag && !*flag) || (list && list->empty())) continue;
    throw BadInput(
        fmt::format("{}={} asks for {}, which is not known", key, value->describe(), what));
  }
}

PeftConfig config_from(const Json& config) {
  if (!config.as<Json::Object>())
    throw BadInput(fmt::format("it holds {}, not an object", config.describe()));
  require_plain_lora(config);
  PeftConfig read;
  if (const Json* rank = config.find("r")) read.rank = rank_of("r", *rank);
  if (const Json* alpha = config.find("lora_alpha")) read.alpha = alpha_of("lora_alpha", *alpha);
  read.use_rslora = bool_at(config, "use_rslora").value_or(false);
  read.lora_bias = bool_at(config, "lora_bias").value_or(false);
  read_modules(config, "target_modules", read.target_modules, read.target_pattern);
  if (read.target_modules.empty() && read.target_pattern.empty())
    throw BadInput("target_modules is left out or empty");
  read_modules(config, "exclude_modules", read.exclude_modules, read.exclude_pattern);
  read.rank_pattern = read_patterns(config, "rank_pattern", rank_of);
  read.alpha_pattern = read_patterns(config, "alpha_pattern", alpha_of);
  read_layers(config, read);
  read.base_model = word_at(config, "base_model_name_or_path").value_or("");
  return read;
}

// Modules --------------------------------------------------------------------------------------

// The name itself, or the end of `module` after a dot.
bool is_named(std::string_view module, std::string_view name) {
  return module == name || (module.size() > name.size() && module.ends_with(name) &&
                            module[module.size() - name.size() - 1] == '.');
}

bool is_number(std::string_view text) {
  return !text.empty() &&
         std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

// The first number of `module` between two dots, behind a list of layers: one of these names, or
// any but the first of all. Nothing: there is none, or none that fits.
std::optional<std::int64_t> layer_of(std::string_view module,
                                     const std::vector<std::string>& lists) {
  const auto number_behind = [&](const std::string* list) -> std::optional<std::int64_t> {
    for (std::size_t dot = module.find('.'); dot != module.npos; dot = module.find('.', dot + 1)) {
      const std::size_t next = module.find('.', dot + 1);
      if (next == module.npos) return std::nullopt;
      const std::string_view number = module.substr(dot + 1, next - dot - 1);
      const std::string_view before = module.substr(0, dot);
      const bool fits = list ? matches_end(*list, before) : before.find('.') != before.npos;
      if (!is_number(number) || !fits) continue;
      std::int64_t layer = 0;
      for (const char c : number) {
        if (__builtin_mul_overflow(layer, 10, &layer) ||
            __builtin_add_overflow(layer, c - '0', &layer))
          return std::nullopt;
      }
      return layer;
    }
    return std::nullopt;
  };
  if (lists.empty()) return number_behind(nullptr);
  for (const std::string& list : lists) {
    if (const auto layer = number_behind(&list)) return layer;
  }
  return std::nullopt;
}

bool is_of_layers(const PeftConfig& config, std::string_view module) {
  if (config.layers_to_transform.empty()) return true;
  const auto layer = layer_of(module, config.layers_pattern);
  return layer && std::find(config.layers_to_transform.begin(), config.layers_to_transform.end(),
                            *layer) != config.layers_to_transform.end();
}

// Whether this entry of target_modules is the one that means it: a whole name does so in any layer.
bool means(const PeftConfig& config, const std::string& target, std::string_view module) {
  return module == target || (is_named(module, target) && is_of_layers(config, module));
}

bool is_excluded(const PeftConfig& config, std::string_view module) {
  if (!config.exclude_pattern.empty()) return matches_whole(config.exclude_pattern, module);
  return std::any_of(config.exclude_modules.begin(), config.exclude_modules.end(),
                     [&](const std::string& name) { return is_named(module, name); });
}

template <typename T>
const std::pair<std::string, T>* first_match(const std::vector<std::pair<std::string, T>>& patterns,
                                             std::string_view module) {
  for (const auto& entry : patterns) {
    if (matches_end(entry.first, module)) return &entry;
  }
  return nullptr;
}

// Tensors --------------------------------------------------------------------------------------

// "FILE: tensor "NAME" is F32 [8, 64]", as sentences about it begin.
std::string named(const Checkpoint& tensors, const StoredTensor& t) {
  return fmt::format("{}: tensor {} is {} {}", tensors.path_of(t), quoted_name(t.name),
                     printable(t.dtype), shape_text(t.shape));
}

// Why a tensor's name is none that peft writes for a linear; the end of "FILE: tensor NAME ...".
std::string objection_to_name(std::string_view name) {
  if (name.find("lora_magnitude_vector") != name.npos) return "is of DoRA, which is not known";
  if (name.find("lora_embedding_") != name.npos) return "is of an embedding, which is not known";
  for (const std::string_view part : {".lora_A.", ".lora_B."}) {
    const std::size_t at = name.find(part);
    if (at == name.npos) continue;
    const std::string_view rest = name.substr(at + part.size());
    if (rest.ends_with(".weight") || rest.ends_with(".bias"))
      return fmt::format(
          "has an adapter's name in it (\"{}\"), which peft leaves out when it saves",
          printable(rest.substr(0, rest.rfind('.'))));
  }
  return fmt::format("is none of a LoRA's (known are {}MODULE{}, {} and {})", kPrefix, kA, kB,
                     kBias);
}

void require_type(const Checkpoint& tensors, const StoredTensor& t, std::size_t dimensions) {
  const auto type = t.type();
  if (type != DType::f32 && type != DType::f16 && type != DType::bf16)
    throw BadInput(named(tensors, t) + ", and known are F32, F16 and BF16");
  const char* wanted = dimensions == 1        ? "[rows]"
                       : t.name.ends_with(kA) ? "[rank, columns]"
                                              : "[rows, rank]";
  if (t.shape.size() != dimensions || t.elements() == 0)
    throw BadInput(fmt::format("{}, not {}{}", named(tensors, t), wanted,
                               t.elements() == 0 ? " (a shard that was not gathered?)" : ""));
}

// What the config says of the module's rank, for sentences.
std::string rank_text(const PeftConfig& config, std::string_view module) {
  const auto* entry = first_match(config.rank_pattern, module);
  return entry ? fmt::format("{} (rank_pattern \"{}\")", entry->second, printable(entry->first))
               : fmt::format("{}", config.rank);
}

void require_fit(const Checkpoint& tensors, const PeftConfig& config, const PeftModule& m) {
  if (!m.a || !m.b) {
    const StoredTensor& there = m.a ? *m.a : m.b ? *m.b : *m.bias;
    throw BadInput(fmt::format(
        "{}: there is tensor {}, but no {}", tensors.path_of(there), quoted_name(there.name),
        quoted_name(std::string(kPrefix) + m.name + std::string(m.a ? kB : kA))));
  }
  if (!is_target(config, m.name))
    throw BadInput(fmt::format("{}: tensor {} is of a module that {} does not target",
                               tensors.path_of(*m.a), quoted_name(m.a->name), kConfigFile));
  if (m.a->shape[0] != m.b->shape[1])
    throw BadInput(fmt::format("{}, rank {}, and {} is {}, rank {}", named(tensors, *m.a),
                               m.a->shape[0], quoted_name(m.b->name), shape_text(m.b->shape),
                               m.b->shape[1]));
  if (m.a->shape[0] != m.rank)
    throw BadInput(fmt::format("{}, rank {}, and {} says {}", named(tensors, *m.a), m.a->shape[0],
                               kConfigFile, rank_text(config, m.name)));
  if (config.lora_bias && !m.bias)
    throw BadInput(
        fmt::format("{}: there is no tensor {}, and {} says lora_bias", tensors.path_of(*m.b),
                    quoted_name(std::string(kPrefix) + m.name + std::string(kBias)), kConfigFile));
  if (!config.lora_bias && m.bias)
    throw BadInput(
        fmt::format("{}, and {} does not say lora_bias", named(tensors, *m.bias), kConfigFile));
  if (m.bias && m.bias->shape[0] != m.b->shape[0])
    throw BadInput(fmt::format("{}, and {} is {}", named(tensors, *m.bias), quoted_name(m.b->name),
                               shape_text(m.b->shape)));
}

// Whatever the config names is in the file, or it has been made for another one.
void require_all_used(const std::string& path, const PeftConfig& config,
                      const std::vector<PeftModule>& modules) {
  const auto require = [&](std::string_view key, const std::string& text, const auto& matches) {
    if (std::none_of(modules.begin(), modules.end(),
                     [&](const PeftModule& m) { return matches(m.name); }))
      throw BadInput(fmt::format("{}: it has no module of {}'s {} \"{}\"", path, kConfigFile, key,
                                 printable(text)));
  };
  for (const std::string& target : config.target_modules)
    require("target_modules", target,
            [&](const std::string& module) { return means(config, target, module); });
  const auto end_of = [](const std::string& pattern) {
    return [&pattern](const std::string& module) { return matches_end(pattern, module); };
  };
  for (const auto& entry : config.rank_pattern)
    require("rank_pattern", entry.first, end_of(entry.first));
  for (const auto& entry : config.alpha_pattern)
    require("alpha_pattern", entry.first, end_of(entry.first));
}

PeftConfig read_config_of(const std::string& folder) {
  std::error_code error;
  if (!fs::is_directory(folder, error))
    throw BadInput(fmt::format("{} is no directory with an adapter", printable(folder)));
  const std::string path = (fs::path(folder) / kConfigFile).string();
  if (!fs::exists(path, error))
    throw BadInput(fmt::format("{}: there is no {}", folder, kConfigFile));
  const MappedFile file(path);
  const auto bytes = file.bytes();
  if (bytes.size() > kMaxConfigBytes)
    throw BadInput(fmt::format("{}: larger than {} MiB", path, kMaxConfigBytes >> 20));
  return parse_peft_config({reinterpret_cast<const char*>(bytes.data()), bytes.size()}, path);
}

std::string tensors_of(const std::string& folder) {
  std::error_code error;
  const std::string path = (fs::path(folder) / kTensorFile).string();
  if (fs::exists(path, error)) return path;
  const bool pickled = fs::exists(fs::path(folder) / "adapter_model.bin", error);
  throw BadInput(fmt::format("{}: there is no {}{}", folder, kTensorFile,
                             pickled ? ", only adapter_model.bin, which is not known (peft writes "
                                       "the other with safe_serialization=True)"
                                     : ""));
}

}  // namespace

PeftConfig parse_peft_config(std::string_view text, const std::string& path) {
  try {
    return config_from(parse_json(text));
  } catch (const BadInput& e) {
    throw BadInput(fmt::format("{}: {}", path, e.what()));
  }
}

LoraScale lora_scale(const PeftConfig& config, std::string_view module) {
  const auto* rank = first_match(config.rank_pattern, module);
  const auto* alpha = first_match(config.alpha_pattern, module);
  return {.rank = rank ? rank->second : config.rank, .alpha = alpha ? alpha->second : config.alpha};
}

bool is_target(const PeftConfig& config, std::string_view module) {
  if (is_excluded(config, module)) return false;
  if (lower(config.target_pattern) == kAllLinear) return true;
  if (!config.target_pattern.empty()) return matches_whole(config.target_pattern, module);
  return std::any_of(config.target_modules.begin(), config.target_modules.end(),
                     [&](const std::string& target) { return means(config, target, module); });
}

PeftAdapter::PeftAdapter(const std::string& folder)
    : config_(read_config_of(folder)),
      own_(std::make_shared<Checkpoint>(std::vector<std::string>{tensors_of(folder)})),
      tensors_(own_.get()) {
  read();
}

PeftAdapter::PeftAdapter(PeftConfig config, const Checkpoint& tensors)
    : config_(std::move(config)), tensors_(&tensors) {
  read();
}

void PeftAdapter::read() {
  std::map<std::string, PeftModule, std::less<>> found;
  for (const Safetensors& file : tensors_->files()) {
    for (const StoredTensor& t : file.tensors()) {
      const auto refuse = [&](const std::string& why) {
        throw BadInput(fmt::format("{}: tensor {} {}", file.path(), quoted_name(t.name), why));
      };
      const std::string_view name = t.name;
      const auto kind = {kA, kB, kBias};
      const auto* suffix = std::find_if(kind.begin(), kind.end(),
                                        [&](std::string_view s) { return name.ends_with(s); });
      if (suffix == kind.end()) refuse(objection_to_name(name));
      if (!name.starts_with(kPrefix) || name.size() <= kPrefix.size() + suffix->size())
        refuse(fmt::format("does not begin with {}, and the name of a module", kPrefix));
      const std::string_view module =
          name.substr(kPrefix.size(), name.size() - kPrefix.size() - suffix->size());
      if (module.size() > kMaxModuleName)
        refuse(fmt::format("is of a module with a name of {} characters, and {} are known",
                           module.size(), kMaxModuleName));
      require_type(*tensors_, t, *suffix == kBias ? 1 : 2);
      PeftModule& m = found[std::string(module)];
      (*suffix == kA ? m.a : *suffix == kB ? m.b : m.bias) = &t;
    }
  }
  if (found.empty()) throw BadInput(fmt::format("{}: there is no tensor in it", tensors_->path()));
  for (auto& [name, m] : found) {
    const LoraScale scale = lora_scale(config_, name);
    m.name = name;
    m.rank = scale.rank;
    m.alpha = scale.alpha;
    require_fit(*tensors_, config_, m);
    modules_.push_back(m);
  }
  require_all_used(tensors_->path(), config_, modules_);
}

const PeftModule* PeftAdapter::find(std::string_view module) const {
  const auto at =
      std::lower_bound(modules_.begin(), modules_.end(), module,
                       [](const PeftModule& m, std::string_view name) { return m.name < name; });
  return at != modules_.end() && at->name == module ? &*at : nullptr;
}

std::int64_t PeftAdapter::max_rank() const {
  std::int64_t most = 0;
  for (const PeftModule& m : modules_) most = std::max(most, m.rank);
  return most;
}

}  // namespace tp
