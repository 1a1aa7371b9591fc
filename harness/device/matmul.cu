#include "harness/device/device.h"
#include "harness/device/matmul.h"
#include "harness/device/require.h"

namespace tp {

namespace {

template <typename T, typename Out>
struct Product {
  View<const T> x;
  View<const T> w;
  const T* bias;  // nullptr: none
  View<Out> out;
};

// Blocks that make rows x cols elements of out each, in one dimension: the others end at 65535.
template <typename T, typename Out>
dim3 blocks_of(const Product<T, Out>& p, int rows, int cols) {
  return dim3(unsigned((p.out.cols + cols - 1) / cols * ((p.out.rows + rows - 1) / rows)));
}

// The first element that this block makes; its neighbours have the same rows.
struct Corner {
  std::int64_t row, col;
};
template <typename T, typename Out>
__device__ Corner corner_of_block(const Product<T, Out>& p, int rows, int cols) {
  const unsigned across = unsigned((p.out.cols + cols - 1) / cols);
  return {std::int64_t{blockIdx.x / across} * rows, std::int64_t{blockIdx.x % across} * cols};
}

// Adds the bias and rounds once.
template <typename T, typename Out>
__device__ void finish(const Product<T, Out>& p, std::int64_t row, std::int64_t col, float sum) {
  if (p.bias != nullptr) sum += to_float(p.bias[col]);
  p.out.data[row * p.out.row_stride + col] = from_float<Out>(sum);
}

// f32: a block makes kFloatRows x kFloatCols elements of out, a thread 4 x 4 of them, apart by as
// many rows and columns as the block has threads in that direction.
constexpr int kFloatRows = 32, kFloatCols = 64, kFloatDepth = 32;
constexpr int kThreadsDown = kFloatRows / 4, kThreadsAcross = kFloatCols / 4;
constexpr int kFloatThreads = kThreadsDown * kThreadsAcross;
constexpr int kFloatStride = kFloatDepth + 1;  // rows of a tile begin at different banks

// Rows [first, first + rows) and columns [k, k + kFloatDepth) of `from`; rows beyond its end are
// zeros, columns beyond it are left as they are.
__device__ void load_float_tile(const View<const float>& from, std::int64_t first, int rows,
                                std::int64_t k, float* tile) {
  for (int i = int(threadIdx.x); i < rows * kFloatDepth; i += kFloatThreads) {
    const std::int64_t row = first + i / kFloatDepth, col = k + i % kFloatDepth;
    if (col >= from.cols) continue;
    tile[i / kFloatDepth * kFloatStride + i % kFloatDepth] =
        row < from.rows ? from.data[row * from.row_stride + col] : 0.0f;
  }
}

__global__ void float_kernel(Product<float, float> p) {
  float* x_tile = dynamic_shared<float>();
  float* w_tile = x_tile + kFloatRows * kFloatStride;
  const auto [first_row, first_col] = corner_of_block(p, kFloatRows, kFloatCols);
  const int down = int(threadIdx.x) / kThreadsAcross, across = int(threadIdx.x) % kThreadsAcross;
  float sums[4][4] = {};
  for (std::int64_t k = 0; k < p.x.cols; k += kFloatDepth) {
    load_float_tile(p.x, first_row, kFloatRows, k, x_tile);
    load_float_tile(p.w, first_col, kFloatCols, k, w_tile);
    __syncthreads();
    const int depth = p.x.cols - k < kFloatDepth ? int(p.x.cols - k) : kFloatDepth;
    if (first_row + down < p.x.rows && first_col + across < p.w.rows) {
      for (int kk = 0; kk < depth; ++kk) {
        float w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j)
          w[j] = w_tile[(across + j * kThreadsAcross) * kFloatStride + kk];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (first_row + down + i * kThreadsDown >= p.x.rows) break;
          const float x = x_tile[(down + i * kThreadsDown) * kFloatStride + kk];
#pragma unroll
          for (int j = 0; j < 4; ++j) sums[i][j] = fmaf(x, w[j], sums[i][j]);
        }
      }
    }
    __syncthreads();  // nobody still reads what the next step overwrites
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::int64_t row = first_row + down + i * kThreadsDown,
                         col = first_col + across + j * kThreadsAcross;
      if (row < p.out.rows && col < p.out.cols) finish(p, row, col, sums[i][j]);
    }
  }
}

void launch_product(const Product<float, float>& p, Stream& stream) {
  launch("matmul", float_kernel, blocks_of(p, kFloatRows, kFloatCols), dim3(kFloatThreads),
         (kFloatRows + kFloatCols) * kFloatStride * sizeof(float), stream, p);
}

// f16 and bf16: how a block's tile of out is shared out. A warp makes TilesDown x TilesAcross tiles
// of 16 x 8; Stages tiles of Depth columns of x and w are on their way to shared memory at a time.
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

template <typename T>
bool is_aligned(const View<const T>& view) {
  return reinterpret_cast<std::uintptr_t>(view.data) % 16 == 0 && view.row_stride % kChunk == 0;
}

