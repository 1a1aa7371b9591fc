// CUDA's rules as kernels see them, on whichever backend this build has. The kernels' results are
// known, bit by bit.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <iterator>
#include <numeric>
#include <random>

#include "harness/base/dtype.h"
#include "harness/device/kernels_testing.h"
#include "harness/device/larger.h"
#include "harness/device/sanitizer.h"
#include "harness/device/testing.h"

namespace tp::testing {
namespace {

using ::testing::Each;

std::vector<float> noise(int count, unsigned seed = 7) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> values(count);
  for (float& value : values) value = uniform(generator) * std::exp2(float(generator() % 20));
  return values;
}

TEST(Kernels, EveryThreadOfEveryBlockRunsOnce) {
  const auto out = results<unsigned>(12 * 24, indices);
  for (unsigned i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], i / 24 * 1000 + i % 24);
}

TEST(Kernels, WarpFunctionsAreCudas) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const auto out = results<std::int64_t>(32 * kWarpProbes, warp_functions, seed);
    for (int lane = 0; lane < 32; ++lane) {
      const std::int64_t* mine = out.data() + lane * kWarpProbes;
      EXPECT_EQ(mine[0], (lane / 8 * 8 + (lane + 3) % 8) * 10);
      EXPECT_EQ(mine[1], std::int64_t(lane ^ 5) << 33);
      EXPECT_EQ(mine[2], lane % 16 < 3 ? lane : lane - 3);
      EXPECT_EQ(mine[3], (lane < 30 ? lane + 2 : lane) * 2 + 1);
      EXPECT_EQ(mine[4], 0x49249249);
      EXPECT_EQ(mine[5], 2);
      EXPECT_EQ(mine[6], 2);
      EXPECT_EQ(mine[7], lane / 8 % 2 == 1 ? lane - 8 : lane)
          << "only earlier segments can be read";
    }
  }
}

TEST(Kernels, DisjointMasksMeetApart) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const auto out = results<unsigned>(64, half_masks, seed);
    for (unsigned lane = 0; lane < 32; ++lane) {
      EXPECT_EQ(out[lane], lane % 2 == 0 ? 0x55550000u : 0xAAAA0000u);
      EXPECT_EQ(out[32 + lane], lane % 2);
    }
  }
}

TEST(Kernels, ALaneMayWaitWhileAnotherMeetsSomebodyElseFirst) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const auto out = results<unsigned>(2, nested_masks, seed);
    EXPECT_THAT(out, Each(2u));
  }
}

TEST(Kernels, WarpSumHasTheBitsOfTheButterfly) {
  for (unsigned data = 0; data < 20; ++data) {
    const auto out = results<float>(64, [&](Stream& stream, float* out) {
      const Buffer x = upload(stream, noise(32, data));
      warp_sums(stream, x.as<float>(), out, out + 32);
    });
    for (int lane = 0; lane < 32; ++lane) EXPECT_EQ(out[lane], out[32 + lane]);
  }
}

TEST(Kernels, PartSumsHaveTheBitsOfTheButterfly) {
  for (unsigned data = 0; data < 20; ++data) {
    const auto out = results<float>(128, [&](Stream& stream, float* out) {
      const Buffer x = upload(stream, noise(32, data));
      part_sums(stream, x.as<float>(), out, out + 64);
    });
    for (int i = 0; i < 64; ++i) EXPECT_EQ(out[i], out[64 + i]) << i;
  }
}

