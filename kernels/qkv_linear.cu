#include "harness/device/matmul.h"
#include "harness/device/require.h"
#include "kernels/qkv_linear.h"

namespace tp {

std::int64_t qkv_width(const ModelShape& model, const RankShape& rank) {
  return rank.heads.size * model.query_dim() +
         rank.kv_heads.size * (model.head_dim + model.value_head_dim());
}

template <typename T>
void qkv_linear(View<const T> x, View<const T> weight, View<const T> bias, View<T> qkv,
                const ModelShape& model, const RankShape& rank, Stream& stream) {
  const std::int64_t width = qkv_width(model, rank);
  require(weight.rows == width, "qkv_linear", "the weight has {} rows, q, k and v need {}",
          {weight.rows, width});
  require(bias.rows == 0 || bias.cols == width, "qkv_linear",
          "the bias has {} elements, q, k and v need {}", {bias.cols, width});
  matmul<T>(x, weight, bias.rows == 0 ? nullptr : bias.data, qkv, stream);
}

template void qkv_linear(View<const float>, View<const float>, View<const float>, View<float>,
                         const ModelShape&, const RankShape&, Stream&);
template void qkv_linear(View<const f16>, View<const f16>, View<const f16>, View<f16>,
                         const ModelShape&, const RankShape&, Stream&);
template void qkv_linear(View<const bf16>, View<const bf16>, View<const bf16>, View<bf16>,
                         const ModelShape&, const RankShape&, Stream&);

}  // namespace tp
