#pragma once
// The checkpoint that the user named (--model DIR): the same in every process of a run, like the
// operators, so that an operator can run a case on the file's own tensors.

#include <cstdint>
#include <string>

#include "harness/base/checkpoint.h"
#include "harness/base/models.h"

namespace tp {

// `directory`: with a config.json and safetensors; empty: none. Nothing is opened yet. Call it
// before anybody asks for the checkpoint, and not while anybody has it.
void set_user_checkpoint(const std::string& directory);

// nullptr where there is none. Opened by the first who asks, on any thread, and open until the next
// set_user_checkpoint. Throws BadInput where it cannot be opened, every time.
const Checkpoint* user_checkpoint();

// Another number after each set_user_checkpoint, for those who keep what they found in a
// checkpoint.
std::uint64_t user_checkpoint_version();

// The model of its config.json, with its quantization; otherwise as user_checkpoint().
const Model* user_model();

// "DIR: 2 files, 310 tensors, fp8_block (native, activations token_groups)"; of one that is set.
std::string user_checkpoint_text();

}  // namespace tp
