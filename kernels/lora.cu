// Two kernels. Both have a block for each tile and some columns, and two paths that a block chooses
// by its tile's slot, so that tokens in another order have the same bits:
//   - matrix: slots of more than two tokens, 16-bit types: tensor cores. Their operands come
//     straight from memory: which 16 of the products share a step is nobody's business, as long as
//     both operands agree, and so a lane takes elements that lie side by side.
//   - vector: slots of one or two tokens, or fp32: fmaf, and every element of A and B read once.
// An element's bits depend on its token's row of x (or h), on its rows of A or B and their length,
// on the adapter's LoRA rank, and on the path; not on what else is in the tile or in the batch.

#include <algorithm>
#include <bit>
#include <type_traits>

#include "harness/device/device.h"
#include "harness/device/require.h"
#include "kernels/lora.h"

namespace tp {

namespace {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

constexpr int kMaxVectorTokens = 2;  // of a slot, and of 16-bit types
constexpr int kStep = 16;            // products that one matrix step adds up

template <typename T>
__device__ bool takes_matrix_steps(const LoraTile& tile) {
  return !std::is_same_v<T, float> && tile.of_slot > kMaxVectorTokens;
}

template <typename T>
bool has_aligned_rows(const View<T>& m) {
  return reinterpret_cast<std::uintptr_t>(m.data) % 16 == 0 && m.row_stride * sizeof(T) % 16 == 0;
}

template <typename T>
constexpr int kWide = 16 / int(sizeof(T));  // elements of the widest load

template <typename T, int N>
using Words = Vec<std::uint32_t, int{sizeof(T)} * N / 4>;

// Elements [k, k + N) of a row, zeros instead of those from `end` on, which are not read, and for
// no row; two of them in a register, or one of fp32 (nvcc takes wide loads apart otherwise). Whole:
// the row, if there is one, is aligned and has them all. Without branches between them, loads of
// several rows are on their way together.
template <bool Whole, int N, typename T>
__device__ Words<T, N> load_row(const T* row, std::int64_t k, std::int64_t end, bool aligned) {
  Words<T, N> some{};
  if (row == nullptr) return some;
  if constexpr (Whole) {
    some = std::bit_cast<Words<T, N>>(load_vector<T, N>(row + k));
  } else {
    if (aligned && k + N <= end) return std::bit_cast<Words<T, N>>(load_vector<T, N>(row + k));
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
template <typename T, int Count>
__device__ float element(const Vec<std::uint32_t, Count>& words, int e) {
  if constexpr (std::is_same_v<T, float>) {
    return std::bit_cast<float>(words[e]);
  } else {
    return to_float(T{std::uint16_t(words[e / 2] >> 16 * (e % 2))});
  }
}

// ---- Shrink.

// Columns of a row that all lanes of a warp take together: eight each, for two matrix steps.
constexpr int kChunk = 8, kWarpChunk = 4 * kChunk;
constexpr int kMaxShrinkWarps = 8;
// Loads of so many chunks are on their way at a time.
constexpr int kInFlight = 4;
// Columns of h that a block makes, where there are blocks enough; else half of them.
constexpr int kShrinkColumns = 16;
constexpr std::int64_t kEnoughBlocks = 128;

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

// What a block shrinks: the tile's tokens through rows [first, first + count) of A.
template <typename T, typename H>
struct ShrinkBlock {
  const Shrink<T, H>& s;
  const LoraTile& tile;
  std::int64_t first;
  int count;

  // nullptr: there is none.
  __device__ const T* x_row(int row) const {
    return row < tile.count ? s.x.data + s.batch.order[tile.first + row] * s.x.row_stride : nullptr;
  }
  __device__ const T* a_row(int col) const {
    return col < count ? s.a.data + (first + col) * s.a.row_stride : nullptr;
  }
};

// The warp's sums of its share of the columns, to part[16][Columns].
template <int Columns, typename T, typename H>
__device__ void shrink_by_matrix(const ShrinkBlock<T, H>& block, float* part) {
  constexpr int kTiles = Columns / 8;
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
      part[(g + e / 2 * 8) * Columns + j * 8 + t * 2 + e % 2] = sums[j].x[e];
  }
}

template <int Columns, typename T, typename H>
__device__ void shrink_by_vector(const ShrinkBlock<T, H>& block, float* part) {
  constexpr int kRows = kMaxVectorTokens, kCols = 8;  // at a time
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
          if (threadIdx.x % 32 == 0) part[(row + r) * Columns + col + c] = sum;
        }
      }
    }
  }
}

