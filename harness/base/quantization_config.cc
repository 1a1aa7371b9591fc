#include "harness/base/quantization_config.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <functional>
#include <map>
#include <optional>
#include <regex>

#include "harness/base/check.h"
#include "harness/base/config_json.h"
#include "harness/base/peft_pattern.h"
#include "harness/base/quantization_json.h"
#include "harness/base/text.h"

namespace tp {

namespace {

constexpr std::string_view kRegex = "re:";
constexpr int kMaxBlock = 1 << 20;
// std::regex recurses as deep as a name is long.
constexpr std::size_t kMaxName = 1000;

// nullptr for a pattern that std::regex does not know (Python's have more), or that could take
// without end (peft_pattern.h). Matching takes polynomial time (libstdc++'s flag), whatever
// somebody wrote. Compiled once: thousands of modules are asked about.
const std::regex* regex_of(std::string_view pattern) {
  constexpr std::size_t kKept = 1000;
  thread_local std::map<std::string, std::optional<std::regex>, std::less<>> compiled;
  if (const auto known = compiled.find(pattern); known != compiled.end())
    return known->second ? &*known->second : nullptr;
  if (compiled.size() >= kKept) compiled.clear();
  std::optional<std::regex>& made = compiled[std::string(pattern)];
  const std::string_view regex = pattern.substr(kRegex.size());
  if (not_understood(regex)) return nullptr;
  made.emplace(regex.begin(), regex.end(),
               std::regex::ECMAScript | std::regex_constants::__polynomial);
  return &*made;
}

// * and ? as in file names, but * goes across dots.
bool glob(std::string_view pattern, std::string_view text) {
  std::size_t p = 0, t = 0, star = pattern.npos, resumed = 0;
  while (t < text.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      resumed = t;
    } else if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == text[t])) {
      ++p, ++t;
    } else if (star != pattern.npos) {
      p = star + 1;
      t = ++resumed;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

// What a key has that nobody here knows; `path` names the key from the top.
BadInput unknown(std::string_view path, std::string_view key, const Json* value,
                 std::string_view known) {
  return BadInput(fmt::format("{}.{}={} is not known ({})", path, key,
                              value ? value->describe() : "null", known));
}

void require_null(const Json& config, std::string_view path, std::string_view key) {
  const Json* value = member(config, key);
  if (!value) return;
  const Json::Object* object = value->as<Json::Object>();
  const Json::Array* array = value->as<Json::Array>();
  if ((object && object->empty()) || (array && array->empty())) return;
  throw unknown(path, key, value, "known is null");
}

bool is(const Json& config, std::string_view key, std::string_view word) {
  const Json* value = member(config, key);
  const std::string* text = value ? value->as<std::string>() : nullptr;
  return text && *text == word;
}
bool is(const Json& config, std::string_view key, std::int64_t number) {
  const Json* value = member(config, key);
  const std::int64_t* whole = value ? value->as<std::int64_t>() : nullptr;
  return whole && *whole == number;
}

// [rows, columns], or as it once was: "128x128".
void set_block(QuantFormat& format, const Json& config, std::string_view path,
               std::string_view key) {
  const Json* value = member(config, key);
  std::vector<std::int64_t> numbers;
  if (const Json::Array* array = value ? value->as<Json::Array>() : nullptr) {
    for (const Json& entry : *array) {
      const std::int64_t* number = entry.as<std::int64_t>();
      numbers.push_back(number ? *number : 0);
    }
  } else if (is(config, key, "128x128")) {
    numbers = {128, 128};
  }
  if (numbers.size() != 2 || std::any_of(numbers.begin(), numbers.end(),
                                         [](std::int64_t n) { return n < 1 || n > kMaxBlock; }))
    throw unknown(path, key, value, "a block is [rows, columns]");
  format.block_rows = int(numbers[0]);
  format.block_cols = int(numbers[1]);
}

QuantFormat legal(QuantFormat format, std::string_view path) {
  if (const auto why = illegal(format)) throw BadInput(fmt::format("{}: {}", path, *why));
  return format;
}

// "quant_method": "fp8": DeepSeek's with weight_block_size, AutoFP8's without.
QuantFormat native_fp8(const Json& config, std::string_view path) {
  QuantFormat format{.scheme = Scheme::fp8_tensor, .dialect = Dialect::native};
  if (const Json* fmt_key = member(config, "fmt");
      fmt_key && !is(config, "fmt", "e4m3") && !is(config, "fmt", "float8_e4m3fn"))
    throw unknown(path, "fmt", fmt_key, "known are e4m3, float8_e4m3fn");
  require_null(config, path, "scale_fmt");
  const bool blocks = member(config, "weight_block_size");
  if (blocks) {
    format.scheme = Scheme::fp8_block;
    set_block(format, config, path, "weight_block_size");
  }
  if (is(config, "activation_scheme", "static")) {
    format.activations = Activations::fixed;
  } else if (is(config, "activation_scheme", "dynamic")) {
    format.activations = blocks ? Activations::token_groups : Activations::tensor;
  } else {
    throw unknown(path, "activation_scheme", member(config, "activation_scheme"),
                  "known are dynamic, static");
  }
  return legal(format, path);
}

QuantFormat gptq(const Json& config, std::string_view path) {
  if (!is(config, "bits", 4)) throw unknown(path, "bits", member(config, "bits"), "known is 4");
  if (const Json* stored = member(config, "checkpoint_format");
      stored && !is(config, "checkpoint_format", "gptq"))
    throw unknown(path, "checkpoint_format", stored, "known is gptq");
  // What they say is in the file, too, g_idx and qzeros: here they only have to make sense.
  bool_at(config, "desc_act");
  bool_at(config, "sym");
  require_null(config, path, "modules_in_block_to_quantize");
  const auto group = size_at(config, "group_size", kMaxBlock);
  if (!group) throw unknown(path, "group_size", nullptr, "how many columns share a scale");
  return legal({.scheme = Scheme::gptq, .dialect = Dialect::native, .block_cols = *group}, path);
}

QuantFormat modelopt(const Json& config, std::string_view path) {
  QuantFormat format{.dialect = Dialect::modelopt};
  const Json* algo = member(config, "quant_algo");
  if (is(config, "quant_algo", "FP8")) {
    format.scheme = Scheme::fp8_tensor;
    format.activations = Activations::fixed;
  } else if (is(config, "quant_algo", "FP8_PER_CHANNEL_PER_TOKEN")) {
    format.scheme = Scheme::fp8_channel;
    format.activations = Activations::token;
  } else if (is(config, "quant_algo", "NVFP4")) {
    format.scheme = Scheme::nvfp4;
    format.activations = Activations::token_groups;
    format.block_cols = size_at(config, "group_size", kMaxBlock).value_or(16);
  } else {
    throw unknown(path, "quant_algo", algo, "known are FP8, FP8_PER_CHANNEL_PER_TOKEN, NVFP4");
  }
  return legal(format, path);
}

Activations compressed_activations(const Json* config, const QuantFormat& weights,
                                   const std::string& path) {
  if (!config) return Activations::plain;
  const bool fp4 = weights.scheme == Scheme::nvfp4;
  if (!is(*config, "type", "float"))
    throw unknown(path, "type", member(*config, "type"), "known is float");
  if (!is(*config, "num_bits", fp4 ? 4 : 8))
    throw unknown(path, "num_bits", member(*config, "num_bits"), "the weights have others");
  const Json* said = member(*config, "dynamic");
  const bool local = is(*config, "dynamic", "local");
  const bool dynamic = !local && bool_at(*config, "dynamic").value_or(false);
  const Json* strategy = member(*config, "strategy");
  const std::string word = word_at(*config, "strategy").value_or(dynamic ? "token" : "tensor");
  if (word == "tensor_group" || word == "group") {
    // The scales of groups are always made of the call, those of nvfp4 in units of a known one.
    if (!fp4 && !dynamic) throw unknown(path, "dynamic", said, "known with groups is true");
    if (!is(*config, "group_size", weights.block_cols))
      throw unknown(path, "group_size", member(*config, "group_size"),
                    fmt::format("the weights have {}", weights.block_cols));
    return Activations::token_groups;
  }
  if (local) throw unknown(path, "dynamic", said, "known without groups are true, false");
  if (word == "tensor") return dynamic ? Activations::tensor : Activations::fixed;
  if (word == "token" && dynamic) return Activations::token;
  throw unknown(path, "strategy", strategy,
                dynamic ? "known are tensor, token, group" : "known is tensor");
}

QuantFormat compressed_group(const Json& group, const std::optional<std::string>& stored_as,
                             const std::string& path) {
  QuantFormat format{.dialect = Dialect::compressed_tensors};
  const std::string weights_path = path + ".weights";
  const Json* weights = member(group, "weights");
  if (!weights) throw unknown(path, "weights", nullptr, "what is quantised otherwise");
  require_null(group, path, "output_activations");
  require_null(*weights, weights_path, "actorder");
  if (!bool_at(*weights, "symmetric").value_or(true))
    throw unknown(weights_path, "symmetric", member(*weights, "symmetric"), "known is true");
  if (!is(*weights, "type", "float"))
    throw unknown(weights_path, "type", member(*weights, "type"), "known is float");
  const std::string strategy = word_at(*weights, "strategy").value_or("tensor");
  const std::string stored = word_at(group, "format").value_or(stored_as.value_or(""));
  if (is(*weights, "num_bits", 8)) {
    if (stored != "float-quantized" && stored != "naive-quantized")
      throw BadInput(fmt::format("{}.format=\"{}\" is not known (of 8 bits: float-quantized)", path,
                                 printable(stored)));
    if (strategy == "tensor") {
      format.scheme = Scheme::fp8_tensor;
    } else if (strategy == "channel") {
      format.scheme = Scheme::fp8_channel;
    } else if (strategy == "block") {
      format.scheme = Scheme::fp8_block;
      set_block(format, *weights, weights_path, "block_structure");
    } else {
      throw unknown(weights_path, "strategy", member(*weights, "strategy"),
                    "known are tensor, channel, block");
    }
  } else if (is(*weights, "num_bits", 4)) {
    if (stored != "nvfp4-pack-quantized")
      throw BadInput(fmt::format("{}.format=\"{}\" is not known (of 4 bits: nvfp4-pack-quantized)",
                                 path, printable(stored)));
    if (strategy != "tensor_group" && strategy != "group")
      throw unknown(weights_path, "strategy", member(*weights, "strategy"),
                    "known is tensor_group");
    format.scheme = Scheme::nvfp4;
    format.block_cols = size_at(*weights, "group_size", kMaxBlock).value_or(16);
  } else {
    throw unknown(weights_path, "num_bits", member(*weights, "num_bits"), "known are 4, 8");
  }
  format.activations = compressed_activations(member(group, "input_activations"), format,
                                              path + ".input_activations");
  return legal(format, path);
}

// The whole of compressed-tensors; what is said of all groups throws.
std::vector<QuantGroup> compressed_groups(const Json& config, const std::string& path) {
  if (const auto status = word_at(config, "quantization_status"); status && *status != "compressed")
    throw unknown(path, "quantization_status", member(config, "quantization_status"),
                  "known is compressed");
  require_null(config, path, "transform_config");
  if (const Json* sparsity = member(config, "sparsity_config")) {
    const std::string stored = word_at(*sparsity, "format").value_or("dense");
    if (stored != "dense")
      throw unknown(path + ".sparsity_config", "format", member(*sparsity, "format"),
                    "known is dense");
  }
  const Json* groups = member(config, "config_groups");
  const Json::Object* all = groups ? groups->as<Json::Object>() : nullptr;
  if (!all || all->empty()) throw unknown(path, "config_groups", groups, "one group at least");
  const auto stored_as = word_at(config, "format");
  std::vector<QuantGroup> read;
  for (const auto& [name, entry] : *all) {
    const std::string group_path = fmt::format("{}.config_groups.{}", path, printable(name));
    QuantGroup& group = read.emplace_back();
    group.targets = words_at(entry, "targets");
    // What is not known of one group is told to those who are in it.
    try {
      group.format = compressed_group(entry, stored_as, group_path);
    } catch (const BadInput& e) {
      group.unknown = e.what();
    }
  }
  return read;
}

const Json* found_in(const Json& config) {
  const Json* found = member(config, "quantization_config");
  if (!found) found = member(config, "compression_config");
  // As compressed-tensors once had it.
  if (const Json* inner = found ? member(*found, "quantization_config") : nullptr) return inner;
  return found;
}

// Lists of modules, wherever a dialect has them.
std::vector<std::string> ignored_by(const Json& config) {
  std::vector<std::string> all;
  for (const char* key :
       {"ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers"}) {
    for (std::string& pattern : words_at(config, key)) all.push_back(std::move(pattern));
  }
  // GPTQModel: "-:REGEX" has no quantisation, "+:REGEX" another one.
  if (const Json* dynamic = member(config, "dynamic")) {
    const Json::Object* rules = dynamic->as<Json::Object>();
    if (!rules) throw BadInput(fmt::format("dynamic={} is no object", dynamic->describe()));
    for (const auto& [rule, value] : *rules) {
      if (!rule.starts_with("-:"))
        throw BadInput(fmt::format("dynamic has \"{}\", which is not known (known is \"-:...\")",
                                   printable(rule)));
      all.push_back(std::string(kRegex) + rule.substr(2));
    }
  }
  for (const std::string& pattern : all) {
    if (pattern.starts_with(kRegex) && !regex_of(pattern))
      throw BadInput(fmt::format("the pattern {} is not understood", printable(pattern)));
  }
  return all;
}

void read_groups(Quantization& out, const Json& config, const std::string& path) {
  const Json* method = member(config, "quant_method");
  std::string word = method ? word_at(config, "quant_method").value_or("") : "";
  std::replace(word.begin(), word.end(), '_', '-');
  if (!method && member(config, "quant_algo")) word = "modelopt";
  if (word == "compressed-tensors") {
    out.groups = compressed_groups(config, path);
    for (const QuantGroup& group : out.groups) {
      for (const std::string& target : group.targets) {
        if (target.starts_with(kRegex) && !regex_of(target))
          throw BadInput(
              fmt::format("{}: the target {} is not understood", path, printable(target)));
      }
    }
    return;
  }
  QuantGroup& group = out.groups.emplace_back();
  if (word == "fp8") {
    group.format = native_fp8(config, path);
  } else if (word == "gptq") {
    group.format = gptq(config, path);
    if (!bool_at(config, "lm_head").value_or(false)) out.ignored.push_back("lm_head");
  } else if (word == "modelopt" || word == "modelopt-fp4") {
    group.format = modelopt(config, path);
  } else {
    throw unknown(path, "quant_method", method,
                  "known are compressed-tensors, fp8, gptq, modelopt");
  }
}

void read_quantization(Quantization& out, const Json& config, const std::string& path) {
  // First who is left alone: that decides whom it concerns if the rest is not known.
  try {
    out.ignored = ignored_by(config);
    read_groups(out, config, path);
  } catch (const BadInput& e) {
    out.groups.assign(1, QuantGroup{.targets = {}, .format = {}, .unknown = e.what()});
    if (!out.groups[0].unknown.starts_with(path))
      out.groups[0].unknown = fmt::format("{}: {}", path, e.what());
  }
}

bool is_ignored(const Quantization& quantization, std::string_view module) {
  return std::any_of(quantization.ignored.begin(), quantization.ignored.end(),
                     [&](const std::string& pattern) { return matches_module(pattern, module); });
}

const QuantGroup* group_of(const Quantization& quantization, std::string_view module) {
  for (const bool by_name : {true, false}) {
    for (const QuantGroup& group : quantization.groups) {
      if (!by_name && group.targets.empty()) return &group;
      for (const std::string& target : group.targets) {
        if (by_name ? matches_module(target, module) : target == "Linear") return &group;
      }
    }
  }
  return nullptr;
}

// The attention's linears, layer by layer, under the names that they may have: what is true of one
// name is taken as meant. Sets format and refusal.
void look_at_attention(Quantization& out, int num_layers) {
  const QuantGroup* seen = nullptr;
  for (int layer = 0; layer < num_layers && !out.groups.empty(); ++layer) {
    for (const char* linear : {"q_proj", "k_proj", "v_proj", "o_proj"}) {
      bool ignored = false;
      const QuantGroup* group = nullptr;
      for (const char* prefix : {"model", "model.language_model", "language_model.model"}) {
        const std::string name = fmt::format("{}.layers.{}.self_attn.{}", prefix, layer, linear);
        ignored |= is_ignored(out, name);
        if (!group) group = group_of(out, name);
      }
      if (ignored) continue;
      if (!group) continue;
      if (!group->unknown.empty()) {
        out.refusal = group->unknown;
        return;
      }
      if (seen && seen->format != group->format) {
        out.refusal = fmt::format(
            "quantization_config: attention is {} ({}) and {} ({}), and only one of them can be "
            "run",
            kSchemeWords[std::size_t(seen->format.scheme)],
            kActivationsWords[std::size_t(seen->format.activations)],
            kSchemeWords[std::size_t(group->format.scheme)],
            kActivationsWords[std::size_t(group->format.activations)]);
        return;
      }
      seen = group;
    }
  }
  for (const QuantGroup& group : out.groups) {
    if (!seen && group.unknown.empty()) seen = &group;
  }
  if (seen) out.format = seen->format;
}

}  // namespace

bool matches_module(std::string_view pattern, std::string_view module) {
  if (pattern.empty() || module.size() > kMaxName) return false;
  if (pattern.starts_with(kRegex)) {
    const std::regex* regex = regex_of(pattern);
    return regex && std::regex_search(module.begin(), module.end(), *regex,
                                      std::regex_constants::match_continuous);
  }
  if (pattern.find_first_of("*?") != pattern.npos) {
    for (std::size_t end = 0; end != module.npos;) {
      end = module.find('.', end + 1);
      if (glob(pattern, module.substr(0, end))) return true;
    }
    return false;
  }
  for (std::size_t at = module.find(pattern); at != module.npos;
       at = module.find(pattern, at + 1)) {
    const std::size_t end = at + pattern.size();
    if ((at == 0 || module[at - 1] == '.') && (end == module.size() || module[end] == '.'))
      return true;
  }
  return false;
}

bool Quantization::applies_to(std::string_view module) const {
  return !is_ignored(*this, module) && group_of(*this, module) != nullptr;
}

QuantFormat Quantization::format_of(std::string_view module) const {
  if (!applies_to(module)) return {};
  const QuantGroup& group = *group_of(*this, module);
  if (!group.unknown.empty())
    throw BadInput(fmt::format("{} is quantised: {}", printable(module), group.unknown));
  return group.format;
}

Quantization quantization_of(const Json& root, const Json& text, const Json* beside,
                             int num_layers) {
  Quantization out;
  const Json* config = found_in(root);
  if (!config) config = found_in(text);
  if (config) {
    read_quantization(out, *config, "quantization_config");
  } else if (beside) {
    const Json* inner = member(*beside, "quantization");
    // ModelOpt writes the file for models that it left alone, too.
    if (inner && !member(*inner, "quant_algo")) return out;
    read_quantization(out, inner ? *inner : *beside, "hf_quant_config.json");
  }
  look_at_attention(out, num_layers);
  return out;
}

std::string to_text(const Quantization& quantization) {
  if (quantization.groups.empty()) return "not quantised";
  const QuantFormat& f = quantization.format;
  if (f.scheme == Scheme::none) return "quantised in a format that is not known";
  return fmt::format("{} ({}, activations {})", kSchemeWords[std::size_t(f.scheme)],
                     kDialectWords[std::size_t(f.dialect)],
                     kActivationsWords[std::size_t(f.activations)]);
}

}  // namespace tp
