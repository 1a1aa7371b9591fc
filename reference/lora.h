#pragma once
// LoRA in double: what a token's own adapter makes of its activations, and how far a correct
// kernel may be off (numerics.md 5.5). Adapters are as they are on disk, not sharded; each token is
// computed by itself.

#include <cstdint>
#include <vector>

#include "reference/product.h"

namespace tp::reference {

// The adapter of each token: an index into a list of matrices, or -1.
using AdapterOfToken = std::vector<std::int32_t>;

// h[t] = A_(adapter of t) x[t], over the columns `inner` of x: [tokens, most rows of any A], zeros
// beyond an adapter's own LoRA rank and for tokens of none. Before it is stored.
Budget lora_shrink(const Matrix& x, const std::vector<Matrix>& a, const AdapterOfToken& adapters,
                   Shard inner, const Accumulation& accumulation);

// y[t] = base[t] + scale (B_(adapter of t) h[t] + bias): h is rounded to type `operand` before the
// product, where every h has been computed as it stands; B [out, LoRA rank] of each adapter, scales
// and biases ([1, out], or nullptr) likewise. The sum, scaling and adding are made in fp32. Before
// the last rounding, to type `out`, which compare() knows.
struct LoraDelta {
  const Matrix* b = nullptr;
  const Matrix* bias = nullptr;
  float scale = 1;
};
Budget lora_expand(const Matrix& base, const Matrix& h, const std::vector<LoraDelta>& deltas,
                   const AdapterOfToken& adapters, DType operand, const Accumulation& accumulation,
                   DType out);

}  // namespace tp::reference
