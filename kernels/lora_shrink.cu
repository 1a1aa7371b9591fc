// lora_shrink: see lora_parts.cuh.

#include <algorithm>

#include "harness/device/require.h"
#include "kernels/lora_parts.cuh"

namespace tp {

using namespace lora;

namespace {

// Columns of a row that all lanes of a warp take together: eight each, for two matrix steps.
constexpr int kChunk = 8, kWarpChunk = 4 * kChunk;
constexpr int kMaxShrinkWarps = 8;

// They share out the columns of x.
constexpr int shrink_warps(std::int64_t k) {
  return int(std::min<std::int64_t>(kMaxShrinkWarps, ceil_div(k, 256)));
}

template <typename T, typename H>
struct Shrink {
  View<const T> x, a;
  bool x_aligned, a_aligned;
  LoraBatch batch;
  std::int64_t first_col;
  LoraIntermediate<H> h;
};

// ---- Whole vectors of 16-bit elements.

// How a launch is cut. Bits do not depend on it.
template <int ColumnsOfBlock, int ChunksInFlight>
struct ShrinkCut {
  static constexpr int kColumns = ColumnsOfBlock;         // of h that a block makes
  static constexpr int kChunksInFlight = ChunksInFlight;  // whose loads are on their way together
  static constexpr int kBlocks = ChunksInFlight > 5 ? 1 : 2;  // of a multiprocessor, at least
};
using FewBlocks = ShrinkCut<8, 12>;  // less for each of them, and all of it at once
using ManyBlocks = ShrinkCut<16, 5>;
// Beyond these the few blocks, twice as many, would be more than an H100 has multiprocessors.
constexpr std::int64_t kMostFewBlocks = 66;

// Once the kernel before this one has ended; and lora_expand has enough to do meanwhile.
__device__ inline void x_can_be_read() {
  wait_for_previous_kernel();
  let_next_kernel_start();
}

// This lane's part of chunks first, first + stride, .. below `end` of some rows; zeros for those
// behind it, and for no row.
template <int Chunks, int Rows, typename T>
__device__ void load_chunks(Words<T, kChunk> (&to)[Chunks][Rows], const T* const (&rows)[Rows],
                            int first, int stride, int end) {
#pragma unroll
  for (int u = 0; u < Chunks; ++u) {
    const int chunk = first + u * stride;
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      to[u][i] = {};
      if (chunk < end && rows[i] != nullptr)
        to[u][i] = load_words<T, kChunk>(rows[i] + chunk * kWarpChunk);
    }
  }
}

// The warp's sums of its share of the columns of x: `a`, `count` rows of A, and the tokens of rows
// g and g + 8 of the tile; to part[16][Cut::kColumns].
template <typename Cut, typename T, typename H>
__device__ void whole_by_matrix(const Shrink<T, H>& s, const std::int32_t (&tokens)[2], const T* a,
                                int count, float* part) {
  constexpr int kTiles = Cut::kColumns / 8, kInFlight = Cut::kChunksInFlight;
  const int warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32,
            lane = int(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const T *x_rows[2], *a_rows[kTiles];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    x_rows[i] = tokens[i] < 0 ? nullptr : s.x.data + tokens[i] * s.x.row_stride + t * kChunk;
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
    a_rows[j] = j * 8 + g < count ? a + (j * 8 + g) * s.a.row_stride + t * kChunk : nullptr;

  FragmentC sums[kTiles] = {};
  const int chunks = int(s.x.cols / kWarpChunk);
  Words<T, kChunk> x[kInFlight][2], of_a[kInFlight][kTiles];
  for (int first = warp; first < chunks; first += kInFlight * warps) {
    load_chunks(of_a, a_rows, first, warps, chunks);
    if (first == warp) x_can_be_read();
    load_chunks(x, x_rows, first, warps, chunks);
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (first + u * warps >= chunks) break;
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j * 8 >= count) break;
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
          mma(sums[j],
              FragmentA<T>{{x[u][0][half], x[u][1][half], x[u][0][half + 1], x[u][1][half + 1]}},
              FragmentB<T>{{of_a[u][j][half], of_a[u][j][half + 1]}});
        }
      }
    }
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      part[(g + e / 2 * 8) * Cut::kColumns + j * 8 + t * 2 + e % 2] = sums[j].x[e];
  }
}

