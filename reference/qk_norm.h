#pragma once
// RMSNorm over all query heads of a token, and over all key heads of a token: the full-width q/k
// norm of MiniMax-M2 and OLMo 2; and that of single heads, of Qwen3, Gemma 3 and Llama 4. It knows
// nothing of ranks: that is what makes it a reference.

#include <algorithm>

#include "reference/rms_norm.h"

namespace tp::reference {

struct QkNorm {
  Budget q;
  Budget k;
};

// q [tokens, num_heads * head_dim], k [tokens, num_kv_heads * head_dim]; weights [1, the same
// width].
inline QkNorm qk_norm(const Matrix& q, const Matrix& k, const Matrix& q_weight,
                      const Matrix& k_weight, double eps, const Profile& q_profile,
                      const Profile& k_profile) {
  return {rms_norm(q, q_weight, eps, q_profile, double(q.cols)),
          rms_norm(k, k_weight, eps, k_profile, double(k.cols))};
}

// What the norms of single heads multiply with: weight_offset + weight[j], j being the column
// within a head; 1 without a weight.
struct HeadWeight {
  const Matrix* weight = nullptr;  // [1, head_dim]
  double offset = 0;
};

// x [tokens, heads * head_dim]. `width`: columns that one mean spans, head_dim for the norm as it
// is defined; another one is how a wrong kernel would look (see discrimination in properties/).
inline Budget head_norm(const Matrix& x, const HeadWeight& head_weight, std::int64_t head_dim,
                        std::int64_t width, double eps, const Profile& profile) {
  Budget out(x.rows, x.cols);
  Matrix group(1, width), weight(1, width);
  for (std::size_t at = 0; at < x.values.size(); at += std::size_t(width)) {
    std::copy_n(x.values.begin() + std::ptrdiff_t(at), width, group.values.begin());
    for (std::int64_t j = 0; j < width; ++j) {
      const std::size_t col = (at + std::size_t(j)) % std::size_t(head_dim);
      weight.values[std::size_t(j)] =
          head_weight.weight ? head_weight.offset + head_weight.weight->values[col] : 1;
    }
    const Budget one =
        rms_norm(group, weight, eps, profile, double(width), head_weight.offset == 0 ? 0 : 0x1p-24);
    std::copy(one.r.begin(), one.r.end(), out.r.begin() + std::ptrdiff_t(at));
    std::copy(one.rho.begin(), one.rho.end(), out.rho.begin() + std::ptrdiff_t(at));
  }
  return out;
}

}  // namespace tp::reference