TEST(Kernels, RoundsPairsAsFromFloatDoes) {
  constexpr int kThreads = 1024;
  std::vector<float> values = noise(2 * kThreads);
  // Ties, subnormals, overflow, zeros.
  const float special[] = {1.00390625f, 1.01171875f, 1.00048828125f, 1e-6f, -3e-8f, 65520.0f,
                           1e38f,       3.4e38f,     INFINITY,       -0.0f, 1e-39f, -INFINITY};
  std::copy(std::begin(special), std::end(special), values.begin());
  values[20] = NAN;
  values[21] = -NAN;
  const auto out = results<std::uint32_t>(2 * kThreads, [&](Stream& stream, std::uint32_t* out) {
    const Buffer x = upload(stream, values);
    rounded_pairs(stream, x.as<float>(), out, out + kThreads, kThreads);
  });
  for (int i = 0; i < 2 * kThreads; ++i) {
    const float value = values[std::size_t(i)];
    const auto half = [&](int first) {
      return std::uint16_t(out[std::size_t(first + i / 2)] >> 16 * (i % 2));
    };
    const bool is_nan = std::isnan(value);
    EXPECT_EQ(half(0), is_nan ? 0x7FFF : from_float<f16>(value).bits) << value;
    EXPECT_EQ(half(kThreads), is_nan ? 0x7FFF : from_float<bf16>(value).bits) << value;
  }
}

// The order that reduce.h documents, written independently of it.
float documented_sum(std::vector<float> values) {
  std::vector<float> warps;
  for (std::size_t first = 0; first < values.size(); first += 32) {
    for (int distance = 16; distance >= 1; distance /= 2) {
      for (int i = 0; i < distance; ++i) values[first + i] += values[first + i + distance];
    }
    warps.push_back(values[first]);
  }
  while ((warps.size() & (warps.size() - 1)) != 0) warps.push_back(0.0f);
  for (; warps.size() > 1; warps.resize(warps.size() / 2)) {
    for (std::size_t i = 0; i < warps.size() / 2; ++i) warps[i] = warps[2 * i] + warps[2 * i + 1];
  }
  return warps[0];
}

TEST(Kernels, BlockSumIsTheDocumentedTreeUnderEverySchedule) {
  for (int threads : {32, 64, 96, 128, 160, 288, 512, 544, 1024}) {
    const std::vector<float> x = noise(threads);
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
      const auto out = results<float>(
          threads,
          [&](Stream& stream, float* out) {
            const Buffer in = upload(stream, x);
            block_sums(stream, in.as<float>(), out, threads);
          },
          seed);
      EXPECT_THAT(out, Each(documented_sum(x))) << threads;
    }
  }
}

TEST(Kernels, BlockMaxKeepsNanAndTheSignOfZero) {
  const auto maximum = [](std::vector<float> x) {
    const int threads = int(x.size());
    const auto out = results<float>(threads, [&](Stream& stream, float* out) {
      const Buffer in = upload(stream, x);
      block_maxima(stream, in.as<float>(), out, threads);
    });
    for (float value : out) EXPECT_EQ(std::signbit(value), std::signbit(out[0]));
    return out.back();
  };
  std::vector<float> x = noise(96);
  EXPECT_EQ(maximum(x), *std::max_element(x.begin(), x.end()));
  x[50] = NAN;
  EXPECT_TRUE(std::isnan(maximum(x)));
  x.assign(64, -0.0f);
  EXPECT_TRUE(std::signbit(maximum(x)));
  x[33] = 0.0f;
  EXPECT_FALSE(std::signbit(maximum(x)));
}

template <typename T>
class Matrix : public ::testing::Test {};
using MatrixTypes = ::testing::Types<f16, bf16>;
TYPED_TEST_SUITE(Matrix, MatrixTypes);

constexpr int kM = 16, kN = 8, kK = 16;

// c + a b by one mma; b is k x n.
template <typename T>
std::vector<float> product(const std::vector<float>& a, const std::vector<float>& b,
                           const std::vector<float>& c, bool by_columns) {
  std::vector<T> left(kM * kK), right(kK * kN);
  for (int i = 0; i < kM * kK; ++i) left[i] = from_float<T>(a[i]);
  for (int k = 0; k < kK; ++k) {
    for (int n = 0; n < kN; ++n) {
      right[by_columns ? n * kK + k : k * kN + n] = from_float<T>(b[k * kN + n]);
    }
  }
  return results<float>(kM * kN, [&](Stream& stream, float* out) {
    const Buffer a_buffer = upload(stream, left), b_buffer = upload(stream, right),
                 c_buffer = upload(stream, c);
    multiply(stream, a_buffer.as<T>(), b_buffer.as<T>(), by_columns, c_buffer.as<float>(), out);
  });
}

