#pragma once
// RMSNorm over all query heads of a token, and over all key heads of a token: the full-width q/k
// norm of MiniMax-M2 and OLMo 2. It knows nothing of ranks: that is what makes it a reference.

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

}  // namespace tp::reference
