#pragma once
// Products of which the weight is streamed: it is read once, at what memory gives, and all else is
// done meanwhile. For few rows of x, where a product of tiles (tiled_product.cuh) waits for memory,
// and for any number where nobody else makes it.
//
// The rows of w are on the 16-row side of the matrix steps, the rows of x (tokens) on the other. Of
// 64 bytes of 8 rows, lane 4 g + t brings the 16 bytes of row g that it will multiply itself: what
// it reads first is the first of its operands of the first step, whatever place in k that has. So
// the 16 columns of a step are no neighbours, but the same ones for w and x, and nothing is
// rearranged on its way; codes of e4m3 become f16 in registers. The warps of a block share out the
// columns of a row, and add their sums up at the end, in ascending order.

#include <cstdint>
#include <type_traits>

#include "harness/base/tensor.h"
#include "harness/device/device.h"
#include "harness/device/library_product.h"
#include "harness/device/streamed_size.h"

namespace tp {

constexpr int kPieceBytes = 16;                // that a lane brings at a time
constexpr int kGroupBytes = 32 * kPieceBytes;  // of 8 rows

// How many rows of w and of x a block takes. A warp makes RowTiles x TokenTiles tiles of 16 x 8;
// WarpsDown of them share rows of x, kWarpsDeep share rows of w. Stages are on their way to shared
// memory at a time.
template <int RowTiles, int TokenTiles, int WarpsDown, int Stages>
struct StreamTiling {
  static constexpr int kRowTiles = RowTiles, kTokenTiles = TokenTiles, kWarpsDown = WarpsDown,
                       kStages = Stages;
  static constexpr int kRows = WarpsDown * RowTiles * 16, kTokens = TokenTiles * 8;
  static constexpr int kWarps = WarpsDown * kWarpsDeep, kThreads = kWarps * 32;
  // Of w: the groups of each warp. Of x: those of each share of the columns, token tile by tile.
  static constexpr int kWarpGroups = 2 * RowTiles, kTokenGroups = kWarpsDeep * TokenTiles;
  static constexpr int kStageBytes = (kWarps * kWarpGroups + kTokenGroups) * kGroupBytes;
  static constexpr int kSumStride = kRows + 4;  // of a token's sums: no bank conflicts
  static constexpr int kSumBytes = kWarpsDeep * kTokens * kSumStride * int(sizeof(float));

