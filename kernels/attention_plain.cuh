#pragma once
// Attention in fp32: a warp for each row of the pack, a lane for each key of a tile, then for each
// column of the output.

#include "kernels/attention_parts.cuh"

namespace tp {

inline constexpr int kPlainTile = 32;

// Floats of shared memory for a block of `warps` rows.
inline std::int64_t plain_shared_floats(int dim, int v_dim, int warps) {
  // One column more, so that the lanes' rows of k begin in different banks.
  return std::int64_t{kPlainTile} * (dim + 1) + std::int64_t{kPlainTile} * v_dim +
         std::int64_t{warps} * (dim + kPlainTile);
}

template <typename T>
__global__ void attention_plain_kernel(AttentionLaunch<T> a) {
  const AttentionBlock<T> block(a);
  if (!block.has_row(block.first_row)) return;  // the whole block: this sequence is a short one
  const int warps = int(blockDim.x / 32), warp = int(threadIdx.x / 32),
            lane = int(threadIdx.x % 32), row = block.first_row + warp;
  float* k_tile = dynamic_shared<float>();
  float* v_tile = k_tile + kPlainTile * (a.dim + 1);
  float* q_row = v_tile + kPlainTile * a.v_dim + warp * a.dim;
  float* p_row = v_tile + kPlainTile * a.v_dim + warps * a.dim + warp * kPlainTile;

  const bool mine = block.has_row(row);
  if (mine) {
    const T* q =
        a.q.data + block.token_of(row) * a.q.row_stride + block.head_of(row) * std::int64_t(a.dim);
    for (int d = lane; d < a.dim; d += 32) q_row[d] = to_float(q[d]);
  }
  const float slope = block.slope_of(row);
  SoftmaxState state{a.hidden_logit, 0.0f};
  float o[kMaxAttentionHeadDim / 32] = {};
  const int end = block.end_tile();
  for (int tile = block.first_tile(); tile < end; ++tile) {
    const int base_key = tile * kPlainTile, keys = min(kPlainTile, block.keys - base_key);
    __syncthreads();  // the tile before is read by all
    for (int j = warp; j < keys; j += warps) {
      const T* k = block.key(base_key + j);
      const T* v = block.value(base_key + j);
      for (int d = lane; d < a.dim; d += 32) k_tile[j * (a.dim + 1) + d] = to_float(k[d]);
      for (int d = lane; d < a.v_dim; d += 32) v_tile[j * a.v_dim + d] = to_float(v[d]);
    }
    __syncthreads();
    if (!mine) continue;
    float s = a.hidden_logit;
    if (lane < keys) {
      float product = 0.0f;
      for (int d = 0; d < a.dim; ++d)
        product = fmaf(q_row[d], k_tile[lane * (a.dim + 1) + d], product);
      s = block.logit(product, row, base_key + lane, slope);
    }
    const float maximum = larger(state.maximum, warp_max(s));
    const float base = exponent_base(maximum, a.empty_maximum);
    const float p = lane < keys ? weight(s, base) : 0.0f, alpha = weight(state.maximum, base);
    state = {maximum, state.sum * alpha + warp_sum(p)};
    p_row[lane] = p;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kMaxAttentionHeadDim / 32; ++i) {
      const int d = lane + 32 * i;
      if (d >= a.v_dim) break;
      o[i] *= alpha;
      for (int j = 0; j < keys; ++j) o[i] = fmaf(p_row[j], v_tile[j * a.v_dim + d], o[i]);
    }
    __syncwarp();
  }
  if (!mine) return;

  float lse;
  const float scale = finish_row(block, row, state, &lse);
  const std::int64_t token = block.token_of(row);
  const int head = block.head_of(row);
  const std::int64_t part = part_of(a, block.split, token, head);
  for (int i = 0; lane + 32 * i < a.v_dim; ++i) {
    const int d = lane + 32 * i;
    if (a.splits > 1) {
      a.parts[part * a.v_dim + d] = o[i] * scale;
    } else {
      a.out.data[token * a.out.row_stride + head * std::int64_t(a.v_dim) + d] =
          from_float<T>(o[i] * scale);
    }
  }
  if (lane == 0)
    (a.splits > 1 ? part_lse(a)[part] : a.lse.data[token * a.lse.row_stride + head]) = lse;
}

}  // namespace tp
