#pragma once
// LoRA adapters as the Python package peft writes them (huggingface/peft): a folder with
// adapter_config.json and adapter_model.safetensors.

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "harness/base/checkpoint.h"

namespace tp {

// What adapter_config.json says, as far as serving needs it.
struct PeftConfig {
  std::int64_t rank = 8;
  double alpha = 8;
  bool use_rslora = false;
  // Names of modules, or their ends after a dot; or one pattern that all of a module's name has to
  // match, of which "all-linear" means every one.
  std::vector<std::string> target_modules;
  std::string target_pattern;
  std::vector<std::string> exclude_modules;
  std::string exclude_pattern;
  // Of modules whose name a key matches (as peft does: the whole name, or its end after a dot); the
  // first that does.
  std::vector<std::pair<std::string, std::int64_t>> rank_pattern;
  std::vector<std::pair<std::string, double>> alpha_pattern;
  // The layers in which the ends of target_modules count; empty: all. The layer is the first number
  // behind one of these names, or, where there are none, behind any but the first part of a name.
  std::vector<std::int64_t> layers_to_transform;
  std::vector<std::string> layers_pattern;
  bool lora_bias = false;  // B has a bias
  std::string base_model;  // base_model_name_or_path, for sentences
};

// Throws BadInput in one sentence naming `path`, the key and what is wrong with it: no JSON, wrong
// types, rank 0, alpha NaN, a pattern that is not understood (peft_pattern.h), and what is not
// served: DoRA and the like, modules_to_save, trained biases of the base (bias != "none"),
// fan_in_fan_out, layer_replication, other peft_types. Keys that training alone needs are not
// looked at.
PeftConfig parse_peft_config(std::string_view text, const std::string& path);

// Of a module ("model.layers.0.mlp.up_proj"): LoraRules::scale makes a factor of them.
struct LoraScale {
  std::int64_t rank = 0;
  double alpha = 0;
};
LoraScale lora_scale(const PeftConfig& config, std::string_view module);
// Whether the config's target_modules, exclude_modules and layers name it.
bool is_target(const PeftConfig& config, std::string_view module);

// A and B of one module.
struct PeftModule {
  std::string name;  // "model.layers.0.self_attn.q_proj"
  std::int64_t rank = 0;
  double alpha = 0;
  const StoredTensor* a = nullptr;     // [rank, in]
  const StoredTensor* b = nullptr;     // [out, rank]
  const StoredTensor* bias = nullptr;  // [out] of B (lora_bias); nullptr: none
};

class PeftAdapter {
 public:
  // A folder. Throws BadInput naming file, tensor and numbers: no such folder, a tensor that is
  // none of a LoRA's, A without B, shapes that do not fit each other or the config's ranks, types
  // other than F32, F16, BF16, modules that the config does not target, targets or patterns that
  // match nothing in the file.
  explicit PeftAdapter(const std::string& folder);
  // The same of a file that is open, which must outlive it.
  PeftAdapter(PeftConfig config, const Checkpoint& tensors);

  const PeftConfig& config() const { return config_; }
  const Checkpoint& tensors() const { return *tensors_; }
  const std::vector<PeftModule>& modules() const { return modules_; }  // by name
  const PeftModule* find(std::string_view module) const;               // nullptr: there is none
  std::int64_t max_rank() const;

 private:
  void read();

  PeftConfig config_;
  std::shared_ptr<const Checkpoint> own_;
  const Checkpoint* tensors_ = nullptr;
  std::vector<PeftModule> modules_;
};

}  // namespace tp
