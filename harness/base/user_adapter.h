#pragma once
// The LoRA adapter that the user named (--adapter DIR), and the model that it is for (--model DIR):
// the same in every process of a run, like user_checkpoint().

#include <cstdint>
#include <string>

#include "harness/base/models.h"
#include "harness/base/peft.h"

namespace tp {

// `folder`: as peft writes it. `base`: a directory with a config.json, with safetensors or without.
// Both empty: none. Nothing is opened yet. Call it before anybody asks for the adapter, and not
// while anybody has it.
void set_user_adapter(const std::string& folder, const std::string& base);

// nullptr where there is none. Opened by the first who asks, on any thread, and open until the next
// set_user_adapter. Throws BadInput where it or its base cannot be opened, every time.
const PeftAdapter* user_adapter();

// The model of the base's config.json; otherwise as user_adapter().
const Model* user_adapter_base();

// Another number after each set_user_adapter, for those who keep what they found in an adapter.
std::uint64_t user_adapter_version();

// "DIR: 56 modules (q_proj, v_proj), ranks 4 .. 16, rsLoRA"; of one that is set.
std::string user_adapter_text();

}  // namespace tp
