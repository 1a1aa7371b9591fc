#pragma once
// The tensors of lora: adapters as their files hold them, and the slots of all ranks.

#include <string>
#include <string_view>
#include <vector>

#include "properties/lora_call.h"
#include "properties/run/stage.h"

namespace tp::lora {

constexpr std::string_view kA = "lora_A.weight", kB = "lora_B.weight", kBias = "lora_B.bias";

// What a stage calls a tensor of an adapter, and the slots of a matrix ("lora_a.q_proj").
std::string stored_name(std::size_t adapter, const std::string& module, std::string_view what);
std::string slots_name(const char* what, const std::string& part);

// Small integers of both signs, or random numbers whose rows and columns have scales of their own
// within a factor of 4, so that no two of them can be taken for each other. Never zero.
double drawn_value(bool is_exact, std::uint32_t largest, std::uint32_t bits, std::int64_t row,
                   std::int64_t col);

// The adapters' files.
struct StoredSpec {
  TensorSpec spec;
  StoredInput stored;
};
std::vector<StoredSpec> stored_tensors(const Case& c, const Layer& layer, const Variation& v);

// Which slot an adapter is loaded into.
std::int64_t slot_of_adapter(const Case& c, const Variation& v, std::int64_t adapter);

// What the slots of all ranks are parts of.
struct SlotTensors {
  std::vector<TensorSpec> a, b, bias;  // of each part
  TensorSpec ranks, scales;

  std::vector<TensorSpec> all() const;
};
SlotTensors slot_tensors(const Case& c, const Layer& layer);

// A rank's slots. The memory is as large as the rules want it, and no smaller than is right.
std::vector<LocalBuffer> slot_buffers(const Case& c, const Layer& layer, const ShardingRules& rules,
                                      Use use, int tp_rank);

template <typename T>
View<T> first_rows(View<T> view, std::int64_t rows) {
  view.rows = rows;
  return view;
}

}  // namespace tp::lora