// Every element of every operand counts, each with a factor of its own.
TYPED_TEST(Matrix, ProductsOfIntegersAreExact) {
  std::mt19937 generator(3);
  for (int round = 0; round < 8; ++round) {
    std::vector<float> a(kM * kK), b(kK * kN), c(kM * kN);
    for (float& value : a) value = float(int(generator() % 255) - 127);
    for (float& value : b) value = float(int(generator() % 255) - 127);
    for (float& value : c) value = float(int(generator() % 100000) - 50000);
    std::vector<float> expected = c;
    for (int m = 0; m < kM; ++m) {
      for (int n = 0; n < kN; ++n) {
        for (int k = 0; k < kK; ++k) expected[m * kN + n] += a[m * kK + k] * b[k * kN + n];
      }
    }
    EXPECT_EQ((product<TypeParam>(a, b, c, true)), expected);
    EXPECT_EQ((product<TypeParam>(a, b, c, false)), expected);
  }
}

TYPED_TEST(Matrix, OperandsAreLoadedInPairs) {
  std::mt19937 generator(4);
  for (const bool by_columns : {true, false}) {
    std::vector<float> a(kM * kK), b(2 * kK * kN);
    for (float& value : a) value = float(int(generator() % 255) - 127);
    for (float& value : b) value = float(int(generator() % 255) - 127);
    std::vector<float> expected(2 * kM * kN);
    for (int i = 0; i < 2 * kM * kN; ++i) {
      const int half = i / (kM * kN), m = i / kN % kM, n = i % kN;
      for (int k = 0; k < kK; ++k) {
        const int at = by_columns ? n * 2 * kK + half * kK + k : k * 2 * kN + half * kN + n;
        expected[i] += a[m * kK + k] * b[at];
      }
    }
    const auto convert = [](const std::vector<float>& from) {
      std::vector<TypeParam> to;
      for (float value : from) to.push_back(from_float<TypeParam>(value));
      return to;
    };
    const auto got = results<float>(2 * kM * kN, [&](Stream& stream, float* out) {
      const Buffer left = upload(stream, convert(a)), right = upload(stream, convert(b));
      multiply_pairs(stream, left.as<TypeParam>(), right.as<TypeParam>(), by_columns, out);
    });
    EXPECT_EQ(got, expected);
  }
}

// The exponent of a value of T or of fp32, as tensor cores take it.
int exponent(double value, int smallest) { return std::max(std::ilogb(value), smallest); }

// An element as matrix.h says it is computed, written independently of the emulator.
template <typename T>
float documented_product(const float* a, const float* b, float c) {
  int largest = c == 0 ? -1000 : exponent(c, -126);
  const int smallest = format_of(dtype_of<T>::value).emin;
  for (int k = 0; k < kK; ++k) {
    if (a[k] == 0 || b[k * kN] == 0) continue;
    largest = std::max(largest, exponent(a[k], smallest) + exponent(b[k * kN], smallest));
  }
  const double unit = std::exp2(std::max(largest, -133) - 25);
  double sum = std::trunc(c / unit);
  for (int k = 0; k < kK; ++k) sum += std::trunc(double(a[k]) * double(b[k * kN]) / unit);
  sum *= unit;
  if (sum == 0) return 0;
  const double last = std::exp2(exponent(sum, -126) - 23);
  return float(std::trunc(sum / last) * last);  // beyond the largest: infinity
}

// Random significands at scales that let terms of all sizes meet; c as large as the products.
template <typename T>
std::vector<float> values(int count, int low, int high, std::mt19937& generator) {
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> values(count);
  for (float& value : values) {
    value = to_float(from_float<T>(
        std::ldexp(uniform(generator), low + int(generator() % unsigned(high - low + 1)))));
  }
  return values;
}