  // Shorter rows need no more stages than they have chunks.
  static std::size_t shared_bytes(std::int64_t chunks) {
    const std::int64_t rings = (chunks < Stages ? chunks : Stages) * kStageBytes;
    return std::size_t(rings > kSumBytes ? rings : kSumBytes);
  }
};

// out = (x_scale * w_scale) * x w^T + bias: the product of the scales, the scaling and the bias in
// fp32. E: e4m3, or f16 or bf16.
template <typename E>
struct StreamedProduct {
  View<const E> x, w;
  const float* x_scales = nullptr;  // nullptr: none; those of rows are x_scale_stride apart
  std::int64_t x_scale_stride = 0;
  const float* w_scales = nullptr;
  std::int64_t w_scale_stride = 0;
  const void* bias = nullptr;  // of bias_type; nullptr: none
  DType bias_type = DType::f32;
  void* out = nullptr;  // x.rows rows of w.rows elements of out_type
  DType out_type = DType::f32;
  std::int64_t out_stride = 0;
};

using Piece = Vec<std::uint32_t, kPieceBytes / 4>;

// A warp begins to bring 64 bytes of each of the rows first .. first + 8 of `from`, from column k
// on: zeros instead of columns beyond the last one, the last row again instead of rows beyond it.
template <typename E>
__device__ void stream_group(const View<const E>& from, std::int64_t first, std::int64_t k,
                             std::byte* group) {
  const int lane = int(threadIdx.x) % 32;
  const std::int64_t row = first + lane / 4 < from.rows ? first + lane / 4 : from.rows - 1;
  k += lane % 4 * (kPieceBytes / int(sizeof(E)));
  std::byte* to = group + lane * kPieceBytes;
  if (k < from.cols) {
    copy_async<kPieceBytes>(to, from.data + row * from.row_stride + k);
  } else {
    store_vector(reinterpret_cast<std::uint32_t*>(to), Piece{});
  }
}

// The operands of a step that 16 bytes of a row hold: two pairs of values.
template <typename E>
struct PieceSteps {
  static constexpr int kSteps = 2;
  __device__ static void pairs(const Piece& piece, int step, std::uint32_t& first,
                               std::uint32_t& second) {
    first = piece[2 * step];
    second = piece[2 * step + 1];
  }
};
template <>
struct PieceSteps<e4m3> {
  static constexpr int kSteps = 4;
  __device__ static void pairs(const Piece& piece, int step, std::uint32_t& first,
                               std::uint32_t& second) {
    widen_codes(piece[step], first, second);
  }
};

__device__ inline float load_float(const void* values, DType t, std::int64_t i) {
  if (t == DType::bf16) return to_float(static_cast<const bf16*>(values)[i]);
  if (t == DType::f16) return to_float(static_cast<const f16*>(values)[i]);
  return static_cast<const float*>(values)[i];
}
__device__ inline void store_float(void* values, DType t, std::int64_t i, float value) {
  if (t == DType::bf16) {
    static_cast<bf16*>(values)[i] = from_float<bf16>(value);
  } else if (t == DType::f16) {
    static_cast<f16*>(values)[i] = from_float<f16>(value);
  } else {
    static_cast<float*>(values)[i] = value;
  }
}

template <typename Tile, typename E>
__global__ void __launch_bounds__(Tile::kThreads) streamed_kernel(StreamedProduct<E> p) {
  using T = std::conditional_t<std::is_same_v<E, e4m3>, f16, E>;  // what is multiplied
  using Steps = PieceSteps<E>;
  constexpr int kGroupCols = kLineBytes / int(sizeof(E)), kChunk = kWarpsDeep * kGroupCols;
  std::byte* shared = dynamic_shared<std::byte>();
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int down = warp % Tile::kWarpsDown, deep = warp / Tile::kWarpsDown;
  const std::int64_t across = (p.x.rows + Tile::kTokens - 1) / Tile::kTokens;
  const std::int64_t first_row = blockIdx.x / across * Tile::kRows,
                     first_token = blockIdx.x % across * Tile::kTokens;
  const int chunks = int((p.w.cols + kChunk - 1) / kChunk);
  const auto stage = [&](int chunk) { return shared + chunk % Tile::kStages * Tile::kStageBytes; };
  const auto w_groups = [&](int chunk) {  // this warp's
    return stage(chunk) + warp * Tile::kWarpGroups * kGroupBytes;
  };
  const auto x_groups = [&](int chunk) {
    return stage(chunk) + Tile::kWarps * Tile::kWarpGroups * kGroupBytes;
  };
  const auto load_w = [&](int chunk) {
    if (chunk >= chunks) return;
#pragma unroll
    for (int i = 0; i < Tile::kWarpGroups; ++i) {
      stream_group(p.w, first_row + down * Tile::kRowTiles * 16 + i * 8,
                   std::int64_t{chunk} * kChunk + deep * kGroupCols,
                   w_groups(chunk) + i * kGroupBytes);
    }
  };
  const auto load_x = [&](int chunk) {
    if (chunk >= chunks) return;
#pragma unroll
    for (int i = 0; i < Tile::kTokenGroups; i += Tile::kWarps) {
      const int group = i + warp;
      if (group >= Tile::kTokenGroups || first_token + group / kWarpsDeep * 8 >= p.x.rows) break;
      stream_group(p.x, first_token + group / kWarpsDeep * 8,
                   std::int64_t{chunk} * kChunk + group % kWarpsDeep * kGroupCols,
                   x_groups(chunk) + group * kGroupBytes);
    }
  };

  // The kernel before this one may make x, but no weight.
#pragma unroll
  for (int chunk = 0; chunk < Tile::kStages - 1; ++chunk) load_w(chunk);
  let_next_kernel_start();
  wait_for_previous_kernel();
#pragma unroll
  for (int chunk = 0; chunk < Tile::kStages - 1; ++chunk) {
    load_x(chunk);
    copy_async_commit();  // the first group has all weights so far
  }
  FragmentC sums[Tile::kRowTiles][Tile::kTokenTiles] = {};
  for (int chunk = 0; chunk < chunks; ++chunk) {
    copy_async_wait<Tile::kStages - 2>();
    // Everybody's part of this chunk is there, and nobody still reads the one before it.
    __syncthreads();
    load_w(chunk + Tile::kStages - 1);
    load_x(chunk + Tile::kStages - 1);
    copy_async_commit();
    const auto piece_of = [&](const std::byte* group) {
      return load_vector<std::uint32_t, 4>(
          reinterpret_cast<const std::uint32_t*>(group + lane * kPieceBytes));
    };
    FragmentA<T> a[Tile::kRowTiles][Steps::kSteps];
#pragma unroll
    for (int i = 0; i < Tile::kRowTiles; ++i) {
      const Piece upper = piece_of(w_groups(chunk) + 2 * i * kGroupBytes),
                  lower = piece_of(w_groups(chunk) + (2 * i + 1) * kGroupBytes);
#pragma unroll
      for (int step = 0; step < Steps::kSteps; ++step) {
        Steps::pairs(upper, step, a[i][step].x[0], a[i][step].x[2]);
        Steps::pairs(lower, step, a[i][step].x[1], a[i][step].x[3]);
      }
    }
#pragma unroll
    for (int j = 0; j < Tile::kTokenTiles; ++j) {
      if (first_token + j * 8 >= p.x.rows) break;
      const Piece tokens = piece_of(x_groups(chunk) + (j * kWarpsDeep + deep) * kGroupBytes);
#pragma unroll
      for (int step = 0; step < Steps::kSteps; ++step) {
        FragmentB<T> b;
        Steps::pairs(tokens, step, b.x[0], b.x[1]);
#pragma unroll
        for (int i = 0; i < Tile::kRowTiles; ++i) mma(sums[i][j], a[i][step], b);
      }
    }
  }

  // The sums of each share of the columns, a row of them for each token.
  copy_async_wait<0>();
  __syncthreads();
  float* shares = reinterpret_cast<float*>(shared);
  constexpr int kShare = Tile::kTokens * Tile::kSumStride;
#pragma unroll
  for (int i = 0; i < Tile::kRowTiles; ++i) {
#pragma unroll
    for (int j = 0; j < Tile::kTokenTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int token = j * 8 + lane % 4 * 2 + e % 2,
                  row = (down * Tile::kRowTiles + i) * 16 + lane / 4 + e / 2 * 8;
        shares[deep * kShare + token * Tile::kSumStride + row] = sums[i][j].x[e];
      }
    }
  }
  __syncthreads();
  for (int i = int(threadIdx.x); i < Tile::kTokens * Tile::kRows; i += Tile::kThreads) {
    const int token = i / Tile::kRows;
    const std::int64_t row = first_row + i % Tile::kRows, x_row = first_token + token;
    if (x_row >= p.x.rows) break;
    if (row >= p.w.rows) continue;
    const float* share = shares + token * Tile::kSumStride + i % Tile::kRows;
    float sum = *share;
#pragma unroll
    for (int d = 1; d < kWarpsDeep; ++d) sum += share[d * kShare];
    if (p.x_scales != nullptr || p.w_scales != nullptr) {
      const float of_x = p.x_scales == nullptr ? 1.0f : p.x_scales[x_row * p.x_scale_stride];
      const float of_w = p.w_scales == nullptr ? 1.0f : p.w_scales[row * p.w_scale_stride];
      sum *= of_x * of_w;
    }
    if (p.bias != nullptr) sum += load_float(p.bias, p.bias_type, row);
    store_float(p.out, p.out_type, x_row * p.out_stride + row, sum);
  }
}

