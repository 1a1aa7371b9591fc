#pragma once
// What a rank has of a layer: which rows and columns, where they are in its buffers, and the
// tensors that the buffers of all ranks are parts of.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/weight_loader.h"
#include "properties/stored_linear.h"

namespace tp::stored_linear {

// ---- What the case's format has.

bool has_slots(const Case& c);
bool has_fixed_scale(const Case& c);   // of activations, stored with the weights
bool has_weight_scale(const Case& c);  // one, made of the slots
bool quantises(const Case& c);         // activations
bool makes_scales(const Case& c);      // of activations, in each call
bool is_gptq(const Case& c);

// ---- Rows and columns.

// Where a rank's columns are: plain arithmetic, and nothing that is under test.
LocalColumns columns_of(const Case& c, const Layer& layer, int tp_rank);
// Groups of `group` columns that a rank's own columns touch.
Shard touched(const LocalColumns& columns, std::int64_t group);
// The rows of each part that a rank has under the right rules.
std::vector<Shard> own_rows(const Layer& layer, int tp_rank);
// The tokens that a rank has of x before it is gathered: all, or an equal share.
Shard own_tokens(const Case& c, int tp_rank);

// How a rank's weight is laid out.
struct Places {
  std::vector<std::int64_t> first;  // row of each part
  std::int64_t rows = 0;
  std::vector<Shard> padding;
};
Places places_of(const Layer& layer, int tp_rank);
// Rows of padding on all ranks together: the tensor that they are judged as.
std::int64_t padding_rows(const Case& c, const Layer& layer);

// ---- Tensors that are cut as the parts' rows are.

// A tensor that each part has one of, cut as the parts' rows are: rows of the tensor, or its
// columns where it is stored that way round.
struct Kind {
  std::string buffer;
  std::string suffix;  // of the tensors' names, behind the part's
  DType dtype = DType::f32;
  std::int64_t other = 1;  // the tensor's other dimension
  bool rows_are_columns = false;
  Shard own = {};  // of the other dimension, on this rank
};
Kind weight_kind(const Case& c, const Layer& layer, int tp_rank);
Kind bias_kind(const Case& c);
// The scales that are not slots; nothing: there are none.
std::optional<Kind> scales_kind(const Case& c, const Layer& layer, int tp_rank);
// What the product multiplies with: the weight as it was loaded, or what was made of it.
std::optional<Kind> prepared_kind(const Case& c, const Layer& layer, int tp_rank);

// Of each part, and last, if there is any, the padding on all ranks: as wide as the first rank's.
std::vector<TensorSpec> tensors(const Case& c, const Layer& layer, const Kind& kind);
LocalBuffer buffer(const Layer& layer, const Kind& kind, Use use, int tp_rank);

// ---- The others.

// A small tensor that all ranks have whole.
TensorSpec shared(const std::string& name, std::int64_t cols);
LocalBuffer shared_buffer(const std::string& name, std::int64_t cols, Use use);

// gptq: which of the rank's groups a column has.
TensorSpec groups_spec(const Layer& layer);
LocalBuffer groups_buffer(const Case& c, const Layer& layer, Use use, int tp_rank);

LocalBuffer x_buffer(const Case& c, const Layer& layer, int tp_rank);
TensorSpec codes_spec(const TensorSpec& x);
LocalBuffer codes_buffer(const Case& c, const Layer& layer, Use use, int tp_rank);

// Scales of activations that a call makes: of each rank's own columns where these are cut.
struct ScaleColumns {
  std::int64_t rows = 1;  // tokens, or 1
  std::vector<Shard> of_rank;
  std::int64_t total = 0;
};
ScaleColumns scale_columns(const Case& c, const Layer& layer);
TensorSpec x_scale_spec(const Case& c, const Layer& layer);
LocalBuffer x_scale_buffer(const Case& c, const Layer& layer, Use use, int tp_rank);

// ---- All that is loaded.

struct LoadOutputs {
  std::vector<TensorSpec> specs;
  std::vector<LocalBuffer> buffers;
};
// What ranks have after loading, as outputs of that stage or as inputs of a later one.
LoadOutputs loaded(const Case& c, const Layer& layer, bool bias, Use use, int tp_rank);
// What the loader is told: the rows and columns that a rank loads under these rules.
StoredLinear stored_linear(const Case& c, const Layer& layer, const ShardingRules& rules,
                           int tp_rank);

}  // namespace tp::stored_linear
