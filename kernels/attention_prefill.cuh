#pragma once
// Attention of many queries with wide heads in f16 and bf16, for the chip's limit: what
// attention_matrix.cuh does, but with all sizes known, a block of 128 rows, and masks only where a
// tile is not seen as a whole. No softcap and no slopes.

#include "kernels/attention_parts.cuh"

namespace tp {

// How a block works: kWarps warps of kSteps * 16 rows each, tiles of kTile keys, of which kStages
// are in shared memory, and kBlocks blocks at a time on one multiprocessor.
template <int kWarps_, int kSteps_, int kTile_, int kStages_, int kBlocks_>
struct PrefillShape {
  static constexpr int kWarps = kWarps_, kSteps = kSteps_, kTile = kTile_, kStages = kStages_,
                       kBlocks = kBlocks_, kThreads = 32 * kWarps, kRows = 16 * kSteps * kWarps;
};

// Where a key's rows of k and v begin, from a head's first element on; -1: nobody sees it.
struct KeyOffsets {
  std::int64_t k, v;
};

// Rows of tiles lie 16 bytes more than a multiple of 128 apart: no bank conflicts.
constexpr int hot_stride(int dim) { return dim + 8; }

template <typename T, int kDim, typename Shape>
constexpr std::size_t prefill_shared_bytes() {
  return sizeof(T) * hot_stride(kDim) * (Shape::kRows + 2 * Shape::kStages * Shape::kTile) +
         2 * Shape::kTile * sizeof(KeyOffsets);
}

template <typename T, int kDim, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    attention_prefill_kernel(AttentionLaunch<T> a) {
  constexpr int kTile = Shape::kTile, kSteps = Shape::kSteps, kStages = Shape::kStages,
                kStride = hot_stride(kDim), kVector = 8, kLanes = kDim / kVector,
                kRowsAtOnce = Shape::kThreads / kLanes;
  const AttentionBlock<T> block(a);
  if (!block.has_row(block.first_row)) return;  // the whole block: this sequence is a short one
  const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  T* const q_tile = dynamic_shared<T>();
  T* const stages = q_tile + Shape::kRows * kStride;
  auto* const offsets =
      reinterpret_cast<KeyOffsets*>(stages + 2 * kStages * kTile * kStride);  // [2][kTile]

  // What a thread brings of each row: its columns of every kRowsAtOnce-th.
  const int bring_row = int(threadIdx.x) / kLanes, bring_col = int(threadIdx.x) % kLanes * kVector;
  const T* const k_head =
      a.k.data + (a.first_kv_head + block.kv_head) * std::int64_t(kDim) + bring_col;
  const T* const v_head =
      a.v.data + (a.first_kv_head + block.kv_head) * std::int64_t(a.v_head_stride) + bring_col;
  const int first_seen = block.first_key(), end_seen = block.end_key();
  const auto find_keys = [&](int tile) {
    for (int j = int(threadIdx.x); j < kTile; j += Shape::kThreads) {
      const int position = tile * kTile + j;
      const bool seen = first_seen <= position && position < end_seen;
      offsets[tile % 2 * kTile + j] = {seen ? block.offset_of(position, a.k.row_stride) : -1,
                                       seen ? block.offset_of(position, a.v.row_stride) : -1};
    }
  };
  const auto bring_tile = [&](int tile) {
    T* const to = stages + tile % kStages * (2 * kTile * kStride) + bring_row * kStride + bring_col;
    const KeyOffsets* const from = offsets + tile % 2 * kTile + bring_row;
#pragma unroll
    for (int i = 0; i < kTile; i += kRowsAtOnce) {
      const KeyOffsets at = from[i];
      copy_async_or_zero<16>(to + i * kStride, k_head + (at.k < 0 ? 0 : at.k), at.k >= 0);
      copy_async_or_zero<16>(to + (kTile + i) * kStride, v_head + (at.v < 0 ? 0 : at.v), at.v >= 0);
    }
  };

  for (int i = bring_row; i < Shape::kRows; i += kRowsAtOnce) {
    const int row = block.first_row + i;
    const bool there = block.has_row(row);
    const std::int64_t at = there ? block.token_of(row) * a.q.row_stride +
                                        block.head_of(row) * std::int64_t(kDim) + bring_col
                                  : 0;
    copy_async_or_zero<16>(q_tile + i * kStride + bring_col, a.q.data + at, there);
  }
  const int first = block.first_tile(), end = block.end_tile();
  for (int i = 0; i < kStages - 1; ++i) {
    if (first + i < end) find_keys(first + i);
    __syncthreads();
    if (first + i < end) bring_tile(first + i);
    copy_async_commit();
  }
  if (first + kStages - 1 < end) find_keys(first + kStages - 1);

  // Of this warp's rows: tiles of which some row sees something, and those that all see as a whole.
  const int warp_row = block.first_row + 16 * kSteps * warp,
            last_row = min(warp_row + 16 * kSteps, block.rows()) - 1;
  const bool works = block.has_row(warp_row);
  const int warp_end = works ? (block.end_key(last_row) + kTile - 1) / kTile : 0,
            whole_first = (block.first_key(last_row) + kTile - 1) / kTile,
            whole_end = block.end_key(warp_row) / kTile;

  SoftmaxState state[kSteps][2];
  for (int m = 0; m < kSteps; ++m) state[m][0] = state[m][1] = {a.hidden_logit, 0.0f};
  FragmentC o[kSteps][kDim / 8] = {};
  const float unit = a.scale * kLog2E;  // of exponents to base 2
  const T* const q = q_tile + 16 * kSteps * warp * kStride;

  for (int tile = first; tile < end; ++tile) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    // Everybody is done with the tile before this one.
    if (tile + kStages - 1 < end) bring_tile(tile + kStages - 1);
    copy_async_commit();
    if (tile + kStages < end) find_keys(tile + kStages);
    if (tile >= warp_end) continue;

    const T* const k_tile = stages + tile % kStages * (2 * kTile * kStride);
    const T* const v_tile = k_tile + kTile * kStride;
    FragmentC s[kSteps][kTile / 8] = {};
#pragma unroll
    for (int d = 0; d < kDim; d += 32) {
      FragmentA<T> left[kSteps], right[kSteps];
      FragmentB2<T> k[kTile / 8];
#pragma unroll
      for (int m = 0; m < kSteps; ++m) {
        left[m] = load_a(q + 16 * m * kStride + d, kStride);
        right[m] = load_a(q + 16 * m * kStride + d + 16, kStride);
      }
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
        k[n] = load_b2(k_tile + 8 * n * kStride + d, kStride);
#pragma unroll
        for (int m = 0; m < kSteps; ++m) mma(s[m][n], left[m], k[n].x[0]);
      }
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
        for (int m = 0; m < kSteps; ++m) mma(s[m][n], right[m], k[n].x[1]);
      }
    }
    if (tile < whole_first || tile >= whole_end) {
#pragma unroll
      for (int m = 0; m < kSteps; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const AttentionRow row(block, warp_row + 16 * m + 8 * i + lane / 4);
#pragma unroll
          for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
            for (int j = 0; j < 2; ++j) {
              if (!row.sees(tile * kTile + 8 * n + 2 * (lane % 4) + j))
                s[m][n].x[2 * i + j] = a.hidden_logit;
            }
          }
        }
      }
    }
    FragmentA<T> p[kSteps][kTile / 16];
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
      float alpha[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float maximum = s[m][0].x[2 * i];
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n)
          maximum = fmaxf(maximum, fmaxf(s[m][n].x[2 * i], s[m][n].x[2 * i + 1]));
        maximum = fmaxf(state[m][i].maximum, quad_max(maximum));
        const float base = exponent_base(maximum, a.empty_maximum);
        alpha[i] = exp2_flushed((state[m][i].maximum - base) * unit);
        float sum = state[m][i].sum * alpha[i];  // of this lane's columns
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            float& x = s[m][n].x[2 * i + j];
            sum += x = exp2_flushed((x - base) * unit);
          }
        }
        state[m][i] = {maximum, sum};
      }
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) p[m][k] = to_a<T>(s[m][2 * k], s[m][2 * k + 1]);
      if (alpha[0] != 1.0f || alpha[1] != 1.0f) {
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
          for (int x = 0; x < 4; ++x) o[m][n].x[x] *= alpha[x / 2];
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 2) {
        const FragmentB2<T> v = load_b2_transposed(v_tile + 16 * k * kStride + 8 * n, kStride);
#pragma unroll
        for (int m = 0; m < kSteps; ++m) {
          mma(o[m][n], p[m][k], v.x[0]);
          mma(o[m][n + 1], p[m][k], v.x[1]);
        }
      }
    }
  }
  copy_async_wait<0>();

  if (!works) return;
#pragma unroll
  for (int m = 0; m < kSteps; ++m) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float sum = quad_sum(state[m][i].sum);
      const int row = warp_row + 16 * m + 8 * i + lane / 4;
      if (!block.has_row(row)) continue;
      const RowResult<T> result(block, row, {state[m][i].maximum * a.scale, sum});
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n)
        result.store_pair(8 * n + 2 * (lane % 4), o[m][n].x[2 * i], o[m][n].x[2 * i + 1]);
      if (lane % 4 == 0) result.store_lse();
    }
  }
}

}  // namespace tp
