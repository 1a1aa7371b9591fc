#pragma once
// Attention of few queries that see many keys, with wide heads in f16 and bf16, for the chip's
// limit, which is how fast k and v can be read (FlashDecoding): all rows of a pack are one matrix
// step, the warps of a block take different keys, and each has several tiles of them on their way.
// No softcap and no slopes.

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
  constexpr std::size_t kStages = sizeof(T) * hot_stride(kDim) * 2 * Shape::kTile * Shape::kStages;
  static_assert(sizeof(DecodePart<kDim>) <= kStages);
  return sizeof(T) * hot_stride(kDim) * kDecodeRows +
         Shape::kWarps * (kStages + Shape::kStages * Shape::kTile * sizeof(KeyOffsets));
}

template <typename T, int kDim, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    attention_decode_kernel(AttentionLaunch<T> a) {
  constexpr int kTile = Shape::kTile, kStages = Shape::kStages, kStride = hot_stride(kDim),
                kVector = 8, kLanes = kDim / kVector, kRowsAtOnce = 32 / kLanes,
                kStage = 2 * kTile * kStride;
  const AttentionBlock<T> block(a);
  if (!block.has_row(block.first_row)) return;  // the whole block: this sequence is a short one
  const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  T* const q_tile = dynamic_shared<T>();
  T* const all_stages = q_tile + kDecodeRows * kStride;
  T* const stages = all_stages + warp * kStages * kStage;
  auto* const offsets =
      reinterpret_cast<KeyOffsets*>(all_stages + Shape::kWarps * kStages * kStage) +
      warp * kStages * kTile;  // [kStages][kTile]

  const int bring_row = lane / kLanes, bring_col = lane % kLanes * kVector;
  const T* const k_head =
      a.k.data + (a.first_kv_head + block.kv_head) * std::int64_t(kDim) + bring_col;
  const T* const v_head =
      a.v.data + (a.first_kv_head + block.kv_head) * std::int64_t(a.v_head_stride) + bring_col;
  const int first_seen = block.first_key(), end_seen = block.end_key();
  const int first = block.first_tile(), end = block.end_tile();
  const auto first_key_of = [&](int tile) { return tile * Shape::kKeys + warp * kTile; };
  const auto is_seen = [&](int position) { return first_seen <= position && position < end_seen; };
  // A key's page is asked for one tile before where the key lies is computed.
  const auto page_of = [&](int tile) {
    const int position = first_key_of(tile) + lane % kTile;
    return tile < end && is_seen(position) ? block.page(position) : 0;
  };
  const auto find_keys = [&](int tile, std::int32_t page) {
    const int position = first_key_of(tile) + lane;
    if (kTile < 32 && lane >= kTile) return;
    const bool seen = is_seen(position);
    offsets[tile % kStages * kTile + lane] = {
        seen ? block.offset_in(page, position, a.k.row_stride) : -1,
        seen ? block.offset_in(page, position, a.v.row_stride) : -1};
  };
  const auto bring_tile = [&](int tile) {
    T* const to = stages + tile % kStages * kStage + bring_row * kStride + bring_col;
    const KeyOffsets* const from = offsets + tile % kStages * kTile + bring_row;
#pragma unroll
    for (int i = 0; i < kTile; i += kRowsAtOnce) {
      const KeyOffsets at = from[i];
      copy_async_or_zero<16>(to + i * kStride, k_head + (at.k < 0 ? 0 : at.k), at.k >= 0);
      copy_async_or_zero<16>(to + (kTile + i) * kStride, v_head + (at.v < 0 ? 0 : at.v), at.v >= 0);
    }
  };

  std::int32_t pages[kStages + 1];
#pragma unroll
  for (int i = 0; i <= kStages; ++i) pages[i] = page_of(first + i);
  for (int i = int(threadIdx.x) / kLanes; i < kDecodeRows; i += Shape::kThreads / kLanes) {
    const int row = block.first_row + i;
    const bool there = block.has_row(row);
    const std::int64_t at = there ? block.token_of(row) * a.q.row_stride +
                                        block.head_of(row) * std::int64_t(kDim) + bring_col
                                  : 0;
    copy_async_or_zero<16>(q_tile + i * kStride + bring_col, a.q.data + at, there);
  }
  copy_async_commit();
#pragma unroll
  for (int i = 0; i < kStages; ++i) find_keys(first + i, pages[i]);
  std::int32_t page = pages[kStages];
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) {
    if (first + i < end) bring_tile(first + i);
    copy_async_commit();
  }
  copy_async_wait<kStages - 1>();
  __syncthreads();
  FragmentA<T> q[kDim / 16];