template <int Columns, typename T, typename H>
__global__ void __launch_bounds__(kMaxShrinkWarps * 32, 2) shrink_kernel(Shrink<T, H> s) {
  float* parts = dynamic_shared<float>();  // [warps][16][Columns]
  const unsigned across = unsigned(ceil_div(s.h.cols, Columns));
  const std::int64_t first = std::int64_t{blockIdx.x % across} * Columns;
  const std::int64_t matrix = blockIdx.x / across % unsigned(s.batch.parts);
  const LoraTile tile = s.batch.tiles[blockIdx.x / across / unsigned(s.batch.parts)];
  const int columns = int(min(std::int64_t{Columns}, s.h.cols - first));
  // Of them, those that the adapter has.
  int count = 0;
  const std::int64_t slot_matrix = tile.slot * std::int64_t{s.batch.parts} + matrix;
  if (tile.slot >= 0) {
    const std::int64_t left = s.batch.ranks[slot_matrix] - s.first_col - first;
    count = int(max(std::int64_t{0}, min(std::int64_t{columns}, left)));
  }
  if (count > 0) {
    const ShrinkBlock<T, H> block{s, tile, slot_matrix * s.h.cols + first, count};
    float* part = parts + threadIdx.x / 32 * (kLoraTile * Columns);
    if constexpr (!std::is_same_v<T, float>) {
      if (takes_matrix_steps<T>(tile)) {
        shrink_by_matrix<Columns>(block, part);
      } else {
        shrink_by_vector<Columns>(block, part);
      }
    } else {
      shrink_by_vector<Columns>(block, part);
    }
    __syncthreads();
  }
  for (int i = int(threadIdx.x); i < tile.count * columns; i += int(blockDim.x)) {
    const int row = i / columns, col = i % columns;
    float sum = 0.0f;
    if (col < count) {
      sum = parts[row * Columns + col];
      for (unsigned w = 1; w < blockDim.x / 32; ++w)
        sum += parts[(w * kLoraTile + unsigned(row)) * Columns + unsigned(col)];
    }
    const std::int64_t token = s.batch.order[tile.first + row];
    s.h.data[matrix * s.h.part_stride + token * s.h.token_stride + (first + col) * s.h.col_stride] =
        from_float<H>(sum);
  }
}

// ---- Expand.

// Columns of y that a warp makes, and a block.
constexpr int kWarpColumns = 32, kExpandWarps = 4, kExpandColumns = kWarpColumns * kExpandWarps;
constexpr int kRun = kWarpColumns / 4;  // of a lane, side by side

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
  bool b_aligned;
  LoraBatch batch;
  std::int64_t slot_rows;
  ColumnRun runs[2 * LoraColumns::kMaxParts + 1];
  int num_runs;
  unsigned blocks;  // of a tile
  int h_stride;     // of the tile in shared memory
  View<const Out> base;
  View<Out> y;
};

// What becomes of the sums of a block.
template <typename T, typename H, typename Out>
struct ExpandBlock {
  const Expand<T, H, Out>& e;
  const LoraTile& tile;
  std::int64_t first;  // column of y
  int columns;
  std::int64_t b_row;  // of `first`, of all slots
  const T* bias;       // of `first`; nullptr: none
  float scale;

