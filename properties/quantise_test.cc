// Quantisation to e4m3 on this build's backend: codes and scales are, bit for bit, those of plain
// loops on the host, and within what the reference allows.

#include "kernels/quantise.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "harness/device/testing.h"
#include "kernels/quantised_linear.h"
#include "reference/quantise.h"

namespace tp {
namespace {

using tp::testing::download;
using tp::testing::fault_of;
using tp::testing::run_rank;
using tp::testing::upload;

// Rows of x that are `pad` elements apart, behind one element of somebody else.
template <typename T>
struct Rows {
  std::int64_t rows, cols, stride;
  std::vector<T> values;

  Rows(std::int64_t rows, std::int64_t cols, std::int64_t pad)
      : rows(rows), cols(cols), stride(cols + pad), values(std::size_t(1 + rows * stride)) {
    std::memset(static_cast<void*>(values.data()), 0xFF, values.size() * sizeof(T));
  }
  T& at(std::int64_t i, std::int64_t k) { return values[std::size_t(1 + i * stride + k)]; }
  View<T> on(const Buffer& buffer) const { return {buffer.as<T>() + 1, rows, cols, stride}; }
  Matrix matrix() {
    Matrix m(rows, cols);
    for (std::int64_t i = 0; i < rows; ++i)
      for (std::int64_t k = 0; k < cols; ++k) m.row(i)[k] = to_float(at(i, k));
    return m;
  }
};

// Dense values of sizes that differ from row to row. The second row is zeros, the third one holds
// the smallest number of f32.
template <typename T>
Rows<T> random_rows(std::int64_t rows, std::int64_t cols, std::int64_t pad) {
  std::mt19937 generator(unsigned(rows * 1000 + cols));
  std::normal_distribution<float> normal;
  Rows<T> x(rows, cols, pad);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t k = 0; k < cols; ++k)
      x.at(i, k) = from_float<T>(i == 1   ? 0.0f
                                 : i == 2 ? (k == 0 ? -0x1p-149f : 0.0f)
                                          : std::ldexp(normal(generator), int(i % 13) - 6));
  return x;
}

template <typename T>
void expect_codes(Rows<T> x, Rows<e4m3> codes, const std::vector<float>& scales,
                  std::int64_t block_cols, std::int64_t first_col, std::int64_t scale_rows) {
  const std::int64_t groups = std::int64_t(scales.size()) / scale_rows;
  Matrix factors(scale_rows, groups);
  std::copy(scales.begin(), scales.end(), factors.values.begin());
  const Budget budget = reference::quantised(x.matrix(), {&factors, block_cols, first_col});
  std::vector<e4m3> dense;
  for (std::int64_t i = 0; i < x.rows; ++i) {
    for (std::int64_t k = 0; k < x.cols; ++k) {
      const float scale = float(
          factors.row(scale_rows == 1 ? 0 : i)[block_cols ? (k + first_col) / block_cols : 0]);
      dense.push_back(codes.at(i, k));
      ASSERT_EQ(int(codes.at(i, k).bits), int(from_float<e4m3>(to_float(x.at(i, k)) / scale).bits))
          << i << "," << k;
    }
  }
  const Comparison c = compare(DType::e4m3, dense.data(), budget);
  EXPECT_FALSE(c.first) << c.first->row << "," << c.first->col;
  for (std::size_t at = 0; at < codes.values.size(); ++at) {
    if (at == 0 || (std::int64_t(at) - 1) % codes.stride >= codes.cols) {
      EXPECT_EQ(int(codes.values[at].bits), 0xFF) << "beside the matrix";
    }
  }
}

template <typename T>
class Quantise : public ::testing::Test {};
using Types = ::testing::Types<float, f16, bf16>;
TYPED_TEST_SUITE(Quantise, Types);

constexpr std::int64_t kSizes[][2] = {{1, 1}, {3, 7}, {5, 128}, {4, 300}, {20, 1500}, {2, 5000}};

TYPED_TEST(Quantise, ByAScaleThatIsKnown) {
  for (const auto& [rows, cols] : kSizes) {
    for (const float scale : {0.25f, 0.0037f, 1e-4f}) {  // the last one saturates
      const Rows<TypeParam> x = random_rows<TypeParam>(rows, cols, 3);
      Rows<e4m3> codes(rows, cols, 1);
      const Report report = run_rank([&, rows = rows](Stream& stream) {
        const Buffer xs = upload(stream, x.values), out = upload(stream, codes.values),
                     factor = upload(stream, std::vector<float>{scale});
        quantise_fixed<TypeParam>(x.on(xs), factor.as<float>(), codes.on(out), stream);
        codes.values = download<e4m3>(stream, out);
      });
      ASSERT_FALSE(report.fault) << report.fault->what;
      expect_codes(x, codes, {scale}, 0, 0, 1);
    }
  }
}

// Ties between two codes times odd scales: a division finds every one of them, a product with the
// reciprocal does not.
TEST(QuantiseTies, AreThoseOfATrueDivision) {
  std::vector<float> ties;
  for (int bits = 0; bits < 0x7E; ++bits)
    ties.push_back((to_float(e4m3{std::uint8_t(bits)}) + to_float(e4m3{std::uint8_t(bits + 1)})) /
                   2);
  const std::int64_t count = std::int64_t(ties.size());
  int told_apart = 0;
  for (int odd = 3; odd < 256; odd += 2) {
    const float scale = float(odd);
    std::vector<float> x;
    for (const float tie : ties) x.push_back(tie * scale);  // exact
    std::vector<e4m3> codes(ties.size());
    run_rank([&](Stream& stream) {
      const Buffer xs = upload(stream, x), out = upload(stream, codes),
                   factor = upload(stream, std::vector<float>{scale});
      quantise_fixed<float>({xs.as<float>(), 1, count, count}, factor.as<float>(),
                            {out.as<e4m3>(), 1, count, count}, stream);
      codes = download<e4m3>(stream, out);
    });
    for (std::size_t i = 0; i < ties.size(); ++i) {
      ASSERT_EQ(codes[i].bits, i + i % 2) << x[i] << " / " << scale;
      told_apart += from_float<e4m3>(x[i] * (1 / scale)).bits != codes[i].bits;
    }
  }
  EXPECT_GT(told_apart, 100);
}

TYPED_TEST(Quantise, ByTheLargestElement) {
  for (const auto& [rows, cols] : kSizes) {
    Rows<TypeParam> x = random_rows<TypeParam>(rows, cols, 3);
    Rows<e4m3> codes(rows, cols, 1);
    float maximum = 0, scale = 0;
    const Report report = run_rank([&](Stream& stream) {
      const Buffer xs = upload(stream, x.values), out = upload(stream, codes.values),
                   slots = upload(stream, std::vector<float>{-1, -1});
      absolute_maximum<TypeParam>(x.on(xs), slots.as<float>(), stream);
      quantise_by_maximum<TypeParam>(x.on(xs), slots.as<float>(), codes.on(out),
                                     slots.as<float>() + 1, stream);
      codes.values = download<e4m3>(stream, out);
      const std::vector<float> values = download<float>(stream, slots);
      maximum = values[0], scale = values[1];
    });
    ASSERT_FALSE(report.fault) << report.fault->what;
    EXPECT_EQ(maximum, reference::absolute_maximum(x.matrix()));
    EXPECT_EQ(scale, reference::scale_of(maximum));
    EXPECT_GT(scale, 0);
    expect_codes(x, codes, {scale}, 0, 0, 1);
  }
}

TYPED_TEST(Quantise, ByTheLargestElementOfEachToken) {
  for (const auto& [rows, cols] : kSizes) {
    Rows<TypeParam> x = random_rows<TypeParam>(rows, cols, 3);
    Rows<e4m3> codes(rows, cols, 1);
    std::vector<float> scales(static_cast<std::size_t>(rows));
    const Report report = run_rank([&](Stream& stream) {
      const Buffer xs = upload(stream, x.values), out = upload(stream, codes.values),
                   factors = upload(stream, scales);
      quantise_token<TypeParam>(x.on(xs), codes.on(out), factors.as<float>(), stream);
      codes.values = download<e4m3>(stream, out);
      scales = download<float>(stream, factors);
    });
    ASSERT_FALSE(report.fault) << report.fault->what;
    const Budget expected = reference::token_scales(x.matrix(), cols, 0);
    EXPECT_FALSE(compare(DType::f32, scales.data(), expected).first);
    expect_codes(x, codes, scales, cols, 0, rows);
  }
}

TYPED_TEST(Quantise, ByTheLargestElementOfEachBlockOfColumns) {
  for (const auto& [rows, cols] : kSizes) {
    for (const auto& [block_cols, first_col] :
         {std::pair<std::int64_t, std::int64_t>{128, 0}, {128, 100}, {5, 3}, {1, 0}}) {
      Rows<TypeParam> x = random_rows<TypeParam>(rows, cols, 3);
      Rows<e4m3> codes(rows, cols, 1);
      Rows<float> scales(rows, (first_col + cols + block_cols - 1) / block_cols, 2);
      const Report report =
          run_rank([&, block_cols = block_cols, first_col = first_col](Stream& stream) {
            const Buffer xs = upload(stream, x.values), out = upload(stream, codes.values),
                         factors = upload(stream, scales.values);
            quantise_token_groups<TypeParam>(x.on(xs), block_cols, first_col, codes.on(out),
                                             scales.on(factors), stream);
            codes.values = download<e4m3>(stream, out);
            scales.values = download<float>(stream, factors);
          });
      ASSERT_FALSE(report.fault) << report.fault->what;
      const Budget expected = reference::token_scales(x.matrix(), block_cols, first_col);
      std::vector<float> dense;
      for (std::int64_t i = 0; i < scales.rows; ++i)
        for (std::int64_t g = 0; g < scales.cols; ++g) dense.push_back(scales.at(i, g));
      EXPECT_FALSE(compare(DType::f32, dense.data(), expected).first);
      expect_codes(x, codes, dense, block_cols, first_col, rows);
    }
  }
}

// The weight is fetched while x is quantised: the same bits as one after the other, in any order of
// what may run at the same time.
TEST(QuantisedLinear, HasTheBitsOfItsTwoHalves) {
  std::mt19937 generator(21);
  std::normal_distribution<float> normal;
  for (const std::int64_t tokens : {3, 16, 20}) {
    constexpr std::int64_t kOut = 40, kIn = 528;
    std::vector<bf16> x(std::size_t(tokens * kIn));
    std::vector<e4m3> w(std::size_t(kOut * kIn));
    for (bf16& v : x) v = from_float<bf16>(normal(generator));
    for (e4m3& v : w) v = from_float<e4m3>(normal(generator));
    for (std::uint64_t seed = 0; seed < 10; ++seed) {
      const Report report = run_rank(
          [&](Stream& stream) {
            const Buffer xs = upload(stream, x), ws = upload(stream, w),
                         x_scale = upload(stream, std::vector<float>{0.01f}),
                         w_scale = upload(stream, std::vector<float>{0.5f}),
                         codes = upload(stream, std::vector<e4m3>(x.size(), e4m3{0x7F})),
                         out = upload(stream, std::vector<bf16>(std::size_t(tokens * kOut)));
            QuantisedWeight weight{.format = {.scheme = Scheme::fp8_tensor}, .cols = kIn};
            weight.codes = ws.as<e4m3>(kOut, kIn);
            weight.factors = w_scale.as<float>(1, 1);
            const View<bf16> in = xs.as<bf16>(tokens, kIn), outs = out.as<bf16>(tokens, kOut);
            const View<e4m3> c = codes.as<e4m3>(tokens, kIn);
            quantised_linear<bf16, bf16>(in, x_scale.as<float>(), weight, {}, c, outs, stream);
            const auto codes_at_once = download<e4m3>(stream, codes);
            const auto at_once = download<bf16>(stream, out);
            poison(stream, codes, 0x7F);
            quantise_fixed<bf16>(in, x_scale.as<float>(), c, stream);
            quantised_product<bf16, bf16>(c, Scales{.data = x_scale.as<float>()}, weight, {}, outs,
                                          stream);
            const auto codes_after = download<e4m3>(stream, codes);
            const auto after = download<bf16>(stream, out);
            EXPECT_EQ(std::memcmp(codes_at_once.data(), codes_after.data(), codes_after.size()), 0);
            EXPECT_EQ(std::memcmp(at_once.data(), after.data(), after.size() * 2), 0)
                << tokens << " tokens, seed " << seed;
          },
          seed);
      EXPECT_FALSE(report.fault) << report.fault->what;
    }
  }
}

// What is not a number stays visible: in its own code, and in every code that a scale of it made.
TEST(QuantiseNaN, IsSeen) {
  std::vector<float> x = {1, NAN, 3, INFINITY};
  std::vector<e4m3> codes(4);
  float maximum = 0, scale = 0;
  std::vector<e4m3> by_maximum(4);
  run_rank([&](Stream& stream) {
    const Buffer xs = upload(stream, x), out = upload(stream, codes),
                 slots = upload(stream, std::vector<float>{0.5f, 0, 0});
    const View<const float> view{xs.as<float>(), 1, 4, 4};
    quantise_fixed<float>(view, slots.as<float>(), {out.as<e4m3>(), 1, 4, 4}, stream);
    codes = download<e4m3>(stream, out);
    absolute_maximum<float>(view, slots.as<float>() + 1, stream);
    quantise_by_maximum<float>(view, slots.as<float>() + 1, {out.as<e4m3>(), 1, 4, 4},
                               slots.as<float>() + 2, stream);
    by_maximum = download<e4m3>(stream, out);
    const std::vector<float> values = download<float>(stream, slots);
    maximum = values[1], scale = values[2];
  });
  EXPECT_EQ(to_float(codes[0]), 2);
  EXPECT_TRUE(std::isnan(to_float(codes[1])));
  EXPECT_EQ(to_float(codes[3]), 448);
  EXPECT_TRUE(std::isnan(maximum));
  EXPECT_TRUE(std::isnan(scale));
  for (const e4m3 code : by_maximum) EXPECT_TRUE(std::isnan(to_float(code)));
}

TEST(ReduceSlots, Reduces) {
  const std::vector<float> slots = {2, 7, 1, 0.5f, 3};
  const auto reduced = [&](SlotReduction how) {
    float out = 0;
    run_rank([&](Stream& stream) {
      const Buffer in = upload(stream, slots), scale = upload(stream, std::vector<float>(1));
      reduce_slots(in.as<float>(), 5, how, scale.as<float>(), stream);
      out = download<float>(stream, scale)[0];
    });
    return out;
  };
  EXPECT_EQ(reduced(SlotReduction::max), 7);
  EXPECT_EQ(reduced(SlotReduction::min), 0.5f);
  EXPECT_EQ(reduced(SlotReduction::first), 2);
  EXPECT_EQ(reduced(SlotReduction::last), 3);
  EXPECT_EQ(reduced(SlotReduction::mean), 13.5f / 5);
}

// Three slots of rows, in no order; with the largest scale nothing saturates, and rows that had it
// stay as they are. In place and out of place.
TEST(Requantise, MakesOneScaleOfSeveral) {
  constexpr std::int64_t kRows = 9, kCols = 260;
  const std::vector<float> slots = {0.01f, 0.037f, 0.0211f};
  const std::vector<std::int32_t> slot_of_row = {2, 0, 1, 1, 2, 2, 0, 0, 1};
  Rows<e4m3> weight(kRows, kCols, 4);
  for (std::int64_t i = 0; i < kRows; ++i)
    for (std::int64_t k = 0; k < kCols; ++k) weight.at(i, k).bits = std::uint8_t(i * 31 + k);
  for (const bool in_place : {false, true}) {
    Rows<e4m3> out = in_place ? weight : Rows<e4m3>(kRows, kCols, 1);
    const Report report = run_rank([&](Stream& stream) {
      const Buffer from = upload(stream, weight.values), to = upload(stream, out.values),
                   of_slots = upload(stream, slots), of_rows = upload(stream, slot_of_row),
                   scale = upload(stream, std::vector<float>(1));
      reduce_slots(of_slots.as<float>(), 3, SlotReduction::max, scale.as<float>(), stream);
      requantise(weight.on(in_place ? to : from), of_rows.as<std::int32_t>(), of_slots.as<float>(),
                 scale.as<float>(), out.on(to), stream);
      out.values = download<e4m3>(stream, to);
    });
    ASSERT_FALSE(report.fault) << report.fault->what;
    std::vector<e4m3> dense;
    for (std::int64_t i = 0; i < kRows; ++i) {
      const float slot = slots[std::size_t(slot_of_row[std::size_t(i)])];
      for (std::int64_t k = 0; k < kCols; ++k) {
        const e4m3 code = out.at(i, k);
        dense.push_back(code);
        const float old = to_float(weight.at(i, k));
        if (std::isnan(old)) {
          ASSERT_TRUE(std::isnan(to_float(code)));
          continue;
        }
        ASSERT_EQ(int(code.bits), int(from_float<e4m3>(old * slot / slots[1]).bits));
        if (slot == slots[1]) {
          ASSERT_EQ(int(code.bits), int(weight.at(i, k).bits));
        }
      }
    }
    const Comparison c =
        compare(DType::e4m3, dense.data(),
                reference::requantised(weight.matrix(), slot_of_row,
                                       std::vector<double>(slots.begin(), slots.end()), slots[1]));
    EXPECT_FALSE(c.first) << c.first->row << "," << c.first->col;
    EXPECT_EQ(int(out.values[0].bits), 0xFF);
  }
}

TEST(QuantiseSizes, AreRefusedWithTheNumbers) {
  const auto fault = [](auto call) {
    return fault_of([&](Stream& stream) {
      const Buffer x = upload(stream, std::vector<float>(64));
      const Buffer out = upload(stream, std::vector<float>(64));
      call(View<const float>{x.as<float>(), 3, 10, 10}, out, stream);
    });
  };
  EXPECT_EQ(fault([](auto x, const Buffer& out, Stream& stream) {
              quantise_fixed<float>(x, out.as<float>(), {out.as<e4m3>(), 3, 9, 9}, stream);
            }),
            "BadLaunch: quantise_fixed: x is 3 x 10, its codes are 3 x 9");
  EXPECT_EQ(
      fault([](auto x, const Buffer& out, Stream& stream) {
        quantise_token_groups<float>(x, 4, 3, {out.as<e4m3>(), 3, 10, 10},
                                     {out.as<float>(), 3, 3, 3}, stream);
      }),
      "BadLaunch: quantise_token_groups: 3 x 10 in blocks of 4, the first without 3, have 3 x "
      "3 scales");
  EXPECT_EQ(fault([](auto, const Buffer& out, Stream& stream) {
              reduce_slots(out.as<float>(), 0, SlotReduction::max, out.as<float>(), stream);
            }),
            "BadLaunch: reduce_slots: 0 scales");
}

}  // namespace
}  // namespace tp
