#pragma once
// Which linears of a checkpoint are quantised, and how: quantization_config of a config.json, in
// the dialects of compressed-tensors, ModelOpt, GPTQ, and of DeepSeek's and AutoFP8's "fp8"
// (research: ecosystem.md 1.5).

#include <string>
#include <string_view>
#include <vector>

#include "harness/base/quantization.h"

namespace tp {

// Linears that are quantised in one way.
struct QuantGroup {
  std::vector<std::string> targets;  // patterns, or Linear: every other one; empty: every one
  QuantFormat format;
  std::string unknown;  // why `format` is not known, in one sentence; empty: it is
};

struct Quantization {
  QuantFormat format;  // of the attention's linears, or else of those that are quantised
  std::vector<std::string> ignored;  // patterns of modules that are left as they are
  std::vector<QuantGroup> groups;    // the first whose target is a module's name has it
  // Why the attention's linears cannot be run, in one sentence that names key and value: another
  // format than those of quantization.h, or several in one model. Empty: they can.
  std::string refusal;

  // Whether the linear `module` ("model.layers.0.self_attn.q_proj") is quantised. Not to be asked
  // of norms and embeddings, which never are.
  bool applies_to(std::string_view module) const;
  // How; Scheme::none where it is not. Throws BadInput where its format is not known.
  QuantFormat format_of(std::string_view module) const;
};

// Whether a pattern of such a list means `module`:
//   re:REGEX      matches a beginning of it (compressed-tensors; Python's re.match)
//   with * or ?   matches it or a module that it is in; * goes across dots (ModelOpt, GPT-OSS)
//   else          is it, or some of its names in a row: lm_head, self_attn, model.layers.0
bool matches_module(std::string_view pattern, std::string_view module);

// "fp8_block (native, activations token_groups)", "not quantised".
std::string to_text(const Quantization& quantization);

}  // namespace tp
