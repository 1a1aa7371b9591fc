// matmul against plain loops: exact data bit by bit at every awkward size, and dense data within
// what its Accumulation declares.

#include "harness/device/matmul.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <random>

#include "harness/device/testing.h"

namespace tp::testing {
namespace {

struct Size {
  std::int64_t m, n, k;
};

// A matrix on the host with `pad` elements between its rows, after `offset` elements of another's.
template <typename T>
struct Host {
  std::int64_t rows, cols, offset, stride;
  std::vector<T> values;

  Host(std::int64_t rows, std::int64_t cols, std::int64_t offset, std::int64_t pad)
      : rows(rows),
        cols(cols),
        offset(offset),
        stride(cols + pad),
        values(std::size_t(offset + rows * stride), from_float<T>(NAN)) {}
  T& at(std::int64_t i, std::int64_t j) { return values[std::size_t(offset + i * stride + j)]; }
  View<T> on(const Buffer& buffer) const { return {buffer.as<T>() + offset, rows, cols, stride}; }
};

template <typename T, typename Out>
struct OneProduct {
  Host<T> x, w, bias;
  Host<Out> out;

  OneProduct(Size s, std::int64_t offset, std::int64_t pad)
      : x(s.m, s.k, offset, pad),
        w(s.n, s.k, offset, pad),
        bias(1, s.n, 0, 0),
        out(s.m, s.n, offset, pad) {}

