#pragma once
// The named decisions of a gated MLP's first half under tensor parallelism, for ShardingRules
// (vLLM's MergedColumnParallelLinear and SiluAndMul).

#include <cstdint>

#include "harness/base/shape.h"

namespace tp {

// Rows of [gate_proj; up_proj], one below the other, that become the two halves of a rank. Each run
// lies within one of the two.
struct GatedRows {
  Shard gate, up;
  bool operator==(const GatedRows&) const = default;
};

// A rank's share of gate_proj, and as much of up_proj. `intermediate`: rows of each of them.
inline GatedRows rows_of_own_columns(std::int64_t intermediate, int tp_size, int tp_rank) {
  const std::int64_t size = div_exact(intermediate, tp_size);
  return {{tp_rank * size, size}, {intermediate + tp_rank * size, size}};
}

// Where a rank's fused weight has the rows of gate and of up, and so its product their columns. The
// rest of its `width` rows is padding: zeros.
struct GatedLayout {
  std::int64_t gate = 0;
  std::int64_t up = 0;
  std::int64_t width = 0;
  bool operator==(const GatedLayout&) const = default;
};

// Where the activation finds them.
struct GatedHalves {
  std::int64_t gate = 0;
  std::int64_t up = 0;
  bool operator==(const GatedHalves&) const = default;
};

// The next multiple of `tile`, from 1 on.
constexpr std::int64_t padded_to(std::int64_t tile, std::int64_t rows) {
  return (rows + tile - 1) / tile * tile;
}

struct GatedRules {
  // Rows of the weights that this rank loads.
  GatedRows (*weight_rows)(std::int64_t intermediate, int tp_size,
                           int tp_rank) = rows_of_own_columns;
  // The same of the biases.
  GatedRows (*bias_rows)(std::int64_t intermediate, int tp_size, int tp_rank) = rows_of_own_columns;
  // Where they go, `size` rows of each, for a kernel that wants them in tiles of `tile` rows: each
  // half is padded by itself, because it is the padded weight that is split into halves.
  GatedLayout (*layout)(std::int64_t size, std::int64_t tile) = [](std::int64_t size,
                                                                   std::int64_t tile) {
    const std::int64_t half = padded_to(tile, size);
    return GatedLayout{0, half, 2 * half};
  };
  // Whether the padding is written, or left as it was allocated.
  bool writes_padding = true;
  // Where the activation splits a fused row of so many columns.
  GatedHalves (*halves)(std::int64_t width) = [](std::int64_t width) {
    return GatedHalves{0, width / 2};
  };
};

}  // namespace tp
