// lora_expand: see lora_parts.cuh.

#include <algorithm>
#include <vector>

#include "harness/device/require.h"
#include "kernels/lora_parts.cuh"

namespace tp {

using namespace lora;

namespace {

// Columns of y that a lane makes side by side, and a warp, and a block.
constexpr int kRun = 8, kWarpColumns = 4 * kRun;
constexpr int kExpandWarps = 4, kExpandColumns = kWarpColumns * kExpandWarps;

// Columns [first, first + count) of y: of a matrix of the layer, or (-1) of none.
struct ColumnRun {
  std::int32_t part, first, count;
  std::int32_t b_row;  // of its first column, in a slot
  unsigned block;      // the first of those of a tile that make it
};
constexpr int kMaxRuns = 2 * LoraColumns::kMaxParts + 1;

template <typename T, typename H, typename Out>
struct Expand {
  LoraIntermediate<const H> h;
  View<const T> b, bias;
  bool b_aligned;
  LoraBatch batch;
  std::int64_t slot_rows;
  ColumnRun runs[kMaxRuns];
  int num_runs;
  unsigned blocks;  // of a tile
  int h_stride;     // of the tile in shared memory
  View<const Out> base;
  View<Out> y;

  // What block `number` of a tile makes a part of.
  __device__ const ColumnRun& run_of(unsigned number) const {
    int r = 0;
#pragma unroll
    for (int i = 1; i < kMaxRuns; ++i)
      if (i < num_runs && runs[i].block <= number) r = i;
    return runs[r];
  }
};

// ---- Whole runs of columns, 16-bit operands, no bias.

// Elements [k, k + 4) of a row, the row being aligned. Cut: zeros from `rank` on, which are not
// read; else there are none of these.
template <bool Cut, typename T>
__device__ Words<T, 4> load_four(const T* row, int k, int rank) {
  if (!Cut || k + 4 <= rank) return load_words<T, 4>(row + k);
  Words<T, 4> some{};
#pragma unroll
  for (int e = 0; e < 3; ++e) {
    if (k + e >= rank) break;
    if constexpr (std::is_same_v<T, float>) {
      some[e] = std::bit_cast<std::uint32_t>(row[k + e]);
    } else {
      some[e / 2] |= std::uint32_t{row[k + e].bits} << 16 * (e % 2);
    }
  }
  return some;
}
// The same of h, rounded to T.
template <bool Cut, typename T, typename H>
__device__ Words<T, 4> load_shrunk(const H* row, int k, int rank) {
  const auto four = load_four<Cut>(row, k, rank);
  if constexpr (std::is_same_v<H, T>) {
    return four;
  } else {
    return words_of<T, 4>([&](int e) { return element<H>(four, e); });
  }
}

// Once the kernel before this one has ended.
__device__ inline void h_can_be_read() {
  wait_for_previous_kernel();
  let_next_kernel_start();
}

// A run of columns of the base, and of y.
template <typename Out>
struct Run {
  static constexpr int kWidth = kWide<Out>;
  Words<Out> words[kRun / kWidth] = {};

  __device__ void load(const Out* base) {
#pragma unroll
    for (int i = 0; i < kRun / kWidth; ++i) words[i] = load_words(base + i * kWidth);
  }
  __device__ float at(int c) const { return element<Out>(words[c / kWidth], c % kWidth); }
  // value(c) to column c.
  template <typename F>
  __device__ static void store(Out* y, F value) {
#pragma unroll
    for (int i = 0; i < kRun / kWidth; ++i)
      store_words(y + i * kWidth, words_of<Out>([&](int c) { return value(i * kWidth + c); }));
  }
};

// What a block makes: `columns` columns of base and y from their pointers on, with the rows of B
// from b on, and part's h.
template <typename T, typename H, typename Out>
struct WholeBlock {
  const T* b;
  const H* h;
  const Out* base;
  Out* y;
  int columns;
  int rank;
  float scale;
};

// tokens: of rows g and g + 8 of the tile, -1: none. Cut: fours of the LoRA rank are.
template <bool Cut, typename T, typename H, typename Out>
__device__ void whole_by_matrix(const Expand<T, H, Out>& e, const WholeBlock<T, H, Out>& block,
                                const std::int32_t (&tokens)[2]) {
  constexpr int kTiles = kWarpColumns / 8, kEach = kStep / 4;
  const int lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int first = int(threadIdx.x) / 32 * kWarpColumns;
  if (first >= block.columns) return;
  // The columns of the tiles are spread out, so that a lane's sums of all tiles lie side by side:
  // of column i of tile j, 8 (i / 2) + 2 j + i % 2.
  const int run = first + t * kRun, b_col = first + g / 2 * kRun + g % 2;
  Run<Out> base[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (tokens[i] >= 0 && run < block.columns)
      base[i].load(block.base + tokens[i] * e.base.row_stride + run);
  }
  FragmentC sums[kTiles] = {};
  for (int step = 0; step < block.rank; step += kStep) {
    const int k = step + t * kEach;
    Words<T, kEach> b[kTiles] = {}, h[2] = {};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) {
      if (k < block.rank && b_col < block.columns)
        b[j] = load_four<Cut>(block.b + (b_col + 2 * j) * e.b.row_stride, k, block.rank);
    }
    if (step == 0) h_can_be_read();
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (k < block.rank && tokens[i] >= 0)
        h[i] = load_shrunk<Cut, T>(block.h + tokens[i] * e.h.token_stride, k, block.rank);
    }
    const FragmentA<T> a{{h[0][0], h[1][0], h[0][1], h[1][1]}};
#pragma unroll
    for (int j = 0; j < kTiles; ++j) mma(sums[j], a, FragmentB<T>{{b[j][0], b[j][1]}});
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (tokens[i] < 0 || run >= block.columns) continue;
    Run<Out>::store(block.y + tokens[i] * e.y.row_stride + run, [&](int c) {
      return base[i].at(c) + block.scale * sums[c / 2].x[i * 2 + c % 2];
    });
  }
}

