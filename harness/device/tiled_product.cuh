#pragma once
// Products of matrices on tensor cores: the tiles, the loop and the corners that matmul and
// scaled_matmul share. What the operands are kept in, and what becomes of a block of columns, are
// policies.
//
// An operand (x or w) gives T, f16 or bf16, to the tensor cores. It has
//   load(row, col, count, to)       writes elements col .. col + kChunk of a row to shared memory,
//                                   zeros instead of those from `count` on or beyond the last row;
//                                   by copy_async or at once
// A scaling has
//   kInBlocks                       whether the sums of blocks of columns are scaled
//   border(k)                       where the block of column k ends: maybe beyond the last column
//   x_factor(row, k), w_factor(col, k)

#include <cstdint>
#include <limits>

#include "harness/base/tensor.h"
#include "harness/device/device.h"

namespace tp {

// out = x w^T + bias. `cols` of x and of w.
template <typename X, typename W, typename Scaling, typename Bias, typename Out>
struct Product {
  X x;
  W w;
  Scaling scaling;
  std::int64_t cols;
  const Bias* bias;  // nullptr: none
  View<Out> out;
};

// Blocks that make rows x cols elements of out each, in one dimension: the others end at 65535.
template <typename Out>
dim3 blocks_of(const View<Out>& out, int rows, int cols) {
  return dim3(unsigned((out.cols + cols - 1) / cols * ((out.rows + rows - 1) / rows)));
}

// The first element that this block makes; its neighbours have the same rows.
struct Corner {
  std::int64_t row, col;
};
template <typename Out>
__device__ Corner corner_of_block(const View<Out>& out, int rows, int cols) {
  const unsigned across = unsigned((out.cols + cols - 1) / cols);
  return {std::int64_t{blockIdx.x / across} * rows, std::int64_t{blockIdx.x % across} * cols};
}

// Adds the bias and rounds once.
template <typename Bias, typename Out>
__device__ void finish(const Bias* bias, const View<Out>& out, std::int64_t row, std::int64_t col,
                       float sum) {
  if (bias != nullptr) sum += to_float(bias[col]);
  out.data[row * out.row_stride + col] = from_float<Out>(sum);
}

// How a block's tile of out is shared out. A warp makes TilesDown x TilesAcross tiles of 16 x 8;
// Stages tiles of Depth columns of x and w are on their way to shared memory at a time.
template <int WarpsDown, int WarpsAcross, int TilesDown, int TilesAcross, int Depth, int Stages>
struct Tiling {
  static constexpr int kWarpsAcross = WarpsAcross, kTilesDown = TilesDown,
                       kTilesAcross = TilesAcross, kDepth = Depth, kStages = Stages;
  static constexpr int kWarpRows = TilesDown * 16, kWarpCols = TilesAcross * 8;
  static constexpr int kRows = WarpsDown * kWarpRows, kCols = WarpsAcross * kWarpCols;
  static constexpr int kThreads = WarpsDown * WarpsAcross * 32;
  static constexpr int kStride = Depth + 8;  // of a tile's rows: no bank conflicts (matrix.h)
  static constexpr int kStageElements = (kRows + kCols) * kStride;
};
// Few tokens: narrow tiles, so that all of a GPU reads the weight (and an emulator computes little
// that nobody wants). Many: as much reuse as the registers hold.
using FewRows = Tiling<1, 2, 1, 2, 64, 4>;
using ManyRows = Tiling<2, 4, 4, 4, 32, 4>;
constexpr std::int64_t kFewRows = 64;

constexpr int kChunk = 8;         // elements of one 16-byte copy
constexpr int kStep = 16;         // columns that one matrix step multiplies
constexpr int kPair = 2 * kStep;  // of the two steps that one load of w serves

// Values that need no conversion.
template <typename T>
struct Plain {
  View<const T> values;
  bool aligned;  // every row begins at a multiple of 16 bytes

  explicit Plain(const View<const T>& view)
      : values(view),
        aligned(reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 &&
                view.row_stride % kChunk == 0) {}
  __device__ void load(std::int64_t row, std::int64_t col, int count, T* to) const {
    const T* source = values.data + row * values.row_stride + col;
    if (aligned && row < values.rows && count >= kChunk && col % kChunk == 0) {
      copy_async<16>(to, source);
      return;
    }
    Vec<T, kChunk> chunk;
    for (int e = 0; e < kChunk; ++e) chunk[e] = row < values.rows && e < count ? source[e] : T{};
    store_vector(to, chunk);
  }
};

struct Unscaled {
  static constexpr bool kInBlocks = false;

  __device__ static std::int64_t border(std::int64_t) {
    return std::numeric_limits<std::int64_t>::max();
  }
};

// The columns of one stage, of one block of columns only.
template <int Depth, typename Scaling>
struct Step {
  std::int64_t first = 0, end = 0, border = 0;