#pragma unroll
  for (int d = 0; d < kDim / 16; ++d) q[d] = load_a(q_tile + 16 * d, kStride);

  const int last_row = min(block.first_row + kDecodeRows, block.rows()) - 1,
            whole_first = block.first_key(last_row), whole_end = block.end_key(block.first_row);
  SoftmaxState state[2] = {{a.hidden_logit, 0.0f}, {a.hidden_logit, 0.0f}};
  FragmentC o[kDim / 8] = {};
  const float unit = a.scale * kLog2E;  // of exponents to base 2

  for (int tile = first; tile < end; ++tile) {
    copy_async_wait<kStages - 2>();
    __syncwarp();
    // The warp is done with the tile before this one.
    if (tile + kStages - 1 < end) bring_tile(tile + kStages - 1);
    copy_async_commit();
    find_keys(tile + kStages, page);
    page = page_of(tile + kStages + 1);
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
    if (first_key < whole_first || first_key + kTile > whole_end) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const AttentionRow row(block, block.first_row + 8 * i + lane / 4);
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            if (!row.sees(first_key + 8 * n + 2 * (lane % 4) + j))
              s[n].x[2 * i + j] = a.hidden_logit;
          }
        }
      }
    }
    float alpha[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float maximum = s[0].x[2 * i];
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n)
        maximum = fmaxf(maximum, fmaxf(s[n].x[2 * i], s[n].x[2 * i + 1]));
      maximum = fmaxf(state[i].maximum, quad_max(maximum));
      const float base = exponent_base(maximum, a.empty_maximum);
      alpha[i] = exp2_flushed((state[i].maximum - base) * unit);
      float sum = state[i].sum * alpha[i];  // of this lane's columns
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[n].x[2 * i + j];
          sum += x = exp2_flushed((x - base) * unit);
        }
      }
      state[i] = {maximum, sum};
    }
    if (alpha[0] != 1.0f || alpha[1] != 1.0f) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int x = 0; x < 4; ++x) o[n].x[x] *= alpha[x / 2];
      }
    }
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
  __syncthreads();

  // The stages make room for what the warps have found.
  auto* const parts = reinterpret_cast<DecodePart<kDim>*>(all_stages);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 8 * i + lane / 4;
    const float sum = quad_sum(state[i].sum);
    if (lane % 4 == 0) parts[warp].state[row] = {state[i].maximum, sum};
    if (!block.has_row(block.first_row + row)) continue;
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n)
      store_vector<float, 2>(&parts[warp].o[row][8 * n + 2 * (lane % 4)],
                             {o[n].x[2 * i], o[n].x[2 * i + 1]});
  }
  __syncthreads();
  // As many threads for each row.
  constexpr int kOfRow = Shape::kThreads / kDecodeRows;
  const int row = int(threadIdx.x) / kOfRow;
  if (block.has_row(block.first_row + row)) {
    float maximum = parts[0].state[row].maximum;
#pragma unroll
    for (int w = 1; w < Shape::kWarps; ++w) maximum = fmaxf(maximum, parts[w].state[row].maximum);
    const float base = exponent_base(maximum, a.empty_maximum);
    float weights[Shape::kWarps], sum = 0.0f;
#pragma unroll
    for (int w = 0; w < Shape::kWarps; ++w) {
      weights[w] = exp2_flushed((parts[w].state[row].maximum - base) * unit);
      sum += parts[w].state[row].sum * weights[w];
    }
    const RowResult<T> result(block, block.first_row + row, {maximum * a.scale, sum});
    const int column = int(threadIdx.x) % kOfRow * 2;
#pragma unroll
    for (int d = column; d < kDim; d += 2 * kOfRow) {
      float left = 0.0f, right = 0.0f;
#pragma unroll
      for (int w = 0; w < Shape::kWarps; ++w) {
        const Vec<float, 2> o = load_vector<float, 2>(&parts[w].o[row][d]);
        left += o[0] * weights[w], right += o[1] * weights[w];
      }
      result.store_pair(d, left, right);
    }
    if (column == 0) result.store_lse();
  }
  if (a.splits == 1 || a.arrivals == nullptr) return;
  __threadfence();
  __syncthreads();
  auto* const last = reinterpret_cast<int*>(dynamic_shared<T>());
  if (threadIdx.x == 0) {
    unsigned* const at =
        a.arrivals + (block.sequence * (gridDim.x / a.splits) +
                      (block.first_row / kDecodeRows) * (a.heads / a.group) + block.kv_head);
    *last = atomicAdd(at, 1u) == unsigned(a.splits - 1);
    if (*last) *at = 0;
  }
  __syncthreads();
  if (!*last) return;
  __threadfence();
  for (int r = warp; r < kDecodeRows; r += Shape::kWarps) {
    const int row = block.first_row + r;
    if (block.has_row(row)) merge_row<4>(a, block.token_of(row), block.head_of(row), lane);
  }
}

}  // namespace tp