template <typename T, typename H, typename Out>
__global__ void __launch_bounds__(kExpandWarps * 32) expand_whole_kernel(Expand<T, H, Out> e) {
  const int lane = int(threadIdx.x) % 32;
  const std::int32_t* order = e.batch.order + blockIdx.y * std::size_t{kLoraTile};
  const std::int32_t tokens[2] = {order[lane / 4], order[lane / 4 + 8]};
  const LoraTile tile = e.batch.tiles[blockIdx.y];
  const ColumnRun run = e.run_of(blockIdx.x);
  const int offset = int(blockIdx.x - run.block) * kExpandColumns;
  const int rank = run.part < 0 ? 0 : rank_of(e.batch, tile, run.part);
  WholeBlock<T, H, Out> block{.b = nullptr,
                              .h = nullptr,
                              .base = e.base.data + run.first + offset,
                              .y = e.y.data + run.first + offset,
                              .columns = min(kExpandColumns, run.count - offset),
                              .rank = rank,
                              .scale = 0.0f};
  if (rank > 0) {
    block.b = e.b.data + (tile.slot * e.slot_rows + run.b_row + offset) * e.b.row_stride;
    block.h = e.h.data + run.part * e.h.part_stride;
    block.scale = e.batch.scales[tile.slot * e.batch.parts + run.part];
    rank % 4 == 0 ? whole_by_matrix<false>(e, block, tokens)
                  : whole_by_matrix<true>(e, block, tokens);
    return;
  }
  h_can_be_read();  // nor may y be written before
  if (e.y.data == e.base.data) return;
  const int runs = block.columns / kRun;
  for (int i = int(threadIdx.x); i < tile.count * runs; i += int(blockDim.x)) {
    const std::int64_t token = order[i / runs];
    const int col = i % runs * kRun;
    Run<Out> base;
    base.load(block.base + token * e.base.row_stride + col);
    Run<Out>::store(block.y + token * e.y.row_stride + col, [&](int c) { return base.at(c); });
  }
}

// ---- Any rows.

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

  __device__ Out finish(Out base, int col, float sum) const {
    if (bias != nullptr) sum += to_float(bias[col]);
    return from_float<Out>(to_float(base) + scale * sum);
  }
  // Columns col .. col + kRun of a token.
  template <typename F>
  __device__ void each_of_run(int row, int col, F f) const {
    const std::int64_t token = tokens[row];
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
__device__ void any_by_matrix(const ExpandBlock<T, H, Out>& block, const T* h, int rank) {
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
__device__ void any_by_vector(const ExpandBlock<T, H, Out>& block, const float* h, int rank) {
  constexpr int kRows = 2;  // at a time
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
      const std::int64_t token = block.tokens[row + r];
      const std::int64_t at = block.first + col;
      e.y.data[token * e.y.row_stride + at] =
          block.finish(e.base.data[token * e.base.row_stride + at], col,
                       (sums[r][0] + sums[r][1]) + (sums[r][2] + sums[r][3]));
    }
  }
}

// The tile of h, rounded to T: `rows` of it, zeros for those beyond the tile and beyond the
// adapter's LoRA rank, as far as a matrix step goes.
template <typename T, typename H, typename Out>
__device__ void load_h(const Expand<T, H, Out>& e, const LoraTile& tile, const std::int32_t* tokens,
                       int part, int rows, int rank, T* to) {
  const int filled = (rank + kStep - 1) / kStep * kStep;
  for (int i = int(threadIdx.x); i < rows * filled; i += int(blockDim.x)) {
    const int row = i / filled, j = i % filled;
    T value{};
    if (row < tile.count && j < rank) {
      const std::int64_t token = tokens[row];
      value = from_float<T>(to_float(
          e.h.data[part * e.h.part_stride + token * e.h.token_stride + j * e.h.col_stride]));
    }
    to[row * e.h_stride + j] = value;
  }
}

