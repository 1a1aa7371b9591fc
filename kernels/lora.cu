// Two kernels. Both have a block for each tile and some columns, and two paths that a block chooses
// by its tile's slot, so that tokens in another order have the same bits:
//   - matrix: slots of more than two tokens, 16-bit types: tensor cores. Their operands come
//     straight from memory: which 16 of the products share a step is nobody's business, as long as
//     both operands agree, and so a lane takes elements that lie side by side.
//   - vector: slots of one or two tokens, or fp32: fmaf, and every element of A and B read once.
// An element's bits depend on its token's row of x (or h), on its rows of A or B and their length,
// on the adapter's LoRA rank, and on the path; not on what else is in the tile or in the batch.
//
// Of few tokens a launch takes as long as its longest chain of loads. So a block asks for what it
// knows the place of at once, and for all of a row together; A and B, which no kernel writes, are
// on their way before the kernel before this one has ended.

#include <algorithm>
#include <type_traits>

#include "harness/device/device.h"
#include "harness/device/require.h"
#include "kernels/lora.h"
#include "kernels/words.cuh"

namespace tp {

namespace {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

constexpr int kMaxVectorTokens = 2;  // of a slot, and of 16-bit types
constexpr int kStep = 16;            // products that one matrix step adds up

template <typename T>
__device__ bool takes_matrix_steps(const LoraTile& tile) {
  return !std::is_same_v<T, float> && tile.of_slot > kMaxVectorTokens;
}

// Elements [k, k + N) of a row, zeros instead of those from `end` on, which are not read, and for
// no row. Whole: rows are aligned, and `end` cuts none of their vectors. Without branches between
// them, loads of several rows are on their way together.
template <bool Whole, int N, typename T>
__device__ Words<T, N> load_row(const T* row, std::int64_t k, std::int64_t end, bool aligned) {
  Words<T, N> some{};
  if (row == nullptr || k >= end) return some;
  if (Whole || (aligned && k + N <= end)) return load_words<T, N>(row + k);
  if constexpr (!Whole) {
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
__device__ inline int rank_of(const LoraBatch& batch, const LoraTile& tile, std::int64_t matrix) {
  if (batch.slots > 32)
    return tile.slot < 0 ? 0 : batch.ranks[tile.slot * std::int64_t{batch.parts} + matrix];
  const int lane = int(threadIdx.x) % 32;
  const int rank = lane < batch.slots ? batch.ranks[lane * std::int64_t{batch.parts} + matrix] : 0;
  return tile.slot < 0 ? 0 : __shfl_sync(0xFFFFFFFFu, rank, tile.slot);
}

// ---- Shrink.

// Columns of a row that all lanes of a warp take together: eight each, for two matrix steps.
constexpr int kChunk = 8, kWarpChunk = 4 * kChunk;
constexpr int kMaxShrinkWarps = 8;

// They share out the columns of x.
constexpr int shrink_warps(std::int64_t k) {
  return int(std::min<std::int64_t>(kMaxShrinkWarps, ceil_div(k, 256)));
}

// How a launch is cut. Bits do not depend on it.
template <int ColumnsOfBlock, int ChunksInFlight, int VectorsInFlight>
struct ShrinkCut {
  static constexpr int kColumns = ColumnsOfBlock;         // of h that a block makes
  static constexpr int kChunksInFlight = ChunksInFlight;  // whose loads are on their way together
  static constexpr int kVectorsInFlight = VectorsInFlight;
  static constexpr int kBlocks = ChunksInFlight > 6 ? 1 : 2;  // of a multiprocessor, at least
};
using FewBlocks = ShrinkCut<8, 12, 2>;  // less for each of them, and all of it at once
using ManyBlocks = ShrinkCut<16, 6, 1>;
constexpr std::int64_t kEnoughBlocks = 128;

template <typename T, typename H>
struct Shrink {
  View<const T> x, a;
  bool x_aligned, a_aligned;
  LoraBatch batch;
  std::int64_t first_col;
  LoraIntermediate<H> h;
};

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

// This lane's part of chunks first, first + stride, .. below `end` of some rows; zeros for those
// behind it, and for no row.
template <int Chunks, int Rows, typename T>
__device__ void load_chunks(Words<T, kChunk> (&to)[Chunks][Rows], const T* const (&rows)[Rows],
                            std::int64_t first, int stride, std::int64_t end) {
#pragma unroll
  for (int u = 0; u < Chunks; ++u) {
    const std::int64_t chunk = first + u * stride;
#pragma unroll
    for (int i = 0; i < Rows; ++i) {
      to[u][i] = {};
      if (chunk < end && rows[i] != nullptr)
        to[u][i] = load_words<T, kChunk>(rows[i] + chunk * kWarpChunk + threadIdx.x % 4 * kChunk);
    }
  }
}

// The warp's sums of its share of the columns, to part[16][Cut::kColumns].
template <typename Cut, typename T, typename H>
__device__ void shrink_by_matrix(const ShrinkBlock<T, H>& block, float* part) {
  constexpr int kTiles = Cut::kColumns / 8, kInFlight = Cut::kChunksInFlight;
  const Shrink<T, H>& s = block.s;
  const int warps = int(blockDim.x) / 32, warp = int(threadIdx.x) / 32,
            lane = int(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const T* x_rows[2] = {block.x_row(g), block.x_row(g + 8)};
  const T* a_rows[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) a_rows[j] = block.a_row(j * 8 + g);

  FragmentC sums[kTiles] = {};
  using Loaded = Words<T, kChunk>;
  const auto add = [&](const Loaded(&x)[2], const Loaded(&a)[kTiles]) {
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (j * 8 >= block.count) break;
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        mma(sums[j], FragmentA<T>{{x[0][half], x[1][half], x[0][half + 1], x[1][half + 1]}},
            FragmentB<T>{{a[j][half], a[j][half + 1]}});
      }
    }
  };
  // Whole chunks, all lanes' loads of some of them together; then what is left.
  const std::int64_t whole = s.x_aligned && s.a_aligned ? s.x.cols / kWarpChunk : 0;
  Loaded x[kInFlight][2], a[kInFlight][kTiles];
  load_chunks(a, a_rows, warp, warps, whole);
  wait_for_previous_kernel();
  for (std::int64_t first = warp; first < whole; first += kInFlight * warps) {
    if (first != warp) load_chunks(a, a_rows, first, warps, whole);
    load_chunks(x, x_rows, first, warps, whole);
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (first + u * warps >= whole) break;
      add(x[u], a[u]);
    }
  }
  const std::int64_t chunks = ceil_div(s.x.cols, kWarpChunk);
  for (std::int64_t chunk = whole + (warps + warp - whole % warps) % warps; chunk < chunks;
       chunk += warps) {
    const std::int64_t k = chunk * kWarpChunk + t * kChunk;
    Loaded x_chunk[2], a_chunk[kTiles];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      x_chunk[i] = load_row<false, kChunk>(x_rows[i], k, s.x.cols, s.x_aligned);
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      a_chunk[j] = load_row<false, kChunk>(a_rows[j], k, s.x.cols, s.a_aligned);
    add(x_chunk, a_chunk);
  }
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
#pragma unroll
    for (int e = 0; e < 4; ++e)
      part[(g + e / 2 * 8) * Cut::kColumns + j * 8 + t * 2 + e % 2] = sums[j].x[e];
  }
}

template <typename Cut, typename T, typename H>
__device__ void shrink_by_vector(const ShrinkBlock<T, H>& block, float* part) {
  constexpr int kRows = kMaxVectorTokens, kCols = 8;  // at a time
  constexpr int kWidth = kWide<T>, kInFlight = Cut::kVectorsInFlight;
  const Shrink<T, H>& s = block.s;
  const std::int64_t stride = std::int64_t{blockDim.x} * kWidth;
  for (int row = 0; row < block.tile.count; row += kRows) {
    const T* x_rows[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) x_rows[r] = block.x_row(row + r);
    for (int col = 0; col < block.count; col += kCols) {
      float sums[kRows][kCols] = {};
      for (std::int64_t first = std::int64_t{threadIdx.x} * kWidth; first < s.x.cols;
           first += kInFlight * stride) {
        Words<T> x[kInFlight][kRows], a[kInFlight][kCols];
        const auto load = [&]<bool Whole>(std::bool_constant<Whole>) {
#pragma unroll
          for (int u = 0; u < kInFlight; ++u) {
#pragma unroll
            for (int c = 0; c < kCols; ++c) {
              a[u][c] = load_row<Whole, kWidth>(block.a_row(col + c), first + u * stride, s.x.cols,
                                                s.a_aligned);
            }
          }
          wait_for_previous_kernel();
#pragma unroll
          for (int u = 0; u < kInFlight; ++u) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              x[u][r] =
                  load_row<Whole, kWidth>(x_rows[r], first + u * stride, s.x.cols, s.x_aligned);
            }
          }
        };
        if (s.x_aligned && s.a_aligned && s.x.cols % kWidth == 0) {
          load(std::true_type{});
        } else {
          load(std::false_type{});
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          if (first + u * stride >= s.x.cols) break;
#pragma unroll
          for (int e = 0; e < kWidth; ++e) {
#pragma unroll
            for (int c = 0; c < kCols; ++c) {
              if (col + c >= block.count) break;
#pragma unroll
              for (int r = 0; r < kRows; ++r)
                sums[r][c] = fmaf(element<T>(x[u][r], e), element<T>(a[u][c], e), sums[r][c]);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (row + r >= block.tile.count) break;
#pragma unroll
        for (int c = 0; c < kCols; ++c) {
          if (col + c >= block.count) break;
          const float sum = warp_sum(sums[r][c]);
          if (threadIdx.x % 32 == 0) part[(row + r) * Cut::kColumns + col + c] = sum;
        }
      }
    }
  }
}

template <typename Cut, typename T, typename H>
__global__ void __launch_bounds__(kMaxShrinkWarps * 32, Cut::kBlocks)
    shrink_kernel(Shrink<T, H> s) {
  constexpr int kColumns = Cut::kColumns;
  float* parts = dynamic_shared<float>();  // [warps][16][kColumns]
  const unsigned across = unsigned(ceil_div(s.h.cols, kColumns));
  const std::int64_t first = std::int64_t{blockIdx.x % across} * kColumns;
  const std::int64_t matrix = blockIdx.x / across % unsigned(s.batch.parts);
  const unsigned number = blockIdx.x / across / unsigned(s.batch.parts);
  const LoraTile tile = s.batch.tiles[number];
  const std::int32_t* tokens = s.batch.order + std::int64_t{number} * kLoraTile;
  const int columns = int(min(std::int64_t{kColumns}, s.h.cols - first));
  // Of them, those that the adapter has.
  const std::int64_t left = rank_of(s.batch, tile, matrix) - s.first_col - first;
  const int count = int(max(std::int64_t{0}, min(std::int64_t{columns}, left)));
  if (count > 0) {
    const std::int64_t slot_matrix = tile.slot * std::int64_t{s.batch.parts} + matrix;
    const ShrinkBlock<T, H> block{s, tile, tokens, slot_matrix * s.h.cols + first, count};
    float* part = parts + threadIdx.x / 32 * (kLoraTile * kColumns);
    if constexpr (!std::is_same_v<T, float>) {
      if (takes_matrix_steps<T>(tile)) {
        shrink_by_matrix<Cut>(block, part);
      } else {
        shrink_by_vector<Cut>(block, part);
      }
    } else {
      shrink_by_vector<Cut>(block, part);
    }
    __syncthreads();
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (int i = int(threadIdx.x); i < tile.count * columns; i += int(blockDim.x)) {
    const int row = i / columns, col = i % columns;
    float sum = 0.0f;
    if (col < count) {
      sum = parts[row * kColumns + col];
      for (unsigned w = 1; w < blockDim.x / 32; ++w)
        sum += parts[(w * kLoraTile + unsigned(row)) * kColumns + unsigned(col)];
    }
    s.h.data[matrix * s.h.part_stride + tokens[row] * s.h.token_stride +
             (first + col) * s.h.col_stride] = from_float<H>(sum);
  }
}

// ---- Expand.

// Columns of y that a lane makes side by side, and a warp: runs of them in `Tiles` groups.
constexpr int kRun = 8, kWarpColumns = 4 * kRun;
constexpr int kExpandWarps = 4;
// Words of B that a thread has on their way before it waits for h.
constexpr int kWordsAhead = 16;

// How a launch is cut: groups of columns that a warp makes. Bits do not depend on it.
constexpr int kFewGroups = 1, kManyGroups = 2;
constexpr std::int64_t kEnoughExpandBlocks = 512;
constexpr int expand_columns(int groups) { return kWarpColumns * kExpandWarps * groups; }

// Columns [first, first + count) of y: of a matrix of the layer, or (-1) of none.
struct ColumnRun {
  std::int32_t part;
  std::int64_t first, count;
  std::int64_t b_row;  // of its first column, in a slot
  unsigned block;      // the first of those of a tile that make it
};

template <typename T, typename H, typename Out>
struct Expand {
  LoraIntermediate<const H> h;
  View<const T> b, bias;
  bool b_aligned, h_aligned, y_aligned;
  LoraBatch batch;
  std::int64_t slot_rows;
  ColumnRun runs[2 * LoraColumns::kMaxParts + 1];
  int num_runs;
  unsigned blocks;  // of a tile
  int h_stride;     // of a row of h in shared memory
  View<const Out> base;
  View<Out> y;
};

// What becomes of the sums of a block.
template <typename T, typename H, typename Out>
struct ExpandBlock {
  const Expand<T, H, Out>& e;
  const LoraTile& tile;
  const std::int32_t* tokens;
  std::int64_t first;  // column of y
  int columns;
  std::int64_t b_row;  // of `first`, of all slots
  const T* bias;       // of `first`; nullptr: none
  float scale;

  __device__ const T* b_row_of(int col) const {
    return col < columns ? e.b.data + (b_row + col) * e.b.row_stride : nullptr;
  }
  __device__ const Out* base_of(std::int64_t token, int col) const {
    return e.base.data + token * e.base.row_stride + first + col;
  }
  __device__ Out* y_of(std::int64_t token, int col) const {
    return e.y.data + token * e.y.row_stride + first + col;
  }
  // Whether runs of columns are.
  __device__ bool is_aligned() const { return e.y_aligned && first % kWide<Out> == 0; }
  __device__ float finish(float base, int col, float sum) const {
    if (bias != nullptr) sum += to_float(bias[col]);
    return base + scale * sum;
  }
};

// Columns col .. col + kRun of a token's row of the base, and of y. Whole: all of them are of the
// block, and aligned.
template <bool Whole, typename Out>
struct Run {
  static constexpr int kWidth = kWide<Out>;
  Words<Out> words[kRun / kWidth] = {};

  template <typename T, typename H>
  __device__ void load(const ExpandBlock<T, H, Out>& block, std::int64_t token, int col) {
    const Out* base = block.base_of(token, col);
#pragma unroll
    for (int i = 0; i < kRun / kWidth; ++i)
      words[i] = load_row<Whole, kWidth>(base, i * kWidth, block.columns - col, block.is_aligned());
  }
  __device__ float at(int c) const { return element<Out>(words[c / kWidth], c % kWidth); }

  // value(c) to column col + c.
  template <typename T, typename H, typename F>
  __device__ static void store(const ExpandBlock<T, H, Out>& block, std::int64_t token, int col,
                               F value) {
    Out* y = block.y_of(token, col);
    if (Whole || (block.is_aligned() && col + kRun <= block.columns)) {
#pragma unroll
      for (int i = 0; i < kRun / kWidth; ++i)
        store_words(y + i * kWidth, words_of<Out>([&](int c) { return value(i * kWidth + c); }));
    } else if constexpr (!Whole) {
#pragma unroll
      for (int c = 0; c < kRun; ++c)
        if (col + c < block.columns) y[c] = from_float<Out>(value(c));
    }
  }
};

// Elements [k, k + 4) of a token's row of h, rounded to T; zeros from `rank` on, which are not
// read, and for no row.
template <bool Whole, typename T, typename H>
__device__ Words<T, 4> load_shrunk(const H* row, int k, int rank, std::int64_t stride) {
  if (row == nullptr || k >= rank) return {};
  if constexpr (Whole) {
    const auto four = load_words<H, 4>(row + k);
    if constexpr (std::is_same_v<H, T>) {
      return four;
    } else {
      return words_of<T, 4>([&](int e) { return element<H>(four, e); });
    }
  } else {
    return words_of<T, 4>(
        [&](int e) { return k + e < rank ? to_float(row[(k + e) * stride]) : 0.0f; });
  }
}

// The warp's columns from `first` on. Whole: B, h, base and y are aligned, and nothing of them is
// cut.
template <bool Whole, int Groups, typename T, typename H, typename Out>
__device__ void expand_by_matrix(const ExpandBlock<T, H, Out>& block, int part, int rank,
                                 int first) {
  constexpr int kTiles = kWarpColumns / 8, kEach = kStep / 4;
  constexpr int kSteps = Whole ? kWordsAhead / (Groups * kTiles * kEach / 2) : 1;  // at a time
  const Expand<T, H, Out>& e = block.e;
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  // The columns of a group's tiles are spread out, so that a lane's sums of all tiles lie side by
  // side: of column i of tile j, 8 (i / 2) + 2 j + i % 2.
  const auto b_row = [&](int group, int j) {
    return block.b_row_of(first + group * kWarpColumns + g / 2 * kRun + 2 * j + g % 2);
  };
  Words<T, kEach> b[kSteps][Groups][kTiles];
  const auto load_b = [&](int from) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = from + s * kStep + t * kEach;
#pragma unroll
      for (int group = 0; group < Groups; ++group) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          b[s][group][j] = load_row<Whole, kEach>(b_row(group, j), k, rank, e.b_aligned);
        }
      }
    }
  };
  load_b(0);
  const H* h_rows[2] = {};
  Run<Whole, Out> base[2][Groups];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (g + 8 * i >= block.tile.count) break;
    const std::int64_t token = block.tokens[g + 8 * i];
    h_rows[i] = e.h.data + part * e.h.part_stride + token * e.h.token_stride;
