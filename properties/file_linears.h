#pragma once
// Which tensors of a checkpoint are which linears: found by what models call them, layer by layer.

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "harness/base/checkpoint.h"

namespace tp {

enum class LinearKind : std::uint8_t {
  qkv,            // q, k and v projection
  attention_out,  // o_proj
  gate_up,        // gate and up projection of the MLP
  mlp_out,        // down_proj
};

struct FileLinear {
  // "model.layers.0.self_attn.q_proj" and so on; or the only one, which all matrices are fused in.
  std::vector<std::string> modules;
  // Fused, under a name that those who store heads in stripes give it. Nothing but the model's code
  // is sure about that.
  bool is_striped = false;
};

// By the layer's number in the tensors' names. Of several decoders (a vision tower's) the one that
// has most linears with `hidden_size` rows or columns; of a layer's MLPs the dense one, or the
// first expert. A layer that has something of the attention (or of the MLP) is there with all the
// names that it should have, even if the checkpoint lacks tensors of them.
std::map<int, FileLinear> linears_of(const Checkpoint& checkpoint, LinearKind kind,
                                     std::int64_t hidden_size);

// The same of user_checkpoint(), remembered; empty where there is none. Valid until the next
// set_user_checkpoint.
const std::map<int, FileLinear>& file_linears(LinearKind kind);

// What models call the linears of this kind, for sentences: "q_proj, k_proj and v_proj".
std::string usual_names(LinearKind kind);

}  // namespace tp