template <typename T>
bool is_normal(float value) {
  return value == 0 || std::ilogb(value) >= format_of(dtype_of<T>::value).emin;
}

TYPED_TEST(Matrix, ProductsAreRoundedAsDocumented) {
  std::mt19937 generator(5);
  const bool half = std::is_same_v<TypeParam, f16>;
  const int ranges[][2] = {{0, 0},
                           {-4, 4},
                           {-14, 14},
                           {half ? -24 : -60, half ? 15 : 60},
                           {half ? -26 : -132, half ? -12 : -50},
                           {half ? 8 : 50, half ? 15 : 64}};
  for (const auto& [low, high] : ranges) {
    for (int round = 0; round < 20; ++round) {
      std::vector<float> a = values<TypeParam>(kM * kK, low, high, generator);
      const std::vector<float> b = values<TypeParam>(kK * kN, low, high, generator);
      std::vector<float> c = values<float>(kM * kN, 2 * low, std::min(2 * high, 127), generator);
      for (int i = 0; i < kM * kN; i += 3) c[i] = 0.0f;
      for (int i = 0; i < kM * kK; i += 7) a[i] = 0.0f;
      std::fill_n(a.begin() + round % kM * kK, kK, -0.0f);  // a row beyond the tokens of a batch
      const std::vector<float> got = product<TypeParam>(a, b, c, round % 2 == 0);
      for (int m = 0; m < kM; ++m) {
        for (int n = 0; n < kN; ++n) {
          const float element = c[m * kN + n];
          ASSERT_EQ(got[m * kN + n], documented_product<TypeParam>(&a[m * kK], &b[n], element));
          double exact = element, sum = std::abs(double(element));
          bool normal = true;
          for (int k = 0; k < kK; ++k) {
            normal &= is_normal<TypeParam>(a[m * kK + k]) && is_normal<TypeParam>(b[k * kN + n]);
            const double term = double(a[m * kK + k]) * double(b[k * kN + n]);
            exact += term;
            sum += std::abs(term);
          }
          // TC(16, 25) of research/numerics.md section 4, with c among the terms. Subnormal
          // operands count as larger than they are, so that more is cut off.
          const double bound = (17 * std::exp2(-25) + std::exp2(-23)) * sum + std::exp2(-149);
          const double error = std::abs(got[m * kN + n] - exact);
          ASSERT_TRUE(error <= bound || !normal || !std::isfinite(got[m * kN + n]));
        }
      }
    }
  }
}

TYPED_TEST(Matrix, ProductsAreTruncated) {
  std::vector<float> a(kM * kK), b(kK * kN), c(kM * kN);
  a[0] = 1;
  b[0] = 1;
  a[1] = 3 * std::exp2(-12.0f);
  b[kN] = std::exp2(-12.0f);
  EXPECT_EQ(product<TypeParam>(a, b, c, true)[0], 1 + 2 * std::exp2(-24.0f)) << "not to nearest";
  // Two terms of 2^-24 below 1 are kept until they are added up; in pairs of 2^-26 they are not.
  a[1] = a[2] = std::exp2(-12.0f);
  b[kN] = b[2 * kN] = std::exp2(-12.0f);
  EXPECT_EQ(product<TypeParam>(a, b, c, true)[0], 1 + std::exp2(-23.0f));
  for (int k = 1; k < kK; ++k) {
    a[k] = std::exp2(-13.0f);
    b[k * kN] = std::exp2(-13.0f);
  }
  EXPECT_EQ(product<TypeParam>(a, b, c, true)[0], 1.0f);
  a[0] = 0;
  c[0] = 1;
  EXPECT_EQ(product<TypeParam>(a, b, c, true)[0], 1.0f) << "below c it is the same";
}