  __device__ void next(const Scaling& scaling, std::int64_t cols) {
    if (end == border) border = scaling.border(end);
    first = end;
    end = first + Depth < cols ? first + Depth : cols;
    if (border < end) end = border;
  }
};

// Begins to bring rows [first, first + Rows) and columns [k, end) of `from` to `tile`, with zeros
// beyond, as far as the pair of matrix steps that contains the last of the columns.
template <typename Tile, int Rows, typename Operand, typename T>
__device__ void load_tile(const Operand& from, std::int64_t first, std::int64_t k, std::int64_t end,
                          T* tile) {
  constexpr int kChunks = Tile::kDepth / kChunk;
  const int depth = int(end - k), filled = (depth + kPair - 1) / kPair * kPair;
  for (int i = int(threadIdx.x); i < Rows * kChunks; i += Tile::kThreads) {
    const int col = i % kChunks * kChunk;
    if (col < filled)
      from.load(first + i / kChunks, k + col, depth - col,
                tile + i / kChunks * Tile::kStride + col);
  }
}

template <typename Tile, typename T, typename P>
__global__ void __launch_bounds__(Tile::kThreads) matrix_kernel(P p) {
  using Scaling = decltype(p.scaling);
  T* stages = dynamic_shared<T>();
  const Corner corner = corner_of_block(p.out, Tile::kRows, Tile::kCols);
  const std::int64_t first_row = corner.row, first_col = corner.col;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int warp_row = warp / Tile::kWarpsAcross * Tile::kWarpRows,
            warp_col = warp % Tile::kWarpsAcross * Tile::kWarpCols;
  Step<Tile::kDepth, Scaling> loaded;
  const auto load = [&](int step) {
    if (loaded.end < p.cols) {
      loaded.next(p.scaling, p.cols);
      T* stage = stages + step % Tile::kStages * Tile::kStageElements;
      load_tile<Tile, Tile::kRows>(p.x, first_row, loaded.first, loaded.end, stage);
      load_tile<Tile, Tile::kCols>(p.w, first_col, loaded.first, loaded.end,
                                   stage + Tile::kRows * Tile::kStride);
    }
    copy_async_commit();  // an empty group, too: what is waited for is counted in groups
  };
  // Of element e of the tile that is i down and j across.
  const auto row_of = [&](int i, int e) {
    return first_row + warp_row + i * 16 + lane / 4 + e / 2 * 8;
  };
  const auto col_of = [&](int j, int e) {
    return first_col + warp_col + j * 8 + lane % 4 * 2 + e % 2;
  };

  FragmentC sums[Tile::kTilesDown][Tile::kTilesAcross] = {};
  [[maybe_unused]] FragmentC totals[Tile::kTilesDown][Tile::kTilesAcross] = {};
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step);
  Step<Tile::kDepth, Scaling> here;
  for (int step = 0; here.end < p.cols; ++step) {
    here.next(p.scaling, p.cols);
    const int depth = int(here.end - here.first);
    copy_async_wait<Tile::kStages - 2>();
    // Everybody's part of this stage is there, and nobody still reads the one before it.
    __syncthreads();
    load(step + Tile::kStages - 1);
    const T* x = stages + step % Tile::kStages * Tile::kStageElements + warp_row * Tile::kStride;
    const T* w = stages + step % Tile::kStages * Tile::kStageElements +
                 (Tile::kRows + warp_col) * Tile::kStride;
#pragma unroll
    for (int kk = 0; kk < Tile::kDepth; kk += kPair) {
      if (kk >= depth) break;
      FragmentB2<T> b[Tile::kTilesAcross];
#pragma unroll
      for (int j = 0; j < Tile::kTilesAcross; ++j)
        b[j] = load_b2(w + j * 8 * Tile::kStride + kk, Tile::kStride);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (kk + half * kStep >= depth) break;
        FragmentA<T> a[Tile::kTilesDown];
#pragma unroll
        for (int i = 0; i < Tile::kTilesDown; ++i)
          a[i] = load_a(x + i * 16 * Tile::kStride + kk + half * kStep, Tile::kStride);
#pragma unroll
        for (int i = 0; i < Tile::kTilesDown; ++i) {
#pragma unroll
          for (int j = 0; j < Tile::kTilesAcross; ++j) mma(sums[i][j], a[i], b[j].x[half]);
        }
      }
    }
    if constexpr (Scaling::kInBlocks) {
      if (here.end != here.border && here.end != p.cols) continue;
      float w_factors[Tile::kTilesAcross][2];
#pragma unroll
      for (int j = 0; j < Tile::kTilesAcross; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const std::int64_t col = col_of(j, e);
          w_factors[j][e] = col < p.out.cols ? p.scaling.w_factor(col, here.first) : 0.0f;
        }
      }
#pragma unroll
      for (int i = 0; i < Tile::kTilesDown; ++i) {
#pragma unroll
        for (int lower = 0; lower < 2; ++lower) {
          const std::int64_t row = row_of(i, 2 * lower);
          const float x_factor = row < p.out.rows ? p.scaling.x_factor(row, here.first) : 0.0f;
#pragma unroll
          for (int j = 0; j < Tile::kTilesAcross; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              float& sum = sums[i][j].x[2 * lower + e];
              float& total = totals[i][j].x[2 * lower + e];
              total = fmaf(sum, x_factor * w_factors[j][e], total);
              sum = 0.0f;
            }
          }
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < Tile::kTilesDown; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kTilesAcross; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const std::int64_t row = row_of(i, e), col = col_of(j, e);
        if (row < p.out.rows && col < p.out.cols)
          finish(p.bias, p.out, row, col, Scaling::kInBlocks ? totals[i][j].x[e] : sums[i][j].x[e]);
      }
    }
  }
}

// T: what the tensor cores multiply.
template <typename T, typename P>
void launch_tiled(const char* name, const P& p, Stream& stream) {
  const auto launch_as = [&]<typename Tile>(Tile) {
    launch(name, matrix_kernel<Tile, T, P>, blocks_of(p.out, Tile::kRows, Tile::kCols),
           dim3(Tile::kThreads), Tile::kStages * Tile::kStageElements * sizeof(T), stream, p);
  };
  p.out.rows <= kFewRows ? launch_as(FewRows{}) : launch_as(ManyRows{});
}

}  // namespace tp