  template <typename F>
  void fill(F value) {
    for (std::int64_t i = 0; i < x.rows; ++i)
      for (std::int64_t k = 0; k < x.cols; ++k) x.at(i, k) = from_float<T>(value());
    for (std::int64_t j = 0; j < w.rows; ++j) {
      for (std::int64_t k = 0; k < w.cols; ++k) w.at(j, k) = from_float<T>(value());
      bias.at(0, j) = from_float<T>(value());
    }
  }
  void go(bool with_bias) {
    const Report report = run_rank([&](Stream& stream) {
      const Buffer xs = upload(stream, x.values), ws = upload(stream, w.values),
                   biases = upload(stream, bias.values), outs = upload(stream, out.values);
      matmul<T, Out>(x.on(xs), w.on(ws), with_bias ? biases.template as<T>() : nullptr,
                     out.on(outs), stream);
      out.values = download<Out>(stream, outs);
    });
    ASSERT_FALSE(report.fault) << report.fault->what;
  }
  // What lies between the rows is nobody's.
  void expect_pads_untouched() const {
    for (std::size_t i = 0; i < out.values.size(); ++i) {
      const std::int64_t at = std::int64_t(i) - out.offset;
      if (at < 0 || at % out.stride >= out.cols) {
        ASSERT_TRUE(std::isnan(to_float(out.values[i])));
      }
    }
  }
};

// Integers of both signs, few enough for every order to be exact.
template <typename T, typename Out>
void expect_exact(Size s, std::int64_t offset, std::int64_t pad, bool with_bias) {
  SCOPED_TRACE(::testing::Message() << s.m << " x " << s.n << " x " << s.k << ", offset " << offset
                                    << ", pad " << pad << ", bias " << with_bias);
  std::mt19937 generator(unsigned(s.m * 31 + s.n * 7 + s.k));
  OneProduct<T, Out> run(s, offset, pad);
  run.fill([&] { return float(int(1 + generator() % 3) * (generator() % 2 ? 1 : -1)); });
  run.go(with_bias);
  for (std::int64_t i = 0; i < s.m; ++i) {
    for (std::int64_t j = 0; j < s.n; ++j) {
      float sum = with_bias ? to_float(run.bias.at(0, j)) : 0.0f;
      for (std::int64_t k = 0; k < s.k; ++k)
        sum += to_float(run.x.at(i, k)) * to_float(run.w.at(j, k));
      ASSERT_EQ(to_float(run.out.at(i, j)), to_float(from_float<Out>(sum))) << i << "," << j;
    }
  }
  run.expect_pads_untouched();
}

template <typename T, typename Out>
void expect_exact_everywhere() {
  for (const Size s : {Size{1, 1, 1}, Size{1, 33, 8}, Size{3, 5, 7}, Size{16, 32, 64},
                       Size{17, 31, 65}, Size{64, 40, 100}, Size{65, 130, 33}, Size{129, 7, 300}}) {
    expect_exact<T, Out>(s, 0, 0, false);
    expect_exact<T, Out>(s, 0, 8, true);  // aligned rows wherever k allows it
    expect_exact<T, Out>(s, 1, 3, true);
  }
  // Rows that come by 16-byte copies, in more tiles than are on their way at a time.
  for (const Size s : {Size{16, 40, 320}, Size{33, 40, 576}, Size{130, 136, 320}}) {
    expect_exact<T, Out>(s, 0, 0, false);
    expect_exact<T, Out>(s, 0, 8, true);
  }
}

TEST(Matmul, IsExactForExactDataAtEverySize) {
  expect_exact_everywhere<float, float>();
  expect_exact_everywhere<f16, f16>();
  expect_exact_everywhere<f16, float>();
  expect_exact_everywhere<bf16, bf16>();
  expect_exact_everywhere<bf16, float>();
}

TEST(Matmul, AddsFloatsInAscendingOrder) {
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  OneProduct<float, float> run({5, 70, 77}, 0, 0);
  run.fill([&] { return normal(generator); });
  run.go(true);
  for (std::int64_t i = 0; i < 5; ++i) {
    for (std::int64_t j = 0; j < 70; ++j) {
      float sum = 0;
      for (std::int64_t k = 0; k < 77; ++k) sum = std::fma(run.x.at(i, k), run.w.at(j, k), sum);
      ASSERT_EQ(run.out.at(i, j), sum + run.bias.at(0, j));
    }
  }
}

// Few rows and many take other tiles: the bits of an element must not know. And none may be farther
// off than the profile says.
template <typename T>
void expect_the_declared_error() {
  std::mt19937 generator(5);
  std::normal_distribution<float> normal;
  OneProduct<T, float> many({80, 24, 200}, 0, 0), few({16, 24, 200}, 1, 1);
  many.fill([&] { return normal(generator); });
  few.w = Host<T>(24, 200, 1, 1);
  for (std::int64_t j = 0; j < 24; ++j)
    for (std::int64_t k = 0; k < 200; ++k) few.w.at(j, k) = many.w.at(j, k);
  for (std::int64_t i = 0; i < 16; ++i)
    for (std::int64_t k = 0; k < 200; ++k) few.x.at(i, k) = many.x.at(i, k);
  many.go(false);
  few.go(false);
  const Accumulation profile = matmul_accumulation(dtype_of<T>::value, 200);
  bool any_error = false;
  for (std::int64_t i = 0; i < 80; ++i) {
    for (std::int64_t j = 0; j < 24; ++j) {
      double sum = 0, magnitude = 0;
      for (std::int64_t k = 0; k < 200; ++k) {
        const double product =
            double(to_float(many.x.at(i, k))) * double(to_float(many.w.at(j, k)));
        sum += product;
        magnitude += std::fabs(product);
      }
      const double error = std::fabs(many.out.at(i, j) - sum);
      ASSERT_LE(error, profile.error() * magnitude + 200 * 0x1p-53 * magnitude);
      any_error |= error > 0;
      if (i < 16) {
        ASSERT_EQ(few.out.at(i, j), many.out.at(i, j));
      }
    }
  }
  EXPECT_TRUE(any_error);
}

TEST(Matmul, IsAsPreciseAsDeclaredAndTheSameInAnyTile) {
  expect_the_declared_error<float>();
  expect_the_declared_error<f16>();
  expect_the_declared_error<bf16>();
}

// More blocks of rows than the second dimension of a grid has room for.
TEST(Matmul, TakesMoreThanTwoMillionRows) {
  constexpr std::int64_t kRows = 65535 * 32 + 1;
  OneProduct<float, float> run({kRows, 1, 1}, 0, 0);
  int next = 0;
  run.fill([&] { return float(next++ % 1000); });
  run.go(false);
  const float w = run.w.at(0, 0);
  for (std::int64_t i = 0; i < kRows; ++i) ASSERT_EQ(run.out.at(i, 0), run.x.at(i, 0) * w) << i;
}

// Beside a subnormal operand, which counts as 2^-14, more of the other products is cut off.
TEST(Matmul, IsAsPreciseAsDeclaredBesideSubnormalOperands) {
  constexpr std::int64_t kDepth = 64;
  std::mt19937 generator(7);
  OneProduct<f16, float> run({16, 8, kDepth}, 0, 0);
  run.fill([&] { return std::ldexp(float(1024 + generator() % 1024), -18); });
  for (std::int64_t k = 0; k < kDepth; k += 16) {
    for (std::int64_t i = 0; i < 16; ++i) run.x.at(i, k) = from_float<f16>(0x1p-24f);
    for (std::int64_t j = 0; j < 8; ++j) run.w.at(j, k) = from_float<f16>(1024.0f);
  }
  run.go(false);
  const Accumulation profile = matmul_accumulation(DType::f16, kDepth);
  int beyond = 0;
  for (std::int64_t i = 0; i < 16; ++i) {
    for (std::int64_t j = 0; j < 8; ++j) {
      double sum = 0, raised = 0;  // of positive products: their sum is that of magnitudes
      for (std::int64_t k = 0; k < kDepth; ++k) {
        const double a = to_float(run.x.at(i, k)), b = to_float(run.w.at(j, k));
        sum += a * b;
        raised += profile.raised(a, b);
      }
      const double error = std::fabs(run.out.at(i, j) - sum);
      ASSERT_LE(error, profile.error() * sum + profile.cut(raised)) << i << "," << j;
      beyond += error > profile.error() * sum;
    }
  }
  EXPECT_GT(beyond, 100);
}

TEST(Matmul, RefusesSizesThatDoNotFit) {
  const std::string fault = fault_of([](Stream& stream) {
    const Buffer buffer = upload(stream, std::vector<float>(64));
    const View<float> x{buffer.as<float>(), 2, 3, 3}, w{buffer.as<float>(), 4, 5, 5};
    matmul<float, float>(x, w, nullptr, {buffer.as<float>(), 2, 4, 4}, stream);
  });
  EXPECT_EQ(fault, "BadLaunch: matmul: x is 2 x 3, w is 4 x 5, out is 2 x 4");
}

}  // namespace
}  // namespace tp::testing