TYPED_TEST(Matrix, ProductsOfInfinitiesAndNans) {
  std::vector<float> a(kM * kK), b(kK * kN, 1.0f), c(kM * kN);
  a[0 * kK + 3] = INFINITY;
  a[1 * kK + 5] = INFINITY;
  a[1 * kK + 6] = -INFINITY;
  a[2 * kK + 7] = NAN;
  a[3 * kK + 0] = -INFINITY;
  a[9 * kK + 8] = INFINITY;
  b[8 * kN + 4] = 0.0f;
  c[4 * kN + 2] = -INFINITY;
  c[5 * kN + 2] = NAN;
  const std::vector<float> got = product<TypeParam>(a, b, c, true);
  for (int n = 0; n < kN; ++n) {
    EXPECT_EQ(got[n], INFINITY);
    EXPECT_TRUE(std::isnan(got[kN + n]));
    EXPECT_TRUE(std::isnan(got[2 * kN + n]));
    EXPECT_EQ(got[3 * kN + n], -INFINITY);
    EXPECT_EQ(got[4 * kN + n], n == 2 ? -INFINITY : 0.0f);
    EXPECT_EQ(std::isnan(got[5 * kN + n]), n == 2);
    EXPECT_EQ(std::isnan(got[9 * kN + n]), n == 4);
    EXPECT_EQ(std::isinf(got[9 * kN + n]), n != 4);
    EXPECT_EQ(got[15 * kN + n], 0.0f);
  }
  b[2 * kN + 5] = INFINITY;
  b[6 * kN + 7] = NAN;
  const std::vector<float> other = product<TypeParam>(a, b, c, true);
  for (int n = 0; n < kN; ++n)  // also where all of a row are zeros
    EXPECT_EQ(std::isnan(other[15 * kN + n]), n == 5 || n == 7);
}

// The accumulators of one product, as the A operand of the next: with columns of the identity for
// B, what comes out is what was rounded.
TYPED_TEST(Matrix, AccumulatorsAreRoundedToOperands) {
  using T = TypeParam;
  std::mt19937 generator(11);
  for (int round = 0; round < 8; ++round) {
    std::vector<float> c(kM * kK);
    for (float& value : c) {
      value = std::ldexp(float(int(generator())) * 0x1p-31f, int(generator() % 46) - 30);
      if (generator() % 4 != 0) continue;  // halfway between two values of T, then
      const std::uint32_t even = std::bit_cast<std::uint32_t>(to_float(from_float<T>(value)));
      value = std::bit_cast<float>(even | 1u << (23 - format_of(dtype_of<T>::value).p));
    }
    c[20] = 1e9f;
    c[40] = 65519.0f;
    const bool infinite = std::isinf(to_float(from_float<T>(c[20])));
    for (int first : {0, 8}) {
      std::vector<T> b(kK * kN);
      for (int n = 0; n < kN; ++n) b[(first + n) * kN + n] = from_float<T>(1.0f);
      const auto got = results<float>(kM * kN, [&](Stream& stream, float* out) {
        const Buffer in = upload(stream, c), right = upload(stream, b);
        multiply_rounded(stream, in.as<float>(), right.as<T>(), out);
      });
      for (int m = 0; m < kM; ++m) {
        for (int n = 0; n < kN; ++n) {
          if (infinite && m == 1 && first + n != 4) {
            EXPECT_TRUE(std::isnan(got[m * kN + n])) << "infinity times 0";
          } else {
            EXPECT_EQ(got[m * kN + n], to_float(from_float<T>(c[m * kK + first + n])));
          }
        }
      }
    }
  }
}