#pragma unroll
    for (int group = 0; group < Groups; ++group)
      base[i][group].load(block, token, first + group * kWarpColumns + t * kRun);
  }
  wait_for_previous_kernel();
  FragmentC sums[Groups][kTiles] = {};
  for (int from = 0; from < rank; from += kSteps * kStep) {
    if (from > 0) load_b(from);
    Words<T, kEach> h[kSteps][2];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 2; ++i)
        h[s][i] =
            load_shrunk<Whole, T>(h_rows[i], from + s * kStep + t * kEach, rank, e.h.col_stride);
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      if (from + s * kStep >= rank) break;
      const FragmentA<T> a{{h[s][0][0], h[s][1][0], h[s][0][1], h[s][1][1]}};
#pragma unroll
      for (int group = 0; group < Groups; ++group) {
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (first + group * kWarpColumns + 2 * j >= block.columns) break;
          mma(sums[group][j], a, FragmentB<T>{{b[s][group][j][0], b[s][group][j][1]}});
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (g + 8 * i >= block.tile.count) break;
#pragma unroll
    for (int group = 0; group < Groups; ++group) {
      const int col = first + group * kWarpColumns + t * kRun;
      Run<Whole, Out>::store(block, block.tokens[g + 8 * i], col, [&](int c) {
        return block.finish(base[i][group].at(c), col + c, sums[group][c / 2].x[i * 2 + c % 2]);
      });
    }
  }
}

