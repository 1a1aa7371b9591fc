// scaled_matmul against plain loops: exact data bit by bit, for every kind of weight, at sizes,
// strides and borders of blocks that fall on no step of the tensor cores; one column a block, where
// the declared order shows; and dense data within the budget of the reference.

#include "harness/device/scaled_matmul.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <random>
#include <type_traits>
#include <vector>

#include "harness/device/testing.h"
#include "reference/scaled_product.h"

namespace tp::testing {
namespace {

struct Size {
  std::int64_t m, n, k;
};

// Where a matrix lies in its buffer, in elements.
struct Place {
  std::int64_t offset = 0, pad = 0;
};

template <typename V>
struct Host {
  std::int64_t rows, cols, offset, stride;
  std::vector<V> values;

  Host(std::int64_t rows, std::int64_t cols, Place place = {})
      : rows(rows),
        cols(cols),
        offset(place.offset),
        stride(cols + place.pad),
        values(std::size_t(offset + rows * stride)) {
    std::memset(static_cast<void*>(values.data()), 0xFF, values.size() * sizeof(V));  // NaN
  }
  V& at(std::int64_t i, std::int64_t j) { return values[std::size_t(offset + i * stride + j)]; }
  const V& at(std::int64_t i, std::int64_t j) const {
    return values[std::size_t(offset + i * stride + j)];
  }
  View<V> on(const Buffer& buffer) const { return {buffer.as<V>() + offset, rows, cols, stride}; }
};

// How a matrix of codes is scaled: values[i or 0][(k + first_col) / cols_per].
struct Blocks {
  bool each_row = false;
  std::int64_t cols_per = 0, first_col = 0;

  Host<float> values(std::int64_t rows, std::int64_t cols) const {
    return {each_row ? rows : 1, cols_per == 0 ? 1 : (first_col + cols + cols_per - 1) / cols_per,
            Place{0, each_row ? 2 : 0}};
  }
  Scales on(const Host<float>& values, const Buffer& buffer) const {
    return {buffer.as<float>(), each_row ? values.stride : 0, cols_per, first_col};
  }
};

// What the weight is quantised as; w.value is what the tensor cores shall multiply.
template <typename T, typename F>
struct Fp8 {
  using Type = View<const e4m3>;
  Host<e4m3> codes;

  Fp8(Size s, Place place, bool, F& draw) : codes(s.n, s.k, place) {
    for (std::int64_t j = 0; j < s.n; ++j)
      for (std::int64_t k = 0; k < s.k; ++k) codes.at(j, k) = from_float<e4m3>(draw());
  }
  float value(std::int64_t j, std::int64_t k) const { return to_float(codes.at(j, k)); }
  template <typename G>
  void with(Stream& stream, G call) const {
    const Buffer buffer = upload(stream, codes.values);
    call(Type(codes.on(buffer)));
  }
};

template <typename T, typename F>
struct Nvfp4 {
  using Type = Nvfp4Weight;
  static constexpr std::int64_t kFirstCol = 6;
  std::int64_t cols;
  Host<std::uint8_t> codes;
  Host<e4m3> scales;

  Nvfp4(Size s, Place place, bool, F& draw)
      : cols(s.k),
        codes(s.n, (s.k + 1) / 2, place),
        scales(s.n, (kFirstCol + s.k + 15) / 16, place) {
    for (std::int64_t j = 0; j < s.n; ++j) {
      for (std::int64_t b = 0; b < codes.cols; ++b)
        codes.at(j, b) = std::uint8_t(std::int64_t(std::fabs(draw()) * 37 + j * 5 + b * 3) % 256);
      for (std::int64_t g = 0; g < scales.cols; ++g) scales.at(j, g) = from_float<e4m3>(draw());
    }
  }
  float value(std::int64_t j, std::int64_t k) const {
    static const float kValues[] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
    const int code = codes.at(j, k / 2) / (k % 2 == 0 ? 1 : 16) % 16;
    return kValues[code % 8] * (code < 8 ? 1.0f : -1.0f) *
           to_float(scales.at(j, (k + kFirstCol) / 16));
  }
  template <typename G>
  void with(Stream& stream, G call) const {
    const Buffer bytes = upload(stream, codes.values), factors = upload(stream, scales.values);
    call(Type{codes.on(bytes), scales.on(factors), cols, kFirstCol});
  }
};

template <typename T, typename F>
struct Gptq {
  using Type = GptqWeight;
  static constexpr std::int64_t kGroup = 20, kFirstCol = 13;
  std::int64_t cols;
  Host<std::int32_t> codes;
  Host<f16> scales;
  std::vector<std::int32_t> groups;  // empty: kGroup columns each

