#pragma once
// Adapters as an option of linear layers: the stages of operator lora behind the layer's own.

#include <vector>

#include "properties/lora_layers.h"
#include "properties/run/stage.h"

namespace tp::lora {

// The keys `lora` and `lora_rank`: how many adapters there are, none by default, and the LoRA ranks
// that their slots have room for. `fits`: whether the keys before these allow so many.
std::vector<Key> option_keys(bool (*fits)(const Case&, std::int64_t adapters) = nullptr);
bool has_adapters(const Case& c);
// For option_keys: ranks that gather codes have no activations for adapters.
bool fits_gather(const Case& c, std::int64_t adapters);

// The case of operator lora that such a case stands for; it must have the shape's keys. Tokens use
// any of the adapters, or none; `options`: keys of lora that are not at their defaults.
Case as_lora(const Case& c, Base base, std::map<std::string, std::int64_t> options = {});

// The stages of both, one after the other.
std::vector<Stage> followed_by(std::vector<Stage> stages, std::vector<Stage> more);
// Operator::work of a case of lora.
double work(const Case& lora_case);

// Why a linear layer cannot have the adapters that it is to have, in one sentence.
std::optional<std::string> refuse_option(const Case& c, const Case& lora_case);

// Makes a law one about adapters, too: shrunk activations are compared token by token, sums with a
// delta where the base is; parts of sums have no twins.
LawRun with_adapters(LawRun law);

// A weight with its only adapter merged into it: w + scale B A. `part`: which of the layer's.
TensorSpec merged(TensorSpec w, const Case& lora_case, std::size_t part);
// Exact f32 data, one adapter, weights that are just there: the outputs `..._lora` have the same
// bits where the weights were merged and no token has an adapter.
LawRun law_merged();

}  // namespace tp::lora
