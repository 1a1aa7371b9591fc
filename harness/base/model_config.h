#pragma once
// Reads a model's attention shape from a Hugging Face config.json, as it is.

#include <string>
#include <string_view>

#include "harness/base/models.h"

namespace tp {

// `text` is the content of the file `path`, which is named in errors and becomes the model's id and
// source. Looks into text_config where that has num_attention_heads; derives what a config may
// leave out (num_key_value_heads, head_dim, v_head_dim). Throws BadInput with the file, the key and
// the numbers.
Model model_from_config(std::string_view text, const std::string& path);

// The same for a file on disk, of at most 16 MiB.
Model read_config(const std::string& path);

}  // namespace tp