// The rows of h of a tile, rounded to T, in fp32; zeros behind the adapter's LoRA rank, as far as a
// vector goes.
template <typename T, typename H, typename Out>
__device__ void load_h(const ExpandBlock<T, H, Out>& block, int part, int rank, float* to) {
  const LoraIntermediate<const H>& h = block.e.h;
  const int filled = (rank + kStep - 1) / kStep * kStep;
  for (int i = int(threadIdx.x); i < block.tile.count * filled; i += int(blockDim.x)) {
    const int row = i / filled, j = i % filled;
    float value = 0.0f;
    if (j < rank) {
      value = to_float(from_float<T>(to_float(
          h.data[part * h.part_stride + block.tokens[row] * h.token_stride + j * h.col_stride])));
    }
    to[row * block.e.h_stride + j] = value;
  }
}

// A thread has a column at a time.
template <typename T, typename H, typename Out>
__device__ void expand_by_vector(const ExpandBlock<T, H, Out>& block, int part, int rank,
                                 float* h) {
  constexpr int kRows = kMaxVectorTokens;  // at a time
  constexpr int kWidth = kWide<T>, kChains = 4;
  constexpr int kAhead = 4;  // vectors of B
  const Expand<T, H, Out>& e = block.e;
  Words<T> b[kAhead];
  const auto load_b = [&](int col, int from) {
#pragma unroll
    for (int v = 0; v < kAhead; ++v) {
      const int k = from + v * kWidth;
      b[v] = load_row<false, kWidth>(block.b_row_of(col), k, rank, e.b_aligned);
    }
  };
  load_b(int(threadIdx.x), 0);
  wait_for_previous_kernel();
  load_h<T>(block, part, rank, h);
  __syncthreads();
  for (int col = int(threadIdx.x); col < block.columns; col += int(blockDim.x)) {
    for (int row = 0; row < block.tile.count; row += kRows) {
      float sums[kRows][kChains] = {};
      const int rows = block.tile.count - row;
      for (int from = 0; from < rank; from += kAhead * kWidth) {
        // What was loaded ahead is for the first column, and for all of its rows if it is all.
        if (col != int(threadIdx.x) || (row > 0 && rank > kAhead * kWidth) || from > 0)
          load_b(col, from);
#pragma unroll
        for (int v = 0; v < kAhead; ++v) {
          if (from + v * kWidth >= rank) break;
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            if (r >= rows) break;
#pragma unroll
            for (int i = 0; i < kWidth; ++i) {
              float& sum = sums[r][i % kChains];
              sum =
                  fmaf(h[(row + r) * e.h_stride + from + v * kWidth + i], element<T>(b[v], i), sum);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        const std::int64_t token = block.tokens[row + r];
        const float sum = (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]);
        *block.y_of(token, col) =
            from_float<Out>(block.finish(to_float(*block.base_of(token, col)), col, sum));
      }
    }
  }
}

template <int Groups, typename T, typename H, typename Out>
__global__ void __launch_bounds__(kExpandWarps * 32) expand_kernel(Expand<T, H, Out> e) {
  const unsigned tile_number = blockIdx.x / e.blocks, number = blockIdx.x % e.blocks;
  const LoraTile tile = e.batch.tiles[tile_number];
  int r = 0;
  while (r + 1 < e.num_runs && e.runs[r + 1].block <= number) ++r;
  const ColumnRun run = e.runs[r];
  const std::int64_t offset = std::int64_t{number - run.block} * expand_columns(Groups);
  const int rank = run.part < 0 ? 0 : rank_of(e.batch, tile, run.part);
  const std::int64_t slot = rank > 0 ? tile.slot : 0;
  const ExpandBlock<T, H, Out> block{
      .e = e,
      .tile = tile,
      .tokens = e.batch.order + std::int64_t{tile_number} * kLoraTile,
      .first = run.first + offset,
      .columns = int(min(std::int64_t{expand_columns(Groups)}, run.count - offset)),
      .b_row = slot * e.slot_rows + run.b_row + offset,
      .bias =
          e.bias.rows == 0 ? nullptr : e.bias.data + slot * e.bias.row_stride + run.b_row + offset,
      .scale = rank > 0 ? e.batch.scales[slot * e.batch.parts + run.part] : 0.0f};
  if (rank == 0) {
    wait_for_previous_kernel();
    if (e.y.data == e.base.data) return;
    const int runs = (block.columns + kRun - 1) / kRun;
    for (int i = int(threadIdx.x); i < tile.count * runs; i += int(blockDim.x)) {
      const std::int64_t token = block.tokens[i / runs];
      Run<false, Out> base;
      base.load(block, token, i % runs * kRun);
      Run<false, Out>::store(block, token, i % runs * kRun, [&](int c) { return base.at(c); });
    }
    return;
  }
  if constexpr (!std::is_same_v<T, float>) {
    if (takes_matrix_steps<T>(tile)) {
      const bool whole = e.b_aligned && e.h_aligned && rank % 4 == 0 && block.is_aligned() &&
                         block.columns % (kWarpColumns * Groups) == 0;
      const int first = int(threadIdx.x) / 32 * (kWarpColumns * Groups);
      if (whole) {
        if (first < block.columns) expand_by_matrix<true, Groups>(block, run.part, rank, first);
        return;
      }
#pragma unroll 1
      for (int i = 0; i < Groups; ++i) {
        const int col = first + i * kWarpColumns;
        if (col < block.columns) expand_by_matrix<false, 1>(block, run.part, rank, col);
      }
      return;
    }
  }
  expand_by_vector(block, run.part, rank, dynamic_shared<float>());
}

// The columns of y in ascending order, with those between them if there is something to copy.
// Throws Fault(BadLaunch) where they overlap or leave y.
template <typename T, typename H, typename Out>
void find_runs(const LoraColumns& columns, int block_columns, Expand<T, H, Out>& e) {
  e.num_runs = 0;
  e.blocks = 0;
  const auto add = [&e, block_columns](std::int32_t part, std::int64_t first, std::int64_t count,
                                       std::int64_t b_row) {
    if (count == 0) return;
    e.runs[e.num_runs++] = {part, first, count, b_row, e.blocks};
    e.blocks += unsigned(ceil_div(count, block_columns));
  };
  std::vector<int> order;
  std::int64_t b_rows[LoraColumns::kMaxParts] = {};
  for (int p = 0; p < columns.parts; ++p) {
    order.push_back(p);
    b_rows[p] = p == 0 ? 0 : b_rows[p - 1] + columns.rows[p - 1];
  }
  std::sort(order.begin(), order.end(),
            [&](int a, int b) { return columns.at[a] < columns.at[b]; });
  const bool copies = e.y.data != e.base.data;
  std::int64_t end = 0;
  for (const int p : order) {
    if (columns.rows[p] == 0) continue;
    require(
        columns.rows[p] > 0 && columns.at[p] >= end && columns.at[p] + columns.rows[p] <= e.y.cols,
        "lora_expand", "matrix {} has {} columns from {} on, but those up to {} are taken of {}",
        {p, columns.rows[p], columns.at[p], end, e.y.cols});
    if (copies) add(-1, end, columns.at[p] - end, 0);
    add(p, columns.at[p], columns.rows[p], b_rows[p]);
    end = columns.at[p] + columns.rows[p];
  }
  if (copies) add(-1, end, e.y.cols - end, 0);
}

// ---- Join.

constexpr int kJoinThreads = 256;

template <typename H>
__global__ void join_kernel(const H* gathered, std::int64_t share, std::int64_t elements,
                            LoraIntermediate<H> whole) {
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= elements) return;
  const std::int64_t col = i % whole.cols, token = i / whole.cols % whole.tokens,
                     part = i / whole.cols / whole.tokens;
  const std::int64_t parts = elements / whole.cols / whole.tokens;
  whole.data[part * whole.part_stride + token * whole.token_stride + col * whole.col_stride] =
      gathered[((col / share * parts + part) * whole.tokens + token) * share + col % share];
}

