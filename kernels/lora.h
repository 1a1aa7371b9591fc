#pragma once
// LoRA over a linear layer on one rank, for a batch of tokens that use several adapters of
// different ranks, or none (S-LoRA, Punica; vLLM's lora_shrink and lora_expand): two kernels, which
// know slots only. What is in them is lora_slots.h's; which collective stands between the two, the
// layer's.

#include <cstdint>
#include <vector>

#include "harness/base/compare.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

// Tokens of one slot, at most kLoraTile of them. Tokens of no adapter have slot -1.
struct LoraTile {
  std::int32_t slot, count;
};
constexpr std::int32_t kLoraTile = 16;

// Tokens sorted by slot (those of no adapter last), each slot's in ascending order, and cut into
// tiles. Made on the host, once for all layers of a step.
struct LoraPlan {
  std::vector<std::int32_t> order;  // [tiles][kLoraTile], -1 behind the tokens of a tile
  std::vector<LoraTile> tiles;
};
// Throws Fault(BadLaunch) where a token's slot is not -1 .. slots-1.
LoraPlan lora_plan(const std::vector<std::int32_t>& slot_of_token, std::int32_t slots);

// The same in device memory, and what is known of each slot.
struct LoraBatch {
  const std::int32_t* order = nullptr;  // [tiles][kLoraTile]
  const LoraTile* tiles = nullptr;
  std::int32_t num_tiles = 0;
  // [slots][parts]: LoRA ranks, 0 of a matrix that the adapter does not change; and factors.
  const std::int32_t* ranks = nullptr;
  const float* scales = nullptr;
  std::int32_t slots = 0;
  std::int32_t parts = 0;  // matrices of the layer: 3 of q, k, v
};

// Shrunk activations: [parts][tokens][cols], any strides, so that what was gathered along the rank
// dimension can be read as it lies.
template <typename H>
struct LoraIntermediate {
  H* data = nullptr;
  std::int64_t tokens = 0;
  std::int64_t cols = 0;  // LoRA ranks of a slot (or of this rank's share of it)
  std::int64_t part_stride = 0, token_stride = 0, col_stride = 1;
};

// h[p][t][j] = sum_k x[t][k] a[slot of t][p][j][k], added up in fp32, rounded to H (T or float).
// x [tokens, in]; a [slots * parts * h.cols, in]. Row j of the slots' A is row first_col + j of the
// adapters'; where that is not below the adapter's LoRA rank, and for tokens of no adapter, h is 0
// and nothing is read. Any row strides; segments of any length; matrix steps where T is f16 or
// bf16. May begin before the kernel before it in the stream has ended (overlap.h): of what is read,
// that one may write x, nothing else. Throws Fault(BadLaunch) where the sizes do not fit.
template <typename T, typename H>
void lora_shrink(View<const T> x, View<const T> a, const LoraBatch& batch, std::int64_t first_col,
                 LoraIntermediate<H> h, Stream& stream);

// What ranks gathered, each its share of the LoRA ranks: gathered [tp_size][parts][tokens][cols],
// dense, to `whole`, of tp_size * cols columns. They must not overlap. Throws Fault(BadLaunch)
// where the columns do not divide.
template <typename H>
void lora_join(const H* gathered, int tp_size, std::int64_t parts, LoraIntermediate<H> whole,
               Stream& stream);

// How the expanded deltas lie in the rows of y, and B's rows in a slot: those of the matrices one
// after another.
struct LoraColumns {
  static constexpr int kMaxParts = 4;
  std::int32_t parts = 0;
  std::int64_t rows[kMaxParts] = {};  // of B in a slot; 0: there are none
  std::int64_t at[kMaxParts] = {};    // the first column of y
};

// What lora_expand may take to be complete when it begins.
enum class LoraBefore : std::uint8_t {
  all,   // all that it reads
  rest,  // all but h: that is what the kernel before it in the stream writes (lora_shrink, with
         // nothing in between), and lora_expand begins while that one runs
};

// y[t][at[p] + n] = base[the same] + scale (sum_j h[p][t][j] b[slot of t][n of p][j] + bias[slot][n
// of p]), j below the adapter's LoRA rank; h is rounded to T first, the sum is made in fp32, and so
// are scaling and adding, with one rounding to Out (T or float) at the end. Tokens of no adapter,
// matrices that the adapter does not change, and columns of y that `columns` does not name get base
// as it is. y may be base. Matrix steps as above. `columns` may be in any order, but not overlap.
// b [slots * rows of a slot, LoRA ranks of a slot]; bias [slots, rows of a slot], or no rows: none;
// y, base [tokens, any]. Any row strides. Throws Fault(BadLaunch) where the sizes do not fit.
template <typename T, typename H, typename Out>
void lora_expand(LoraIntermediate<const H> h, View<const T> b, View<const T> bias,
                 const LoraBatch& batch, const LoraColumns& columns, View<const Out> base,
                 View<Out> y, Stream& stream, LoraBefore before = LoraBefore::all);

// Which kernel each of the two is. An element's bits do not depend on it.
enum class LoraKernel : std::uint8_t {
  any,    // any rows
  whole,  // whole vectors of 16-bit elements
  whole_many_blocks,
};
// aligned: all tensors' rows begin at multiples of 16 bytes.
LoraKernel lora_shrink_kernel(DType t, std::int64_t in, bool aligned, std::int64_t tiles,
                              std::int64_t parts, std::int64_t h_cols);
LoraKernel lora_expand_kernel(DType t, const LoraColumns& columns, std::int64_t y_cols,
                              bool aligned, bool has_bias, std::int64_t tiles);

// How the two add up: over k columns of x, and over a LoRA rank. No path is less exact. An
// element's bits depend on its token's row, its rows of A or B, and the adapter's LoRA rank: on
// nothing else of the batch.
Accumulation lora_shrink_accumulation(DType t, std::int64_t k);
Accumulation lora_expand_accumulation(DType t, std::int64_t rank);

}  // namespace tp
