#pragma once
// How the weights of linear layers are quantised, and what a checkpoint calls the tensors that come
// of it (research: ecosystem.md 1.5).

#include <optional>
#include <string>
#include <string_view>

namespace tp {

enum class Scheme : unsigned char {
  none,         // weights in the type of the activations
  fp8_tensor,   // e4m3, one f32 scale a stored tensor
  fp8_channel,  // e4m3, one f32 scale an output row
  fp8_block,    // e4m3, one f32 scale a block of block_rows x block_cols of the stored tensor
  nvfp4,        // e2m1, two a byte; an e4m3 scale for 16 columns of a row, one f32 scale a tensor
  gptq,         // int4, eight to an i32 along the input; a scale for each group and output row
};
constexpr std::string_view kSchemeWords[] = {"none",      "fp8_tensor", "fp8_channel",
                                             "fp8_block", "nvfp4",      "gptq"};

// Whose names, shapes and senses the stored tensors have.
enum class Dialect : unsigned char {
  compressed_tensors,  // weight_scale [1]; nvfp4: weight_packed, and global scales stored as
                       // 1/scale
  modelopt,            // weight_scale []; nvfp4: weight, weight_scale_2, stored as scale
  native,              // AutoFP8 (scales of shape []); DeepSeek's weight_scale_inv; GPTQ's own
};
constexpr std::string_view kDialectWords[] = {"compressed_tensors", "modelopt", "native"};

// How the activations are scaled before they are multiplied with quantised weights.
enum class Activations : unsigned char {
  plain,         // not at all: weights are dequantised
  fixed,         // by input_scale, one a stored tensor, known beforehand (static)
  tensor,        // by the largest element of the call (dynamic)
  token,         // by the largest element of the token
  token_groups,  // by the largest element of each block_cols columns of the token; with nvfp4 in
                 // units of input_scale, which is known beforehand
};
constexpr std::string_view kActivationsWords[] = {"plain", "fixed", "tensor", "token",
                                                  "token_groups"};

struct QuantFormat {
  Scheme scheme = Scheme::none;
  Dialect dialect = Dialect::compressed_tensors;
  Activations activations = Activations::plain;
  int block_rows = 128;  // of fp8_block
  int block_cols = 128;  // of fp8_block; columns of a group of nvfp4 (16) and of gptq
  bool operator==(const QuantFormat&) const = default;
};

// Why nobody writes such a checkpoint, in one sentence; nothing if somebody does. Plain activations
// go with every scheme: whoever has no such matrix product dequantises.
std::optional<std::string> illegal(const QuantFormat& format);

// What the tensors of one stored linear are called behind its prefix ("...self_attn.q_proj.").
// Empty: the format has no such tensor, or none that its activations need.
struct TensorNames {
  std::string weight;        // weight, weight_packed, qweight
  std::string scale;         // of rows, blocks or groups; of the tensor where it has one scale only
  std::string global_scale;  // nvfp4's second scale
  std::string input_scale;   // of activations scaled beforehand
  bool global_is_inverse = false;  // global_scale and input_scale are stored as 1/scale
  std::string zeros;               // gptq: the zero points, packed as the weight is
  std::string group_of_column;     // gptq: which group's scale an input column has
  bool operator==(const TensorNames&) const = default;
};
// Of a format that is not illegal().
TensorNames tensor_names(const QuantFormat& format);

}  // namespace tp