void require_batch(const LoraBatch& batch, std::int64_t tokens, const char* op) {
  require(batch.num_tiles >= 1 && batch.num_tiles <= tokens && batch.slots >= 1 &&
              batch.parts >= 1 && batch.parts <= LoraColumns::kMaxParts,
          op, "{} tiles of {} tokens, {} slots, {} matrices",
          {batch.num_tiles, tokens, batch.slots, batch.parts});
}

}  // namespace

LoraPlan lora_plan(const std::vector<std::int32_t>& slot_of_token, std::int32_t slots) {
  std::vector<std::vector<std::int32_t>> tokens(std::size_t(slots) + 1);
  for (std::size_t t = 0; t < slot_of_token.size(); ++t) {
    const std::int32_t slot = slot_of_token[t];
    require(slot >= -1 && slot < slots, "lora_plan", "token {} has slot {} of {}",
            {std::int64_t(t), slot, slots});
    tokens[std::size_t(slot == -1 ? slots : slot)].push_back(std::int32_t(t));
  }
  LoraPlan plan;
  for (std::int32_t i = 0; i <= slots; ++i) {
    const std::vector<std::int32_t>& own = tokens[std::size_t(i)];
    for (std::int32_t at = 0; at < std::int32_t(own.size()); at += kLoraTile) {
      const std::int32_t count = std::min(kLoraTile, std::int32_t(own.size()) - at);
      plan.tiles.push_back({i == slots ? -1 : i, count, std::int32_t(own.size())});
      plan.order.insert(plan.order.end(), own.begin() + at, own.begin() + at + count);
      plan.order.resize(plan.tiles.size() * kLoraTile, -1);
    }
  }
  return plan;
}

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
  const std::int64_t pairs = std::int64_t{batch.num_tiles} * batch.parts;
  const auto launch_as = [&]<typename Cut>(Cut) {
    launch_overlapping("lora_shrink", shrink_kernel<Cut, T, H>,
                       dim3(unsigned(pairs * ceil_div(h.cols, Cut::kColumns))),
                       dim3(unsigned(warps) * 32),
                       std::size_t(warps) * kLoraTile * Cut::kColumns * sizeof(float), stream, s);
  };
  if (pairs * ceil_div(h.cols, ManyBlocks::kColumns) >= kEnoughBlocks) {
    launch_as(ManyBlocks{});
  } else {
    launch_as(FewBlocks{});
  }
}

