#pragma once
// Who makes which product, by its size: the library (library_product.h), where there is one; the
// kernels that stream the weight (streamed_product.cuh); those of tiles (tiled_product.cuh) all
// others.

#include <cstdint>

namespace tp {

constexpr int kLineBytes = 64;  // of a row, that a warp brings and multiplies at a time
constexpr int kWarpsDeep = 4;   // of a block share out the columns of a row: a line each, in turns

// Rows of fewer columns leave warps idle. Bits depend on the choice, so it asks for nothing but the
// columns, and where rows begin: at multiples of 16 bytes.
constexpr std::int64_t kLeastStreamedCols = 256;
constexpr bool is_streamed(std::int64_t cols, int element_bytes) {
  return cols >= kLeastStreamedCols && cols * element_bytes % 16 == 0;
}

// More rows of x than this and the library is faster: on an H100 with quantising it is behind at 16
// rows of x and ahead at 64.
constexpr std::int64_t kMostStreamedRows = 16;

}  // namespace tp