// Begins to bring rows [first, first + Rows) and columns [k, k + Depth) of `from` to `tile`, with
// zeros beyond its end, as far as the pair of matrix steps that contains its last column.
template <typename Tile, int Rows, typename T>
__device__ void load_tile(const View<const T>& from, bool aligned, std::int64_t first,
                          std::int64_t k, T* tile) {
  constexpr int kChunks = Tile::kDepth / kChunk;
  for (int i = int(threadIdx.x); i < Rows * kChunks; i += Tile::kThreads) {
    const std::int64_t row = first + i / kChunks, col = k + i % kChunks * kChunk;
    T* to = tile + i / kChunks * Tile::kStride + i % kChunks * kChunk;
    if (col >= (from.cols + kPair - 1) / kPair * kPair) continue;
    const T* source = from.data + row * from.row_stride + col;
    if (aligned && row < from.rows && col + kChunk <= from.cols) {
      copy_async<16>(to, source);
      continue;
    }
    Vec<T, kChunk> values;
    for (int e = 0; e < kChunk; ++e)
      values[e] = row < from.rows && col + e < from.cols ? source[e] : T{};
    store_vector(to, values);
  }
}

template <typename Tile, typename T, typename Out>
__global__ void __launch_bounds__(Tile::kThreads)
    matrix_kernel(Product<T, Out> p, bool x_aligned, bool w_aligned) {
  T* stages = dynamic_shared<T>();
  const Corner corner = corner_of_block(p, Tile::kRows, Tile::kCols);
  const std::int64_t first_row = corner.row, first_col = corner.col;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int warp_row = warp / Tile::kWarpsAcross * Tile::kWarpRows,
            warp_col = warp % Tile::kWarpsAcross * Tile::kWarpCols;
  const std::int64_t steps = (p.x.cols + Tile::kDepth - 1) / Tile::kDepth;
  const auto load = [&](std::int64_t step) {
    if (step < steps) {
      T* stage = stages + step % Tile::kStages * Tile::kStageElements;
      const std::int64_t k = step * Tile::kDepth;
      load_tile<Tile, Tile::kRows>(p.x, x_aligned, first_row, k, stage);
      load_tile<Tile, Tile::kCols>(p.w, w_aligned, first_col, k,
                                   stage + Tile::kRows * Tile::kStride);
    }
    copy_async_commit();  // an empty group, too: what is waited for is counted in groups
  };

  FragmentC sums[Tile::kTilesDown][Tile::kTilesAcross] = {};
  for (int step = 0; step < Tile::kStages - 1; ++step) load(step);
  for (std::int64_t step = 0; step < steps; ++step) {
    copy_async_wait<Tile::kStages - 2>();
    // Everybody's part of this stage is there, and nobody still reads the one before it.
    __syncthreads();
    load(step + Tile::kStages - 1);
    const T* x = stages + step % Tile::kStages * Tile::kStageElements + warp_row * Tile::kStride;
    const T* w = stages + step % Tile::kStages * Tile::kStageElements +
                 (Tile::kRows + warp_col) * Tile::kStride;
#pragma unroll
    for (int kk = 0; kk < Tile::kDepth; kk += kPair) {
      if (step * Tile::kDepth + kk >= p.x.cols) break;
      FragmentB2<T> b[Tile::kTilesAcross];
#pragma unroll
      for (int j = 0; j < Tile::kTilesAcross; ++j)
        b[j] = load_b2(w + j * 8 * Tile::kStride + kk, Tile::kStride);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (step * Tile::kDepth + kk + half * kStep >= p.x.cols) break;
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
  }
#pragma unroll
  for (int i = 0; i < Tile::kTilesDown; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kTilesAcross; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const std::int64_t row = first_row + warp_row + i * 16 + lane / 4 + e / 2 * 8,
                           col = first_col + warp_col + j * 8 + lane % 4 * 2 + e % 2;
        if (row < p.out.rows && col < p.out.cols) finish(p, row, col, sums[i][j].x[e]);
      }
    }
  }
}

template <typename Tile, typename T, typename Out>
void launch_tiled(const Product<T, Out>& p, Stream& stream) {
  launch("matmul", matrix_kernel<Tile, T, Out>, blocks_of(p, Tile::kRows, Tile::kCols),
         dim3(Tile::kThreads), Tile::kStages * Tile::kStageElements * sizeof(T), stream, p,
         is_aligned(p.x), is_aligned(p.w));
}

template <typename T, typename Out>
void launch_product(const Product<T, Out>& p, Stream& stream) {
  if (p.out.rows <= kFewRows) {
    launch_tiled<FewRows>(p, stream);
  } else {
    launch_tiled<ManyRows>(p, stream);
  }
}

}  // namespace

template <typename T, typename Out>
void matmul(View<const T> x, View<const T> w, const T* bias, View<Out> out, Stream& stream) {
  require(x.cols == w.cols && out.rows == x.rows && out.cols == w.rows, "matmul",
          "x is {} x {}, w is {} x {}, out is {} x {}",
          {x.rows, x.cols, w.rows, w.cols, out.rows, out.cols});
  launch_product(Product<T, Out>{x, w, bias, out}, stream);
}

Accumulation matmul_accumulation(DType t, std::int64_t k) {
  if (t == DType::f32) return {.depth = k};
  return {.depth = (k + kStep - 1) / kStep,
          .matrix_steps = true,
          .least_normal = t == DType::f16 ? 0x1p-14 : 0x1p-126};
}

template void matmul(View<const float>, View<const float>, const float*, View<float>, Stream&);
template void matmul(View<const f16>, View<const f16>, const f16*, View<f16>, Stream&);
template void matmul(View<const f16>, View<const f16>, const f16*, View<float>, Stream&);
template void matmul(View<const bf16>, View<const bf16>, const bf16*, View<bf16>, Stream&);
template void matmul(View<const bf16>, View<const bf16>, const bf16*, View<float>, Stream&);

}  // namespace tp