TEST(Kernels, QuadsAreFourNeighbours) {
  for (unsigned data = 0; data < 10; ++data) {
    std::vector<float> x = noise(32, data);
    x[13] = NAN;
    x[16] = x[18] = -0.0f;
    x[17] = x[19] = data % 2 == 0 ? 0.0f : -0.0f;
    const auto out = results<std::uint32_t>(128, [&](Stream& stream, std::uint32_t* out) {
      const Buffer in = upload(stream, x);
      auto* to = reinterpret_cast<float*>(out);
      quads(stream, in.as<float>(), to, to + 32, to + 64, to + 96);
    });
    for (int lane = 0; lane < 32; ++lane) {
      const bool nan = lane / 4 == 3;
      const float* first = &x[lane / 4 * 4];
      const float sum = std::bit_cast<float>(out[lane]);
      const float maximum = std::bit_cast<float>(out[64 + lane]);
      EXPECT_EQ(std::isnan(sum), nan);
      EXPECT_EQ(std::isnan(maximum), nan);
      if (nan) continue;
      EXPECT_EQ(out[lane], out[32 + lane]);
      EXPECT_EQ(out[64 + lane], out[96 + lane]);
      EXPECT_EQ(sum, (first[0] + first[1]) + (first[2] + first[3]));
      EXPECT_EQ(maximum, *std::max_element(first, first + 4));
    }
  }
}

TEST(Kernels, CopiesRunAheadOfTheirReaders) {
  constexpr int kTile = 1024;
  for (int tiles : {1, 2, 7}) {
    std::vector<float> x(tiles * kTile);
    std::iota(x.begin(), x.end(), 1.0f);
    std::vector<float> expected(kTile);
    for (int i = 0; i < tiles * kTile; ++i) expected[i % kTile] += x[i];
    for (int stages : {2, 3}) {
      for (int bytes : {4, 8, 16}) {
        for (std::uint64_t seed = 0; seed < 3; ++seed) {
          const auto out = results<float>(
              kTile,
              [&](Stream& stream, float* out) {
                const Buffer in = upload(stream, x);
                pipeline(stream, in.as<float>(), out, tiles, stages, bytes);
              },
              seed);
          EXPECT_EQ(out, expected) << tiles << " tiles, " << stages << " stages, " << bytes;
        }
      }
    }
  }
}

TEST(Kernels, AtomicsAddUp) {
  constexpr int kBlocks = 6;
  constexpr int kThreads = 40;
  constexpr int n = kBlocks * kThreads;
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    const AtomicResults r = results<AtomicResults>(
        1, [](Stream& stream, AtomicResults* out) { atomics(stream, out, kBlocks, kThreads); },
        seed)[0];
    EXPECT_EQ(r.add_int, -n * (n - 1) / 2);
    EXPECT_EQ(r.max_int, n - 1);
    EXPECT_EQ(r.min_int, 1 - n);
    EXPECT_EQ(r.add_unsigned, 2u * n);
    EXPECT_EQ(r.add_wide, (1ull << 33) * n);
    EXPECT_EQ(r.add_float, float(n));
    EXPECT_EQ(r.exchanged, 5u);
    EXPECT_EQ(r.locked, n);
    EXPECT_EQ(r.lock, 0);
  }
}

TEST(Kernels, ABlockMayWaitForAnother) {
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    EXPECT_EQ(
        results<int>(
            2, [](Stream& stream, int* out) { blocks_wait(stream, out, out + 1, 6); }, seed)[1],
        1);
  }
}

TEST(Kernels, VectorsAreCopiedWhole) {
  std::vector<std::uint16_t> x(64);
  std::iota(x.begin(), x.end(), 1);
  const auto out = results<std::uint16_t>(64, [&](Stream& stream, std::uint16_t* out) {
    const Buffer in = upload(stream, x);
    reverse_vectors(stream, in.as<std::uint16_t>(), out, 64);
  });
  for (int i = 0; i < 64; ++i) EXPECT_EQ(out[i], x[i / 8 * 8 + 7 - i % 8]);
}

constexpr std::uint64_t kRoundingHashes[kRoundings] = {
    0x9c7b3df44ebc3683, 0xeed2664881f14cc9, 0x461550cd54206eb1, 0xc4d1087e18d4be11,
    0xbe03d5e1a3c841dd, 0x7222cce746b12325, 0xbd1caa6a06436325, 0xc957273dc6c7e04b};

