#include "kernels/attention_parts.cuh"
#include "kernels/attention_testing.h"

namespace tp::testing {

void merge_states(float* parts, std::int64_t splits, std::int64_t rows, std::int64_t dim,
                  float* out, float* lse, Stream& stream) {
  AttentionLaunch<float> a{};
  a.q = {nullptr, rows, dim, dim};
  a.out = {out, rows, dim, dim};
  a.lse = {lse, rows, 1, 1};
  a.parts = parts;
  a.splits = int(splits);
  a.heads = 1;
  a.v_dim = int(dim);
  const unsigned warps = unsigned(splits + kMergedByWarp - 1) / kMergedByWarp;
  launch("attention.merge", merge_kernel<float, 1>, dim3(unsigned(rows)), dim3(32 * warps),
         std::size_t(warps * dim) * sizeof(float), stream, a);
}

}  // namespace tp::testing
