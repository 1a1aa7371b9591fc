#include "harness/base/model_config.h"

#include <fmt/format.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <optional>

#include "harness/base/case.h"
#include "harness/base/check.h"
#include "harness/base/json.h"

namespace tp {

namespace {

constexpr std::uintmax_t kMaxBytes = 16 << 20;
// What a case line can hold: a shape that is read shall be one that can be run.
const int kMaxHidden = int(shared_key("hidden_size").max);
const int kMaxHeads = int(shared_key("num_heads").max);
const int kMaxHeadDim = int(shared_key("head_dim").max);

// The member `key`; a null counts as left out.
const Json* member(const Json& config, std::string_view key) {
  const Json* value = config.find(key);
  return value == nullptr || value->as<std::nullptr_t>() ? nullptr : value;
}

std::optional<int> size_at(const Json& config, std::string_view key, int max) {
  const Json* value = member(config, key);
  if (value == nullptr) return std::nullopt;
  const std::int64_t* number = value->as<std::int64_t>();
  if (number == nullptr && !value->as<double>()) {
    throw BadInput(fmt::format("{} is {}, not a whole number", key, value->describe()));
  }
  if (number == nullptr || *number < 1 || *number > max) {
    throw BadInput(
        fmt::format("{}={} is not a whole number in 1..{}", key, value->describe(), max));
  }
  return int(*number);
}

int required_size(const Json& config, std::string_view key, int max) {
  if (const auto size = size_at(config, key, max)) return *size;
  throw BadInput(fmt::format("{} is missing", key));
}

bool flag_at(const Json& config, std::string_view key) {
  const Json* value = member(config, key);
  if (value == nullptr) return false;
  if (const bool* flag = value->as<bool>()) return *flag;
  throw BadInput(fmt::format("{} is {}, neither true nor false", key, value->describe()));
}

double eps_of(const Json& config) {
  for (const char* key :
       {"rms_norm_eps", "layer_norm_eps", "layernorm_epsilon", "norm_eps", "norm_epsilon"}) {
    const Json* value = member(config, key);
    if (value == nullptr) continue;
    const double* real = value->as<double>();
    const std::int64_t* whole = value->as<std::int64_t>();
    const double eps = real ? *real : whole ? double(*whole) : -1;
    if (!(eps >= 0 && eps < 1)) {
      throw BadInput(fmt::format("{}={} is not a number in 0..1", key, value->describe()));
    }
    return eps;
  }
  return 0;
}

// Only what the keys say: Qwen3, Gemma 3 and OLMo 2 norm q and k and have no key for it.
std::string qk_norm_of(const Json& config, bool mla) {
  if (mla) return "mla_latent";
  if (!member(config, "use_qk_norm")) return "";
  if (!flag_at(config, "use_qk_norm")) return "none";
  const Json* type = member(config, "qk_norm_type");
  const std::string* word = type ? type->as<std::string>() : nullptr;
  if (word && *word == "per_layer") return "full_width";
  if (word && *word == "per_head") return "per_head";
  return "";
}

int head_dim_of(const Json& config, const ModelShape& shape, bool mla) {
  const auto head_dim = size_at(config, "head_dim", kMaxHeadDim);
  // With MLA a head is its two parts together; some of these configs carry an unrelated head_dim
  // too.
  if (mla && member(config, "qk_nope_head_dim")) {
    const int sum = required_size(config, "qk_nope_head_dim", kMaxHeadDim) +
                    required_size(config, "qk_rope_head_dim", kMaxHeadDim);
    if (sum > kMaxHeadDim) {
      throw BadInput(
          fmt::format("qk_nope_head_dim + qk_rope_head_dim = {} is above {}", sum, kMaxHeadDim));
    }
    return sum;
  }
  if (head_dim) return *head_dim;
  if (shape.hidden_size % shape.num_heads != 0) {
    throw BadInput(fmt::format(
        "head_dim is missing, and hidden_size={} is not a multiple of num_attention_heads={}",
        shape.hidden_size, shape.num_heads));
  }
  const int derived = shape.hidden_size / shape.num_heads;
  if (derived > kMaxHeadDim) {
    throw BadInput(fmt::format("hidden_size={} / num_attention_heads={} gives a head_dim above {}",
                               shape.hidden_size, shape.num_heads, kMaxHeadDim));
  }
  return derived;
}

Model model_from(const Json& root) {
  if (!root.as<Json::Object>())
    throw BadInput(fmt::format("it holds {}, not an object", root.describe()));
  const Json* nested = root.find("text_config");
  const Json& config = nested && member(*nested, "num_attention_heads") ? *nested : root;

  Model model;
  ModelShape& shape = model.shape;
  model.mla = size_at(config, "kv_lora_rank", kMaxHidden).has_value();
  shape.hidden_size = required_size(config, "hidden_size", kMaxHidden);
  shape.num_heads = required_size(config, "num_attention_heads", kMaxHeads);
  shape.num_kv_heads = size_at(config, "num_key_value_heads", kMaxHeads).value_or(shape.num_heads);
  if (shape.num_heads % shape.num_kv_heads != 0) {
    throw BadInput(fmt::format("num_attention_heads={} is not a multiple of num_key_value_heads={}",
                               shape.num_heads, shape.num_kv_heads));
  }
  shape.head_dim = head_dim_of(config, shape, model.mla);
  shape.v_head_dim = size_at(config, "v_head_dim", kMaxHeadDim).value_or(0);
  if (shape.v_head_dim == shape.head_dim) shape.v_head_dim = 0;  // one spelling of "the same"
  shape.attn_output_gate =
      flag_at(config, "attn_output_gate") || flag_at(config, "attention_output_gate");
  model.qk_norm = qk_norm_of(config, model.mla);
  model.eps = eps_of(config);
  return model;
}

}  // namespace

Model model_from_config(std::string_view text, const std::string& path) {
  try {
    Model model = model_from(parse_json(text));
    model.id = model.source = path;
    return model;
  } catch (const BadInput& e) {
    throw BadInput(fmt::format("{}: {}", path, e.what()));
  }
}

Model read_config(const std::string& path) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    throw BadInput(fmt::format("{}: {}", path, error ? error.message() : "not a regular file"));
  }
  std::ifstream in(path, std::ios::binary);
  if (!in) throw BadInput(fmt::format("{}: {}", path, std::strerror(errno)));
  std::string text;
  // Read until the limit and one byte on, rather than trusting a size that may change meanwhile.
  text.resize(kMaxBytes + 1);
  in.read(text.data(), std::streamsize(text.size()));
  text.resize(std::size_t(in.gcount()));
  if (in.bad()) throw BadInput(fmt::format("{}: cannot be read", path));
  if (text.size() > kMaxBytes)
    throw BadInput(fmt::format("{}: larger than {} MiB", path, kMaxBytes >> 20));
  return model_from_config(text, path);
}

}  // namespace tp