// Which tiling. As many rows a block as leave few of an H100's 132 multiprocessors idle, and as
// many tokens as there are. Whatever it is, the bits are the same.
template <typename F>
void with_stream_tiling(std::int64_t rows, std::int64_t tokens, F call) {
  constexpr std::int64_t kBlocks = 120;
  const auto with_tokens = [&]<int TokenTiles>(std::integral_constant<int, TokenTiles>) {
    if (rows >= 96 * kBlocks) return call(StreamTiling<3, TokenTiles, 2, 5>{});
    if (rows >= 64 * kBlocks) return call(StreamTiling<2, TokenTiles, 2, 6>{});
    if (rows >= 32 * kBlocks) return call(StreamTiling<1, TokenTiles, 2, 6>{});
    return call(StreamTiling<1, TokenTiles, 1, 8>{});
  };
  if (tokens <= kMostStreamedRows)
    return with_tokens(std::integral_constant<int, kMostStreamedRows / 8>{});
  return with_tokens(std::integral_constant<int, 8>{});
}

// Whether rows lie as the kernel reads them.
template <typename E>
bool can_be_streamed(const View<const E>& rows) {
  return is_streamed(rows.cols, sizeof(E)) &&
         reinterpret_cast<std::uintptr_t>(rows.data) % kPieceBytes == 0 &&
         rows.row_stride * sizeof(E) % kPieceBytes == 0;
}