  Gptq(Size s, Place place, bool in_any_order, F& draw)
      : cols(s.k),
        codes(s.n, (s.k + 7) / 8, place),
        scales((kFirstCol + s.k + kGroup - 1) / kGroup, s.n, place) {
    for (std::int64_t j = 0; j < s.n; ++j)
      for (std::int64_t b = 0; b < codes.cols; ++b)
        codes.at(j, b) = std::int32_t(std::uint32_t(std::fabs(draw()) * 1000 + 1) * 0x9E3779B9u +
                                      std::uint32_t(j * 77 + b));
    for (std::int64_t g = 0; g < scales.rows; ++g)
      for (std::int64_t j = 0; j < s.n; ++j) scales.at(g, j) = from_float<f16>(draw());
    for (std::int64_t k = 0; in_any_order && k < s.k; ++k)
      groups.push_back(std::int32_t(k * 7 % scales.rows));
  }
  float value(std::int64_t j, std::int64_t k) const {
    const std::uint32_t code = std::uint32_t(codes.at(j, k / 8)) >> 4 * (k % 8) & 15;
    const std::int64_t group = groups.empty() ? (k + kFirstCol) / kGroup : groups[std::size_t(k)];
    return to_float(from_float<T>(float(int(code) - 8) * to_float(scales.at(group, j))));
  }
  template <typename G>
  void with(Stream& stream, G call) const {
    const Buffer words = upload(stream, codes.values), factors = upload(stream, scales.values);
    const Buffer table = upload(stream, groups.empty() ? std::vector<std::int32_t>{0} : groups);
    call(Type{codes.on(words), scales.on(factors),
              groups.empty() ? nullptr : table.as<std::int32_t>(), groups.empty() ? kGroup : 0,
              cols, kFirstCol});
  }
};

// One product of random data, drawn by `draw`; its scales by `draw_scale`.
template <typename X, typename T, typename Out, template <typename, typename> typename Kind>
struct OneProduct {
  using F = std::function<float()>;
  Size s;
  Blocks x_blocks, w_blocks;
  Host<X> x;
  Kind<std::conditional_t<std::is_same_v<X, e4m3>, f16, X>, F> w;
  Host<float> x_scales, w_scales;
  Host<T> bias;
  Host<Out> out;

  OneProduct(Size s, Place place, Blocks x_blocks, Blocks w_blocks, bool in_any_order, F draw,
             F draw_scale)
      : s(s),
        x_blocks(x_blocks),
        w_blocks(w_blocks),
        x(s.m, s.k, place),
        w(s, place, in_any_order, draw),
        x_scales(x_blocks.values(s.m, s.k)),
        w_scales(w_blocks.values(s.n, s.k)),
        bias(1, s.n),
        out(s.m, s.n, place) {
    for (std::int64_t i = 0; i < s.m; ++i)
      for (std::int64_t k = 0; k < s.k; ++k) x.at(i, k) = from_float<X>(draw());
    for (std::int64_t j = 0; j < s.n; ++j) bias.at(0, j) = from_float<T>(draw());
    for (Host<float>* scales : {&x_scales, &w_scales})
      for (float& value : scales->values) value = draw_scale();
  }
  void go(bool with_bias) {
    const Report report = run_rank([&](Stream& stream) {
      const Buffer xs = upload(stream, x.values), biases = upload(stream, bias.values),
                   of_x = upload(stream, x_scales.values), of_w = upload(stream, w_scales.values),
                   outs = upload(stream, out.values);
      w.with(stream, [&](const auto& weight) {
        scaled_matmul<X, std::decay_t<decltype(weight)>, T, Out>(
            x.on(xs), x_blocks.on(x_scales, of_x), weight, w_blocks.on(w_scales, of_w),
            with_bias ? biases.template as<T>() : nullptr, out.on(outs), stream);
        out.values = download<Out>(stream, outs);
      });
    });
    ASSERT_FALSE(report.fault) << report.fault->what;
  }
  double x_scale(std::int64_t i, std::int64_t k) const { return scale(x_blocks, x_scales, i, k); }
  double w_scale(std::int64_t j, std::int64_t k) const { return scale(w_blocks, w_scales, j, k); }

  void expect_pads_untouched() const {
    for (std::size_t i = 0; i < out.values.size(); ++i) {
      const std::int64_t at = std::int64_t(i) - out.offset;
      if (at < 0 || at % out.stride >= out.cols) {
        ASSERT_TRUE(std::isnan(to_float(out.values[i])));
      }
    }
  }