// Values whose bits depend on how each operation rounds: the same on the emulator and on a GPU.
TEST(Kernels, GiveTheSameBitsOnEveryBackend) {
  const std::vector<float> x = noise(4096, 3);
  const auto bits = results<std::uint32_t>(kRoundings * 4096, [&](Stream& stream, unsigned* out) {
    const Buffer in = upload(stream, x);
    roundings(stream, in.as<float>(), out, 4096);
  });
  for (int i = 0; i < kRoundings; ++i) {
    std::uint64_t hash = 0xcbf29ce484222325ull;
    for (int j = 0; j < 4096; ++j) hash = (hash ^ bits[i * 4096 + j]) * 0x100000001b3ull;
    EXPECT_EQ(hash, kRoundingHashes[i]) << "operation " << i << std::hex << ": 0x" << hash;
  }
}

// dtype_test has proven the host's.
TEST(Kernels, SmallTypesAreTheHosts) {
  const auto out = results<std::uint32_t>(kConversions, conversions);
  for (unsigned i = 0; i < 65536; ++i) {
    ASSERT_EQ(out[i], from_float<e4m3>(to_float(f16{std::uint16_t(i)})).bits) << i;
  }
  const std::uint32_t* of_codes = out.data() + 65536;
  for (unsigned i = 0; i < 256; ++i) {
    const e4m3 code{std::uint8_t(i)};
    EXPECT_EQ(of_codes[i], std::bit_cast<std::uint32_t>(to_float(code))) << i;
    EXPECT_EQ(of_codes[256 + i], widened<f16>(code).bits) << i;
    EXPECT_EQ(of_codes[512 + i], widened<bf16>(code).bits) << i;
  }
  for (unsigned i = 0; i < 16; ++i)
    EXPECT_EQ(of_codes[768 + i], std::bit_cast<std::uint32_t>(e2m1_to_float(i))) << i;
}

// A producer and a consumer on two streams, ordered by an event or, by mistake, by nothing.
bool order_holds(bool event, bool delays, std::uint64_t seed) {
  std::vector<float> got;
  Scheduler scheduler({.seed = seed, .delays = delays});
  scheduler.add_rank(0, [&](Stream& stream) {
    Stream& other = stream.scheduler().add_stream(0);
    const Buffer x = upload(stream, std::vector<float>(4, 0.0f));
    const Buffer y = upload(stream, std::vector<float>(4, 0.0f));
    stream.synchronize();
    fill(stream, x.as<float>(), 4, 7.0f);
    const Event filled;
    stream.record(filled);
    if (event) other.wait(filled);
    copy(other, x.as<float>(), y.as<float>(), 4);
    other.synchronize();
    got = download<float>(stream, y);
  });
  const Report report = scheduler.run();
  EXPECT_FALSE(report.fault) << report.fault->what;
  return got == std::vector<float>(4, 7.0f);
}

TEST(Delays, ShowAMissingEvent) {
  if (kTsan) GTEST_SKIP() << "ThreadSanitizer itself sees the race, and fails the test for it";
  int shown = 0;
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    EXPECT_TRUE(order_holds(true, true, seed)) << seed;
    const bool holds = order_holds(false, true, seed);
    shown += !holds;
  }
  EXPECT_GE(shown, 3) << "of 30";
}

// What is launched again is what was recorded: the same arguments, over new data.
TEST(Recording, LaunchesTheSameKernelsAgain) {
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    run_rank(
        [](Stream& stream) {
          const Buffer x = upload(stream, std::vector<float>(8, 1.0f));
          const Buffer y = upload(stream, std::vector<float>(8, 0.0f));
          const Buffer z = upload(stream, std::vector<float>(8, 0.0f));
          Recording recording;
          std::vector<std::vector<float>> got;
          for (float value : {2.0f, 3.0f}) {
            const std::vector<float> data(8, value);
            from_host(stream, x.data(), data.data(), 32);
            stream.begin_recording(recording);
            copy(stream, x.as<float>(), y.as<float>(), 8);
            fill(stream, x.as<float>(), 4, 10 * value);
            stream.pass([] {});
            copy(stream, x.as<float>(), z.as<float>(), 8);
            stream.end_recording();
            got.push_back(download<float>(stream, y));
            got.push_back(download<float>(stream, z));
          }
          EXPECT_THAT(got[0], Each(2.0f));
          EXPECT_THAT(got[1], ::testing::ElementsAre(20, 20, 20, 20, 2, 2, 2, 2));
          EXPECT_THAT(got[2], Each(3.0f));
          // The value that was filled in is the recorded one.
          EXPECT_THAT(got[3], ::testing::ElementsAre(20, 20, 20, 20, 3, 3, 3, 3));
        },
        seed);
  }
}

