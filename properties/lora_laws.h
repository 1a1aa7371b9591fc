#pragma once
// Laws of adapters: of operator lora, and of linear layers that have them as an option.

#include <functional>

#include "properties/lora_call.h"
#include "properties/run/stage.h"

namespace tp::lora {

// Of lora.
LawRun law_tp1();  // not of ranks that round parts of their own
LawRun law_tokens();
LawRun law_alpha();  // twice the alpha, half of A
LawRun law_slots();  // adapters in each other's slots
LawRun law_alone();  // one adapter of the batch alone
// Of a linear layer that has them as an option.
LawRun law_zero_b(std::function<bool(const Case&)> has_adapters);

}  // namespace tp::lora
