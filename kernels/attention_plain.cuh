#pragma once
// Attention in fp32: a warp for every few rows of the pack, a lane for each key of a tile, then for
// each column of the output.

#include "kernels/attention_parts.cuh"

namespace tp {

inline constexpr int kPlainTile = 32;

// Floats of shared memory for a block of `warps` warps of `rows` rows each.
inline std::int64_t plain_shared_floats(int dim, int v_dim, int warps, int rows) {
  // q and weights first, of which a warp's rows are read as one vector; k's rows lie one column
  // further apart than they are wide, so that the lanes' begin in different banks.
  return std::int64_t{warps} * rows * (dim + kPlainTile) +
         std::int64_t{kPlainTile} * (dim + 1 + v_dim);
}

// kRows: of a warp, all multiplied with a value of k or v that is loaded once.
template <typename T, int kRows>
__global__ void attention_plain_kernel(AttentionLaunch<T> a) {
  const AttentionBlock<T> block = AttentionBlock<T>::of_grid(a);
  if (!block.has_row(block.first_row)) return;  // the whole block: this sequence is a short one
  const int warps = int(blockDim.x / 32), warp = int(threadIdx.x / 32),
            lane = int(threadIdx.x % 32), first_row = block.first_row + warp * kRows;
  using Rows = Vec<float, kRows>;
  Rows* q_rows = dynamic_shared<Rows>() + warp * (a.dim + kPlainTile);  // [dim]
  Rows* p_rows = q_rows + a.dim;                                        // [keys]
  float* k_tile = dynamic_shared<float>() + warps * kRows * (a.dim + kPlainTile);
  float* v_tile = k_tile + kPlainTile * (a.dim + 1);

  AttentionRow rows[kRows];
  SoftmaxState state[kRows];
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + r;
    rows[r] = AttentionRow(block, row);
    state[r] = {a.hidden_logit, 0.0f};
    const T* q =
        a.q.data + block.token_of(row) * a.q.row_stride + block.head_of(row) * std::int64_t(a.dim);
    for (int d = lane; d < a.dim; d += 32)
      q_rows[d][r] = block.has_row(row) ? to_float(q[d]) : 0.0f;
  }
  float o[kMaxAttentionHeadDim / 32][kRows] = {};
  const int end = block.end_tile();
  for (int tile = block.first_tile(); tile < end; ++tile) {
    const int first_key = tile * kPlainTile, keys = min(kPlainTile, block.end_key() - first_key);
    __syncthreads();  // the tile before is read by all
    for (int j = warp; j < keys; j += warps) {
      const bool seen = block.is_seen(first_key + j);
      const T* k = seen ? block.key(first_key + j) : nullptr;
      const T* v = seen ? block.value(first_key + j) : nullptr;
      for (int d = lane; d < a.dim; d += 32)
        k_tile[j * (a.dim + 1) + d] = seen ? to_float(k[d]) : 0.0f;
      for (int d = lane; d < a.v_dim; d += 32)
        v_tile[j * a.v_dim + d] = seen ? to_float(v[d]) : 0.0f;
    }
    __syncthreads();
    if (!block.has_row(first_row)) continue;
    float product[kRows] = {};
    if (lane < keys) {
      for (int d = 0; d < a.dim; ++d) {
        const float k = k_tile[lane * (a.dim + 1) + d];
        const Rows q = load_vector<float, kRows>(&q_rows[d][0]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) product[r] = fmaf(q[r], k, product[r]);
      }
    }
    float alpha[kRows];
    Rows p;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float s = product[r] * a.scale;
      if (a.softcap > 0.0f) s = capped(s, a.softcap);
      if (a.slopes != nullptr) s -= rows[r].bias(first_key + lane);
      if (lane >= keys || !rows[r].sees(first_key + lane)) s = a.hidden_logit;
      const float maximum = fmaxf(state[r].maximum, warp_max(s));
      const float base = exponent_base(maximum, a.empty_maximum);
      p[r] = lane < keys ? weight(s, base) : 0.0f;
      alpha[r] = weight(state[r].maximum, base);
      state[r] = {maximum, state[r].sum * alpha[r] + warp_sum(p[r])};
    }
    store_vector<float, kRows>(&p_rows[lane][0], p);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kMaxAttentionHeadDim / 32; ++i) {
      const int d = lane + 32 * i;
      if (d >= a.v_dim) break;
#pragma unroll
      for (int r = 0; r < kRows; ++r) o[i][r] *= alpha[r];
      for (int j = 0; j < keys; ++j) {
        const float v = v_tile[j * a.v_dim + d];
        const Rows weights = load_vector<float, kRows>(&p_rows[j][0]);
#pragma unroll
        for (int r = 0; r < kRows; ++r) o[i][r] = fmaf(weights[r], v, o[i][r]);
      }
    }
  }

#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int row = first_row + r;
    if (!block.has_row(row)) return;
    const RowResult<T> result(block, row, state[r]);
#pragma unroll
    for (int i = 0; i < kMaxAttentionHeadDim / 32; ++i) {
      const int d = lane + 32 * i;
      if (d < a.v_dim) result.store(d, o[i][r]);
    }
    if (lane == 0) result.store_lse();
  }
}

}  // namespace tp