template <typename Cut, typename T, typename H>
__global__ void __launch_bounds__(kMaxShrinkWarps * 32, Cut::kBlocks)
    shrink_whole_kernel(Shrink<T, H> s) {
  constexpr int kColumns = Cut::kColumns;
  float* parts = dynamic_shared<float>();  // [warps][16][kColumns]
  const int lane = int(threadIdx.x) % 32, matrix = int(blockIdx.y);
  const std::int64_t first = std::int64_t{blockIdx.x} * kColumns;
  const std::int32_t* order = s.batch.order + blockIdx.z * std::size_t{kLoraTile};
  const std::int32_t tokens[2] = {order[lane / 4], order[lane / 4 + 8]};
  const LoraTile tile = s.batch.tiles[blockIdx.z];
  const int columns = int(min(std::int64_t{kColumns}, s.h.cols - first));
  // Of them, those that the adapter has.
  const std::int64_t left = rank_of(s.batch, tile, matrix) - s.first_col - first;
  const int count = int(max(std::int64_t{0}, min(std::int64_t{columns}, left)));
  if (count > 0) {
    const std::int64_t slot_matrix = tile.slot * std::int64_t{s.batch.parts} + matrix;
    const T* a = s.a.data + (slot_matrix * s.h.cols + first) * s.a.row_stride;
    float* part = parts + threadIdx.x / 32 * (kLoraTile * kColumns);
    whole_by_matrix<Cut>(s, tokens, a, count, part);
    __syncthreads();
  }
  x_can_be_read();  // nor may h be written before, where nothing was read
  for (int i = int(threadIdx.x); i < tile.count * kColumns; i += int(blockDim.x)) {
    const int row = i / kColumns, col = i % kColumns;
    if (col >= columns) continue;
    float sum = 0.0f;
    if (col < count) {
      sum = parts[i];
#pragma unroll
      for (int w = 1; w < kMaxShrinkWarps; ++w)
        if (w < int(blockDim.x) / 32) sum += parts[w * (kLoraTile * kColumns) + i];
    }
    s.h.data[matrix * s.h.part_stride + order[row] * s.h.token_stride +
             (first + col) * s.h.col_stride] = from_float<H>(sum);
  }
}

// ---- Any rows.

constexpr int kAnyColumns = 16;  // of h that a block makes
// Loads of so many chunks are on their way at a time.
constexpr int kInFlight = 4;

// What a block shrinks: the tile's tokens through rows [first, first + count) of A.
template <typename T, typename H>
struct ShrinkBlock {
  const Shrink<T, H>& s;
  const LoraTile& tile;
  const std::int32_t* tokens;
  std::int64_t first;
  int count;

  // nullptr: there is none.
  __device__ const T* x_row(int row) const {
    return row < tile.count ? s.x.data + tokens[row] * s.x.row_stride : nullptr;
  }
  __device__ const T* a_row(int col) const {
    return col < count ? s.a.data + (first + col) * s.a.row_stride : nullptr;
  }
};