template <typename T, typename H, typename Out>
void lora_expand(LoraIntermediate<const H> h, View<const T> b, View<const T> bias,
                 const LoraBatch& batch, const LoraColumns& columns, View<const Out> base,
                 View<Out> y, Stream& stream, LoraBefore before) {
  require_batch(batch, y.rows, "lora_expand");
  require(columns.parts == batch.parts, "lora_expand", "{} matrices have columns, {} adapters",
          {columns.parts, batch.parts});
  std::int64_t slot_rows = 0;
  for (int p = 0; p < columns.parts; ++p) slot_rows += columns.rows[p];
  require(
      h.tokens == y.rows && h.cols >= 1 && b.cols == h.cols && b.rows == batch.slots * slot_rows,
      "lora_expand", "h is {} x {}, B is {} x {} of {} slots with {} rows, y is {} x {}",
      {h.tokens, h.cols, b.rows, b.cols, batch.slots, slot_rows, y.rows, y.cols});
  require(bias.rows == 0 || (bias.rows == batch.slots && bias.cols == slot_rows), "lora_expand",
          "the bias is {} x {}, of {} slots with {} rows",
          {bias.rows, bias.cols, batch.slots, slot_rows});
  require(base.rows == y.rows && base.cols == y.cols &&
              (base.data != y.data || base.row_stride == y.row_stride),
          "lora_expand", "the base is {} x {}, y is {} x {}",
          {base.rows, base.cols, y.rows, y.cols});
  const std::int64_t h_vector = 4 * sizeof(H);
  Expand<T, H, Out> e{.h = h,
                      .b = b,
                      .bias = bias,
                      .b_aligned = has_aligned_rows(b),
                      .h_aligned = h.col_stride == 1 &&
                                   reinterpret_cast<std::uintptr_t>(h.data) % h_vector == 0 &&
                                   h.part_stride % 4 == 0 && h.token_stride % 4 == 0,
                      .y_aligned = has_aligned_rows(base) && has_aligned_rows(y),
                      .batch = batch,
                      .slot_rows = slot_rows,
                      .runs = {},
                      .num_runs = 0,
                      .blocks = 0,
                      .h_stride = int(ceil_div(h.cols, kStep)) * kStep + kChunk,
                      .base = base,
                      .y = y};
  find_runs(columns, expand_columns(kFewGroups), e);
  if (e.blocks == 0) return;  // none of the matrices' rows are here
  const std::size_t shared = std::size_t(e.h_stride) * sizeof(float) *
                             (std::is_same_v<T, float> ? kLoraTile : kMaxVectorTokens);
  const auto launch_as = [&]<int Groups>(std::integral_constant<int, Groups>) {
    const dim3 grid(unsigned(batch.num_tiles) * e.blocks), threads(kExpandWarps * 32);
    if (before == LoraBefore::rest) {
      launch_overlapping("lora_expand", expand_kernel<Groups, T, H, Out>, grid, threads, shared,
                         stream, e);
    } else {
      launch("lora_expand", expand_kernel<Groups, T, H, Out>, grid, threads, shared, stream, e);
    }
  };
  if (std::int64_t{batch.num_tiles} * e.blocks >= kEnoughExpandBlocks) {
    find_runs(columns, expand_columns(kManyGroups), e);
    launch_as(std::integral_constant<int, kManyGroups>{});
  } else {
    launch_as(std::integral_constant<int, kFewGroups>{});
  }
}

