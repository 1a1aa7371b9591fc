#pragma once
// What all attention kernels share: their arguments, which keys a query sees, where a key lies,
// what becomes of a logit, and how a row is finished.

#include <cstdint>

#include "harness/device/device.h"
#include "kernels/attention.h"
#include "kernels/divisor.h"

namespace tp {

// One launch as the kernels see it. A KV head's queries are packed: row r of the pack is query
// r / group of the sequence and head r % group of the KV head's, so that a key is loaded once for
// all of them, in prefill and in decode.
template <typename T>
struct AttentionLaunch {
  View<const T> q, k, v;
  const float* sinks;
  const float* slopes;
  View<T> out;
  View<float> lse;
  float* parts;  // of all splits: out [split][token][head][v_dim], then lse [split][token][head]

  const std::int32_t* query_start;
  const std::int32_t* kv_len;
  const std::int32_t* table;
  std::int64_t table_stride;
  std::int32_t page_size;  // 0: consecutive rows
  Divisor page_divisor;
  int offset_bits, stale_pages;

  int dim, v_dim, v_head_stride;
  int heads, group, first_kv_head;
  Divisor group_divisor;
  int tile;           // keys
  int rows_of_block;  // of the pack
  int splits, tiles_of_split;
  bool causal;
  bool vectors;  // rows of q, k and v are whole 16-byte vectors
  bool pairs;    // two neighbours of the output, or of a part, can be stored as one
  int causal_ahead, behind_context, length_unit;
  std::int32_t window_left, window_right;  // keys in front of and behind the own; -1: no window

  float scale, softcap, hidden_logit, empty_maximum, lse_unit;
};

constexpr float kLog2E = 1.4426950408889634f;

// The part of one sequence that a block works on.
template <typename T>
struct AttentionBlock {
  const AttentionLaunch<T>& a;
  int sequence, kv_head, split;
  int first_row;             // of the pack
  int first_query, queries;  // of the sequence: row of q, and how many
  int keys;

  int first_entry;  // of the sequence's row in the page table

  __device__ AttentionBlock(const AttentionLaunch<T>& launch, int sequence, int kv_head, int split,
                            int first_row)
      : a(launch), sequence(sequence), kv_head(kv_head), split(split), first_row(first_row) {
    first_query = a.query_start[sequence];
    queries = a.query_start[sequence + 1] - first_query;
    keys = a.kv_len[sequence];
    first_entry = a.table[sequence * a.table_stride];
  }
  // By a grid of (blocks of rows * KV heads * splits, sequences). The last rows see the most keys:
  // the blocks that have them begin first, those of all heads.
  static __device__ AttentionBlock of_grid(const AttentionLaunch<T>& a) {
    const unsigned columns = unsigned(a.heads / a.group * a.splits),
                   row_block = gridDim.x / columns - 1 - blockIdx.x / columns;
    const int column = int(blockIdx.x % columns);
    return {a, int(blockIdx.y), column / a.splits, column % a.splits,
            int(row_block) * a.rows_of_block};
  }
  __device__ int rows() const { return queries * a.group; }
  __device__ bool has_row(int row) const { return row < rows(); }
  __device__ int query_of(int row) const { return a.group_divisor.quotient(row); }
  __device__ int head_of(int row) const {
    return kv_head * a.group + row - query_of(row) * a.group;
  }
  __device__ std::int64_t token_of(int row) const { return first_query + query_of(row); }
  __device__ int position_of(int row) const {
    return (keys - queries) * a.behind_context + query_of(row);
  }

  // Positions [first, end) of the keys that a row sees.
  __device__ int first_key(int row) const {
    const int first = a.window_left < 0 ? 0 : position_of(row) - a.window_left;
    return first > 0 ? first : 0;
  }
  __device__ int end_key(int row) const {
    int end = keys;
    if (a.length_unit > 1) end = (keys + a.length_unit - 1) / a.length_unit * a.length_unit;
    const int position = position_of(row);
    if (a.window_right >= 0) end = min(end, position + a.window_right + 1);
    if (a.causal) end = min(end, position + 1 + a.causal_ahead);
    return end;
  }

