#pragma once
// Attention of few queries that see many keys, with heads of a known width in f16 and bf16, for the
// chip's limit, which is how fast k and v can be read (FlashDecoding): all rows of a pack are one
// matrix step, the warps of a block take different keys, and each has tiles of them on their way.
// Logits as in attention_prefill.cuh.

#include "kernels/attention_prefill.cuh"

namespace tp {

inline constexpr int kDecodeRows = 16;

// kWarps warps, whose tiles of kTile keys lie side by side; of each warp's, kStages are in shared
// memory.
template <int kWarps_, int kTile_, int kStages_, int kBlocks_>
struct DecodeShape {
  static constexpr int kWarps = kWarps_, kTile = kTile_, kStages = kStages_, kBlocks = kBlocks_,
                       kThreads = 32 * kWarps, kKeys = kWarps * kTile;
};

// What a warp has made of its keys: rows of the output, not normalised, and their states.
template <int kDim>
struct DecodePart {
  float o[kDecodeRows][kDim + 8];  // 8 more, so that rows begin in different banks
  SoftmaxState state[kDecodeRows];
};

template <typename T, int kDim, typename Shape>
constexpr std::size_t decode_shared_bytes() {
  constexpr std::size_t kStages = sizeof(T) * padded(kDim) * 2 * Shape::kTile * Shape::kStages;
  static_assert(sizeof(DecodePart<kDim>) <= kStages);
  return sizeof(T) * padded(kDim) * kDecodeRows +
         Shape::kWarps * (kStages + 2 * Shape::kTile * sizeof(KeyAndValue<T>));
}

// Grid: (splits, KV heads, sequences).
template <typename T, int kDim, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    attention_decode_kernel(AttentionLaunch<T> a) {
  constexpr int kTile = Shape::kTile, kStages = Shape::kStages, kStride = padded(kDim),
                kStage = 2 * kTile * kStride, kVector = 8, kLanes = kDim / kVector,
                kRowsAtOnce = 32 / kLanes;
  let_next_kernel_start();  // merging, which waits
  const AttentionBlock<T> block(a, int(blockIdx.z), int(blockIdx.y), int(blockIdx.x), 0);
  if (block.queries == 0) return;
  const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  T* const q_tile = dynamic_shared<T>();
  T* const all_stages = q_tile + kDecodeRows * kStride;
  T* const stages = all_stages + warp * kStages * kStage;
  auto* const found =  // [2][kTile]
      reinterpret_cast<KeyAndValue<T>*>(all_stages + Shape::kWarps * kStages * kStage) +
      warp * 2 * kTile;

  const T* const k_head = a.k.data + (a.first_kv_head + block.kv_head) * std::int64_t(kDim);
  const T* const v_head =
      a.v.data + (a.first_kv_head + block.kv_head) * std::int64_t(a.v_head_stride);
  const int last_row = block.rows() - 1;
  const int first_seen = block.first_key(0), end_seen = block.end_key(last_row);
  const unsigned seen_keys = unsigned(max(0, end_seen - first_seen));
  const auto is_seen = [&](int position) { return unsigned(position - first_seen) < seen_keys; };
  // Tiles of all warps together.
  const int first = first_seen / Shape::kKeys + block.split * a.tiles_of_split,
            end = min((end_seen + Shape::kKeys - 1) / Shape::kKeys, first + a.tiles_of_split);
  const auto first_key_of = [&](int tile) { return tile * Shape::kKeys + warp * kTile; };
  // A lane finds one key of a tile; its page was asked for one tile before.
  const auto page_of = [&](int tile) {
    const int position = first_key_of(tile) + lane % kTile;
    return tile < end && is_seen(position) ? block.page(position) : 0;
  };
  const auto find_keys = [&](int tile, std::int32_t page) {
    const int position = first_key_of(tile) + lane;
    if (lane >= kTile) return;
    KeyAndValue<T> key{k_head, v_head};
    if (is_seen(position)) {
      key.k += block.offset_in(page, position, a.k.row_stride);
      key.v += block.offset_in(page, position, a.v.row_stride);
    }
    found[tile % 2 * kTile + lane] = key;
  };
  const int bring_row = lane / kLanes, bring_col = lane % kLanes * kVector;
  const auto bring_tile = [&](int tile) {
    T* const to = stages + tile % kStages * kStage + bring_row * kStride + bring_col;
    const KeyAndValue<T>* const from = found + tile % 2 * kTile + bring_row;
    const int position = first_key_of(tile) + bring_row;
    bring_keys<kTile, kRowsAtOnce, kStride>(to, from, bring_col, a.vectors,
                                            [&](int i) { return is_seen(position + i); });
  };

  for (int i = int(threadIdx.x) / kLanes; i < kDecodeRows; i += Shape::kThreads / kLanes)
    bring_query(block, q_tile + i * kStride + bring_col, i, bring_col);
  copy_async_commit();
  find_keys(first, page_of(first));
  std::int32_t page = page_of(first + 1);
  __syncwarp();
  // Everything of the stages but the last.
#pragma unroll 1
  for (int tile = first; tile < first + kStages - 1; ++tile) {
    if (tile < end) bring_tile(tile);
    copy_async_commit();
    find_keys(tile + 1, page);
    page = page_of(tile + 2);
    __syncwarp();
  }
  copy_async_wait<kStages - 1>();
  __syncthreads();
  FragmentA<T> q[kDim / 16];
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) q[d] = load_a(q_tile + 16 * d, kStride);