template <typename H>
void lora_join(const H* gathered, int tp_size, std::int64_t parts, LoraIntermediate<H> whole,
               Stream& stream) {
  require(tp_size >= 1 && whole.cols % tp_size == 0, "lora_join", "{} columns are of {} ranks",
          {whole.cols, tp_size});
  const std::int64_t elements = parts * whole.tokens * whole.cols;
  launch("lora_join", join_kernel<H>, dim3(unsigned(ceil_div(elements, kJoinThreads))),
         dim3(kJoinThreads), 0, stream, gathered, whole.cols / tp_size, elements, whole);
}

// Matrix steps: a warp's chunks, two steps each, and the warps' sums one after another, each a
// rounding to nearest, which is less than a step may be off. A step counts as
// kCut + 2^-23 > 10 roundings (of 2^-24), so that the vector path, of no more than 8 of them for
// each of the warp's first chunks in a row, 5 in the warp and those of the warps, is within it:
// 8 m + 5 + (w - 1) <= 10 (2 m + w - 1) for m, w >= 1.
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

// Matrix steps of 16 each; or four chains, and two roundings where they meet: no more than 6 for 16
// products, and a step counts as 10.
Accumulation lora_expand_accumulation(DType t, std::int64_t rank) {
  if (t == DType::f32) return {.depth = ceil_div(rank, 4) + 2};
  return {.depth = ceil_div(rank, kStep),
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

template void lora_expand(LoraIntermediate<const float>, View<const float>, View<const float>,
                          const LoraBatch&, const LoraColumns&, View<const float>, View<float>,
                          Stream&, LoraBefore);
template void lora_expand(LoraIntermediate<const f16>, View<const f16>, View<const f16>,
                          const LoraBatch&, const LoraColumns&, View<const f16>, View<f16>, Stream&,
                          LoraBefore);
template void lora_expand(LoraIntermediate<const f16>, View<const f16>, View<const f16>,
                          const LoraBatch&, const LoraColumns&, View<const float>, View<float>,
                          Stream&, LoraBefore);
template void lora_expand(LoraIntermediate<const float>, View<const f16>, View<const f16>,
                          const LoraBatch&, const LoraColumns&, View<const f16>, View<f16>, Stream&,
                          LoraBefore);
template void lora_expand(LoraIntermediate<const float>, View<const f16>, View<const f16>,
                          const LoraBatch&, const LoraColumns&, View<const float>, View<float>,
                          Stream&, LoraBefore);
template void lora_expand(LoraIntermediate<const bf16>, View<const bf16>, View<const bf16>,
                          const LoraBatch&, const LoraColumns&, View<const bf16>, View<bf16>,
                          Stream&, LoraBefore);
template void lora_expand(LoraIntermediate<const bf16>, View<const bf16>, View<const bf16>,
                          const LoraBatch&, const LoraColumns&, View<const float>, View<float>,
                          Stream&, LoraBefore);
template void lora_expand(LoraIntermediate<const float>, View<const bf16>, View<const bf16>,
                          const LoraBatch&, const LoraColumns&, View<const bf16>, View<bf16>,
                          Stream&, LoraBefore);
template void lora_expand(LoraIntermediate<const float>, View<const bf16>, View<const bf16>,
                          const LoraBatch&, const LoraColumns&, View<const float>, View<float>,
                          Stream&, LoraBefore);

template void lora_join(const float*, int, std::int64_t, LoraIntermediate<float>, Stream&);
template void lora_join(const f16*, int, std::int64_t, LoraIntermediate<f16>, Stream&);
template void lora_join(const bf16*, int, std::int64_t, LoraIntermediate<bf16>, Stream&);

}  // namespace tp
