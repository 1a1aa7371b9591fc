#pragma once
// What a checkpoint holds of a layer, before any rank takes its part: the names and shapes of its
// tensors, and data made from the seed; or the tensors of the user's checkpoint that they are.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "harness/base/checkpoint.h"
#include "properties/stored_linear.h"

namespace tp::stored_linear {

constexpr int kNvfp4Group = 16, kWord = 8;  // columns

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The words of the key `weights`.
enum class Weights : std::int64_t { given, split, fused, striped };
Weights weights_of(const Case& c);

bool is_fused(const Case& c, const Layer& layer);
FusedRows fused_rows(const Case& c, const Layer& layer);
// The number of the layer in the user's checkpoint; nothing: the case's tensors are made.
std::optional<int> layer_in_file(const Case& c);
// Of the names of the stored tensors: one, or one of each part.
std::vector<std::string> prefixes(const Case& c, const Layer& layer);

// A tensor of a checkpoint, and the shape that the file gives it.
struct InFile {
  TensorSpec spec;
  std::vector<std::int64_t> shape;
  bool may_be_flat = false;  // [rows] instead of [rows, 1], as it pleases the writer
};
// All tensors of the layer; `bias`: with its biases.
std::vector<InFile> checkpoint_of(const Case& c, const Layer& layer, bool bias);
// The same as the user's checkpoint has them. Throws BadInput as stored_as does.
std::vector<InFile> tensors_in_file(const Case& c, const Layer& layer, bool bias);
// The tensor of the user's checkpoint that `t` is. Throws BadInput if it is another.
const StoredTensor& stored_as(const InFile& t);

// Element `i` of a tensor, which a file may hold at any address.
double element(const StoredTensor& t, DType type, std::int64_t i);
// The group of each of gptq's columns: in act-order, anywhere.
std::vector<std::int64_t> groups_of_columns(const Case& c, const Layer& layer);

}  // namespace tp::stored_linear