 private:
  static double scale(const Blocks& blocks, const Host<float>& values, std::int64_t row,
                      std::int64_t k) {
    return values.at(blocks.each_row ? row : 0,
                     blocks.cols_per == 0 ? 0 : (k + blocks.first_col) / blocks.cols_per);
  }
};

constexpr Blocks kLayouts[][2] = {
    {{false}, {false}},  // a scale for each tensor
    {{true}, {true}},    // for each token and each row
    {{true, 128, 0}, {true, 128, 0}},
    {{true, 128, 40}, {true, 128, 40}},  // a rank that begins within a block
    {{true, 24, 5}, {true, 24, 5}},      // borders between the steps, and within the eights
    {{true, 0, 0}, {true, 40, 39}},      // only the weight is scaled in blocks
    {{true, 50, 0}, {true, 30, 7}},      // borders that are not each other's
};

// Whole numbers and powers of two, few enough for every order to be exact.
template <typename X, typename T, typename Out, template <typename, typename> typename Kind>
void expect_exact_everywhere() {
  std::mt19937 generator(11);
  const auto draw = [&] { return float(int(1 + generator() % 3) * (generator() % 2 ? 1 : -1)); };
  const auto draw_scale = [&] { return std::ldexp(1.0f, int(generator() % 4) - 2); };
  const Size sizes[] = {{1, 1, 1},    {1, 33, 8},    {3, 5, 7},     {16, 32, 64},
                        {17, 31, 65}, {33, 40, 320}, {65, 130, 33}, {70, 7, 300}};
  for (const auto& [x_blocks, w_blocks] : kLayouts) {
    for (const Size s : sizes) {
      for (const Place place : {Place{0, 0}, Place{0, 8}, Place{1, 3}}) {
        const bool with_bias = place.pad > 0, in_any_order = place.pad != 8;
        SCOPED_TRACE(::testing::Message() << s.m << " x " << s.n << " x " << s.k << ", offset "
                                          << place.offset << ", pad " << place.pad << ", blocks of "
                                          << x_blocks.cols_per << " and " << w_blocks.cols_per);
        OneProduct<X, T, Out, Kind> run(s, place, x_blocks, w_blocks, in_any_order, draw,
                                        draw_scale);
        run.go(with_bias);
        for (std::int64_t i = 0; i < s.m; ++i) {
          for (std::int64_t j = 0; j < s.n; ++j) {
            double sum = with_bias ? to_float(run.bias.at(0, j)) : 0;
            for (std::int64_t k = 0; k < s.k; ++k)
              sum += run.x_scale(i, k) * run.w_scale(j, k) * to_float(run.x.at(i, k)) *
                     run.w.value(j, k);
            ASSERT_EQ(double(float(sum)), sum) << "the test's own data are not exact";
            ASSERT_EQ(to_float(run.out.at(i, j)), to_float(from_float<Out>(float(sum))))
                << i << "," << j;
          }
        }
        run.expect_pads_untouched();
      }
    }
  }
}

TEST(ScaledMatmul, IsExactForExactDataOfFp8) {
  expect_exact_everywhere<e4m3, float, float, Fp8>();
  expect_exact_everywhere<e4m3, f16, f16, Fp8>();
  expect_exact_everywhere<e4m3, bf16, float, Fp8>();
}
TEST(ScaledMatmul, IsExactForExactDataOfFp8AndPlainActivations) {
  expect_exact_everywhere<f16, f16, f16, Fp8>();
  expect_exact_everywhere<bf16, bf16, float, Fp8>();
}
TEST(ScaledMatmul, IsExactForExactDataOfNvfp4) {
  expect_exact_everywhere<f16, f16, float, Nvfp4>();
  expect_exact_everywhere<bf16, bf16, bf16, Nvfp4>();
}
TEST(ScaledMatmul, IsExactForExactDataOfGptq) {
  expect_exact_everywhere<f16, f16, float, Gptq>();
  expect_exact_everywhere<bf16, bf16, bf16, Gptq>();
}

// A product alone is exact on a tensor core: with a column a block, what is left are the roundings
// that scaled_matmul declares, in its order.
TEST(ScaledMatmul, AddsBlocksInAscendingOrder) {
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  const auto draw = [&] { return normal(generator); };
  for (const Size s : {Size{5, 40, 77}, Size{70, 9, 50}}) {
    OneProduct<e4m3, float, float, Fp8> run(s, {}, {true, 1, 0}, {true, 1, 0}, false, draw, draw);
    run.go(true);
    for (std::int64_t i = 0; i < s.m; ++i) {
      for (std::int64_t j = 0; j < s.n; ++j) {
        float total = 0;
        for (std::int64_t k = 0; k < s.k; ++k)
          total = std::fma(to_float(run.x.at(i, k)) * run.w.value(j, k),
                           float(run.x_scale(i, k)) * float(run.w_scale(j, k)), total);
        ASSERT_EQ(run.out.at(i, j), total + run.bias.at(0, j)) << i << "," << j;
      }
    }
  }
}

// Dense data: within the reference's budget, which is no wide one; and the same bits in the tiles
// of few rows and in those of many.
template <typename X, typename T, template <typename, typename> typename Kind>
void expect_the_declared_error() {
  constexpr Size kMany{80, 24, 200}, kFew{16, 24, 200};
  for (const auto& [x_blocks, w_blocks] : kLayouts) {
    SCOPED_TRACE(::testing::Message()
                 << "blocks of " << x_blocks.cols_per << " and " << w_blocks.cols_per);
    const auto draw = [generator = std::mt19937(5),
                       normal = std::normal_distribution<float>()]() mutable {
      return normal(generator);
    };
    using Run = OneProduct<X, T, float, Kind>;
    Run many(kMany, {}, x_blocks, w_blocks, true, draw, draw),
        few(kFew, {1, 1}, x_blocks, w_blocks, true, draw, draw);
    for (std::int64_t j = 0; j < kFew.n; ++j) few.bias.at(0, j) = many.bias.at(0, j);
    for (std::int64_t i = 0; i < kFew.m; ++i) {
      for (std::int64_t k = 0; k < kFew.k; ++k) few.x.at(i, k) = many.x.at(i, k);
      for (std::int64_t b = 0; x_blocks.each_row && b < many.x_scales.cols; ++b)
        few.x_scales.at(i, b) = many.x_scales.at(i, b);
    }
    if (!x_blocks.each_row) few.x_scales = many.x_scales;
    few.w = many.w;
    few.w_scales = many.w_scales;
    many.go(true);
    few.go(true);

    const auto matrix = [](std::int64_t rows, std::int64_t cols, const auto& value) {
      Matrix m(rows, cols);
      for (std::int64_t i = 0; i < rows; ++i)
        for (std::int64_t k = 0; k < cols; ++k) m.row(i)[k] = value(i, k);
      return m;
    };
    const Matrix x = matrix(kMany.m, kMany.k,
                            [&](auto i, auto k) { return to_float(many.x.at(i, k)); }),
                 w = matrix(kMany.n, kMany.k, [&](auto j, auto k) { return many.w.value(j, k); }),
                 bias =
                     matrix(1, kMany.n, [&](auto, auto j) { return to_float(many.bias.at(0, j)); }),
                 of_x = matrix(many.x_scales.rows, many.x_scales.cols,
                               [&](auto i, auto b) { return many.x_scales.at(i, b); }),
                 of_w = matrix(many.w_scales.rows, many.w_scales.cols,
                               [&](auto j, auto b) { return many.w_scales.at(j, b); });
    std::int64_t longest = kMany.k;
    for (const std::int64_t cols : {x_blocks.cols_per, w_blocks.cols_per})
      if (cols > 0) longest = std::min(longest, cols);
    const Budget budget =
        reference::scaled_product(x, {&of_x, x_blocks.cols_per, x_blocks.first_col}, w,
                                  {&of_w, w_blocks.cols_per, w_blocks.first_col}, {0, kMany.k},
                                  &bias, scaled_accumulation(dtype_of<X>::value, longest), true);
    const Comparison c = compare(DType::f32, many.out.values.data(), budget);
    EXPECT_FALSE(c.first) << c.first->row << "," << c.first->col << " of " << c.first->count;
    EXPECT_GT(c.score, 0);
    for (std::int64_t i = 0; i < kFew.m; ++i) {
      for (std::int64_t j = 0; j < kFew.n; ++j)
        ASSERT_EQ(few.out.at(i, j), many.out.at(i, j)) << i << "," << j;
    }
  }
}

TEST(ScaledMatmul, IsAsPreciseAsDeclaredAndTheSameInAnyTile) {
  expect_the_declared_error<e4m3, float, Fp8>();
  expect_the_declared_error<f16, f16, Fp8>();
  expect_the_declared_error<bf16, bf16, Fp8>();
  expect_the_declared_error<f16, f16, Nvfp4>();
  expect_the_declared_error<bf16, bf16, Nvfp4>();
  expect_the_declared_error<f16, f16, Gptq>();
  expect_the_declared_error<bf16, bf16, Gptq>();
}

// One NaN among the codes, the scales of groups, or the scales: its row of out shows it, no other.
TEST(ScaledMatmul, ShowsNaN) {
  const auto one = [] { return 1.0f; };
  OneProduct<e4m3, f16, f16, Fp8> run({20, 20, 50}, {}, {true, 16, 3}, {true, 16, 3}, false, one,
                                      one);
  run.x.at(3, 49).bits = 0xFF;
  run.w.codes.at(4, 0).bits = 0x7F;
  run.x_scales.at(5, 2) = NAN;
  run.go(false);
  for (std::int64_t i = 0; i < 20; ++i) {
    for (std::int64_t j = 0; j < 20; ++j) {
      const float y = to_float(run.out.at(i, j));
      if (i == 3 || j == 4 || i == 5) {
        EXPECT_TRUE(std::isnan(y)) << i << "," << j;
      } else {
        EXPECT_EQ(y, 50) << i << "," << j;
      }
    }
  }
}

TEST(ScaledMatmul, RefusesWhatDoesNotFit) {
  const auto refused = [](auto make_weight, auto x_of, Scales scales) {
    return fault_of([&](Stream& stream) {
      const Buffer buffer = upload(stream, std::vector<float>(64)),
                   out = upload(stream, std::vector<float>(8));
      const auto w = make_weight(buffer);
      const auto x = x_of(buffer);
      using X = std::remove_cvref_t<decltype(*x.data)>;
      using T = std::conditional_t<std::is_same_v<X, e4m3>, float, X>;
      scaled_matmul<X, std::decay_t<decltype(w)>, T, float>(x, scales, w, {}, nullptr,
                                                            {out.as<float>(), 2, 4, 4}, stream);
    });
  };
  const auto x_of = []<typename X>(X) {
    return [](const Buffer& buffer) { return View<const X>{buffer.as<X>(), 2, 20, 20}; };
  };
  const auto codes = [](std::int64_t cols) {
    return [=](const Buffer& buffer) { return View<const e4m3>{buffer.as<e4m3>(), 4, cols, cols}; };
  };
  const auto nvfp4 = [](std::int64_t bytes, std::int64_t groups) {
    return [=](const Buffer& buffer) {
      return Nvfp4Weight{{buffer.as<std::uint8_t>(), 4, bytes, bytes},
                         {buffer.as<e4m3>(), 4, groups, groups},
                         20,
                         14};
    };
  };
  const auto gptq = [](std::int64_t words, std::int64_t groups) {
    return [=](const Buffer& buffer) {
      return GptqWeight{{buffer.as<std::int32_t>(), 4, words, words},
                        {buffer.as<f16>(), groups, 4, 4},
                        nullptr,
                        16,
                        20,
                        14};
    };
  };
  EXPECT_EQ(refused(codes(19), x_of(e4m3{}), {}),
            "BadLaunch: scaled_matmul: x is 2 x 20, w is 4 x 19, out is 2 x 4");
  EXPECT_EQ(refused(codes(20), x_of(e4m3{}), {.cols_per = -1}),
            "BadLaunch: scaled_matmul: a scale is for -1 columns, of which 0 are missing at first");
  EXPECT_EQ(refused(codes(20), x_of(float{}), {}),
            "BadLaunch: scaled_matmul: x is f32, which tensor cores do not multiply: quantise it "
            "first");
  EXPECT_EQ(refused(nvfp4(10, 3), x_of(f16{}), {}), "");
  EXPECT_EQ(refused(nvfp4(9, 3), x_of(f16{}), {}),
            "BadLaunch: scaled_matmul: 20 columns from 14 on are in 4 x 9 bytes with 4 x 3 scales");
  EXPECT_EQ(
      refused(nvfp4(10, 2), x_of(f16{}), {}),
      "BadLaunch: scaled_matmul: 20 columns from 14 on are in 4 x 10 bytes with 4 x 2 scales");
  EXPECT_EQ(refused(gptq(3, 3), x_of(bf16{}), {}), "");
  EXPECT_EQ(refused(gptq(2, 3), x_of(bf16{}), {}),
            "BadLaunch: scaled_matmul: 20 columns are in 4 x 2 words with 3 x 4 scales");
  EXPECT_EQ(
      refused(gptq(3, 2), x_of(bf16{}), {}),
      "BadLaunch: scaled_matmul: 20 columns from 14 on have 2 scales, one for 16 columns each");
}

}  // namespace
}  // namespace tp::testing
