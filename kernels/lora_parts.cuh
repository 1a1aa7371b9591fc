#pragma once
// What lora_shrink and lora_expand have in common. Both have a block for each tile and some
// columns. 16-bit types are multiplied on tensor cores, whose operands come straight from memory:
// which 16 of the products share a step is nobody's business, as long as both operands agree, and
// so a lane takes elements that lie side by side. fp32 is added up by fmaf. An element's bits
// depend on its token's row of x (or h), on its rows of A or B and their length, and on the
// adapter's LoRA rank; not on what else is in the tile or in the batch.
//
// Of each there are two kernels that make the same bits. Few tokens take as long as the longest
// chain of loads, so the one for whole vectors asks for all that it knows the place of at once:
// first for what says which rows these are, then for the rows; A and B, which no kernel writes, are
// on their way before the kernel before this one has ended. The other takes any rows.

#include <cstdint>
#include <type_traits>

#include "harness/device/device.h"
#include "kernels/lora.h"
#include "kernels/words.cuh"

namespace tp::lora {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

constexpr int kStep = 16;  // products that one matrix step adds up

// Elements [k, k + N) of a row, zeros instead of those from `end` on, which are not read, and for
// no row. Whole: the row, if there is one, is aligned and has them all. Without branches between
// them, loads of several rows are on their way together.
template <bool Whole, int N, typename T>
__device__ Words<T, N> load_row(const T* row, std::int64_t k, std::int64_t end, bool aligned) {
  Words<T, N> some{};
  if (row == nullptr) return some;
  if constexpr (Whole) {
    some = load_words<T, N>(row + k);
  } else {
    if (aligned && k + N <= end) return load_words<T, N>(row + k);
#pragma unroll
    for (int e = 0; e < N; ++e) {
      if (k + e >= end) break;
      if constexpr (std::is_same_v<T, float>) {
        some[e] = std::bit_cast<std::uint32_t>(row[k + e]);
      } else {
        some[e / 2] |= std::uint32_t{row[k + e].bits} << 16 * (e % 2);
      }
    }
  }
  return some;
}

// The LoRA rank of the tile's adapter for a matrix; 0: no adapter, or not of this matrix. All lanes
// of a warp call it. The ranks of all slots are asked for before it is known which it will be.
__device__ inline int rank_of(const LoraBatch& batch, const LoraTile& tile, int matrix) {
  if (batch.slots > 32) return tile.slot < 0 ? 0 : batch.ranks[tile.slot * batch.parts + matrix];
  const int lane = int(threadIdx.x) % 32;
  const int rank = lane < batch.slots ? batch.ranks[lane * batch.parts + matrix] : 0;
  return tile.slot < 0 ? 0 : __shfl_sync(0xFFFFFFFFu, rank, tile.slot);
}

// Throws Fault(BadLaunch) where the batch cannot be one of so many tokens.
void require_batch(const LoraBatch& batch, std::int64_t tokens, const char* op);

// Tiles of a launch whose grid has them in y or z.
constexpr std::int64_t kMaxGridTiles = 65535;

}  // namespace tp::lora
