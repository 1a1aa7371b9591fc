#pragma once
// Attention of many queries with heads of a known width in f16 and bf16, for the chip's limit: what
// attention_matrix.cuh does, but a warp takes 32 rows, so that a key is loaded from shared memory
// for twice as many, and masks are only where a tile is not seen as a whole. Logits are products
// and a scale above 0, nothing else: exponents are differences of products times scale * log2(e).

#include "kernels/attention_parts.cuh"

namespace tp {

// How a block works: kWarps warps of kSteps * 16 rows each, tiles of kTile keys, of which kStages
// are in shared memory, and kBlocks blocks at a time on one multiprocessor.
template <int kWarps_, int kSteps_, int kTile_, int kStages_, int kBlocks_>
struct PrefillShape {
  static constexpr int kWarps = kWarps_, kSteps = kSteps_, kTile = kTile_, kStages = kStages_,
                       kBlocks = kBlocks_, kThreads = 32 * kWarps, kRows = 16 * kSteps * kWarps;
};

// Where a key and its value are; anywhere, if nobody sees them.
template <typename T>
struct KeyAndValue {
  const T *k, *v;
};

// Rows of tiles lie 16 bytes more than a multiple of 128 apart: no bank conflicts.
constexpr int padded(int dim) { return dim + 8; }

// Brings 8 elements to shared memory, or zeros: as one copy that runs meanwhile, if `whole`.
template <typename T>
__device__ void bring_vector(T* to, const T* from, bool wanted, bool whole) {
  if (whole) {
    copy_async_or_zero<16>(to, from, wanted);
  } else {
#pragma unroll 1
    for (int i = 0; i < 8; ++i) to[i] = wanted ? from[i] : T{};
  }
}

// A thread's part of a tile of keys and one of values that begins kTile rows later, `from` and `to`
// being its first row and others coming each kStep: is_seen(i) says whether row i is wanted.
template <int kTile, int kStep, int kStride, typename T, typename IsSeen>
__device__ void bring_keys(T* to, const KeyAndValue<T>* from, int col, bool whole,
                           const IsSeen& is_seen) {
  if (whole) {
#pragma unroll
    for (int i = 0; i < kTile; i += kStep) {
      const KeyAndValue<T> key = from[i];
      copy_async_or_zero<16>(to + i * kStride, key.k + col, is_seen(i));
      copy_async_or_zero<16>(to + (kTile + i) * kStride, key.v + col, is_seen(i));
    }
    return;
  }
#pragma unroll 1
  for (int i = 0; i < kTile; i += kStep) {
    const KeyAndValue<T> key = from[i];
    bring_vector(to + i * kStride, key.k + col, is_seen(i), false);
    bring_vector(to + (kTile + i) * kStride, key.v + col, is_seen(i), false);
  }
}

// Row `i` of a tile of q, for a thread's columns from `col` on.
template <typename T>
__device__ void bring_query(const AttentionBlock<T>& block, T* to, int i, int col) {
  const int row = block.first_row + i;
  const bool there = block.has_row(row);
  const std::int64_t at = there ? block.token_of(row) * block.a.q.row_stride +
                                      block.head_of(row) * std::int64_t(block.a.dim) + col
                                : 0;
  bring_vector(to, block.a.q.data + at, there, block.a.vectors);
}

// Weights of this lane's logits `s`: products of its rows and some keys. What is known of each row
// becomes that of all keys so far; gives what the sums before must be multiplied with.
template <typename T, int kFragments>
__device__ void weigh(const AttentionLaunch<T>& a, FragmentC (&s)[kFragments],
                      SoftmaxState (&state)[2], float (&alpha)[2]) {
  const float unit = a.scale * kLog2E;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float maximum = s[0].x[2 * i];
#pragma unroll
    for (int n = 0; n < kFragments; ++n)
      maximum = fmaxf(maximum, fmaxf(s[n].x[2 * i], s[n].x[2 * i + 1]));
    maximum = fmaxf(state[i].maximum, quad_max(maximum));
    const float base = exponent_base(maximum, a.empty_maximum);
    alpha[i] = exp2_flushed((state[i].maximum - base) * unit);
    float sum = state[i].sum * alpha[i];  // of this lane's columns
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float& x = s[n].x[2 * i + j];
        // Exactly 1 for the maximum itself, which one fused step would not give.
        sum += x = exp2_flushed((x - base) * unit);
      }
    }
    state[i] = {maximum, sum};
  }
}

