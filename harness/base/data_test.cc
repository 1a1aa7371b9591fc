// The data of a case: Philox, fills, and that every value is a function of its global place alone.

#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

#include "harness/base/fill.h"
#include "harness/base/philox.h"

namespace tp {
namespace {

// Random123's own known answers for philox4x32-10 (its kat_vectors file).
TEST(Philox, KnownAnswers) {
  EXPECT_EQ(philox(0, 0, 0), (Random4{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
  EXPECT_EQ(philox(~0ull, ~0ull, ~0ull), (Random4{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(Philox, WordsAreThoseOfTheBlocks) {
  for (const std::uint64_t first : {0ull, 3ull, 17ull, (1ull << 34) - 21}) {
    for (const std::size_t count : {0u, 1u, 5u, 31u, 32u, 75u}) {
      std::vector<std::uint32_t> words(count);
      philox_words(7, stream_of("x"), first, words);
      for (std::size_t i = 0; i < count; ++i) {
        const std::uint64_t at = first + i;
        ASSERT_EQ(words[i], philox(7, stream_of("x"), at / 4)[at % 4]) << first << ", " << i;
      }
    }
  }
}

TEST(Philox, TheLastBlockIsKeptForItsOwnArgumentsOnly) {
  LastPhilox last;
  for (const std::uint64_t seed : {0ull, 1ull, 1ull}) {
    for (const std::uint64_t stream : {0ull, 0ull, 5ull}) {
      for (const std::uint64_t index : {0ull, 0ull, 9ull})
        EXPECT_EQ(last(seed, stream, index), philox(seed, stream, index));
    }
  }
}

std::vector<float> values(const TensorSpec& t, const DataRegime& g, Shard rows, Shard cols) {
  std::vector<float> out(std::size_t(rows.size * cols.size));
  fill_block(t, g, rows, cols, out.data(), cols.size);
  return out;
}

const TensorSpec kX{"x", DType::f32, 6, 40, Role::activation, 8};
const TensorSpec kW{"w", DType::f32, 1, 40, Role::weight, 8};

TEST(Fill, AShardHoldsWhatTheWholeHoldsThere) {
  for (int fill = 0; fill < 6; ++fill) {
    const DataRegime g{.fill = Fill(fill), .seed = 7, .eps = 1e-6};
    const auto whole = values(kX, g, {0, 6}, {0, 40});
    const auto part = values(kX, g, {2, 3}, {11, 13});
    for (int i = 0; i < 3; ++i) {
      for (int j = 0; j < 13; ++j)
        EXPECT_EQ(part[std::size_t(i * 13 + j)], whole[std::size_t((i + 2) * 40 + 11 + j)]);
    }
  }
}

TEST(Fill, ExactIsOnePowerOfTwoARowAndIntegerWeights) {
  const DataRegime g{.fill = Fill::exact, .seed = 3, .eps = 1e-5};
  std::set<float> magnitudes;
  int negative = 0;
  const auto x = values(kX, g, {0, 6}, {0, 40});
  for (std::size_t i = 0; i < x.size(); ++i) {
    EXPECT_EQ(std::fabs(x[i]), std::fabs(x[i / 40 * 40]));
    magnitudes.insert(std::fabs(x[i]));
    negative += x[i] < 0;
  }
  for (float m : magnitudes) EXPECT_TRUE(m == 32 || m == 64 || m == 128) << m;
  EXPECT_GT(negative, 60);
  EXPECT_LT(negative, 180);
  std::set<float> distinct;
  for (float w : values(kW, g, {0, 1}, {0, 40})) {
    EXPECT_EQ(w, std::round(w));
    EXPECT_TRUE(1 <= std::fabs(w) && std::fabs(w) <= 127) << w;
    distinct.insert(w);
  }
  EXPECT_GT(distinct.size(), 30u);  // never all ones
}

TEST(Fill, DenseHeadsDifferByLessThanAFactorOfFourAndNothingIsZero) {
  const DataRegime g{.fill = Fill::dense, .seed = 5, .eps = 1e-6};
  const auto x = values(kX, g, {0, 1}, {0, 40});
  std::set<double> scales;
  for (int h = 0; h < 5; ++h) {
    double sum = 0;
    for (int j = 0; j < 8; ++j) {
      EXPECT_NE(x[std::size_t(h * 8 + j)], 0.0f);
      sum += std::fabs(x[std::size_t(h * 8 + j)]);
    }
    scales.insert(sum);
  }
  EXPECT_EQ(scales.size(), 5u);
}

TEST(Fill, SmallRowsHasOneRowOfTheSizeOfSqrtEps) {
  const DataRegime g{.fill = Fill::small_rows, .seed = 5, .eps = 1e-6};
  int small = 0;
  for (std::int64_t i = 0; i < 6; ++i) {
    double square = 0;
    for (float v : values(kX, g, {i, 1}, {0, 40})) square += double(v) * v / 40;
    if (square < 1e-3) {
      ++small;
      EXPECT_GT(square, 1e-7);
      EXPECT_LT(square, 1e-4);
    }
  }
  EXPECT_EQ(small, 1);
}

TEST(Fill, EqualZeroShardAndWideAreWhatTheirNamesSay) {
  const auto equal = values(kX, {.fill = Fill::equal, .seed = 1}, {1, 1}, {0, 40});
  EXPECT_EQ(std::set<float>(equal.begin(), equal.end()).size(), 1u);
  const auto zero = values(kX, {.fill = Fill::zero_shard, .seed = 1}, {0, 1}, {0, 40});
  EXPECT_EQ(std::count(zero.begin(), zero.end(), 0.0f), 24);  // three heads of five
  float lo = INFINITY, hi = 0;
  for (float v : values(kX, {.fill = Fill::wide, .seed = 1}, {0, 6}, {0, 40})) {
    lo = std::min(lo, std::fabs(v));
    hi = std::max(hi, std::fabs(v));
  }
  EXPECT_GT(hi / lo, 10000);
}

TEST(Fill, ScalingIsExactAndRotationMovesRows) {
  for (int fill = 0; fill < 6; ++fill) {
    TensorSpec t = kX;
    t.dtype = DType::f16;
    const DataRegime g{.fill = Fill(fill), .seed = 7, .eps = 1e-6};
    DataRegime varied = g;
    varied.scale_log2 = 2;
    varied.rotate_rows = 5;
    std::vector<f16> a(240), b(240);
    fill_block(t, g, {0, 6}, {0, 40}, a.data(), 40);
    fill_block(t, varied, {0, 6}, {0, 40}, b.data(), 40);
    for (int i = 0; i < 6; ++i) {
      for (int j = 0; j < 40; ++j) {
        EXPECT_EQ(to_float(b[std::size_t(i * 40 + j)]),
                  4 * to_float(a[std::size_t((i + 5) % 6 * 40 + j)]));
      }
    }
  }
}

TEST(Fill, SeedAndNameMatter) {
  TensorSpec y = kX;
  y.name = "y";
  const DataRegime g{.fill = Fill::dense, .seed = 1}, other{.fill = Fill::dense, .seed = 2};
  EXPECT_NE(values(kX, g, {0, 1}, {0, 40}), values(y, g, {0, 1}, {0, 40}));
  EXPECT_NE(values(kX, g, {0, 1}, {0, 40}), values(kX, other, {0, 1}, {0, 40}));
}

}  // namespace
}  // namespace tp
