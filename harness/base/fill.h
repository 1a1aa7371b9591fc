#pragma once
// The data of a case. The kind of data decides what is visible far more than any tolerance does
// (research: numerics.md section 7), so `fill` is part of the case line. Every value is a function
// of (seed, tensor name, global row and column): never all-ones weights, never equal heads by
// accident.

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "harness/base/dtype.h"
#include "harness/base/shape.h"

namespace tp {

enum class Fill : std::uint8_t {
  exact,       // every order of summation gives the same bits: +-2^k a row, integer weights
  dense,       // random significands; every head and row has its own scale within a factor of 4
  small_rows,  // dense, but one row is of the size of sqrt(eps)
  wide,        // 17 binades inside a row
  equal,       // all elements of a row are equal
  zero_shard,  // a run of heads holds zeros only
  // Of attention, whose queries must know the keys (properties/attention_data.h).
  one_hot,   // each query finds one key, and only that
  ties,      // all keys a query sees weigh the same
  tripwire,  // the keys at every edge carry most of the weight, forbidden ones too if they are seen
};
constexpr std::string_view kFillWords[] = {
    "exact", "dense", "small_rows", "wide", "equal", "zero_shard", "one_hot", "ties", "tripwire"};
constexpr int kPlainFills = 6;  // the first ones: a tensor is filled by itself

enum class Role : std::uint8_t { activation, weight };

// How the tensors of one run are filled.
struct DataRegime {
  Fill fill = Fill::exact;
  std::uint64_t seed = 0;
  double eps = 0;       // the size of small_rows is sqrt(eps)
  int scale_log2 = 0;   // activations are multiplied by 2^scale_log2 (a law)
  int rotate_rows = 0;  // row i holds what row (i + rotate_rows) % rows would hold (a law)
};

// A global tensor: what the model has, before anything is cut.
struct TensorSpec {
  std::string name;
  DType dtype = DType::f32;
  std::int64_t rows = 1;
  std::int64_t cols = 1;
  Role role = Role::activation;
  std::int64_t entity_cols = 1;  // columns of one head (or of whatever an index selects)
  // Where the elements of a tensor must know of each other or of another tensor (the keys that a
  // query shall find): the value of one, before it is rounded to dtype. A function of its arguments
  // only, no libm. Empty: filled by role and regime (if dtype is one of activations).
  std::function<double(const DataRegime&, std::int64_t row, std::int64_t col)> value = {};
  // The same for elements that are random by themselves: a function of 32 random bits of the
  // element's own.
  std::function<double(const DataRegime&, std::uint32_t bits, std::int64_t row, std::int64_t col)>
      drawn = {};
  // Filled by role and regime, row i holds what row source[i] of a tensor with enough rows would
  // hold (keys in their slots). Empty: itself.
  std::vector<std::int64_t> source = {};
};

// Writes rows x cols of the tensor, row-major with `out_stride` elements a row, in the tensor's
// type. Values do not depend on which block is asked for.
void fill_block(const TensorSpec& tensor, const DataRegime& regime, Shard rows, Shard cols,
                void* out, std::int64_t out_stride);

}  // namespace tp
