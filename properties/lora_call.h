#pragma once
// LoRA as the keys of a case describe it: a layer, the adapters in its slots, and which token uses
// which.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "harness/base/case.h"
#include "harness/base/peft.h"
#include "kernels/lora_slots.h"

namespace tp::lora {

// A linear layer as adapters see it.
struct Layer {
  std::string prefix;              // of its modules: "model.layers.0.self_attn."
  std::vector<std::string> parts;  // "q_proj", "k_proj", "v_proj"
  std::string fused;               // "qkv_proj"; empty: no adapter has them as one
  std::vector<std::int64_t> rows;  // of each matrix
  std::int64_t in_features = 0;
  bool cuts_columns = false;         // row-parallel
  std::vector<std::string> outputs;  // what the base layer's stage calls its outputs: "q", "k", "v"
  std::string buffer;                // and the ranks' rows of them: "qkv"
  // The rows of each matrix that a rank has in its weight, and on how many ranks each of them is.
  std::function<std::vector<Shard>(int tp_rank)> own;
  std::vector<int> replicas;
};

// Keys of the case line that say what adapters there are and who uses them.
std::vector<Key> keys();
// Why they do not fit each other or the layer, in one sentence; nothing if they do.
std::optional<std::string> refuse(const Case& c, const Layer& layer);

// ---- What the keys mean.

bool shares_out_rank(const Case& c);  // "fully sharded"
bool merges_scale(const Case& c);
bool shrinks_again(const Case& c);  // lora_expand's stage runs both kernels, one behind the other
bool has_bias(const Case& c);       // some adapters' B has one
DeltaJoins joins(const Case& c, const Layer& layer);
std::int64_t slots(const Case& c);
// LoRA ranks that a slot has room for; ranks that share them out have equal shares.
std::int64_t max_rank(const Case& c, const Layer& layer);
DType intermediate_dtype(const Case& c);
DType file_dtype(const Case& c);

// Where a value of the shrunk activations lies.
enum class Layout : std::int64_t { parts, tokens, ranks };
Layout layout(const Case& c);

// A matrix of an adapter; rank 0: the adapter does not change it.
struct Module {
  std::int64_t rank = 0;
  double alpha = 0;
};
struct Adapter {
  bool is_fused = false;
  std::vector<Module> modules;  // of each part; of a fused one all are the same
  bool use_rslora = false;
  bool has_bias = false;  // behind B
};
// Of each slot; and, where slots are used again, last the one that all of them had before.
std::vector<Adapter> adapters(const Case& c, const Layer& layer);
// Its adapter_config.json. `alpha_times`: a law's factor.
std::string config_text(const Layer& layer, const Adapter& adapter, double alpha_times);

// Which slot each token uses, -1: none; token i does what token i + rotate does otherwise.
std::vector<std::int32_t> slot_of_token(const Case& c, std::int64_t rotate);

// What a rank's slots are told.
LoraLayer lora_layer(const Case& c, const Layer& layer, int tp_rank);

}  // namespace tp::lora
