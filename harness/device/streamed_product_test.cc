// Products that are streamed, in every tiling and at its borders, and those of more rows, which a
// library makes where there is one: exact data bit by bit, dense data with the same bits in any
// tiling, and within the budget that is declared.

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "harness/device/library_product.h"
#include "harness/device/matmul.h"
#include "harness/device/scaled_matmul.h"
#include "harness/device/streamed_size.h"
#include "harness/device/testing.h"
#include "reference/scaled_product.h"

namespace tp::testing {
namespace {

// Rows of 16-byte multiples, 16 elements of nobody's between them.
template <typename T>
struct Rows {
  std::int64_t rows, cols, stride;
  std::vector<T> values;

  Rows(std::int64_t rows, std::int64_t cols)
      : rows(rows),
        cols(cols),
        stride(cols + 16),
        values(std::size_t(rows * stride), from_float<T>(NAN)) {}
  T& at(std::int64_t i, std::int64_t k) { return values[std::size_t(i * stride + k)]; }
  View<T> on(const Buffer& buffer) const { return {buffer.as<T>(), rows, cols, stride}; }
};

constexpr float kXScale = 0.25f, kWScale = 8;

// out = x w^T + bias of T, or of codes with these scales.
template <typename E, typename Out>
struct Streamed {
  using Bias = std::conditional_t<std::is_same_v<E, e4m3>, Out, E>;
  Rows<E> x, w;
  Rows<Bias> bias;
  Rows<Out> out;

