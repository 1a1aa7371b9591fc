// libFuzzer: an adapter_config.json. What is accepted has ranks and alphas within their limits, for
// whatever module is asked about, and its patterns are matched in reasonable time.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "harness/base/check.h"
#include "harness/base/peft.h"
#include "harness/base/peft_pattern.h"

namespace {

void require(bool is_so) {
  if (!is_so) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const tp::PeftConfig config =
        tp::parse_peft_config({reinterpret_cast<const char*>(data), size}, "adapter_config.json");
    require(config.target_modules.empty() != config.target_pattern.empty());
    const std::string longest = "model." + std::string(tp::kMaxModuleName - 13, 'a') + ".q_proj";
    for (const std::string& module :
         {std::string("model.layers.0.self_attn.q_proj"),
          std::string("model.language_model.layers.17.mlp.experts.3.gate_up_proj"),
          std::string("lm_head"), longest}) {
      const tp::LoraScale scale = tp::lora_scale(config, module);
      require(scale.rank >= 1 && scale.rank <= 1 << 16);
      require(std::isfinite(scale.alpha));
      tp::is_target(config, module);
    }
    // A name that is listed is meant, whatever the layers; unless it is excluded.
    const bool excludes = !config.exclude_modules.empty() || !config.exclude_pattern.empty();
    for (const std::string& module : config.target_modules)
      require(excludes || tp::is_target(config, module));
  } catch (const tp::BadInput&) {
  }
  return 0;
}