template <typename T, typename H, typename Out>
__global__ void __launch_bounds__(kExpandWarps * 32) expand_any_kernel(Expand<T, H, Out> e) {
  const LoraTile tile = e.batch.tiles[blockIdx.x / e.blocks];
  const std::int32_t* tokens = e.batch.order + std::int64_t{blockIdx.x / e.blocks} * kLoraTile;
  const unsigned number = blockIdx.x % e.blocks;
  const ColumnRun run = e.run_of(number);
  const std::int64_t offset = std::int64_t{number - run.block} * kExpandColumns;
  const std::int64_t matrix = tile.slot * std::int64_t{e.batch.parts} + run.part;
  const bool is_changed = tile.slot >= 0 && run.part >= 0;
  const int rank = is_changed ? e.batch.ranks[matrix] : 0;
  const std::int64_t slot = is_changed ? tile.slot : 0;
  const ExpandBlock<T, H, Out> block{
      .e = e,
      .tile = tile,
      .tokens = tokens,
      .first = run.first + offset,
      .columns = int(min(std::int64_t{kExpandColumns}, std::int64_t{run.count} - offset)),
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
  T* h = dynamic_shared<T>();
  if constexpr (std::is_same_v<T, float>) {
    load_h(e, tile, tokens, run.part, tile.count, rank, h);
    __syncthreads();
    any_by_vector(block, h, rank);
  } else {
    load_h(e, tile, tokens, run.part, kLoraTile, rank, h);
    __syncthreads();
    any_by_matrix(block, h, rank);
  }
}

// The columns of y in ascending order, with those between them if there is something to copy.
// Throws Fault(BadLaunch) where they overlap or leave y.
template <typename T, typename H, typename Out>
void find_runs(const LoraColumns& columns, Expand<T, H, Out>& e) {
  const auto add = [&e](std::int32_t part, std::int64_t first, std::int64_t count,
                        std::int64_t b_row) {
    if (count == 0) return;
    e.runs[e.num_runs++] = {part, std::int32_t(first), std::int32_t(count), std::int32_t(b_row),
                            e.blocks};
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

}  // namespace

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
  const bool h_aligned = h.col_stride == 1 &&
                         reinterpret_cast<std::uintptr_t>(h.data) % h_vector == 0 &&
                         h.part_stride % 4 == 0 && h.token_stride % 4 == 0;
  const bool y_aligned = has_aligned_rows(base) && has_aligned_rows(y);
  Expand<T, H, Out> e{.h = h,
                      .b = b,
                      .bias = bias,
                      .b_aligned = has_aligned_rows(b),
                      .batch = batch,
                      .slot_rows = slot_rows,
                      .runs = {},
                      .num_runs = 0,
                      .blocks = 0,
                      .h_stride = int(ceil_div(h.cols, kStep)) * kStep + 8,
                      .base = base,
                      .y = y};
  find_runs(columns, e);
  if (e.blocks == 0) return;  // none of the matrices' rows are here
  if constexpr (!std::is_same_v<T, float>) {
    if (lora_expand_kernel(dtype_of<T>::value, columns, y.cols,
                           e.b_aligned && h_aligned && y_aligned, bias.rows != 0,
                           batch.num_tiles) != LoraKernel::any) {
      const dim3 grid(e.blocks, unsigned(batch.num_tiles)), threads(kExpandWarps * 32);
      if (before == LoraBefore::rest) {
        launch_overlapping("lora_expand", expand_whole_kernel<T, H, Out>, grid, threads, 0, stream,
                           e);
      } else {
        launch("lora_expand", expand_whole_kernel<T, H, Out>, grid, threads, 0, stream, e);
      }
      return;
    }
  }
  launch("lora_expand", expand_any_kernel<T, H, Out>, dim3(unsigned(batch.num_tiles) * e.blocks),
         dim3(kExpandWarps * 32), std::size_t(e.h_stride) * kLoraTile * sizeof(T), stream, e);
}

LoraKernel lora_expand_kernel(DType t, const LoraColumns& columns, std::int64_t y_cols,
                              bool aligned, bool has_bias, std::int64_t tiles) {
  bool has_whole_runs = y_cols % kRun == 0;
  for (int p = 0; p < columns.parts; ++p)
    has_whole_runs &= columns.rows[p] % kRun == 0 && columns.at[p] % kRun == 0;
  return t != DType::f32 && aligned && !has_bias && has_whole_runs && tiles <= kMaxGridTiles
             ? LoraKernel::whole
             : LoraKernel::any;
}

// Matrix steps of 16 each; or, of fp32, four chains, and two roundings where they meet.
Accumulation lora_expand_accumulation(DType t, std::int64_t rank) {
  if (t == DType::f32) return {.depth = ceil_div(rank, 4) + 2};
  return {.depth = ceil_div(rank, kStep),
          .matrix_steps = true,
          .least_normal = t == DType::f16 ? 0x1p-14 : 0x1p-126};
}

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

}  // namespace tp