  // What its rows see together; and tiles [first, end) that this block's split has of that.
  __device__ int first_key() const { return first_key(first_row); }
  __device__ int end_key() const {
    const int end = end_key(min(first_row + a.rows_of_block, rows()) - 1);
    return end > 0 ? end : 0;
  }
  __device__ int first_tile() const { return first_key() / a.tile + split * a.tiles_of_split; }
  __device__ int end_tile() const {
    return min((end_key() + a.tile - 1) / a.tile, first_tile() + a.tiles_of_split);
  }
  // Whether some row sees the key. The others of a tile may hold anything, infinities and NaN too
  // (a page of them may have been given away): they must not be multiplied, not even with 0.
  __device__ bool is_seen(int position) const {
    return first_key() <= position && position < end_key();
  }

  // Which row of k and v holds the key at a position, and where rows begin. In 64 bits: pages times
  // their stride are more than 2^31 in a pool of ordinary size (vllm#47671).
  __device__ const T* key(int position) const {
    return a.k.data + offset_of(position, a.k.row_stride) +
           (a.first_kv_head + kv_head) * std::int64_t(a.dim);
  }
  __device__ const T* value(int position) const {
    return a.v.data + offset_of(position, a.v.row_stride) +
           (a.first_kv_head + kv_head) * std::int64_t(a.v_head_stride);
  }
  __device__ std::int64_t offset_of(int position, std::int64_t row_stride) const {
    return offset_in(page(position), position, row_stride);
  }
  // The same in two steps: the entry of the page table (or the first key's row), and the rest.
  __device__ std::int32_t page(int position) const {
    if (a.page_size == 0) return first_entry;
    const int last = page_index(keys - 1) - a.stale_pages;
    return a.table[sequence * a.table_stride + min(page_index(position), last < 0 ? 0 : last)];
  }
  __device__ std::int64_t offset_in(std::int32_t page, int position,
                                    std::int64_t row_stride) const {
    if (a.page_size == 0) return (page + std::int64_t(position)) * row_stride;
    const int unused = 64 - a.offset_bits;
    const std::uint64_t begin = std::uint64_t(page * (a.page_size * row_stride));
    return std::int64_t(begin << unused >> unused) +
           (position - page_index(position) * a.page_size) * row_stride;
  }
  __device__ int page_index(int position) const { return a.page_divisor.quotient(position); }
};

// What a row's logits depend on; of a row that is not there, nothing is visible.
struct AttentionRow {
  int position = 0, first = 0, end = 0;
  float slope = 0.0f;

  AttentionRow() = default;
  template <typename T>
  __device__ AttentionRow(const AttentionBlock<T>& block, int row) {
    if (!block.has_row(row)) return;
    position = block.position_of(row);
    first = block.first_key(row);
    end = block.end_key(row);
    if (block.a.slopes != nullptr) slope = block.a.slopes[block.head_of(row)];
  }

  __device__ bool sees_all(int first_key, int keys) const {
    return first <= first_key && first_key + keys <= end;
  }
  __device__ bool sees(int key) const { return first <= key && key < end; }
  __device__ float bias(int key) const { return slope * float(abs(position - key)); }
};

__device__ inline float capped(float s, float softcap) { return softcap * tanhf(s / softcap); }

// What exponents are taken relative to: the maximum, unless there is no logit yet.
__device__ inline float exponent_base(float maximum, float empty_maximum) {
  return maximum == -INFINITY ? empty_maximum : maximum;
}
// Exactly 1 at x = base, and 0 at -infinity.
__device__ inline float weight(float x, float base) { return exp2f((x - base) * kLog2E); }

// The softmax state of a row: the largest logit, and the sum of all weights relative to it. fmaxf
// drops a NaN, but its weight is one, and so is the sum.
struct SoftmaxState {
  float maximum;
  float sum;
};

template <typename T>
__device__ std::int64_t part_of(const AttentionLaunch<T>& a, int split, std::int64_t token,
                                int head) {
  return (split * a.q.rows + token) * a.heads + head;
}
template <typename T>
__device__ float* part_lse(const AttentionLaunch<T>& a) {
  return a.parts + std::int64_t(a.splits) * a.q.rows * a.heads * a.v_dim;
}

// What comes of a row whose keys have all been seen, and where it goes: to the outputs, with the
// sink's weight if there is one, or to its split's part, which is normalised by itself.
template <typename T>
struct RowResult {
  T* out = nullptr;
  float* part = nullptr;
  float* lse_at = nullptr;
  float lse, scale;  // `scale`: of what was accumulated
  bool pairs;

