// The budget of silu(gate) * up: the reference agrees with a second, differently written algorithm;
// correct kernels stay inside, whatever their exp and their order; and wrong ones are rejected.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "harness/base/philox.h"
#include "properties/budget_testing.h"
#include "reference/merged_linear.h"

namespace tp {
namespace {

constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

struct Data {
  DType t;
  Matrix gate, up;
};

// How large the gates are.
enum class Gates { whole, bending, wide, far };
constexpr Gates kGates[] = {Gates::whole, Gates::bending, Gates::wide, Gates::far};

// 4 x 16 of both signs: whole numbers up to 32; up to 8 in magnitude, where silu bends; of 26
// binades below that; or up to 128, where it is the identity, or nothing.
Data data_of(DType t, Gates gates, std::uint64_t seed) {
  Data d{t, Matrix(4, 16), Matrix(4, 16)};
  for (std::size_t i = 0; i < d.gate.values.size(); ++i) {
    const Random4 bits = philox(seed, stream_of("gates"), i);
    const double fraction = double(bits[0] >> 8) * 0x1p-24, sign = bits[1] & 1 ? -1 : 1;
    double g = 0;
    switch (gates) {
      case Gates::whole:
        g = 1 + bits[0] % 32;
        break;
      case Gates::bending:
        g = 8 * fraction;
        break;
      case Gates::wide:
        g = (1 + fraction) * std::ldexp(1.0, 2 - int(bits[2] % 26));
        break;
      case Gates::far:
        g = 128 * fraction;
        break;
    }
    const double up = gates == Gates::whole ? 1 + bits[3] % 100 : 0.25 + 0x1p-29 * bits[3];
    d.gate.values[i] = round_to(t, sign * g);
    d.up.values[i] = round_to(t, bits[1] & 2 ? -up : up);
  }
  return d;
}

// How a correct twin computes, and what it declares.
enum class Twin { quotient, exp_above, exp_below, reciprocal, rounded_once };
constexpr Twin kTwins[] = {Twin::quotient, Twin::exp_above, Twin::exp_below, Twin::reciprocal,
                           Twin::rounded_once};

// Infinity stays where it is.
float moved(float v, int ulps) {
  if (std::isinf(v)) return v;
  for (; ulps > 0; --ulps) v = std::nextafter(v, HUGE_VALF);
  for (; ulps < 0; ++ulps) v = std::nextafter(v, 0.0f);
  return v;
}

reference::SiluProfile declared(Twin twin) {
  // libm's own half ulp beside the two that it is moved.
  if (twin == Twin::exp_above || twin == Twin::exp_below) return {.exp_ulps = 3};
  if (twin == Twin::reciprocal) return {.roundings = 3};
  return {};
}

enum class Bug {
  none,
  sigmoid,  // of the gate, without the gate
  swapped,  // silu(up) * gate
  sign,     // exp(gate)
  relu,
  gelu,          // with tanh, as GeluAndMul has it
  quick_gelu,    // silu(1.702 gate), so to speak
  from_tanh,     // gate / 2 * (1 + tanh(gate / 2)), which cancels for closed gates
  coarse_exp,    // 11 bits of it, as a table or ex2.approx.f16 has
  rounded_silu,  // to the type of the output, before up
  up_twice,
};

float with_11_bits(float v) {
  int exponent = 0;
  const float significand = std::frexp(v, &exponent);
  return std::ldexp(std::nearbyint(significand * 2048) / 2048, exponent);
}

float twin_of(Twin twin, Bug bug, DType t, double gate, double up) {
  float g = float(gate), v = float(up);
  if (bug == Bug::swapped) std::swap(g, v);
  float e = std::exp(bug == Bug::sign ? g : -g);
  if (twin == Twin::exp_above) e = moved(e, 2);
  if (twin == Twin::exp_below) e = moved(e, -2);
  if (bug == Bug::coarse_exp) e = with_11_bits(e);
  float silu = g / (1 + e);
  if (twin == Twin::reciprocal) silu = g * (1 / (1 + e));
  switch (bug) {
    case Bug::sigmoid:
      silu = 1 / (1 + e);
      break;
    case Bug::relu:
      silu = std::max(g, 0.0f);
      break;
    case Bug::gelu:
      silu = 0.5f * g * (1 + std::tanh(0.7978845608f * (g + 0.044715f * g * g * g)));
      break;
    case Bug::quick_gelu:
      silu = g / (1 + std::exp(-1.702f * g));
      break;
    case Bug::from_tanh:
      silu = 0.5f * g * (1 + std::tanh(0.5f * g));
      break;
    case Bug::rounded_silu:
      silu = float(round_to(t, silu));
      break;
    case Bug::up_twice:
      silu *= v;
      break;
    default:
      break;
  }
  if (twin == Twin::rounded_once) return float(gate / (1 + std::exp(-gate)) * up);
  return silu * v;
}

struct Result {
  double cases = 0;     // percent that are rejected
  double elements = 0;  // of all of them
  double score = 0;
};

Result rejected(Bug bug, Twin twin, Gates gates, DType t) {
  constexpr int kCases = 100;
  Result result;
  for (int seed = 0; seed < kCases; ++seed) {
    const Data d = data_of(t, gates, std::uint64_t(seed));
    std::vector<std::byte> out(d.gate.values.size() * std::size_t(size_of(t)));
    for (std::size_t i = 0; i < d.gate.values.size(); ++i)
      store(t, out.data(), std::int64_t(i),
            round_to(t, twin_of(twin, bug, t, d.gate.values[i], d.up.values[i])));
    const Comparison c =
        compare(t, out.data(), reference::silu_and_mul(d.gate, d.up, declared(twin), t));
    result.cases += c.first.has_value() * 100.0 / kCases;
    if (c.first)
      result.elements += 100.0 * double(c.first->count) / double(d.gate.values.size()) / kCases;
    result.score = std::max(result.score, c.score);
  }
  return result;
}

// silu(g) = g exp(g) / (1 + exp(g)) where g < 0, and g + silu(-g) elsewhere.
TEST(SiluReference, AgreesWithASecondAlgorithm) {
  for (const Gates gates : kGates) {
    for (std::uint64_t seed = 0; seed < 50; ++seed) {
      const Data d = data_of(DType::f32, gates, seed);
      const Budget b = reference::silu_and_mul(d.gate, d.up, {}, DType::f32);
      for (std::size_t i = 0; i < b.r.size(); ++i) {
        const long double g = d.gate.values[i], e = std::exp(-std::fabs(g)),
                          closed = -std::fabs(g) * e / (1 + e), silu = g < 0 ? closed : g + closed,
                          r = silu * d.up.values[i];
        // An open gate whose product is exact is taken for the gate itself.
        const double near = b.rho[i] == 0 ? 0x1p-25 : 8 * 0x1p-53;
        ASSERT_LE(std::fabs(b.r[i] - double(r)), near * std::fabs(double(r))) << double(g);
      }
    }
  }
}

TEST(SiluBudget, AcceptsCorrectKernels) {
  for (const DType t : kTypes) {
    for (const Gates gates : kGates) {
      for (const Twin twin : kTwins) {
        const Result result = rejected(Bug::none, twin, gates, t);
        EXPECT_EQ(result.cases, 0) << name_of(t) << int(gates) << int(twin);
        EXPECT_LE(result.score, 1.0);
        // They must come near enough for the budget to be worth something.
        if (gates == Gates::bending) {
          EXPECT_GT(result.score, 0.3) << name_of(t) << int(twin);
        }
      }
    }
  }
}

// Who rounds once more than it declares, or whose exp is worse, is not what was declared.
TEST(SiluBudget, KnowsWhatWasDeclared) {
  int beyond = 0, all = 0;
  for (int seed = 0; seed < 200; ++seed) {
    const Data d = data_of(DType::f32, Gates::bending, std::uint64_t(seed));
    const Budget b = reference::silu_and_mul(d.gate, d.up, {.exp_ulps = 0.5}, DType::f32);
    for (std::size_t i = 0; i < b.r.size(); ++i) {
      const float g = float(d.gate.values[i]), e = moved(std::exp(-g), 12);
      ++all;
      beyond += !accepts(DType::f32, g / (1 + e) * float(d.up.values[i]), b.r[i], b.rho[i]);
    }
  }
  EXPECT_GT(beyond, all / 4);
}

struct Rate {
  const char* name;
  Bug bug;
  double cases[3];     // percent at least that are rejected, of f32, f16, bf16: gates that bend
  double elements[3];  // and of their elements
  double whole;        // of the cases of whole numbers, in each type
};

class SiluMutants : public testing::TestWithParam<Rate> {};

TEST_P(SiluMutants, AreRejected) {
  const Rate& rate = GetParam();
  for (int i = 0; i < 3; ++i) {
    const DType t = kTypes[i];
    const Result bending = rejected(rate.bug, Twin::quotient, Gates::bending, t),
                 whole = rejected(rate.bug, Twin::quotient, Gates::whole, t);
    EXPECT_GE(bending.cases, rate.cases[i]) << name_of(t);
    EXPECT_GE(bending.elements, rate.elements[i]) << name_of(t);
    EXPECT_GE(whole.cases, rate.whole) << name_of(t);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Zoo, SiluMutants,
    testing::Values(Rate{"sigmoid", Bug::sigmoid, {100, 100, 100}, {99, 99, 99}, 100},
                    Rate{"swapped", Bug::swapped, {100, 100, 100}, {99, 97, 94}, 100},
                    Rate{"sign", Bug::sign, {100, 100, 100}, {99, 99, 99}, 100},
                    Rate{"relu", Bug::relu, {100, 100, 100}, {99, 96, 84}, 100},
                    Rate{"gelu", Bug::gelu, {100, 100, 100}, {99, 96, 84}, 100},
                    Rate{"quick_gelu", Bug::quick_gelu, {100, 100, 100}, {99, 96, 84}, 100},
                    // 16 bits forgive what cancels, unless the gate is far below zero.
                    Rate{"from_tanh", Bug::from_tanh, {100, 0, 0}, {20, 0, 0}, 100},
                    Rate{"coarse_exp", Bug::coarse_exp, {100, 80, 20}, {90, 10, 1}, 50},
                    Rate{"rounded_silu", Bug::rounded_silu, {0, 100, 100}, {0, 20, 20}, 0},
                    Rate{"up_twice", Bug::up_twice, {100, 100, 100}, {99, 99, 99}, 100}),
    [](const auto& info) { return std::string(info.param.name); });

struct One {
  double r, rho;
};

One one(double gate, double up, DType t = DType::f32) {
  Matrix g(1, 1), v(1, 1);
  g.values[0] = gate;
  v.values[0] = up;
  const Budget b = reference::silu_and_mul(g, v, {}, t);
  return {b.r[0], b.rho[0]};
}

bool takes(const One& budget, double y, DType t = DType::f32) {
  Budget b(1, 1);
  b.r[0] = budget.r;
  b.rho[0] = budget.rho;
  alignas(8) std::byte bytes[8];
  store(t, bytes, 0, y);
  return !compare(t, bytes, b).first.has_value();
}

// Where 1 + exp(-g) is 1 in fp32, silu is the gate itself, and the product may be exact.
TEST(SiluBudget, KnowsOpenGates) {
  EXPECT_EQ(one(18, 3).r, 54);
  EXPECT_EQ(one(18, 3).rho, 0);
  EXPECT_EQ(1.0f + std::exp(-18.0f), 1.0f);
  EXPECT_GT(one(17, 3).rho, 0);
  EXPECT_GT(one(18 + 0x1p-19, 1 + 0x1p-23).rho, 0);  // the product is not exact
  EXPECT_GT(one(-18, 3).rho, 0);
  EXPECT_EQ(one(0x1p127, 4).r, 0x1p129);
  EXPECT_TRUE(takes(one(0x1p127, 4), HUGE_VAL));
  EXPECT_FALSE(takes(one(0x1p127, 4), double(std::numeric_limits<float>::max())));
}

// Where exp(-g) leaves fp32, a kernel has 0, or what g exp(g) is; one binade before that, only the
// latter.
TEST(SiluBudget, KnowsClosedGates) {
  const double small = -90 * std::exp(-90.0);
  EXPECT_TRUE(takes(one(-90, 1), -0.0));
  EXPECT_TRUE(takes(one(-90, 1), small));
  EXPECT_FALSE(takes(one(-90, 1), 3 * small));
  EXPECT_FALSE(takes(one(-90, 1), -small));
  EXPECT_FALSE(takes(one(-88, 1), -0.0));
  EXPECT_TRUE(takes(one(-88, 1), double(-88 / (1 + std::exp(88.0f)))));
  EXPECT_TRUE(takes(one(-5000, 1), -5000 / (1 + std::exp(5000.0f))));
  EXPECT_FALSE(takes(one(-5000, 1), -0x1p-126));
}

TEST(SiluBudget, KnowsZerosAndWhatIsNotFinite) {
  const double inf = HUGE_VAL;
  for (const double zero : {0.0, -0.0}) {
    EXPECT_EQ(one(zero, 7).rho, 0);
    EXPECT_TRUE(takes(one(zero, 7), 0));
    EXPECT_FALSE(takes(one(zero, 7), 0x1p-149));
    EXPECT_TRUE(takes(one(7, zero), 0));
    EXPECT_FALSE(takes(one(7, zero), 0x1p-149));
  }
  EXPECT_TRUE(takes(one(inf, 2), inf));
  EXPECT_FALSE(takes(one(inf, -2), inf));
  EXPECT_TRUE(takes(one(-inf, 2), -inf / (1 + inf)));  // NaN: the definition has no limit
  EXPECT_FALSE(takes(one(-inf, 2), 0));
  EXPECT_TRUE(takes(one(2, -inf), -inf));
  EXPECT_EQ(one(-90, inf).rho, inf);  // not checked: 0 or not, times infinity
  EXPECT_TRUE(takes(one(6e4, 6e4, DType::f16), inf, DType::f16));
  EXPECT_FALSE(takes(one(6e4, 6e4, DType::f16), 65504, DType::f16));
}

}  // namespace
}  // namespace tp
