#pragma once
// Reads a model's attention shape from a Hugging Face config.json, as it is.

#include <optional>
#include <string>
#include <string_view>

#include "harness/base/models.h"

namespace tp {

// `text` is the content of the file `path`, which is named in errors and becomes the model's id and
// source. Looks into text_config, llm_config and thinker_config.text_config where they have
// num_attention_heads; knows the keys of ecosystem.md 1.1; derives what a config may leave out
// (num_key_value_heads, head_dim, v_head_dim), and what is in the model's code only (q/k norm) from
// model_type. `hf_quant_config`: what ModelOpt wrote beside it; counts where `text` has no
// quantization_config. Throws BadInput with the file, the key and the numbers; but a quantisation
// that is not known is told by Model::quantization.
Model model_from_config(std::string_view text, const std::string& path,
                        const std::optional<std::string>& hf_quant_config = {});

// The same for a file on disk, of at most 16 MiB, with the hf_quant_config.json beside it.
Model read_config(const std::string& path);

}  // namespace tp