// `overlaps`: it may begin before the kernel before it has ended, which makes x, its scales or the
// bias, maybe, but no weight.
template <typename E>
void launch_streamed(const char* name, const StreamedProduct<E>& p, bool overlaps, Stream& stream) {
  with_stream_tiling(p.w.rows, p.x.rows, [&]<typename Tile>(Tile) {
    constexpr std::int64_t kChunkBytes = kWarpsDeep * kLineBytes;
    const std::int64_t blocks = (p.w.rows + Tile::kRows - 1) / Tile::kRows *
                                ((p.x.rows + Tile::kTokens - 1) / Tile::kTokens),
                       chunks = (p.w.cols * sizeof(E) + kChunkBytes - 1) / kChunkBytes;
    const dim3 grid = dim3(unsigned(blocks)), block = dim3(Tile::kThreads);
    const std::size_t bytes = Tile::shared_bytes(chunks);
    if (overlaps) {
      launch_overlapping(name, streamed_kernel<Tile, E>, grid, block, bytes, stream, p);
    } else {
      launch(name, streamed_kernel<Tile, E>, grid, block, bytes, stream, p);
    }
  });
}

// The product by the library where it makes it (no bias, no scales of rows), else streamed. False,
// and nothing is queued, where tiles have to make it.
template <typename E>
bool launch_untiled(const char* name, const StreamedProduct<E>& p, bool overlaps, Stream& stream) {
  if (p.bias == nullptr && p.x_scale_stride == 0 && p.w_scale_stride == 0 &&
      library_matmul({.type = dtype_of<E>::value,
                      .out_type = p.out_type,
                      .m = p.x.rows,
                      .n = p.w.rows,
                      .k = p.x.cols,
                      .x = p.x.data,
                      .w = p.w.data,
                      .out = p.out,
                      .x_stride = p.x.row_stride,
                      .w_stride = p.w.row_stride,
                      .out_stride = p.out_stride,
                      .x_scale = p.x_scales,
                      .w_scale = p.w_scales},
                     stream)) {
    return true;
  }
  if (!can_be_streamed(p.x) || !can_be_streamed(p.w)) return false;
  launch_streamed<E>(name, p, overlaps, stream);
  return true;
}

}  // namespace tp