  // Keys that all rows see.
  const int whole_first = block.first_key(last_row), whole_end = block.end_key(0);
  SoftmaxState state[2] = {{a.hidden_logit, 0.0f}, {a.hidden_logit, 0.0f}};
  FragmentC o[kDim / 8] = {};

#pragma unroll 1
  for (int tile = first; tile < end; ++tile) {
    copy_async_wait<kStages - 2>();
    __syncwarp();
    // The warp is done with the tile before this one.
    const int next = tile + kStages - 1;
    if (next < end) {
      bring_tile(next);
      find_keys(next + 1, page);
      page = page_of(next + 2);
    }
    copy_async_commit();
    const int first_key = first_key_of(tile);
    if (first_key >= end_seen || first_key + kTile <= first_seen) continue;

    const T* const k_tile = stages + tile % kStages * kStage;
    const T* const v_tile = k_tile + kTile * kStride;
    FragmentC s[kTile / 8] = {};
#pragma unroll
    for (int d = 0; d < kDim / 32; ++d) {
      FragmentB2<T> k[kTile / 8];
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n)
        k[n] = load_b2(k_tile + 8 * n * kStride + 32 * d, kStride);
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) mma(s[n], q[2 * d], k[n].x[0]);
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) mma(s[n], q[2 * d + 1], k[n].x[1]);
    }
    if (first_key < whole_first || first_key + kTile > whole_end) hide(block, 0, first_key, s);
    float alpha[2];
    weigh(a, s, state, alpha);
    rescale(o, alpha);
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
      const FragmentA<T> p = to_a<T>(s[2 * k], s[2 * k + 1]);
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 2) {
        const FragmentB2<T> v = load_b2_transposed(v_tile + 16 * k * kStride + 8 * n, kStride);
        mma(o[n], p, v.x[0]);
        mma(o[n + 1], p, v.x[1]);
      }
    }
  }
  copy_async_wait<0>();
  __syncwarp();

  // The warp's stages make room for what it has found.
  const auto part_of_warp = [&](int w) {
    return reinterpret_cast<DecodePart<kDim>*>(all_stages + w * kStages * kStage);
  };
  DecodePart<kDim>& mine = *part_of_warp(warp);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 8 * i + lane / 4;
    const float sum = quad_sum(state[i].sum);
    if (!block.has_row(row)) continue;
    if (lane % 4 == 0) mine.state[row] = {state[i].maximum, sum};
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
      store_vector<float, 2>(&mine.o[row][8 * n + 2 * (lane % 4)],
                             {o[n].x[2 * i], o[n].x[2 * i + 1]});
  }
  __syncthreads();
  // As many threads for each row.
  constexpr int kOfRow = Shape::kThreads / kDecodeRows;
  const int row = int(threadIdx.x) / kOfRow;
  if (!block.has_row(row)) return;
  float maximum = part_of_warp(0)->state[row].maximum;
#pragma unroll
  for (int w = 1; w < Shape::kWarps; ++w)
    maximum = fmaxf(maximum, part_of_warp(w)->state[row].maximum);
  const float unit = a.scale * kLog2E, base = exponent_base(maximum, a.empty_maximum);
  float weights[Shape::kWarps], sum = 0.0f;
#pragma unroll
  for (int w = 0; w < Shape::kWarps; ++w) {
    weights[w] = exp2_flushed((part_of_warp(w)->state[row].maximum - base) * unit);
    sum += part_of_warp(w)->state[row].sum * weights[w];
  }
  const RowResult<T> result(block, row, {maximum * a.scale, sum});
  const int column = int(threadIdx.x) % kOfRow * 2;
#pragma unroll
  for (int d = column; d < kDim; d += 2 * kOfRow) {
    float left = 0.0f, right = 0.0f;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      const Vec<float, 2> x = load_vector<float, 2>(&part_of_warp(w)->o[row][d]);
      left += x[0] * weights[w], right += x[1] * weights[w];
    }
    result.store_pair(d, left, right);
  }
  if (column == 0) result.store_lse();
}

}  // namespace tp
