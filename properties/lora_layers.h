#pragma once
// The base layers that adapters are for, as the keys of operator lora describe them.

#include <string_view>

#include "properties/lora_call.h"

namespace tp::lora {

// Words of the key `module`.
enum class Base : std::int64_t { qkv, gate_up, o_proj, down_proj };

Base base_of(const Case& c);
// Whether it is cut by head.
bool has_heads(const Case& c);
// Columns of gate, and of up, on all ranks.
std::int64_t intermediate(const Case& c);
// The case's model, with the gate of its attention if the queries have one.
ModelShape shape_of(const Case& c);
// Whether the delta joins the ranks' parts of the base.
bool is_partial(const Case& c);
Layer layer_of(const Case& c);

}  // namespace tp::lora
