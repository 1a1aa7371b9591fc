#pragma once
// LoRA in double: what a token's own adapter makes of its activations, and how far a correct
// kernel may be off (numerics.md 5.5). Adapters are as they are on disk, not sharded; each token is
// computed by itself.

#include <cmath>
#include <cstdint>
#include <vector>

#include "reference/checkpoint.h"
#include "reference/product.h"

namespace tp::reference {

// The adapter of each token: an index into a list of matrices, or -1.
using AdapterOfToken = std::vector<std::int32_t>;

inline std::vector<std::int64_t> tokens_of(const AdapterOfToken& adapters, std::size_t adapter) {
  std::vector<std::int64_t> tokens;
  for (std::size_t t = 0; t < adapters.size(); ++t) {
    if (adapters[t] == std::int32_t(adapter)) tokens.push_back(std::int64_t(t));
  }
  return tokens;
}

// h[t] = A_(adapter of t) x[t], over the columns `inner` of x: [tokens, most rows of any A], zeros
// beyond an adapter's own LoRA rank and for tokens of none. Before it is stored.
inline Budget lora_shrink(const Matrix& x, const std::vector<Matrix>& a,
                          const AdapterOfToken& adapters, Shard inner,
                          const Accumulation& accumulation) {
  std::int64_t cols = 0;
  for (const Matrix& m : a) cols = std::max(cols, m.rows);
  Budget h(x.rows, cols);
  for (std::size_t which = 0; which < a.size(); ++which) {
    const std::vector<std::int64_t> tokens = tokens_of(adapters, which);
    const Budget mine =
        product(taken_rows(x, tokens), a[which], inner, nullptr, accumulation, false);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      for (std::int64_t j = 0; j < mine.cols; ++j) {
        const std::size_t from = i * std::size_t(mine.cols) + std::size_t(j),
                          to = std::size_t(tokens[i] * cols + j);
        h.r[to] = mine.r[from];
        h.rho[to] = mine.rho[from];
      }
    }
  }
  return h;
}

// scale v before something is added to it: rounded to fp32, or not, where one fmaf does both.
//
// What v may be off is scaled, too. If v is known exactly, it is a float, and the product of two of
// them has 48 bits: a kernel goes on with just that or with its rounding, and the budget reaches
// from the one to the other, its middle exact in double. Otherwise it may be any rounding of a
// value up to |r| + |scale| rho; and r itself is one of a double.
// A product that overflows fp32 does so only where it is rounded by itself: such an element is not
// checked.
inline Bounded scaled_in_passing(const Bounded& v, float scale) {
  const double r = double(scale) * v.r, rho = std::fabs(double(scale)) * v.rho;
  if (std::isinf(round_to(DType::f32, std::fabs(r) + rho))) return {r, HUGE_VAL};
  if (v.rho == 0) {
    const double rounded = round_to(DType::f32, r);
    return {(r + rounded) / 2, std::fabs(r - rounded) / 2};
  }
  return stored(DType::f32, {r, rho + 0x1p-53 * std::fabs(r)});
}

// What an adapter adds to a matrix; b == nullptr: nothing.
struct LoraDelta {
  const Matrix* b = nullptr;
  const Matrix* bias = nullptr;
  float scale = 1;
  Accumulation accumulation = {};  // over b's columns
};

// y[t] = base[t] + scale (B_(adapter of t) h[t] + bias): h is rounded to type `operand` before the
// product, where every h has been computed as it stands; B [out, LoRA rank] of each adapter, scales
// and biases ([1, out], or nullptr) likewise. The sum, scaling and adding are made in fp32. Before
// the last rounding, to type `out`, which compare() knows.
//
// The budget, step by step; each is 0 where fp32 has the result exactly:
//  - h as it is rounded is exact: the kernel's own h is given, and rounding is no matter of order.
//  - B h and + bias: product(), ACC and one rounding to fp32 of the bias's sum.
//  - scaling: scaled_in_passing().
//  - + base: plus(), one rounding to fp32, or to `out` where that is fp32.
// What is not finite in h or in base is so in y, in any order.
inline Budget lora_expand(const Matrix& base, const Matrix& h, const std::vector<LoraDelta>& deltas,
                          const AdapterOfToken& adapters, DType operand, DType out) {
  Budget y(base.rows, base.cols);
  y.r = base.values;
  for (std::size_t which = 0; which < deltas.size(); ++which) {
    const LoraDelta& delta = deltas[which];
    if (delta.b == nullptr) continue;
    const std::vector<std::int64_t> tokens = tokens_of(adapters, which);
    Matrix operands = taken_rows(h, tokens);
    for (double& v : operands.values) v = round_to(operand, v);
    const Budget sums =
        product(operands, *delta.b, {0, delta.b->cols}, delta.bias, delta.accumulation,
                /*bias_is_last=*/false);
    for (std::size_t i = 0; i < tokens.size(); ++i) {
      for (std::int64_t j = 0; j < sums.cols; ++j) {
        const std::size_t from = i * std::size_t(sums.cols) + std::size_t(j),
                          to = std::size_t(tokens[i] * base.cols + j);
        const double addend = base.values[to];
        Bounded v = {double(delta.scale) * sums.r[from] + addend, 0};
        if (std::isfinite(v.r)) {
          v = plus(scaled_in_passing({sums.r[from], sums.rho[from]}, delta.scale), addend,
                   out == DType::f32);
        }
        y.r[to] = v.r;
        y.rho[to] = v.rho;
      }
    }
  }
  return y;
}

}  // namespace tp::reference
