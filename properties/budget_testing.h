#pragma once
// What the tests of budgets share.

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "harness/base/compare.h"
#include "harness/base/fill.h"
#include "harness/base/philox.h"
#include "harness/base/tensor.h"

namespace tp {

// All of a tensor, as an operator gets it.
inline Matrix filled(const TensorSpec& t, const DataRegime& g) {
  std::vector<std::byte> bytes(std::size_t(t.rows * t.cols * size_of(t.dtype)));
  fill_block(t, g, {0, t.rows}, {0, t.cols}, bytes.data(), t.cols);
  Matrix m(t.rows, t.cols);
  for (std::size_t i = 0; i < m.values.size(); ++i)
    m.values[i] = load(t.dtype, bytes.data(), std::int64_t(i));
  return m;
}

// Integers of both signs, none of them 0.
inline Matrix integers(const char* name, std::int64_t rows, std::int64_t cols, int largest,
                       std::uint64_t seed) {
  Matrix m(rows, cols);
  for (std::size_t i = 0; i < m.values.size(); ++i) {
    const std::uint32_t bits = philox(seed, stream_of(name), i)[0];
    m.values[i] = (1 + int(bits % std::uint32_t(largest))) * (bits >> 31 ? -1 : 1);
  }
  return m;
}

// How a twin kernel adds up.
enum class Order { ascending, descending, product_then_sum, lanes, pairwise, matrix_steps };
inline constexpr Order kOrders[] = {Order::ascending, Order::descending, Order::product_then_sum,
                                    Order::lanes,     Order::pairwise,   Order::matrix_steps};
inline constexpr std::int64_t kLanes = 8;

inline Accumulation declared(Order order, std::int64_t n) {
  switch (order) {
    case Order::product_then_sum:
      return {.depth = n + 1};
    case Order::lanes:
      return {.depth = (n + kLanes - 1) / kLanes + kLanes};
    case Order::pairwise:
      return {.depth = 2 + std::int64_t(std::ceil(std::log2(double(n))))};
    case Order::matrix_steps:
      return {.depth = (n + 15) / 16, .matrix_steps = true};
    default:
      return {.depth = n};
  }
}

inline float pairwise(const double* a, const double* b, std::int64_t n) {
  if (n == 1) return float(a[0]) * float(b[0]);
  return pairwise(a, b, n / 2) + pairwise(a + n / 2, b + n / 2, n - n / 2);
}

// Sixteen products and the sum so far, cut off below 2^-25 of the largest, added, cut off to fp32.
inline float matrix_step(float sum, const double* a, const double* b, std::int64_t n) {
  double largest = std::fabs(double(sum));
  for (std::int64_t k = 0; k < n; ++k) largest = std::max(largest, std::fabs(a[k] * b[k]));
  if (largest == 0) return 0;
  const double unit = std::ldexp(1.0, std::ilogb(largest) - 25);
  double total = std::trunc(double(sum) / unit);
  for (std::int64_t k = 0; k < n; ++k) total += std::trunc(a[k] * b[k] / unit);
  if (total == 0) return 0;
  const double ulp = std::ldexp(1.0, std::max(0, std::ilogb(total) - 23));
  return float(std::trunc(total / ulp) * ulp * unit);
}

inline float twin_sum(Order order, const double* a, const double* b, std::int64_t n) {
  float sum = 0;
  switch (order) {
    case Order::ascending:
      for (std::int64_t k = 0; k < n; ++k) sum = std::fma(float(a[k]), float(b[k]), sum);
      return sum;
    case Order::descending:
      for (std::int64_t k = n - 1; k >= 0; --k) sum = std::fma(float(a[k]), float(b[k]), sum);
      return sum;
    case Order::product_then_sum:
      for (std::int64_t k = 0; k < n; ++k) sum += float(a[k]) * float(b[k]);
      return sum;
    case Order::lanes: {
      float lane[kLanes] = {};
      for (std::int64_t k = 0; k < n; ++k)
        lane[k % kLanes] = std::fma(float(a[k]), float(b[k]), lane[k % kLanes]);
      return std::accumulate(lane, lane + kLanes, 0.0f);
    }
    case Order::pairwise:
      return pairwise(a, b, n);
    case Order::matrix_steps:
      for (std::int64_t k = 0; k < n; k += 16)
        sum = matrix_step(sum, a + k, b + k, std::min<std::int64_t>(16, n - k));
      return sum;
  }
  return sum;
}

inline float rounded(DType t, float v) { return float(round_to(t, v)); }

}  // namespace tp