  __device__ Out finish(Out base, int col, float sum) const {
    if (bias != nullptr) sum += to_float(bias[col]);
    return from_float<Out>(to_float(base) + scale * sum);
  }
  // Columns col .. col + kRun of a token.
  template <typename F>
  __device__ void each_of_run(int row, int col, F f) const {
    const std::int64_t token = e.batch.order[tile.first + row];
    const Out* base = e.base.data + token * e.base.row_stride + first + col;
    Out* y = e.y.data + token * e.y.row_stride + first + col;
    constexpr int kWidth = kWide<Out>;
    if (col + kRun <= columns && reinterpret_cast<std::uintptr_t>(base) % 16 == 0 &&
        reinterpret_cast<std::uintptr_t>(y) % 16 == 0) {
#pragma unroll
      for (int c = 0; c < kRun; c += kWidth) {
        Vec<Out, kWidth> values = load_vector<Out, kWidth>(base + c);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) values[i] = f(values[i], c + i);
        store_vector(y + c, values);
      }
      return;
    }
#pragma unroll
    for (int c = 0; c < kRun; ++c)
      if (col + c < columns) y[c] = f(base[c], c);
  }
};

template <typename T, typename H, typename Out>
__device__ void expand_by_matrix(const ExpandBlock<T, H, Out>& block, const T* h, int rank) {
  constexpr int kTiles = kWarpColumns / 8, kEach = kStep / 4;
  const Expand<T, H, Out>& e = block.e;
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int first = int(threadIdx.x) / 32 * kWarpColumns;
  if (first >= block.columns) return;
  // The columns of a tile are spread out, so that a lane's sums of all tiles lie side by side: of
  // column i of tile j, 8 (i / 2) + 2 j + i % 2.
  const T* b_rows[kTiles];
#pragma unroll
  for (int j = 0; j < kTiles; ++j) {
    const int col = first + g / 2 * kRun + 2 * j + g % 2;
    b_rows[j] = col < block.columns ? e.b.data + (block.b_row + col) * e.b.row_stride : nullptr;
  }
  FragmentC sums[kTiles] = {};
  const auto add_step = [&]<bool Whole>(std::bool_constant<Whole>, int k) {
    Vec<std::uint32_t, kEach / 2> words[kTiles];
#pragma unroll
    for (int j = 0; j < kTiles; ++j)
      words[j] = load_row<Whole, kEach>(b_rows[j], k + t * kEach, rank, e.b_aligned);
    const T* h_at = h + g * e.h_stride + k + t * kEach;
    const auto upper = load_row<true, kEach>(h_at, 0, kEach, true),
               lower = load_row<true, kEach>(h_at + 8 * e.h_stride, 0, kEach, true);
    const FragmentA<T> a{{upper[0], lower[0], upper[1], lower[1]}};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (first + 2 * j >= block.columns) break;
      mma(sums[j], a, FragmentB<T>{{words[j][0], words[j][1]}});
    }
  };
  for (int k = 0; k < rank; k += kStep) {
    if (e.b_aligned && k + kStep <= rank) {
      add_step(std::true_type{}, k);
    } else {
      add_step(std::false_type{}, k);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (g + half * 8 >= block.tile.count) break;
    float delta[kRun];
#pragma unroll
    for (int c = 0; c < kRun; ++c) delta[c] = sums[c / 2].x[half * 2 + c % 2];
    const int col = first + t * kRun;
    block.each_of_run(g + half * 8, col,
                      [&](Out base, int c) { return block.finish(base, col + c, delta[c]); });
  }
}

// A thread has a column.
template <typename T, typename H, typename Out>
__device__ void expand_by_vector(const ExpandBlock<T, H, Out>& block, const float* h, int rank) {
  constexpr int kRows = kMaxVectorTokens;  // at a time
  constexpr int kWidth = kWide<T>, kChains = 4;
  const Expand<T, H, Out>& e = block.e;
  const int col = int(threadIdx.x);
  if (col >= block.columns) return;
  const T* b_row = e.b.data + (block.b_row + col) * e.b.row_stride;
  for (int row = 0; row < block.tile.count; row += kRows) {
    float sums[kRows][kChains] = {};
    const int rows = block.tile.count - row;
    for (int k = 0; k < rank; k += kWidth) {
      const auto b = load_row<false, kWidth>(b_row, k, rank, e.b_aligned);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          float& sum = sums[r][i % kChains];
          sum = fmaf(h[(row + r) * e.h_stride + k + i], element<T>(b, i), sum);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      const std::int64_t token = e.batch.order[block.tile.first + row + r];
      const std::int64_t at = block.first + col;
      e.y.data[token * e.y.row_stride + at] =
          block.finish(e.base.data[token * e.base.row_stride + at], col,
                       (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]));
    }
  }
}