// The warp's sums of its share of the columns, to part[16][kAnyColumns].
template <typename T, typename H>
__device__ void any_by_matrix(const ShrinkBlock<T, H>& block, float* part) {
  constexpr int kTiles = kAnyColumns / 8;
  const Shrink<T, H>& s = block.s;
  const int warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32,
            lane = int(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const T* x_rows[2] = {block.x_row(g), block.x_row(g + 8)};
  const T* a_rows[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) a_rows[j] = block.a_row(j * 8 + g);

  FragmentC sums[kTiles] = {};
  const std::int64_t chunks = ceil_div(s.x.cols, kWarpChunk);
  const auto add_chunks = [&]<int Count, bool Whole>(std::integral_constant<int, Count>,
                                                     std::bool_constant<Whole>,
                                                     std::int64_t chunk) {
    Vec<std::uint32_t, kChunk / 2> x[Count][2], a[Count][kTiles];
#pragma unroll
    for (int u = 0; u < Count; ++u) {
      const std::int64_t k = (chunk + u * warps) * kWarpChunk + t * kChunk;
#pragma unroll
      for (int i = 0; i < 2; ++i)
        x[u][i] = load_row<Whole, kChunk>(x_rows[i], k, s.x.cols, s.x_aligned);
#pragma unroll
      for (int j = 0; j < kTiles; ++j)
        a[u][j] = load_row<Whole, kChunk>(a_rows[j], k, s.x.cols, s.a_aligned);
    }
#pragma unroll
    for (int u = 0; u < Count; ++u) {
      const auto &upper = x[u][0], &lower = x[u][1];
#pragma unroll
      for (int j = 0; j < kTiles; ++j) {
        if (j * 8 >= block.count) break;
        const auto& words = a[u][j];
#pragma unroll
        for (int half = 0; half < 4; half += 2) {
          mma(sums[j], FragmentA<T>{{upper[half], lower[half], upper[half + 1], lower[half + 1]}},
              FragmentB<T>{{words[half], words[half + 1]}});
        }
      }
    }
  };
  const bool aligned = s.x_aligned && s.a_aligned;
  for (std::int64_t chunk = warp; chunk < chunks;) {
    const std::int64_t last = chunk + (kInFlight - 1) * warps;
    if (aligned && (last + 1) * kWarpChunk <= s.x.cols) {
      add_chunks(std::integral_constant<int, kInFlight>{}, std::true_type{}, chunk);
      chunk = last + warps;
    } else {
      add_chunks(std::integral_constant<int, 1>{}, std::false_type{}, chunk);
      chunk += warps;
    }
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      part[(g + e / 2 * 8) * kAnyColumns + j * 8 + t * 2 + e % 2] = sums[j].x[e];
  }
}

template <typename T, typename H>
__device__ void any_by_vector(const ShrinkBlock<T, H>& block, float* part) {
  constexpr int kRows = 2, kCols = 8;  // at a time
  constexpr int kWidth = kWide<T>;
  const Shrink<T, H>& s = block.s;
  for (int row = 0; row < block.tile.count; row += kRows) {
    const T* x_rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) x_rows[r] = block.x_row(row + r);
    for (int col = 0; col < block.count; col += kCols) {
      float sums[kRows][kCols] = {};
      const auto add = [&]<bool Whole>(std::bool_constant<Whole>, std::int64_t k) {
        Vec<std::uint32_t, 4> x[kRows], a[kCols];
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          x[r] = load_row<Whole, kWidth>(x_rows[r], k, s.x.cols, s.x_aligned);
#pragma unroll
        for (int c = 0; c < kCols; ++c)
          a[c] = load_row<Whole, kWidth>(block.a_row(col + c), k, s.x.cols, s.a_aligned);
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
#pragma unroll
          for (int c = 0; c < kCols; ++c) {
            if (col + c >= block.count) break;
#pragma unroll
            for (int r = 0; r < kRows; ++r)
              sums[r][c] = fmaf(element<T>(x[r], e), element<T>(a[c], e), sums[r][c]);
          }
        }
      };
      for (std::int64_t k = std::int64_t{threadIdx.x} * kWidth; k < s.x.cols;
           k += std::int64_t{blockDim.x} * kWidth) {
        if (s.x_aligned && s.a_aligned && k + kWidth <= s.x.cols) {
          add(std::true_type{}, k);
        } else {
          add(std::false_type{}, k);
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (row + r >= block.tile.count) break;
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
          if (col + c >= block.count) break;
          const float sum = warp_sum(sums[r][c]);
          if (threadIdx.x % 32 == 0) part[(row + r) * kAnyColumns + col + c] = sum;
        }
      }
    }
  }
}

template <typename T, typename H>
__global__ void __launch_bounds__(kMaxShrinkWarps * 32, 2) shrink_any_kernel(Shrink<T, H> s) {
  float* parts = dynamic_shared<float>();  // [warps][16][kAnyColumns]
  const unsigned across = unsigned(ceil_div(s.h.cols, kAnyColumns));
  const std::int64_t first = std::int64_t{blockIdx.x % across} * kAnyColumns;
  const std::int64_t matrix = blockIdx.x / across % unsigned(s.batch.parts);
  const unsigned number = blockIdx.x / across / unsigned(s.batch.parts);
  const LoraTile tile = s.batch.tiles[number];
  const std::int32_t* tokens = s.batch.order + std::int64_t{number} * kLoraTile;
  const int columns = int(min(std::int64_t{kAnyColumns}, s.h.cols - first));
  // Of them, those that the adapter has.
  int count = 0;
  const std::int64_t slot_matrix = tile.slot * std::int64_t{s.batch.parts} + matrix;
  if (tile.slot >= 0) {
    const std::int64_t left = s.batch.ranks[slot_matrix] - s.first_col - first;
    count = int(max(std::int64_t{0}, min(std::int64_t{columns}, left)));
  }
  if (count > 0) {
    const ShrinkBlock<T, H> block{s, tile, tokens, slot_matrix * s.h.cols + first, count};
    float* part = parts + threadIdx.x / 32 * (kLoraTile * kAnyColumns);
    if constexpr (std::is_same_v<T, float>) {
      any_by_vector(block, part);
    } else {
      any_by_matrix(block, part);
    }
    __syncthreads();
  }
  for (int i = int(threadIdx.x); i < tile.count * columns; i += int(blockDim.x)) {
    const int row = i / columns, col = i % columns;
    float sum = 0.0f;
    if (col < count) {
      sum = parts[row * kAnyColumns + col];
      for (unsigned w = 1; w < blockDim.x / 32; ++w)
        sum += parts[(w * kLoraTile + unsigned(row)) * kAnyColumns + unsigned(col)];
    }
    const std::int64_t token = tokens[row];
    s.h.data[matrix * s.h.part_stride + token * s.h.token_stride + (first + col) * s.h.col_stride] =
        from_float<H>(sum);
  }
}

}  // namespace