// Rows g and g + 8 (FragmentC) of 16 from `first_row` on: keys that they do not see.
template <typename T, int kFragments>
__device__ void hide(const AttentionBlock<T>& block, int first_row, int first_key,
                     FragmentC (&s)[kFragments]) {
  const int lane = int(threadIdx.x % 32);
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const AttentionRow row(block, first_row + 8 * i + lane / 4);
#pragma unroll
    for (int n = 0; n < kFragments; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        if (!row.sees(first_key + 8 * n + 2 * (lane % 4) + j))
          s[n].x[2 * i + j] = block.a.hidden_logit;
      }
    }
  }
}

template <int kFragments>
__device__ void rescale(FragmentC (&o)[kFragments], const float (&alpha)[2]) {
  if (alpha[0] == 1.0f && alpha[1] == 1.0f) return;  // most often
#pragma unroll
  for (int n = 0; n < kFragments; ++n) {
#pragma unroll
    for (int x = 0; x < 4; ++x) o[n].x[x] *= alpha[x / 2];
  }
}

template <typename T, int kDim, typename Shape>
constexpr std::size_t prefill_shared_bytes() {
  return sizeof(T) * padded(kDim) * (Shape::kRows + 2 * Shape::kStages * Shape::kTile) +
         2 * Shape::kTile * sizeof(KeyAndValue<T>);
}

