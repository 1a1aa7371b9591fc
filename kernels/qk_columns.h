#pragma once
// Where kernels of heads find q and k.

#include "harness/base/shape.h"
#include "harness/base/tensor.h"
#include "harness/device/require.h"

namespace tp {

struct QkColumns {
  Shard q;
  Shard k;
};

// Of a rank's fused row [q | k | v, and possibly more]. Throws Fault(BadLaunch) in the name of `op`
// where the row is too narrow, or the outputs have other sizes than q and k.
template <typename T>
QkColumns qk_columns(const char* op, const View<const T>& qkv, const View<T>& q_out,
                     const View<T>& k_out, const ModelShape& model, const RankShape& rank) {
  const Shard q_cols = {0, rank.heads.size * model.head_dim};
  const Shard k_cols = {q_cols.end(), rank.kv_heads.size * model.head_dim};
  require(qkv.cols >= k_cols.end() + rank.kv_heads.size * model.value_head_dim(), op,
          "the fused row has {} columns, q, k and v need {}",
          {qkv.cols, k_cols.end() + rank.kv_heads.size * model.value_head_dim()});
  require(q_out.rows == qkv.rows && q_out.cols == q_cols.size && k_out.rows == qkv.rows &&
              k_out.cols == k_cols.size,
          op, "outputs are {} x {} and {} x {}, not {} x {} and {}",
          {q_out.rows, q_out.cols, k_out.rows, k_out.cols, qkv.rows, q_cols.size, k_cols.size});
  return {q_cols, k_cols};
}

}  // namespace tp
