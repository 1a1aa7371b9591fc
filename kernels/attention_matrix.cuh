#pragma once
// Attention in f16 and bf16 with matrix steps (FlashAttention-2, arXiv 2307.08691): a warp takes 16
// rows of the pack, its logits and its output stay in registers, tiles of k and v come through
// shared memory while those before them are worked on.

#include "kernels/attention_parts.cuh"

namespace tp {

// Rows of a tile lie this many elements apart: whole matrix steps, and 16 bytes more, so that the
// rows that are loaded together meet no bank conflicts.
constexpr int tile_stride(int cols) { return (cols + 15) / 16 * 16 + 8; }

// Bytes of shared memory: q, and two stages of k and of v.
inline std::int64_t matrix_shared_bytes(int dim, int v_dim, int warps, int tile) {
  return 2 * (std::int64_t{16} * warps * tile_stride(dim) +
              std::int64_t{2} * tile * (tile_stride(dim) + tile_stride(v_dim)));
}

// Brings one row of `cols` elements, filled up with zeros to whole matrix steps, to shared memory;
// by `lanes` threads, of which this is number `lane`. `source` null: zeros only. Whole vectors are
// there after a copy_async_wait.
template <typename T>
__device__ void bring_row(T* to, const T* source, int cols, bool vectors, int lane, int lanes) {
  constexpr int kVector = 16 / int(sizeof(T));
  const int padded = (cols + 15) / 16 * 16;
  if (vectors && source != nullptr) {
    for (int d = lane * kVector; d < cols; d += lanes * kVector) copy_async<16>(to + d, source + d);
    for (int d = cols + lane; d < padded; d += lanes) to[d] = T{};
  } else {
    for (int d = lane; d < padded; d += lanes)
      to[d] = source != nullptr && d < cols ? source[d] : T{};
  }
}

// kMaxTile keys and kMaxDim columns of v at most: both say how many registers a row needs.
template <typename T, int kMaxTile, int kMaxDim>
__global__ void attention_matrix_kernel(AttentionLaunch<T> a) {
  const AttentionBlock<T> block(a);
  if (!block.has_row(block.first_row)) return;  // the whole block: this sequence is a short one
  const int warps = int(blockDim.x / 32), warp = int(threadIdx.x / 32),
            lane = int(threadIdx.x % 32);
  const int q_stride = tile_stride(a.dim), v_stride = tile_stride(a.v_dim);
  T* q_tile = dynamic_shared<T>();
  T* k_tiles = q_tile + 16 * warps * q_stride;
  T* v_tiles = k_tiles + 2 * a.tile * q_stride;

  const auto bring_tile = [&](int tile, int stage) {
    for (int j = warp; j < a.tile; j += warps) {
      const int position = tile * a.tile + j;
      const bool there = position < block.keys;
      bring_row(k_tiles + (stage * a.tile + j) * q_stride, there ? block.key(position) : nullptr,
                a.dim, a.vectors, lane, 32);
      bring_row(v_tiles + (stage * a.tile + j) * v_stride, there ? block.value(position) : nullptr,
                a.v_dim, a.vectors, lane, 32);
    }
    copy_async_commit();
  };

  for (int i = warp; i < 16 * warps; i += warps) {
    const int row = block.first_row + i;
    const T* q = block.has_row(row) ? a.q.data + block.token_of(row) * a.q.row_stride +
                                          block.head_of(row) * std::int64_t(a.dim)
                                    : nullptr;
    bring_row(q_tile + i * q_stride, q, a.dim, a.vectors, lane, 32);
  }
  const int first = block.first_tile(), end = block.end_tile();
  bring_tile(first, 0);  // even if there is none: it is never looked at then

  // Of the two rows that this lane holds a part of: lane / 4, and 8 below it.
  const int rows[2] = {block.first_row + 16 * warp + lane / 4,
                       block.first_row + 16 * warp + lane / 4 + 8};
  const float slopes[2] = {block.slope_of(rows[0]), block.slope_of(rows[1])};
  SoftmaxState state[2] = {{a.hidden_logit, 0.0f}, {a.hidden_logit, 0.0f}};
  FragmentC o[kMaxDim / 8] = {};
  const int v_steps = (a.v_dim + 7) / 8;

  for (int tile = first; tile < end; ++tile) {
    const int stage = (tile - first) % 2;
    if (tile + 1 < end) {
      bring_tile(tile + 1, 1 - stage);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    __syncthreads();

    const T* k_tile = k_tiles + stage * a.tile * q_stride;
    const T* v_tile = v_tiles + stage * a.tile * v_stride;
    FragmentC s[kMaxTile / 8] = {};
    for (int d = 0; d < a.dim; d += 16) {
      const FragmentA<T> q = load_a(q_tile + 16 * warp * q_stride + d, q_stride);
#pragma unroll
      for (int n = 0; n < kMaxTile / 8; ++n) {
        if (8 * n < a.tile) mma(s[n], q, load_b(k_tile + 8 * n * q_stride + d, q_stride));
      }
    }

    float alpha[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float maximum = a.hidden_logit;
#pragma unroll
      for (int n = 0; n < kMaxTile / 8; ++n) {
        if (8 * n >= a.tile) break;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[n].x[2 * i + j];
          x = block.logit(x, rows[i], tile * a.tile + 8 * n + 2 * (lane % 4) + j, slopes[i]);
          maximum = larger(maximum, x);
        }
      }
      maximum = larger(state[i].maximum, quad_max(maximum));
      const float base = exponent_base(maximum, a.empty_maximum);
      alpha[i] = weight(state[i].maximum, base);
      float sum = state[i].sum * alpha[i];  // of this lane's columns
#pragma unroll
      for (int n = 0; n < kMaxTile / 8; ++n) {
        if (8 * n >= a.tile) break;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = s[n].x[2 * i + j];
          sum += x = weight(x, base);
        }
      }
      state[i] = {maximum, sum};
    }
#pragma unroll
    for (int n = 0; n < kMaxDim / 8; ++n) {
      if (n >= v_steps) break;
      for (int x = 0; x < 4; ++x) o[n].x[x] *= alpha[x / 2];
    }
#pragma unroll
    for (int k = 0; k < kMaxTile / 16; ++k) {
      if (16 * k >= a.tile) break;
      const FragmentA<T> p = to_a<T>(s[2 * k], s[2 * k + 1]);
#pragma unroll
      for (int n = 0; n < kMaxDim / 8; ++n) {
        if (n >= v_steps) break;
        mma(o[n], p, load_b_transposed(v_tile + 16 * k * v_stride + 8 * n, v_stride));
      }
    }
    __syncthreads();  // the stage is free for the tile after the next
  }
  if (end <= first) copy_async_wait<0>();

#pragma unroll
  for (int i = 0; i < 2; ++i) {
    state[i].sum = quad_sum(state[i].sum);
    const int row = rows[i];
    if (!block.has_row(row)) continue;
    float lse;
    const float scale = finish_row(block, row, state[i], &lse);
    const std::int64_t token = block.token_of(row);
    const int head = block.head_of(row);
    const std::int64_t part = part_of(a, block.split, token, head);
#pragma unroll
    for (int n = 0; n < kMaxDim / 8; ++n) {
      for (int j = 0; j < 2; ++j) {
        const int d = 8 * n + 2 * (lane % 4) + j;
        if (d >= a.v_dim) break;
        const float value = o[n].x[2 * i + j] * scale;
        if (a.splits > 1) {
          a.parts[part * a.v_dim + d] = value;
        } else {
          a.out.data[token * a.out.row_stride + head * std::int64_t(a.v_dim) + d] =
              from_float<T>(value);
        }
      }
    }
    if (lane % 4 == 0)
      (a.splits > 1 ? part_lse(a)[part] : a.lse.data[token * a.lse.row_stride + head]) = lse;
  }
}

}  // namespace tp