  __device__ RowResult(const AttentionBlock<T>& block, int row, SoftmaxState s) {
    const AttentionLaunch<T>& a = block.a;
    const std::int64_t token = block.token_of(row);
    const int head = block.head_of(row);
    pairs = a.pairs;
    scale = 1.0f;
    if (a.splits > 1) {
      const std::int64_t at = part_of(a, block.split, token, head);
      part = a.parts + at * a.v_dim;
      lse_at = part_lse(a) + at;
    } else {
      out = a.out.data + token * a.out.row_stride + head * std::int64_t(a.v_dim);
      lse_at = a.lse.data + token * a.lse.row_stride + head;
      if (a.sinks != nullptr) {
        const float sink = a.sinks[head], m = larger(s.maximum, sink);
        scale = weight(s.maximum, m);
        s = {m, s.sum * scale + weight(sink, m)};
      }
    }
    // A row that saw no key is nothing, and weighs nothing: 0 and -infinity (vllm#28181).
    lse = s.sum == 0.0f ? -INFINITY : (s.maximum + logf(s.sum)) * a.lse_unit;
    scale = s.sum == 0.0f ? 0.0f : scale / s.sum;
  }
  __device__ void store(int d, float value) const {
    if (part != nullptr) {
      part[d] = value * scale;
    } else {
      out[d] = from_float<T>(value * scale);
    }
  }
  // Of columns d, which is even, and d + 1.
  __device__ void store_pair(int d, float left, float right) const {
    if (!pairs) {
      store(d, left);
      store(d + 1, right);
      return;
    }
    left *= scale, right *= scale;
    if (part != nullptr) {
      store_vector<float, 2>(part + d, {left, right});
    } else {
      store_vector<T, 2>(out + d, {from_float<T>(left), from_float<T>(right)});
    }
  }
  __device__ void store_lse() const { *lse_at = lse; }
};

// Splits that one warp merges at most, and how many rows a block takes of which a warp is enough.
inline constexpr int kMergedByWarp = 8, kMergedRows = 4;

// Merges the states of the splits, and the sink, of each token and head. kFew: a warp for each, and
// each lane weighs all splits; else a block of as many warps as the splits need, grid (tokens,
// heads). kWidth columns at a time.
template <typename T, int kWidth, bool kFew>
__global__ void merge_kernel(AttentionLaunch<T> a) {
  const int lane = int(threadIdx.x % 32), warps = kFew ? 1 : int(blockDim.x / 32),
            warp = kFew ? 0 : int(threadIdx.x / 32);
  std::int64_t token = blockIdx.x;
  int head = int(blockIdx.y);
  if (kFew) {
    const std::int64_t row = std::int64_t(blockIdx.x) * kMergedRows + threadIdx.x / 32;
    if (row >= a.q.rows * a.heads) return;
    token = row / a.heads;
    head = int(row - token * a.heads);
  }
  const std::int64_t stride = a.q.rows * a.heads, at = part_of(a, 0, token, head);
  const float* const lse = part_lse(a) + at;  // of split s at s * stride
  const float sink = a.sinks == nullptr ? -INFINITY : a.sinks[head];
  T* const out = a.out.data + token * a.out.row_stride + head * std::int64_t(a.v_dim);
  float* const sums = dynamic_shared<float>();  // [warps][v_dim], where there are several
  using Columns = Vec<float, kWidth>;
  Columns x[kMergedByWarp];
  const auto load = [&](int d) {
#pragma unroll
    for (int i = 0; i < kMergedByWarp; ++i) {
      const std::int64_t s = warp + i * warps;
      x[i] = Columns{};
      if (s < a.splits && d < a.v_dim)
        x[i] = load_vector<float, kWidth>(a.parts + (at + s * stride) * a.v_dim + d);
    }
  };
  wait_for_previous_kernel();
  load(kWidth * lane);
  // Weights of this warp's splits; all loads before the first meeting. All parts may be empty:
  // exp(-infinity - -infinity) would be NaN (vllm#28181).
  float own[kMergedByWarp], base, sum = 0.0f;
  if constexpr (kFew) {
#pragma unroll
    for (int s = 0; s < kMergedByWarp; ++s) own[s] = s < a.splits ? lse[s * stride] : -INFINITY;
    float m = sink;
#pragma unroll
    for (int s = 0; s < kMergedByWarp; ++s) {
      if (s < a.splits) m = larger(m, own[s]);
    }
    base = exponent_base(m, a.empty_maximum);
    if (a.sinks != nullptr) sum = weight(sink, base);
#pragma unroll
    for (int s = 0; s < kMergedByWarp; ++s) {
      if (s < a.splits) sum += own[s] = weight(own[s], base);
    }
  } else {
    // A lane has the states of splits `lane` and `lane + 32`.
    static_assert(kMaxAttentionSplits <= 64);
    float w[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      w[i] = lane + 32 * i < a.splits ? lse[(lane + 32 * i) * stride] : -INFINITY;
    base = exponent_base(larger(sink, warp_max(larger(w[0], w[1]))), a.empty_maximum);
#pragma unroll
    for (int i = 0; i < 2; ++i) w[i] = lane + 32 * i < a.splits ? weight(w[i], base) : 0.0f;
    sum = warp_sum(w[0] + w[1]);
    if (a.sinks != nullptr) sum += weight(sink, base);
#pragma unroll
    for (int i = 0; i < kMergedByWarp; ++i) {
      const int s = warp + i * warps;
      own[i] = s < a.splits ? __shfl_sync(0xFFFFFFFFu, s < 32 ? w[0] : w[1], s % 32) : 0.0f;
    }
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (int d = kWidth * lane; d < a.v_dim; d += kWidth * 32) {
    if (d >= kWidth * 32) load(d);
    Columns total = {};
#pragma unroll
    for (int i = 0; i < kMergedByWarp; ++i) {
      if (warp + i * warps >= a.splits) break;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) total[j] = fmaf(own[i], x[i][j], total[j]);
    }
    if (!kFew) {
      store_vector<float, kWidth>(sums + warp * a.v_dim + d, total);
    } else {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) out[d + j] = from_float<T>(total[j] * inverse);
    }
  }
  if (!kFew) __syncthreads();
  if (kFew ? lane == 0 : threadIdx.x == blockDim.x - 1)  // who has least to do below
    a.lse.data[token * a.lse.row_stride + head] = sum == 0.0f ? -INFINITY : base + logf(sum);
  if (kFew) return;
  for (int d = int(threadIdx.x); d < a.v_dim; d += int(blockDim.x)) {
    float total = 0.0f;
#pragma unroll 4
    for (int i = 0; i < warps; ++i) total += sums[i * a.v_dim + d];
    out[d] = from_float<T>(total * inverse);
  }
}

// Queues it. `aligned`: parts begin at a multiple of 16 bytes. Many splits are those of few rows,
// for which it pays to overlap.
template <typename T>
void launch_merge(const AttentionLaunch<T>& a, bool aligned, Stream& stream) {
  const bool wide = aligned && a.v_dim % 4 == 0;
  if (a.splits <= kMergedByWarp) {
    const std::int64_t rows = a.q.rows * a.heads;
    launch("attention.merge", wide ? merge_kernel<T, 4, true> : merge_kernel<T, 1, true>,
           dim3(unsigned((rows + kMergedRows - 1) / kMergedRows)), dim3(32 * kMergedRows), 0,
           stream, a);
    return;
  }
  const unsigned warps = unsigned(a.splits + kMergedByWarp / 2 - 1) / (kMergedByWarp / 2);
  launch_overlapping("attention.merge",
                     wide ? merge_kernel<T, 4, false> : merge_kernel<T, 1, false>,
                     dim3(unsigned(a.q.rows), unsigned(a.heads)), dim3(32 * warps),
                     std::size_t(warps) * std::size_t(a.v_dim) * sizeof(float), stream, a);
}

}  // namespace tp