template <typename T, typename H>
void lora_shrink(View<const T> x, View<const T> a, const LoraBatch& batch, std::int64_t first_col,
                 LoraIntermediate<H> h, Stream& stream) {
  require_batch(batch, x.rows, "lora_shrink");
  require(x.cols == a.cols && x.cols >= 1 && x.rows == h.tokens && h.cols >= 1 && first_col >= 0 &&
              a.rows == std::int64_t{batch.slots} * batch.parts * h.cols,
          "lora_shrink", "x is {} x {}, A is {} x {} of {} slots with {} matrices, h is {} x {}",
          {x.rows, x.cols, a.rows, a.cols, batch.slots, batch.parts, h.tokens, h.cols});
  const Shrink<T, H> s{x, a, has_aligned_rows(x), has_aligned_rows(a), batch, first_col, h};
  const int warps = shrink_warps(x.cols);
  const auto shared = [&](int columns) {
    return std::size_t(warps) * kLoraTile * std::size_t(columns) * sizeof(float);
  };
  if constexpr (!std::is_same_v<T, float>) {
    const auto launch_as = [&]<typename Cut>(Cut) {
      launch_overlapping("lora_shrink", shrink_whole_kernel<Cut, T, H>,
                         dim3(unsigned(ceil_div(h.cols, Cut::kColumns)), unsigned(batch.parts),
                              unsigned(batch.num_tiles)),
                         dim3(unsigned(warps) * 32), shared(Cut::kColumns), stream, s);
    };
    switch (lora_shrink_kernel(dtype_of<T>::value, x.cols, s.x_aligned && s.a_aligned,
                               batch.num_tiles, batch.parts, h.cols)) {
      case LoraKernel::whole:
        return launch_as(FewBlocks{});
      case LoraKernel::whole_many_blocks:
        return launch_as(ManyBlocks{});
      case LoraKernel::any:
        break;
    }
  }
  launch("lora_shrink", shrink_any_kernel<T, H>,
         dim3(unsigned(batch.num_tiles * batch.parts * ceil_div(h.cols, kAnyColumns))),
         dim3(unsigned(warps) * 32), shared(kAnyColumns), stream, s);
}

LoraKernel lora_shrink_kernel(DType t, std::int64_t in, bool aligned, std::int64_t tiles,
                              std::int64_t parts, std::int64_t h_cols) {
  if (t == DType::f32 || !aligned || in % kWarpChunk != 0 || tiles > kMaxGridTiles)
    return LoraKernel::any;
  return tiles * parts * ceil_div(h_cols, ManyBlocks::kColumns) > kMostFewBlocks
             ? LoraKernel::whole_many_blocks
             : LoraKernel::whole;
}

// Matrix steps: a warp's chunks, two steps each, and the warps' sums one after another, each a
// rounding to nearest, which is less than a step may be off. fp32: a thread's vectors, the warp,
// and the warps.
Accumulation lora_shrink_accumulation(DType t, std::int64_t k) {
  const int warps = shrink_warps(k);
  if (t == DType::f32) {
    return {.depth = kWide<float> * ceil_div(k, std::int64_t{warps} * 32 * kWide<float>) +
                     kWarpSumDepth + warps - 1};
  }
  return {.depth = 2 * ceil_div(ceil_div(k, kWarpChunk), warps) + warps - 1,
          .matrix_steps = true,
          .least_normal = t == DType::f16 ? 0x1p-14 : 0x1p-126};
}

template void lora_shrink(View<const float>, View<const float>, const LoraBatch&, std::int64_t,
                          LoraIntermediate<float>, Stream&);
template void lora_shrink(View<const f16>, View<const f16>, const LoraBatch&, std::int64_t,
                          LoraIntermediate<f16>, Stream&);
template void lora_shrink(View<const f16>, View<const f16>, const LoraBatch&, std::int64_t,
                          LoraIntermediate<float>, Stream&);
template void lora_shrink(View<const bf16>, View<const bf16>, const LoraBatch&, std::int64_t,
                          LoraIntermediate<bf16>, Stream&);
template void lora_shrink(View<const bf16>, View<const bf16>, const LoraBatch&, std::int64_t,
                          LoraIntermediate<float>, Stream&);

}  // namespace tp
