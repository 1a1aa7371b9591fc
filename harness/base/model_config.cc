#include "harness/base/model_config.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <vector>

#include "harness/base/case.h"
#include "harness/base/check.h"
#include "harness/base/config_json.h"
#include "harness/base/json.h"
#include "harness/base/quantization_json.h"

namespace tp {

namespace {

constexpr std::uintmax_t kMaxBytes = 16 << 20;
// What a case line can hold: a shape that is read shall be one that can be run.
const int kMaxHidden = int(shared_key("hidden_size").max);
const int kMaxHeads = int(shared_key("num_heads").max);
const int kMaxHeadDim = int(shared_key("head_dim").max);
constexpr int kMaxWindow = 1 << 20;
constexpr int kMaxLayers = 1024;

int required_size(const Json& config, std::initializer_list<std::string_view> keys, int max) {
  if (const auto size = first_size(config, keys, max)) return *size;
  throw BadInput(fmt::format("{} is missing", *keys.begin()));
}

double eps_of(const Json& config) {
  for (const char* key : {"rms_norm_eps", "layer_norm_eps", "layernorm_epsilon", "norm_eps",
                          "norm_epsilon", "layer_norm_epsilon"}) {
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

// The object that has the language model's keys: models for pictures and sound nest it. One
// without heads is another part's.
const Json& language_model(const Json& root) {
  const auto has_heads = [](const Json& config) {
    return member(config, "num_attention_heads") != nullptr;
  };
  const Json* thinker = member(root, "thinker_config");
  for (const Json* nested : {member(root, "text_config"), member(root, "llm_config"),
                             thinker ? member(*thinker, "text_config") : nullptr}) {
    if (nested && has_heads(*nested)) return *nested;
  }
  return root;
}

// What is not in the file, but in the code of the model that it is for.
struct Family {
  std::vector<std::string_view> model_types;
  std::string_view qk_norm;       // the style where it norms q and k at all
  bool norm_by_key = false;       // it does if use_qk_norm says so
  bool norm_if_left_out = false;  // or if nothing does
  bool one_plus = false;          // with 1 + w
  bool gate = false;              // attn_output_gate
  bool bias = false;              // of q, k and v
  bool sinks = false;
};
// Source of each: the model's own file in transformers and in vLLM (models.json names commits).
const Family* family_of(const std::string& model_type) {
  static const std::vector<Family> families = {
      {.model_types = {"qwen3", "qwen3_moe", "qwen3_vl", "qwen3_vl_text", "qwen3_vl_moe",
                       "qwen3_vl_moe_text", "qwen3_omni_moe_text"},
       .qk_norm = "per_head"},
      {.model_types = {"qwen3_next"}, .qk_norm = "per_head", .one_plus = true, .gate = true},
      {.model_types = {"qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"},
       .qk_norm = "per_head",
       .one_plus = true},
      {.model_types = {"gemma3", "gemma3_text"}, .qk_norm = "per_head", .one_plus = true},
      {.model_types = {"gemma4", "gemma4_text", "param2moe"}, .qk_norm = "per_head"},
      {.model_types = {"minimax_m2"}, .qk_norm = "full_width", .norm_by_key = true},
      {.model_types = {"minimax_m3"}, .qk_norm = "per_head", .norm_by_key = true},
      {.model_types = {"glm4_moe"}, .qk_norm = "per_head", .norm_by_key = true},
      {.model_types = {"llama4", "llama4_text"},
       .qk_norm = "weightless_after_rope",
       .norm_by_key = true,
       .norm_if_left_out = true},
      {.model_types = {"olmo2", "olmo3", "olmoe"}, .qk_norm = "full_width"},
      {.model_types = {"gpt_oss"}, .qk_norm = "none", .sinks = true},
      {.model_types = {"qwen2", "qwen2_moe", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl",
                       "qwen2_5_vl_text"},
       .qk_norm = "none",
       .bias = true},
      {.model_types = {"llama", "mistral", "mixtral", "gemma", "gemma2", "phi3", "starcoder2",
                       "falcon", "RefinedWeb", "RefinedWebModel", "nemotron-nas", "nemotron_h",
                       "mimo_v2_flash", "gpt_bigcode", "gpt2", "dbrx", "chatglm"},
       .qk_norm = "none"},
  };
  for (const Family& family : families) {
    if (std::find(family.model_types.begin(), family.model_types.end(), model_type) !=
        family.model_types.end())
      return &family;
  }
  return nullptr;
}

// The keys come first. Qwen3, Gemma 3 and OLMo 2 have none.
std::string qk_norm_of(const Json& config, const Family* family, bool mla) {
  if (mla) return "mla_latent";
  const auto said = bool_at(config, "use_qk_norm");
  if (said && !*said) return "none";
  const std::string type = said ? word_at(config, "qk_norm_type").value_or("") : "";
  if (type == "per_layer") return "full_width";
  if (type == "per_head") return "per_head";
  if (!type.empty()) return "";
  if (!family) return "";
  if (family->norm_by_key && !said.value_or(family->norm_if_left_out)) return "none";
  // A key that says yes to a model that has none: its code is not what we know.
  if (said && family->qk_norm == "none") return "";
  return std::string(family->qk_norm);
}

// Nemotron-NAS: each layer has its own attention, or none. The first that has one counts; a note
// says what the others have.
int kv_heads_of_blocks(const Json& blocks, int num_heads, std::string& note) {
  const Json::Array* all = blocks.as<Json::Array>();
  if (!all) throw BadInput(fmt::format("block_configs is {}, not a list", blocks.describe()));
  std::map<int, int> layers;  // by the KV heads
  int first = 0;
  for (const Json& block : *all) {
    const Json* attention = member(block, "attention");
    if (!attention || any_flag(*attention, {"no_op", "replace_with_linear"})) continue;
    const int group = required_size(*attention, {"n_heads_in_group"}, kMaxHeads);
    if (num_heads % group != 0) {
      throw BadInput(fmt::format("num_attention_heads={} is not a multiple of n_heads_in_group={}",
                                 num_heads, group));
    }
    ++layers[num_heads / group];
    if (first == 0) first = num_heads / group;
  }
  if (first == 0) throw BadInput("block_configs has no layer with attention");
  if (layers.size() > 1) {
    std::vector<std::string> others;
    for (const auto& [kv_heads, count] : layers) {
      if (kv_heads != first) others.push_back(fmt::format("{} of them have {}", count, kv_heads));
    }
    note = fmt::format("its layers differ: {} KV heads as in the first, {}", first,
                       fmt::join(others, ", "));
  }
  return first;
}

// In the order of vLLM's converter.
int kv_heads_of(const Json& config, const std::string& model_type, int num_heads,
                std::string& note) {
  const bool falcon = model_type == "falcon" || model_type.starts_with("RefinedWeb");
  const bool new_falcon = falcon && bool_at(config, "new_decoder_architecture").value_or(false);
  if (!new_falcon && bool_at(config, "multi_query").value_or(false)) return 1;
  if (const Json* attention = member(config, "attn_config")) {  // MPT, DBRX
    if (const auto kv_heads = size_at(*attention, "kv_n_heads", kMaxHeads)) return *kv_heads;
  }
  if (const Json* blocks = member(config, "block_configs"))
    return kv_heads_of_blocks(*blocks, num_heads, note);
  if (const auto kv_heads =
          first_size(config, {"n_head_kv", "num_kv_heads", "num_key_value_heads"}, kMaxHeads))
    return *kv_heads;
  // ChatGLM has the number even where a flag turns it off.
  if (bool_at(config, "multi_query_attention").value_or(true)) {
    if (const auto groups = size_at(config, "multi_query_group_num", kMaxHeads)) return *groups;
  }
  return num_heads;
}

int head_dim_of(const Json& config, const ModelShape& shape, bool mla) {
  const auto head_dim = first_size(config, {"head_dim", "hidden_size_per_head"}, kMaxHeadDim);
  // With MLA a head is its two parts together; some of these configs carry an unrelated head_dim
  // too.
  if (mla && member(config, "qk_nope_head_dim")) {
    const int sum = required_size(config, {"qk_nope_head_dim"}, kMaxHeadDim) +
                    required_size(config, {"qk_rope_head_dim"}, kMaxHeadDim);
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

// Of MLA's heads only the qk_rope part rotates, all of it: 0 as well.
int rotary_dim_of(const Json& config, int head_dim, bool mla) {
  if (mla) return 0;
  int dims = size_at(config, "rotary_dim", kMaxHeadDim).value_or(0);
  if (dims == 0) {
    // transformers 5 moved it.
    const Json* parameters = member(config, "rope_parameters");
    for (const Json* at : {&config, parameters}) {
      const auto factor = at ? real_at(*at, "partial_rotary_factor") : std::nullopt;
      if (!factor || dims > 0) continue;
      if (!(*factor > 0 && *factor <= 1))
        throw BadInput(fmt::format("partial_rotary_factor={} is not a number in 0..1", *factor));
      dims = int(head_dim * *factor);
    }
  }
  if (dims > head_dim)
    throw BadInput(fmt::format("rotary_dim={} is above head_dim={}", dims, head_dim));
  return dims == head_dim ? 0 : dims;
}

int window_of(const Json& config) {
  const Json* said = member(config, "sliding_window");
  const std::int64_t* number = said ? said->as<std::int64_t>() : nullptr;
  if (number && *number <= 0) return 0;  // some write none as 0 or -1
  const auto window = size_at(config, "sliding_window", INT_MAX);
  if (!window || !bool_at(config, "use_sliding_window").value_or(true)) return 0;
  const Json* types = member(config, "layer_types");
  if (types && types->as<Json::Array>()) {
    const std::vector<std::string> words = words_at(config, "layer_types");
    if (std::find(words.begin(), words.end(), "sliding_attention") == words.end()) return 0;
  }
  // One that no text of the model fills.
  const auto positions = size_at(config, "max_position_embeddings", INT_MAX);
  return *window >= positions.value_or(kMaxWindow) ? 0 : *window;
}

// Of the dense layers; of an expert where there are none. Lists (Gemma 3n) count by their first.
int intermediate_size_of(const Json& config) {
  const Json* sizes = member(config, "intermediate_size");
  if (const Json::Array* list = sizes ? sizes->as<Json::Array>() : nullptr) {
    const std::int64_t* first = list->empty() ? nullptr : list->front().as<std::int64_t>();
    return first && *first >= 1 && *first <= kMaxHidden ? int(*first) : 0;
  }
  return first_size(config,
                    {"intermediate_size", "ffn_hidden_size", "n_inner", "moe_intermediate_size"},
                    kMaxHidden)
      .value_or(0);
}

// Nothing for types that no kernel here takes.
std::optional<DType> dtype_of(const Json& config) {
  for (const char* key : {"dtype", "torch_dtype"}) {
    const Json* value = member(config, key);
    const std::string* word = value ? value->as<std::string>() : nullptr;
    if (!value) continue;
    if (word && *word == "bfloat16") return DType::bf16;
    if (word && *word == "float16") return DType::f16;
    if (word && *word == "float32") return DType::f32;
    return std::nullopt;
  }
  return std::nullopt;
}

int num_layers_of(const Json& config) {
  return first_size(config, {"num_hidden_layers", "n_layer", "n_layers", "num_layers"}, kMaxLayers)
      .value_or(1);
}

Model model_from(const Json& root, const Json* hf_quant_config) {
  if (!root.as<Json::Object>())
    throw BadInput(fmt::format("it holds {}, not an object", root.describe()));
  const Json& config = language_model(root);
  const std::string model_type =
      word_at(config, "model_type").value_or(word_at(root, "model_type").value_or(""));
  const Family* family = family_of(model_type);

  Model model;
  ModelShape& shape = model.shape;
  model.mla = size_at(config, "kv_lora_rank", kMaxHidden).has_value();
  shape.hidden_size = required_size(config, {"hidden_size", "n_embd", "d_model"}, kMaxHidden);
  shape.num_heads = required_size(config, {"num_attention_heads", "n_head", "n_heads"}, kMaxHeads);
  shape.num_kv_heads = kv_heads_of(config, model_type, shape.num_heads, model.note);
  if (shape.num_heads % shape.num_kv_heads != 0) {
    throw BadInput(fmt::format("num_attention_heads={} is not a multiple of num_key_value_heads={}",
                               shape.num_heads, shape.num_kv_heads));
  }
  shape.head_dim = head_dim_of(config, shape, model.mla);
  shape.v_head_dim = size_at(config, "v_head_dim", kMaxHeadDim).value_or(0);
  if (shape.v_head_dim == shape.head_dim) shape.v_head_dim = 0;  // one spelling of "the same"
  const auto gate = bool_at(config, "attn_output_gate");
  shape.attn_output_gate =
      gate.value_or(family && family->gate) || any_flag(config, {"attention_output_gate"});
  model.qk_norm = qk_norm_of(config, family, model.mla);
  model.qk_norm_one_plus = bool_at(config, "use_gemma_norm").value_or(family && family->one_plus) &&
                           (model.qk_norm == "per_head" || model.qk_norm == "full_width");
  model.eps = eps_of(config);
  model.rotary_dim = rotary_dim_of(config, shape.head_dim, model.mla);
  model.window = window_of(config);
  model.attention_bias = any_flag(config, {"attention_bias", "qkv_bias", "add_qkv_bias",
                                           "use_qkv_bias", "use_bias"}) ||
                         (family && family->bias);
  model.sinks = family && family->sinks;
  model.intermediate_size = intermediate_size_of(config);
  model.dtype = dtype_of(config);
  if (!model.dtype) model.dtype = dtype_of(root);
  model.quantization = quantization_of(root, config, hf_quant_config, num_layers_of(config));
  return model;
}

// A file that a person wrote, or may have meant.
std::string text_of(const std::string& path) {
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
  return text;
}

}  // namespace

Model model_from_config(std::string_view text, const std::string& path,
                        const std::optional<std::string>& hf_quant_config) {
  try {
    std::optional<Json> beside;
    try {
      if (hf_quant_config) beside = parse_json(*hf_quant_config);
    } catch (const BadInput& e) {
      throw BadInput(fmt::format("hf_quant_config.json: {}", e.what()));
    }
    Model model = model_from(parse_json(text), beside ? &*beside : nullptr);
    model.id = model.source = path;
    return model;
  } catch (const BadInput& e) {
    throw BadInput(fmt::format("{}: {}", path, e.what()));
  }
}

Model read_config(const std::string& path) {
  const std::string text = text_of(path);
  const std::filesystem::path beside =
      std::filesystem::path(path).parent_path() / "hf_quant_config.json";
  std::error_code ignored;
  std::optional<std::string> modelopt;
  if (std::filesystem::exists(beside, ignored)) modelopt = text_of(beside.string());
  return model_from_config(text, path, modelopt);
}

}  // namespace tp