TEST(Recording, OtherKernelsTheSecondTimeAreRefused) {
  for (const int second : {0, 2}) {
    EXPECT_THAT(fault_of([&](Stream& stream) {
                  const Buffer x = upload(stream, std::vector<float>(8, 1.0f));
                  Recording recording;
                  for (const int kernels : {1, second}) {
                    stream.begin_recording(recording);
                    for (int i = 0; i < kernels; ++i) fill(stream, x.as<float>(), 8, 1.0f);
                    stream.end_recording();
                  }
                }),
                ::testing::HasSubstr("BadLaunch: the second time"));
  }
}

// Conversions of several values at once are those of one, but for the sign of NaN.
TEST(Conversions, InPacksAreThoseOfOne) {
  const auto out = results<std::uint32_t>(kPackedConversions, packed_conversions);
  for (std::uint32_t i = 0; i < 65536; ++i) {
    const float v = to_float(f16{std::uint16_t(i)});
    const std::uint32_t first = v == v ? from_float<e4m3>(v).bits : 0x7F,
                        second = v == v ? from_float<e4m3>(-v).bits : 0x7F;
    ASSERT_EQ(out[i], first | second << 8) << i;
  }
  for (std::uint32_t i = 0; i < 4 * 256; ++i) {
    const e4m3 code{std::uint8_t(i / 4 + i % 4)};
    const f16 wide{std::uint16_t(out[65536 + i / 2] >> i % 2 * 16)};
    if (to_float(code) == to_float(code)) {
      ASSERT_EQ(wide.bits, widened<f16>(code).bits) << i;
    } else {
      ASSERT_TRUE(std::isnan(to_float(wide))) << i;
    }
  }
}

std::vector<int> handed_over(OverlapMistake mistake, bool recorded, std::uint64_t seed) {
  std::vector<int> last;
  const Report report = run_rank(
      [&](Stream& stream) {
        const Buffer data = upload(stream, std::vector<int>((1 + kHandOvers) * kHandedOver));
        Recording recording;
        for (int run = 0; run < (recorded ? 2 : 1); ++run) {
          poison(stream, data, 0);
          if (recorded) stream.begin_recording(recording);
          hand_over(stream, data.as<int>(), mistake);
          if (recorded) stream.end_recording();
          last = download<int>(stream, data);
          last.erase(last.begin(), last.end() - kHandedOver);
        }
      },
      seed);
  EXPECT_FALSE(report.fault) << report.fault->what;
  return last;
}

TEST(Overlap, KernelsSeeBehindTheirWaitWhatTheOneBeforeWrote) {
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    for (const bool recorded : {false, true}) {
      EXPECT_THAT(handed_over(OverlapMistake::none, recorded, seed), Each(kHandOvers)) << seed;
    }
  }
}

TEST(Larger, IsAnOrderOfFloats) {
  EXPECT_EQ(larger(1.0f, 2.0f), 2.0f);
  EXPECT_EQ(larger(2.0f, 1.0f), 2.0f);
  EXPECT_TRUE(std::isnan(larger(NAN, 1.0f)));
  EXPECT_TRUE(std::isnan(larger(1.0f, NAN)));
  EXPECT_FALSE(std::signbit(larger(-0.0f, 0.0f)));
  EXPECT_FALSE(std::signbit(larger(0.0f, -0.0f)));
}

}  // namespace
}  // namespace tp::testing
