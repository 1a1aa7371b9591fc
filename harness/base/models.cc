#include "harness/base/models.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <filesystem>

#include "harness/base/check.h"
#include "harness/base/json.h"
#include "harness/base/model_config.h"
#include "harness/base/text.h"

namespace tp {

extern const char* const kModelsJson;  // models.json, embedded by CMake

namespace {

int int_at(const Json& entry, std::string_view key, int fallback) {
  const Json* value = entry.find(key);
  return value ? int(*value->as<std::int64_t>()) : fallback;
}

std::string text_at(const Json& entry, std::string_view key) {
  const Json* value = entry.find(key);
  return value ? *value->as<std::string>() : "";
}

Model model_of(const Json& entry) {
  const Json* eps = entry.find("eps");
  return {.id = text_at(entry, "id"),
          .shape = {.hidden_size = int_at(entry, "hidden_size", 0),
                    .num_heads = int_at(entry, "num_heads", 0),
                    .num_kv_heads = int_at(entry, "num_kv_heads", 0),
                    .head_dim = int_at(entry, "head_dim", 0),
                    .v_head_dim = int_at(entry, "v_head_dim", 0),
                    .attn_output_gate = entry.find("attn_output_gate") != nullptr},
          .qk_norm = text_at(entry, "qk_norm"),
          .qk_norm_one_plus = entry.find("qk_norm_one_plus") != nullptr,
          .eps = eps ? *eps->as<double>() : 0,
          .rotary_dim = int_at(entry, "rotary_dim", 0),
          .window = int_at(entry, "window", 0),
          .attention_bias = entry.find("attention_bias") != nullptr,
          .intermediate_size = int_at(entry, "intermediate_size", 0),
          .dtype = {},
          .quantization = {},
          .sinks = entry.find("sinks") != nullptr,
          .mla = entry.find("mla") != nullptr,
          .checkpoint = "",
          .note = "",
          .source = text_at(entry, "source")};
}

bool has_safetensors(const std::string& directory) {
  std::error_code ignored;
  if (std::filesystem::exists(directory + "/model.safetensors.index.json", ignored)) return true;
  for (const auto& entry : std::filesystem::directory_iterator(directory, ignored)) {
    if (entry.path().extension() == ".safetensors") return true;
  }
  return false;
}

Model model_in(const std::string& directory) {
  Model model = read_config(directory + "/config.json");
  if (has_safetensors(directory)) model.checkpoint = directory;
  return model;
}

std::string after_slash(const std::string& id) { return id.substr(id.find('/') + 1); }

}  // namespace

const std::vector<Model>& models() {
  static const std::vector<Model> all = [] {
    std::vector<Model> read;
    const Json root = parse_json(kModelsJson);
    for (const Json& entry : *root.find("models")->as<Json::Array>())
      read.push_back(model_of(entry));
    return read;
  }();
  return all;
}

Model find_model(const std::string& name) {
  std::error_code ignored;
  const bool directory = std::filesystem::is_directory(name, ignored);
  if (directory && std::filesystem::exists(name + "/config.json", ignored)) return model_in(name);
  const bool path =
      name.find('/') != name.npos && !directory && std::filesystem::exists(name, ignored);
  if (path || name.ends_with(".json")) return read_config(name);

  const std::string wanted = lower(name);
  std::vector<std::string> ids;
  std::vector<const Model*> begins;
  for (const Model& m : models()) {
    const std::string id = lower(m.id);
    if (wanted == id || wanted == after_slash(id)) return m;
    if (id.starts_with(wanted) || after_slash(id).starts_with(wanted)) begins.push_back(&m);
    ids.push_back(m.id);
  }
  if (begins.size() == 1) return *begins[0];
  if (begins.size() > 1 && !wanted.empty()) {
    std::vector<std::string> candidates;
    for (const Model* m : begins) candidates.push_back(m->id);
    throw BadInput(
        fmt::format("model '{}' may be any of {}", printable(name), fmt::join(candidates, ", ")));
  }
  if (directory)
    throw BadInput(fmt::format("the directory {} has no config.json", printable(name)));
  const std::vector<std::string> near = near_misses(name, ids);
  const std::string hint = near.empty() ? "see tpcheck list models"
                                        : fmt::format("did you mean {}?", fmt::join(near, ", "));
  throw BadInput(fmt::format("unknown model '{}' ({})", printable(name), hint));
}

Model checkpoint_model(const std::string& directory) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(directory, ignored))
    throw BadInput(fmt::format("{} is no directory with a checkpoint", printable(directory)));
  Model model = model_in(directory);
  if (model.checkpoint.empty())
    throw BadInput(fmt::format("the directory {} has no safetensors", printable(directory)));
  check_known(model);
  return model;
}

void check_known(const Model& model) {
  if (!model.quantization.refusal.empty())
    throw BadInput(fmt::format("{}: {}", model.id, model.quantization.refusal));
}

}  // namespace tp