  template <typename F>
  Streamed(std::int64_t m, std::int64_t n, std::int64_t k, F draw)
      : x(m, k), w(n, k), bias(1, n), out(m, n) {
    for (std::int64_t i = 0; i < m; ++i)
      for (std::int64_t c = 0; c < k; ++c) x.at(i, c) = from_float<E>(draw(0, i, c));
    for (std::int64_t j = 0; j < n; ++j) {
      for (std::int64_t c = 0; c < k; ++c) w.at(j, c) = from_float<E>(draw(1, j, c));
      bias.at(0, j) = from_float<Bias>(draw(2, j, 0));
    }
  }
  void go(bool with_bias) {
    const Report report = run_rank([&](Stream& stream) {
      const Buffer xs = upload(stream, x.values), ws = upload(stream, w.values),
                   biases = upload(stream, bias.values), outs = upload(stream, out.values),
                   x_scale = upload(stream, std::vector<float>{kXScale}),
                   w_scale = upload(stream, std::vector<float>{kWScale});
      const Bias* b = with_bias ? biases.template as<Bias>() : nullptr;
      if constexpr (std::is_same_v<E, e4m3>) {
        scaled_matmul<e4m3, View<const e4m3>, Out, Out>(x.on(xs), {.data = x_scale.as<float>()},
                                                        w.on(ws), {.data = w_scale.as<float>()}, b,
                                                        out.on(outs), stream);
      } else {
        matmul<E, Out>(x.on(xs), w.on(ws), b, out.on(outs), stream);
      }
      out.values = download<Out>(stream, outs);
    });
    ASSERT_FALSE(report.fault) << report.fault->what;
  }
  float scale() const { return std::is_same_v<E, e4m3> ? kXScale * kWScale : 1.0f; }
};

// Few enough whole numbers for every order to be exact, also where 14 bits are kept.
float whole(int what, std::int64_t i, std::int64_t k) {
  const std::uint32_t h = std::uint32_t(what * 7919 + i * 104729 + k * 1299709) * 2654435761u;
  return float(int(1 + (h >> 20) % 2) * ((h >> 30) % 2 ? 1 : -1));
}

template <typename E, typename Out>
void expect_exact(std::int64_t m, std::int64_t n, std::int64_t k, bool with_bias) {
  SCOPED_TRACE(::testing::Message() << m << " x " << n << " x " << k << ", bias " << with_bias);
  Streamed<E, Out> run(m, n, k, whole);
  run.go(with_bias);
  const std::int64_t step = n > 200 ? 31 : 1;  // the last ones, and some of the others
  for (std::int64_t i = 0; i < m; ++i) {
    for (std::int64_t j = n - 1; j >= 0; j -= step) {
      float sum = 0;
      for (std::int64_t c = 0; c < k; ++c)
        sum += to_float(run.x.at(i, c)) * to_float(run.w.at(j, c));
      sum = sum * run.scale() + (with_bias ? to_float(run.bias.at(0, j)) : 0.0f);
      ASSERT_EQ(to_float(run.out.at(i, j)), to_float(from_float<Out>(sum))) << i << "," << j;
    }
    for (std::int64_t j = n; j < run.out.stride; ++j) {
      ASSERT_TRUE(std::isnan(to_float(run.out.at(i, j))));
    }
  }
}

// On both sides of what the tilings are chosen by. No such number of rows of w is the library's.
constexpr std::int64_t kWidths[] = {8, 3832, 3848, 7688, 11528};

TEST(StreamedProduct, IsExactForExactDataInEveryTiling) {
  for (const std::int64_t n : kWidths) {
    for (const std::int64_t m : {3, 16, 17}) {
      if (n > 8 && m == 16) continue;
      expect_exact<bf16, bf16>(m, n, 272, m == 3);
      expect_exact<e4m3, float>(m, n, 272, m == 17);
    }
  }
  expect_exact<f16, f16>(5, 24, 264, true);
  // More tokens than a block takes, and rows of one chunk and of more chunks than are on their way.
  for (const std::int64_t k : {256, 1024, 2576}) {
    expect_exact<bf16, float>(70, 24, k, true);
    expect_exact<e4m3, bf16>(70, 24, k, true);
  }
}

template <typename E>
void expect_the_same_bits() {
  std::mt19937 generator(9);
  std::normal_distribution<float> normal;
  std::vector<float> drawn(1 << 16);
  for (float& v : drawn) v = normal(generator);
  const auto draw = [&](int what, std::int64_t i, std::int64_t k) {
    return drawn[std::size_t(what * 31 + i * 797 + k) % drawn.size()];
  };
  Streamed<E, float> most(70, 24, 400, draw);
  most.go(false);
  for (const auto& [m, n] :
       {std::pair<std::int64_t, std::int64_t>{1, 8}, {16, 3848}, {17, 11528}}) {
    Streamed<E, float> other(m, n, 400, draw);
    other.go(false);
    for (std::int64_t i = 0; i < m; ++i) {
      for (std::int64_t j = 0; j < std::min<std::int64_t>(n, 24); ++j) {
        ASSERT_EQ(other.out.at(i, j), most.out.at(i, j))
            << i << "," << j << " of " << m << " x " << n;
      }
    }
  }
}

TEST(StreamedProduct, HasTheSameBitsInAnyTiling) {
  expect_the_same_bits<bf16>();
  expect_the_same_bits<e4m3>();
}

// Whoever makes them, on either side of kMostStreamedRows.
TEST(StreamedProduct, IsExactForExactDataOfWhoeverMakesIt) {
  for (const std::int64_t m : {kMostStreamedRows, kMostStreamedRows + 1, std::int64_t{130}}) {
    for (const bool bias : {false, true}) {
      expect_exact<bf16, bf16>(m, 48, 272, bias);
      expect_exact<f16, f16>(m, 48, 256, bias);
      expect_exact<bf16, float>(m, 64, 1024, bias);
      expect_exact<e4m3, bf16>(m, 48, 272, bias);
      expect_exact<e4m3, float>(m, 64, 1024, bias);
    }
  }
}

template <typename E>
Matrix matrix(Rows<E>& rows) {
  Matrix m(rows.rows, rows.cols);
  for (std::int64_t i = 0; i < m.rows; ++i)
    for (std::int64_t k = 0; k < m.cols; ++k) m.row(i)[k] = to_float(rows.at(i, k));
  return m;
}

TEST(StreamedProduct, IsAsPreciseAsDeclaredWhoeverMakesIt) {
  std::mt19937 generator(13);
  std::normal_distribution<float> normal;
  const auto draw = [&](int, std::int64_t, std::int64_t) { return normal(generator); };
  for (const std::int64_t m : {kMostStreamedRows, std::int64_t{64}}) {
    Streamed<e4m3, float> run(m, 48, 1024, draw);
    run.go(false);
    Matrix x_scale(1, 1), w_scale(1, 1);
    x_scale.values = {kXScale};
    w_scale.values = {kWScale};
    const auto score = [&](const Accumulation& accumulation) {
      const Budget budget =
          reference::scaled_product(matrix(run.x), {.values = &x_scale}, matrix(run.w),
                                    {.values = &w_scale}, {0, 1024}, nullptr, accumulation, true);
      std::vector<float> out;
      for (std::int64_t i = 0; i < m; ++i)
        for (std::int64_t j = 0; j < 48; ++j) out.push_back(run.out.at(i, j));
      const Comparison c = compare(DType::f32, out.data(), budget);
      return std::pair{c.score, c.first.has_value()};
    };
    const auto [of_declared, rejected] = score(tensor_scaled_accumulation(m, 1024));
    EXPECT_FALSE(rejected) << m;
    EXPECT_GT(of_declared, 0.0001);
    // It is no wide budget where our own steps make the product.
    if (!library_takes(DType::e4m3, m, 1024)) {
      EXPECT_FALSE(score(scaled_accumulation(DType::e4m3, 1024)).second) << m;
    }
  }
}

}  // namespace
}  // namespace tp::testing