// The tile of h, rounded to T, as V (T, or the same in fp32): `rows` of it, zeros for those beyond
// the tile and beyond the adapter's LoRA rank, as far as a matrix step goes.
template <typename T, typename V, typename H, typename Out>
__device__ void load_h(const Expand<T, H, Out>& e, const LoraTile& tile, int part, int rows,
                       int rank, V* to) {
  const int filled = (rank + kStep - 1) / kStep * kStep;
  for (int i = int(threadIdx.x); i < rows * filled; i += int(blockDim.x)) {
    const int row = i / filled, j = i % filled;
    T value{};
    if (row < tile.count && j < rank) {
      const std::int64_t token = e.batch.order[tile.first + row];
      value = from_float<T>(to_float(
          e.h.data[part * e.h.part_stride + token * e.h.token_stride + j * e.h.col_stride]));
    }
    if constexpr (std::is_same_v<V, T>) {
      to[row * e.h_stride + j] = value;
    } else {
      to[row * e.h_stride + j] = to_float(value);
    }
  }
}

template <typename T, typename H, typename Out>
__global__ void __launch_bounds__(kExpandWarps * 32) expand_kernel(Expand<T, H, Out> e) {
  const LoraTile tile = e.batch.tiles[blockIdx.x / e.blocks];
  const unsigned number = blockIdx.x % e.blocks;
  int r = 0;
  while (r + 1 < e.num_runs && e.runs[r + 1].block <= number) ++r;
  const ColumnRun run = e.runs[r];
  const std::int64_t offset = std::int64_t{number - run.block} * kExpandColumns;
  const std::int64_t matrix = tile.slot * std::int64_t{e.batch.parts} + run.part;
  const bool is_changed = tile.slot >= 0 && run.part >= 0;
  const int rank = is_changed ? e.batch.ranks[matrix] : 0;
  const std::int64_t slot = is_changed ? tile.slot : 0;
  const ExpandBlock<T, H, Out> block{
      .e = e,
      .tile = tile,
      .first = run.first + offset,
      .columns = int(min(std::int64_t{kExpandColumns}, run.count - offset)),
      .b_row = slot * e.slot_rows + run.b_row + offset,
      .bias =
          e.bias.rows == 0 ? nullptr : e.bias.data + slot * e.bias.row_stride + run.b_row + offset,
      .scale = rank > 0 ? e.batch.scales[matrix] : 0.0f};
  if (rank == 0) {
    if (e.y.data == e.base.data) return;
    const int runs = (block.columns + kRun - 1) / kRun;
    for (int i = int(threadIdx.x); i < tile.count * runs; i += int(blockDim.x))
      block.each_of_run(i / runs, i % runs * kRun, [](Out base, int) { return base; });
    return;
  }
  if constexpr (!std::is_same_v<T, float>) {
    if (takes_matrix_steps<T>(tile)) {
      T* h = dynamic_shared<T>();
      load_h<T>(e, tile, run.part, kLoraTile, rank, h);
      __syncthreads();
      expand_by_matrix(block, h, rank);
      return;
    }
  }
  float* h = dynamic_shared<float>();
  load_h<T>(e, tile, run.part, tile.count, rank, h);
  __syncthreads();
  expand_by_vector(block, h, rank);
}

