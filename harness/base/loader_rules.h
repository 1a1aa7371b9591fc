#pragma once
// The named decisions on the way from a checkpoint's tensors to a rank's weights and scales, for
// ShardingRules (vLLM's QKVParallelLinear, MergedColumnParallelLinear and RowParallelLinear and
// their weight loaders).

#include <algorithm>
#include <cstdint>
#include <vector>

#include "harness/base/shape.h"

namespace tp {

// Several logical matrices (q, k, v; gate, up) stored as one tensor: `stripes` times [so many rows
// of the first | of the second | ...]. One stripe: the matrices one below the other. A stripe for
// each KV head: [q of its group | k | v]. A stripe for each row: gate and up interleaved.
struct FusedRows {
  std::vector<std::int64_t> parts;  // rows of each matrix; stripes divides them
  std::int64_t stripes = 1;

  std::int64_t total() const {
    std::int64_t sum = 0;
    for (const std::int64_t rows : parts) sum += rows;
    return sum;
  }
  std::int64_t stripe_rows() const { return total() / stripes; }
  // Where `row` of matrix `part` is stored.
  std::int64_t stored(int part, std::int64_t row) const {
    const std::int64_t rows = parts[std::size_t(part)] / stripes;
    std::int64_t offset = 0;
    for (int before = 0; before < part; ++before) offset += parts[std::size_t(before)] / stripes;
    return row / rows * stripe_rows() + offset + row % rows;
  }
};

// A row of a rank's fused weight, and who asks for it.
struct LocalRow {
  int part = 0;            // which matrix it is of
  std::int64_t row = 0;    // which row of that
  std::int64_t local = 0;  // which row of the rank's weight
  Shard own;               // the rows of that matrix that the rank has
  std::int64_t all = 0;    // rows of the rank's weight
  int tp_size = 1;
  int tp_rank = 0;
};

// A run of columns that a rank has of a row-parallel weight.
struct LocalColumns {
  Shard own;
  int tp_size = 1;
  int tp_rank = 0;
};

struct LoaderRules {
  // The row of a stored fused tensor that becomes `at`. `fused` is how the checkpoint stores it.
  std::int64_t (*stored_row)(const FusedRows& fused, const LocalRow& at) =
      [](const FusedRows& fused, const LocalRow& at) { return fused.stored(at.part, at.row); };

  // The row of the scales for `stored`, the stored row that `at` is; a scale is that of block_rows
  // rows, or of one. Blocks lie in the row space of the whole stored tensor, wherever matrices,
  // stripes and ranks begin in it.
  std::int64_t (*scale_row)(const FusedRows& fused, const LocalRow& at, std::int64_t stored,
                            std::int64_t block_rows) =
      [](const FusedRows&, const LocalRow&, std::int64_t stored, std::int64_t block_rows) {
        return stored / block_rows;
      };

  // The first column of the scales that a rank needs, and where its own first column lies in that
  // block of `group` columns: a block that straddles two ranks is on both of them.
  struct FirstGroup {
    std::int64_t group = 0;
    std::int64_t column = 0;
  };
  FirstGroup (*first_group)(const LocalColumns& at, std::int64_t group) = [](const LocalColumns& at,
                                                                             std::int64_t group) {
    return FirstGroup{at.own.offset / group, at.own.offset % group};
  };

  // Which of the scale slots, one for each matrix, the one scale of a tensor that is fused on disk
  // is written to.
  Shard (*slots_of_fused)(int slots) = [](int slots) { return Shard{0, slots}; };

  // Whether rows of zeros that a kernel's tiles want get scales, too: zero times what memory held
  // before may be NaN.
  bool pads_scales = true;

  // What a global scale means: a factor, stored as that or as its inverse.
  float (*factor)(float stored, bool is_inverse) = [](float stored, bool is_inverse) {
    return is_inverse ? 1.0f / stored : stored;
  };

  // Which groups of a table of scales a row-parallel rank loads, given whether the groups of its
  // columns are anywhere in it (act-order) or where its columns are.
  Shard (*groups_loaded)(const LocalColumns& at, std::int64_t group, std::int64_t groups,
                         bool act_order) = [](const LocalColumns& at, std::int64_t group,
                                              std::int64_t groups, bool act_order) {
    if (act_order) return Shard{0, groups};
    const std::int64_t first = at.own.offset / group;
    return Shard{first, (at.own.end() + group - 1) / group - first};
  };
  // The row of the loaded table for a column whose group is `group` of the whole one.
  std::int64_t (*loaded_group)(std::int64_t group, Shard loaded, const LocalColumns& at) =
      [](std::int64_t group, Shard loaded, const LocalColumns&) { return group - loaded.offset; };
};

}  // namespace tp
