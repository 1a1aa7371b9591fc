#pragma once
// Attention in f16 and bf16 with matrix steps (FlashAttention-2, arXiv 2307.08691): a warp takes 16
// rows of the pack, its logits and its output stay in registers, tiles of k and v come through
// shared memory while those before them are worked on.

#include "kernels/attention_parts.cuh"

namespace tp {

// Elements of a row filled up to whole matrix steps, and how far apart rows of a tile lie: 16 bytes
// more than a multiple of 32, so that the rows which are loaded together meet no bank conflicts.
constexpr int whole_steps(int cols) { return (cols + 31) / 32 * 32; }
constexpr int tile_stride(int cols) { return whole_steps(cols) + 8; }

// Where the rows of a tile lie in k and in v, from a head's first element on; -1: zeros.
template <int kTile>
struct TileRows {
  std::int64_t k[kTile], v[kTile];
};

// Bytes of shared memory: q of `rows`, and two stages of k and of v and of where they lie.
template <int kTile>
std::int64_t matrix_shared_bytes(int dim, int v_dim, int rows) {
  return 2 * (std::int64_t{rows} * tile_stride(dim) +
              std::int64_t{2} * kTile * (tile_stride(dim) + tile_stride(v_dim))) +
         2 * std::int64_t{sizeof(TileRows<kTile>)};
}

// Brings `rows` rows of `cols` elements, filled up with zeros to whole matrix steps, to shared
// memory. source(i): where row i is, or null for zeros only. Eight neighbouring threads take a row
// together. Whole vectors are there after a copy_async_wait.
template <typename T, typename Source>
__device__ void bring_rows(T* to, int rows, int cols, bool vectors, const Source& source) {
  constexpr int kLanes = 8, kVector = 16 / int(sizeof(T));
  const int lane = int(threadIdx.x % kLanes), stride = tile_stride(cols);
  for (int i = int(threadIdx.x / kLanes); i < rows; i += int(blockDim.x / kLanes)) {
    const T* from = source(i);
    T* row = to + i * stride;
    const int copied = vectors && from != nullptr ? cols : 0;  // by whole vectors
    for (int d = lane * kVector; d < copied; d += kLanes * kVector)
      copy_async<16>(row + d, from + d);
    for (int d = copied + lane; d < whole_steps(cols); d += kLanes)
      row[d] = from != nullptr && d < cols ? from[d] : T{};
  }
}

// kTile keys; at most kMaxDim columns of v, of which the output takes registers. kExact: head_dim
// and v_head_dim are kMaxDim, and no step needs to be asked whether it is one.
template <typename T, int kTile, int kMaxDim, bool kExact>
__global__ void attention_matrix_kernel(AttentionLaunch<T> a) {
  const AttentionBlock<T> block = AttentionBlock<T>::of_grid(a);
  if (!block.has_row(block.first_row)) return;  // the whole block: this sequence is a short one
  const int warp = int(threadIdx.x / 32), lane = int(threadIdx.x % 32);
  const int dim = kExact ? kMaxDim : a.dim, v_dim = kExact ? kMaxDim : a.v_dim;
  const int q_stride = tile_stride(dim), v_stride = tile_stride(v_dim);
  T* q_tile = dynamic_shared<T>();
  T* k_tiles = q_tile + a.rows_of_block * q_stride;
  T* v_tiles = k_tiles + 2 * kTile * q_stride;

  auto* tile_rows = reinterpret_cast<TileRows<kTile>*>(v_tiles + 2 * kTile * v_stride);
  const T* const k_head = a.k.data + (a.first_kv_head + block.kv_head) * std::int64_t(dim);
  const T* const v_head =
      a.v.data + (a.first_kv_head + block.kv_head) * std::int64_t(a.v_head_stride);

  // Once a key, and not once for each thread that brings a part of it.
  const auto find_rows = [&](int tile, int stage) {
    for (int j = int(threadIdx.x); j < kTile; j += int(blockDim.x)) {
      const int position = tile * kTile + j;
      const bool seen = block.is_seen(position);
      tile_rows[stage].k[j] = seen ? block.offset_of(position, a.k.row_stride) : -1;
      tile_rows[stage].v[j] = seen ? block.offset_of(position, a.v.row_stride) : -1;
    }
  };
  const auto bring_tile = [&](int stage) {
    const TileRows<kTile>& at = tile_rows[stage];
    bring_rows(k_tiles + stage * kTile * q_stride, kTile, dim, a.vectors,
               [&](int j) { return at.k[j] < 0 ? nullptr : k_head + at.k[j]; });
    bring_rows(v_tiles + stage * kTile * v_stride, kTile, v_dim, a.vectors,
               [&](int j) { return at.v[j] < 0 ? nullptr : v_head + at.v[j]; });
    copy_async_commit();
  };

  bring_rows(q_tile, a.rows_of_block, dim, a.vectors, [&](int i) {
    const int row = block.first_row + i;
    return block.has_row(row) ? a.q.data + block.token_of(row) * a.q.row_stride +
                                    block.head_of(row) * std::int64_t(dim)
                              : nullptr;
  });
  const int first = block.first_tile(), end = block.end_tile();
  if (first < end) {
    find_rows(first, 0);
    find_rows(first + 1, 1);
    __syncthreads();
    bring_tile(0);
  } else {
    copy_async_commit();  // of q, which nobody will look at
    copy_async_wait<0>();
  }

  // The two rows of which this lane holds a part. Some warps may have none: they only bring tiles.
  const int row = block.first_row + 16 * warp + lane / 4;
  const bool works = 16 * warp < a.rows_of_block && block.has_row(block.first_row + 16 * warp);
  const AttentionRow rows[2] = {AttentionRow(block, row), AttentionRow(block, row + 8)};
  SoftmaxState state[2] = {{a.hidden_logit, 0.0f}, {a.hidden_logit, 0.0f}};
  FragmentC o[kMaxDim / 8] = {};

  for (int tile = first; tile < end; ++tile) {
    const int stage = (tile - first) % 2;
    if (tile + 1 < end) {
      bring_tile(1 - stage);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();
    if (tile + 2 < end) find_rows(tile + 2, stage);  // this tile has been brought by all
    if (works) {
      const T* q = q_tile + 16 * warp * q_stride;
      const T* k_tile = k_tiles + stage * kTile * q_stride;
      const T* v_tile = v_tiles + stage * kTile * v_stride;
      FragmentC s[kTile / 8] = {};
#pragma unroll 4
      for (int d = 0; d < dim; d += 32) {
        // All loads first, and no step after one that it waits for.
        const FragmentA<T> left = load_a(q + d, q_stride), right = load_a(q + d + 16, q_stride);
        FragmentB2<T> k[kTile / 8];
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) k[n] = load_b2(k_tile + 8 * n * q_stride + d, q_stride);
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) mma(s[n], left, k[n].x[0]);
        if (!kExact && d + 16 >= dim) break;
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) mma(s[n], right, k[n].x[1]);
      }

      // Of the element x[2 i + j] of a fragment n: row i, key first_key + 8 n + j.
      const int first_key = tile * kTile + 2 * (lane % 4);
      const auto for_each_logit = [&](auto&& change) {
#pragma unroll
        for (int n = 0; n < kTile / 8; ++n) {
#pragma unroll
          for (int x = 0; x < 4; ++x) change(s[n].x[x], x / 2, first_key + 8 * n + x % 2);
        }
      };
      for_each_logit([&](float& x, int, int) { x *= a.scale; });
      if (a.softcap > 0.0f) for_each_logit([&](float& x, int, int) { x = capped(x, a.softcap); });
      if (a.slopes != nullptr)
        for_each_logit([&](float& x, int i, int key) { x -= rows[i].bias(key); });
      if (!rows[0].sees_all(tile * kTile, kTile) || !rows[1].sees_all(tile * kTile, kTile)) {
        for_each_logit([&](float& x, int i, int key) {
          if (!rows[i].sees(key)) x = a.hidden_logit;
        });
      }
      float maximum[2] = {a.hidden_logit, a.hidden_logit}, base[2], alpha[2];
      for_each_logit([&](float& x, int i, int) { maximum[i] = fmaxf(maximum[i], x); });
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        maximum[i] = fmaxf(state[i].maximum, quad_max(maximum[i]));
        base[i] = exponent_base(maximum[i], a.empty_maximum);
        alpha[i] = weight(state[i].maximum, base[i]);
        state[i] = {maximum[i], state[i].sum * alpha[i]};  // the sum: of this lane's columns
      }
      for_each_logit([&](float& x, int i, int) { state[i].sum += x = weight(x, base[i]); });
#pragma unroll
      for (int n = 0; n < kMaxDim / 8; ++n) {
        for (int x = 0; x < 4; ++x) o[n].x[x] *= alpha[x / 2];
      }
#pragma unroll
      for (int k = 0; k < kTile / 16; ++k) {
        const FragmentA<T> p = to_a<T>(s[2 * k], s[2 * k + 1]);
#pragma unroll
        for (int n = 0; n < kMaxDim / 8; n += 8) {
          if (!kExact && 8 * n >= v_dim) break;
          FragmentB2<T> v[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // Beyond the padded columns there is nothing to load.
            if (kExact || 8 * (n + 2 * i) < v_dim)
              v[i] = load_b2_transposed(v_tile + 16 * k * v_stride + 8 * (n + 2 * i), v_stride);
          }
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (kExact || 8 * (n + i) < v_dim) mma(o[n + i], p, v[i / 2].x[i % 2]);
          }
        }
      }
    }
    __syncthreads();  // the stage is free for the tile after the next
  }

  if (!works) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    state[i].sum = quad_sum(state[i].sum);
    if (!block.has_row(row + 8 * i)) continue;
    const RowResult<T> result(block, row + 8 * i, state[i]);
#pragma unroll
    for (int n = 0; n < kMaxDim / 8; ++n) {
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int d = 8 * n + 2 * (lane % 4) + j;
        if (kExact || d < v_dim) result.store(d, o[n].x[2 * i + j]);
      }
    }
    if (lane % 4 == 0) result.store_lse();
  }
}

}  // namespace tp