// The columns of y in ascending order, with those between them if there is something to copy.
// Throws Fault(BadLaunch) where they overlap or leave y.
template <typename T, typename H, typename Out>
void find_runs(const LoraColumns& columns, Expand<T, H, Out>& e) {
  const auto add = [&e](std::int32_t part, std::int64_t first, std::int64_t count,
                        std::int64_t b_row) {
    if (count == 0) return;
    e.runs[e.num_runs++] = {part, first, count, b_row, e.blocks};
    e.blocks += unsigned(ceil_div(count, kExpandColumns));
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
      plan.tiles.push_back({i == slots ? -1 : i, std::int32_t(plan.order.size()) + at,
                            std::min(kLoraTile, std::int32_t(own.size()) - at),
                            std::int32_t(own.size())});
    }
    plan.order.insert(plan.order.end(), own.begin(), own.end());
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
  const auto launch_as = [&]<int Columns>(std::integral_constant<int, Columns>) {
    launch("lora_shrink", shrink_kernel<Columns, T, H>,
           dim3(unsigned(batch.num_tiles * batch.parts * ceil_div(h.cols, Columns))),
           dim3(unsigned(warps) * 32), std::size_t(warps) * kLoraTile * Columns * sizeof(float),
           stream, s);
  };
  if (batch.num_tiles * batch.parts * ceil_div(h.cols, kShrinkColumns) >= kEnoughBlocks) {
    launch_as(std::integral_constant<int, kShrinkColumns>{});
  } else {
    launch_as(std::integral_constant<int, kShrinkColumns / 2>{});
  }
}

template <typename T, typename H, typename Out>
void lora_expand(LoraIntermediate<const H> h, View<const T> b, View<const T> bias,
                 const LoraBatch& batch, const LoraColumns& columns, View<const Out> base,
                 View<Out> y, Stream& stream) {
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
  Expand<T, H, Out> e{.h = h,
                      .b = b,
                      .bias = bias,
                      .b_aligned = has_aligned_rows(b),
                      .batch = batch,
                      .slot_rows = slot_rows,
                      .runs = {},
                      .num_runs = 0,
                      .blocks = 0,
                      .h_stride = int(ceil_div(h.cols, kStep)) * kStep + kChunk,
                      .base = base,
                      .y = y};
  find_runs(columns, e);
  if (e.blocks == 0) return;  // none of the matrices' rows are here
  constexpr bool kIsFloat = std::is_same_v<T, float>;
  const int tile_bytes = kLoraTile * int(sizeof(T)),
            row_bytes = (kIsFloat ? kLoraTile : kMaxVectorTokens) * int(sizeof(float));
  launch("lora_expand", expand_kernel<T, H, Out>, dim3(unsigned(batch.num_tiles) * e.blocks),
         dim3(kExpandWarps * 32), std::size_t(e.h_stride) * std::max(tile_bytes, row_bytes), stream,
         e);
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
                          Stream&);
template void lora_expand(LoraIntermediate<const f16>, View<const f16>, View<const f16>,
                          const LoraBatch&, const LoraColumns&, View<const f16>, View<f16>,
                          Stream&);
template void lora_expand(LoraIntermediate<const f16>, View<const f16>, View<const f16>,
                          const LoraBatch&, const LoraColumns&, View<const float>, View<float>,
                          Stream&);
template void lora_expand(LoraIntermediate<const float>, View<const f16>, View<const f16>,
                          const LoraBatch&, const LoraColumns&, View<const f16>, View<f16>,
                          Stream&);
template void lora_expand(LoraIntermediate<const float>, View<const f16>, View<const f16>,
                          const LoraBatch&, const LoraColumns&, View<const float>, View<float>,
                          Stream&);
template void lora_expand(LoraIntermediate<const bf16>, View<const bf16>, View<const bf16>,
                          const LoraBatch&, const LoraColumns&, View<const bf16>, View<bf16>,
                          Stream&);
template void lora_expand(LoraIntermediate<const bf16>, View<const bf16>, View<const bf16>,
                          const LoraBatch&, const LoraColumns&, View<const float>, View<float>,
                          Stream&);
template void lora_expand(LoraIntermediate<const float>, View<const bf16>, View<const bf16>,
                          const LoraBatch&, const LoraColumns&, View<const bf16>, View<bf16>,
                          Stream&);
template void lora_expand(LoraIntermediate<const float>, View<const bf16>, View<const bf16>,
                          const LoraBatch&, const LoraColumns&, View<const float>, View<float>,
                          Stream&);

template void lora_join(const float*, int, std::int64_t, LoraIntermediate<float>, Stream&);
template void lora_join(const f16*, int, std::int64_t, LoraIntermediate<f16>, Stream&);
template void lora_join(const bf16*, int, std::int64_t, LoraIntermediate<bf16>, Stream&);

}  // namespace tp
