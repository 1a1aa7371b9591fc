#pragma once
// The adapter that the user named (--adapter DIR): which of a base's layers it changes, as cases of
// operator lora, and its tensors.

#include <optional>
#include <string>
#include <vector>

#include "harness/base/fill.h"
#include "harness/base/operator.h"
#include "properties/lora_call.h"
#include "properties/lora_layers.h"

namespace tp::lora {

// The key `layer`: 0: none of its layers.
Key layer_key();
bool is_users(const Case& c);
// Why a case that is to run on it cannot, in one sentence.
std::optional<std::string> refuse_users(const Case& c);

// A layer that it changes. Of experts it is the first.
struct UserLayer {
  Base base = Base::qkv;
  std::int64_t number = 0;  // as its modules have it
  std::string prefix;       // of their names: "model.layers.0.self_attn."
  std::string fused;        // the last part of the one module's name, if it is one: "qkv_proj"
};
// The one of the case's keys `module` and `layer`.
const UserLayer& user_layer(const Case& c);

// As the adapter in the first slot.
Adapter user_modules(const Layer& layer);
// A tensor of it: `what` of a module. Its values are the file's.
TensorSpec user_tensor(const std::string& name, const std::string& module, std::string_view what);

// Operator::adapter_cases. Throws BadInput naming file, tensor and numbers where a module does not
// fit the base.
CheckpointCases adapter_cases(int tp_size);

}  // namespace tp::lora