template <typename T, int kDim, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, Shape::kBlocks)
    attention_prefill_kernel(AttentionLaunch<T> a) {
  constexpr int kTile = Shape::kTile, kSteps = Shape::kSteps, kStages = Shape::kStages,
                kStride = padded(kDim), kStage = 2 * kTile * kStride, kVector = 8,
                kLanes = kDim / kVector, kRowsAtOnce = Shape::kThreads / kLanes;
  static_assert(kTile % kRowsAtOnce == 0 && Shape::kRows % kRowsAtOnce == 0);
  static_assert(kTile <= Shape::kThreads);
  const AttentionBlock<T> block = AttentionBlock<T>::of_grid(a);
  if (!block.has_row(block.first_row)) return;  // the whole block: this sequence is a short one
  const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  T* const q_tile = dynamic_shared<T>();
  T* const stages = q_tile + Shape::kRows * kStride;
  auto* const found = reinterpret_cast<KeyAndValue<T>*>(stages + kStages * kStage);  // [2][kTile]

  const T* const k_head = a.k.data + (a.first_kv_head + block.kv_head) * std::int64_t(kDim);
  const T* const v_head =
      a.v.data + (a.first_kv_head + block.kv_head) * std::int64_t(a.v_head_stride);
  const int first_seen = block.first_key(), first = block.first_tile(), end = block.end_tile();
  const unsigned seen_keys = unsigned(max(0, block.end_key() - first_seen));
  const auto is_seen = [&](int position) { return unsigned(position - first_seen) < seen_keys; };
  // A thread finds one key of a tile; its page was asked for one tile before.
  const auto page_of = [&](int tile) {
    const int position = tile * kTile + int(threadIdx.x);
    const bool asks = int(threadIdx.x) < kTile && tile < end && is_seen(position);
    return asks ? block.page(position) : 0;
  };
  const auto find_keys = [&](int tile, std::int32_t page) {
    const int position = tile * kTile + int(threadIdx.x);
    if (int(threadIdx.x) >= kTile) return;
    KeyAndValue<T> key{k_head, v_head};
    if (is_seen(position)) {
      key.k += block.offset_in(page, position, a.k.row_stride);
      key.v += block.offset_in(page, position, a.v.row_stride);
    }
    found[tile % 2 * kTile + int(threadIdx.x)] = key;
  };
  // Of each row, a thread brings the same columns.
  const int bring_row = int(threadIdx.x) / kLanes, bring_col = int(threadIdx.x) % kLanes * kVector;
  const auto bring_tile = [&](int tile) {
    T* const to = stages + tile % kStages * kStage + bring_row * kStride + bring_col;
    const KeyAndValue<T>* const from = found + tile % 2 * kTile + bring_row;
    const int position = tile * kTile + bring_row;
    bring_keys<kTile, kRowsAtOnce, kStride>(to, from, bring_col, a.vectors,
                                            [&](int i) { return is_seen(position + i); });
  };

#pragma unroll 1
  for (int i = bring_row; i < Shape::kRows; i += kRowsAtOnce)
    bring_query(block, q_tile + i * kStride + bring_col, i, bring_col);
  std::int32_t page = page_of(first);
#pragma unroll 1
  for (int tile = first; tile < first + kStages - 1; ++tile) {
    find_keys(tile, page);
    page = page_of(tile + 1);
    __syncthreads();
    if (tile < end) bring_tile(tile);
    copy_async_commit();
  }
  find_keys(first + kStages - 1, page);
  page = page_of(first + kStages);

  // Of this warp's rows: where the tiles end of which some row sees something, and tiles that all
  // of them see as a whole.
  const int warp_row = block.first_row + 16 * kSteps * warp,
            last_row = min(warp_row + 16 * kSteps, block.rows()) - 1;
  const bool works = block.has_row(warp_row);
  const int warp_end = works ? (block.end_key(last_row) + kTile - 1) / kTile : 0,
            whole_first = (block.first_key(last_row) + kTile - 1) / kTile,
            whole_end = block.end_key(warp_row) / kTile;

  SoftmaxState state[kSteps][2];
#pragma unroll
  for (int m = 0; m < kSteps; ++m) state[m][0] = state[m][1] = {a.hidden_logit, 0.0f};
  FragmentC o[kSteps][kDim / 8] = {};
  const T* const q = q_tile + 16 * kSteps * warp * kStride;

  for (int tile = first; tile < end; ++tile) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    // Everybody is done with the tile before this one.
    if (tile + kStages - 1 < end) bring_tile(tile + kStages - 1);
    copy_async_commit();
    find_keys(tile + kStages, page);
    page = page_of(tile + kStages + 1);
    if (tile >= warp_end) continue;

    const T* const k_tile = stages + tile % kStages * kStage;
    const T* const v_tile = k_tile + kTile * kStride;
    FragmentC s[kSteps][kTile / 8] = {};
#pragma unroll
    for (int d = 0; d < kDim; d += 32) {
      // All loads first, and no step after one that it waits for.
      FragmentA<T> left[kSteps], right[kSteps];
      FragmentB2<T> k[kTile / 8];
#pragma unroll
      for (int m = 0; m < kSteps; ++m) {
        left[m] = load_a(q + 16 * m * kStride + d, kStride);
        right[m] = load_a(q + 16 * m * kStride + d + 16, kStride);
      }
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) k[n] = load_b2(k_tile + 8 * n * kStride + d, kStride);
#pragma unroll
      for (int n = 0; n < kTile / 8; ++n) {
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
      for (int m = 0; m < kSteps; ++m) hide(block, warp_row + 16 * m, tile * kTile, s[m]);
    }
    FragmentA<T> p[kSteps][kTile / 16];
    float alpha[kSteps][2];
#pragma unroll
    for (int m = 0; m < kSteps; ++m) {
      weigh(a, s[m], state[m], alpha[m]);
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) p[m][k] = to_a<T>(s[m][2 * k], s[m][2 * k + 1]);
    }
#pragma unroll
    for (int m = 0; m < kSteps; ++m) rescale(o[m], alpha[m]);
#pragma unroll
    for (int k = 0; k < kTile / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 4) {
        FragmentB2<T> v[2];
#pragma unroll
        for (int i = 0; i < 2; ++i)
          v[i] = load_b2_transposed(v_tile + 16 * k * kStride + 8 * (n + 2 * i), kStride);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
#pragma unroll
          for (int m = 0; m < kSteps; ++m) mma(o[m][n + i], p[m][k], v[i / 2].x[i % 2]);
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
