// The budgets of rope, of the norms of heads and of a norm's sum: the references agree with second,
// differently written algorithms; correct kernels stay inside the budget in any order of summation;
// and wrong ones are rejected.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <complex>

#include "harness/base/philox.h"
#include "properties/budget_testing.h"
#include "reference/qk_norm.h"
#include "reference/rope.h"

namespace tp {
namespace {

enum class Norm { none, per_head, per_head_1p, weightless };

// A drawn case: heads of a few tokens, a table of cosines and sines, a norm.
struct Drawn {
  DType t;
  Norm norm;
  int head_dim, heads, tokens = 3;
  reference::RopeShape shape;
  float eps = 1e-6f;
  Matrix x{0, 0}, weight{0, 0}, table{0, 0};
  std::vector<std::int32_t> positions;

  std::uint32_t lanes = 1;  // of the sums

  Profile profile() const {
    return {.depth = head_dim / std::int64_t(lanes) + 1 + lanes,
            .all_reduce_terms = 1,
            .terms = head_dim,
            .rsqrt_ulps = 1};
  }
  Budget budget() const {
    if (norm == Norm::none) return reference::rope(x, table, positions, shape, std::nullopt);
    reference::RopeNorm n{eps, profile()};
    if (norm != Norm::weightless) n.weight = &weight;
    n.weight_offset = norm == Norm::per_head_1p ? 1 : 0;
    return reference::rope(x, table, positions, shape, n);
  }
};

constexpr int kPositions = 32;  // of which the last are only there to be read by mistake

Drawn drawn(std::uint64_t seed, Fill fill) {
  const Random4 r = philox(seed, stream_of("shape"), 0), s = philox(seed, stream_of("shape"), 1);
  Drawn d{.t = DType(r[0] % 3), .norm = Norm(r[1] % 4)};
  d.head_dim = 4 + int(r[2] % 125);
  d.heads = 1 + int(r[3] % 3);
  d.shape = {d.head_dim, std::max(4, (d.head_dim >> s[0] % 3) / 2 * 2), s[1] % 2 == 1};
  d.lanes = 1u << s[2] % 6;
  const DataRegime g{.fill = fill, .seed = seed, .eps = d.eps};
  d.x = filled({"x", d.t, d.tokens, d.heads * d.head_dim, Role::activation, d.head_dim}, g);
  d.weight = filled({"w", d.t, 1, d.head_dim, Role::weight, d.head_dim}, g);
  d.table = Matrix(kPositions, d.shape.rotary_dim);
  const std::int64_t pairs = d.shape.rotary_dim / 2;
  for (std::int64_t p = 0; p < kPositions; ++p) {
    for (std::int64_t i = 0; i < pairs; ++i) {
      const double angle = double(p) * std::pow(1e4, -double(i) / double(pairs));
      const auto stored = [&](double v) {
        return double(fill == Fill::exact ? float(std::nearbyint(v * 1024) / 1024) : float(v));
      };
      d.table.row(p)[i] = stored(std::cos(angle));
      d.table.row(p)[pairs + i] = stored(std::sin(angle));
    }
  }
  for (int i = 0; i < d.tokens; ++i)
    d.positions.push_back(
        1 + std::int32_t(philox(seed, stream_of("positions"), std::uint64_t(i))[0] % 24));
  return d;
}

// The same definition by another road: pairs as complex numbers that are multiplied, in long
// double; the mean square from the largest element down, compensated.
TEST(RopeReference, AgreesWithASecondAlgorithm) {
  using Complex = std::complex<long double>;
  for (std::uint64_t seed = 0; seed < 400; ++seed) {
    const Drawn d = drawn(seed, Fill(seed % 6));
    const Budget b = d.budget();
    for (int i = 0; i < d.tokens; ++i) {
      for (int h = 0; h < d.heads; ++h) {
        std::vector<long double> n(std::size_t(d.head_dim));
        const double* x = d.x.row(i) + h * d.head_dim;
        std::vector<double> sorted(x, x + d.head_dim);
        std::sort(sorted.begin(), sorted.end(),
                  [](double a, double b) { return std::fabs(a) > std::fabs(b); });
        long double sum = 0, lost = 0;
        for (const double v : sorted) {
          const long double term = static_cast<long double>(v) * v - lost, next = sum + term;
          lost = (next - sum) - term;
          sum = next;
        }
        const long double root = sqrtl(sum / d.head_dim + static_cast<long double>(d.eps));
        for (int j = 0; j < d.head_dim; ++j) {
          const double w = d.weight.values[std::size_t(j)];
          n[std::size_t(j)] = x[j];
          if (d.norm != Norm::none) n[std::size_t(j)] /= root;
          if (d.norm == Norm::per_head) n[std::size_t(j)] *= w;
          if (d.norm == Norm::per_head_1p) n[std::size_t(j)] *= 1 + static_cast<long double>(w);
        }
        std::vector<long double> expected = n, size(n.size());
        for (std::size_t j = 0; j < n.size(); ++j) size[j] = std::fabs(n[j]);
        const std::int64_t pairs = d.shape.rotary_dim / 2;
        for (std::int64_t p = 0; p < pairs; ++p) {
          const std::size_t one = std::size_t(d.shape.interleaved ? 2 * p : p),
                            other = std::size_t(d.shape.interleaved ? 2 * p + 1 : p + pairs);
          const double* row = d.table.row(d.positions[std::size_t(i)]);
          const Complex turned = Complex(n[one], n[other]) * Complex(row[p], row[pairs + p]);
          expected[one] = turned.real();
          expected[other] = turned.imag();
          size[one] = size[other] = std::fabs(n[one]) + std::fabs(n[other]);
        }
        for (std::size_t j = 0; j < n.size(); ++j) {
          const std::size_t at = std::size_t(i * d.x.cols + h * d.head_dim) + j;
          // Where the reference claims exactness it leaves out eps, which fp32 cannot see.
          const double slack = b.rho[at] == 0 ? 1e-6 / 1024 : 1e-14;
          ASSERT_LE(std::fabs(b.r[at] - double(expected[j])), slack * double(size[j]))
              << "seed " << seed << " at " << i << "," << h << "," << j;
        }
      }
    }
  }
}

TEST(RopeReference, ExactDataHaveNoBudget) {
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    const Budget b = drawn(seed, Fill::exact).budget();
    EXPECT_TRUE(std::all_of(b.rho.begin(), b.rho.end(), [](double v) { return v == 0; })) << seed;
  }
}

// What passes without a norm, and what position 0 leaves as it is, has no budget in any data.
TEST(RopeReference, WhatDoesNotTurnIsBitwise) {
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    Drawn d = drawn(seed, Fill::dense);
    d.norm = Norm::none;
    const Budget turned = d.budget();
    for (std::size_t at = 0; at < turned.r.size(); ++at) {
      if (std::int64_t(at) % d.head_dim < d.shape.rotary_dim) continue;
      EXPECT_EQ(turned.rho[at], 0);
      EXPECT_EQ(turned.r[at], d.x.values[at]);
    }
    d.positions.assign(std::size_t(d.tokens), 0);
    const Budget at_origin = d.budget();
    EXPECT_EQ(at_origin.r, d.x.values);
    EXPECT_TRUE(
        std::all_of(at_origin.rho.begin(), at_origin.rho.end(), [](double v) { return v == 0; }));
    // A norm rounds, wherever its result stays.
    d.norm = Norm::weightless;
    EXPECT_GT(d.budget().rho[0], 0);
  }
}

enum class Bug {
  none,
  other_style,
  next_position,
  other_direction,
  sine_for_cosine,
  whole_head,
  not_normed,
  normed_after,
  no_one_plus,
  other_heads_mean,
  n_minus_1,
  no_eps,
  bf16_table,
  rounded_between,
};

// A kernel in fp32, with a drawn order of summation and a drawn way to round the products, and one
// bug.
std::vector<std::byte> twin(const Drawn& d, Bug bug, std::uint64_t seed) {
  std::vector<std::byte> out(d.x.values.size() * std::size_t(size_of(d.t)));
  const auto mean_square = [&](const std::vector<float>& x) {
    std::vector<float> lane(d.lanes, 0.0f);
    for (std::size_t j = 0; j < x.size(); ++j)
      lane[j % d.lanes] = std::fma(x[j], x[j], lane[j % d.lanes]);
    float sum = 0;
    for (const float v : lane) sum += v;
    return sum / float(d.head_dim - (bug == Bug::n_minus_1));
  };
  const auto normed = [&](std::vector<float> x, float mean) {
    const float inverse = 1.0f / std::sqrt(mean + (bug == Bug::no_eps ? 0.0f : d.eps));
    for (std::size_t j = 0; j < x.size(); ++j) {
      const float w = float(d.weight.values[j]);
      x[j] *= inverse;
      if (d.norm == Norm::per_head) x[j] *= w;
      if (d.norm == Norm::per_head_1p) x[j] *= bug == Bug::no_one_plus ? w : 1 + w;
      if (bug == Bug::rounded_between) x[j] = float(round_to(d.t, x[j]));
    }
    return x;
  };
  const std::uint32_t way = philox(seed, stream_of("way"), 0)[0] % 3;
  const auto sum_of_products = [&](float a, float b, float c, float e) {  // a b + c e
    if (way == 0) return std::fma(a, b, c * e);
    if (way == 1) return std::fma(c, e, a * b);
    return a * b + c * e;
  };
  const bool interleaved = d.shape.interleaved != (bug == Bug::other_style);
  const std::int64_t rotary_dim = bug == Bug::whole_head ? d.head_dim / 2 * 2 : d.shape.rotary_dim,
                     pairs = rotary_dim / 2;
  for (int i = 0; i < d.tokens; ++i) {
    float first_mean = 0;
    for (int h = 0; h < d.heads; ++h) {
      const std::size_t base = std::size_t(i * d.x.cols + h * d.head_dim);
      std::vector<float> x(d.x.values.begin() + std::ptrdiff_t(base),
                           d.x.values.begin() + std::ptrdiff_t(base) + d.head_dim);
      float mean = mean_square(x);
      if (h == 0) first_mean = mean;
      if (bug == Bug::other_heads_mean) mean = first_mean;
      const bool norms = d.norm != Norm::none && bug != Bug::not_normed;
      if (norms && bug != Bug::normed_after) x = normed(x, mean);
      const std::int32_t position = d.positions[std::size_t(i)] + (bug == Bug::next_position);
      const double* row = d.table.row(position);
      const std::vector<float> n = x;
      for (std::int64_t p = 0; p < pairs; ++p) {
        const std::size_t one = std::size_t(interleaved ? 2 * p : p),
                          other = std::size_t(interleaved ? 2 * p + 1 : p + pairs);
        // A table of rotary_dim columns, read as one of more: into the next row.
        float cosine = float(row[p]), sine = float(row[pairs + p]);
        if (bug == Bug::sine_for_cosine) std::swap(cosine, sine);
        if (bug == Bug::other_direction) sine = -sine;
        if (bug == Bug::bf16_table) {
          cosine = to_float(from_float<bf16>(cosine));
          sine = to_float(from_float<bf16>(sine));
        }
        x[one] = sum_of_products(n[one], cosine, n[other], -sine);
        x[other] = sum_of_products(n[other], cosine, n[one], sine);
      }
      if (norms && bug == Bug::normed_after) x = normed(x, mean_square(x));
      for (int j = 0; j < d.head_dim; ++j)
        store(d.t, out.data(), std::int64_t(base) + j, round_to(d.t, x[std::size_t(j)]));
    }
  }
  return out;
}

bool can_show(const Drawn& d, Bug bug) {
  switch (bug) {
    case Bug::whole_head:
      return d.shape.rotary_dim < d.head_dim / 2 * 2;
    case Bug::not_normed:
    case Bug::n_minus_1:
    case Bug::no_eps:
      return d.norm != Norm::none;
    case Bug::normed_after:  // a rotation keeps the mean square: only a weight tells
      return d.norm == Norm::per_head || d.norm == Norm::per_head_1p;
    case Bug::no_one_plus:
      return d.norm == Norm::per_head_1p;
    case Bug::other_heads_mean:
      return d.norm != Norm::none && d.heads > 1;
    case Bug::rounded_between:
      return d.norm != Norm::none && d.t != DType::f32;
    default:
      return true;
  }
}

double rejected_percent(Bug bug, Fill fill, int cases, double* score_of_f32 = nullptr) {
  int rejected = 0, counted = 0;
  for (std::uint64_t seed = 0; counted < cases; ++seed) {
    const Drawn d = drawn(seed, fill);
    if (!can_show(d, bug)) continue;
    ++counted;
    const Comparison result = compare(d.t, twin(d, bug, seed).data(), d.budget());
    rejected += result.first.has_value();
    if (score_of_f32 && d.t == DType::f32) *score_of_f32 = std::max(*score_of_f32, result.score);
  }
  return 100.0 * rejected / cases;
}

TEST(RopeBudget, CorrectKernelsPass) {
  for (const Fill fill :
       {Fill::exact, Fill::dense, Fill::small_rows, Fill::wide, Fill::equal, Fill::zero_shard}) {
    double score = 0;
    EXPECT_EQ(rejected_percent(Bug::none, fill, 1500, &score), 0) << int(fill);
    EXPECT_LT(score, 1);
    // The budget is not much wider than what kernels do: half of it is used.
    if (fill != Fill::exact) {
      EXPECT_GT(score, 0.4) << int(fill);
    }
  }
}

struct Rate {
  const char* name;
  Bug bug;
  double dense, small_rows;  // percent of the cases, at least
};

class RopeBugs : public testing::TestWithParam<Rate> {};

TEST_P(RopeBugs, AreRejected) {
  const Rate& rate = GetParam();
  const double dense = rejected_percent(rate.bug, Fill::dense, 300),
               small = rejected_percent(rate.bug, Fill::small_rows, 300);
  std::printf("%s: dense %.1f %%, small rows %.1f %%\n", rate.name, dense, small);
  EXPECT_GE(dense, rate.dense);
  EXPECT_GE(small, rate.small_rows);
}

INSTANTIATE_TEST_SUITE_P(Rope, RopeBugs,
                         testing::Values(Rate{"other_style", Bug::other_style, 100, 100},
                                         Rate{"next_position", Bug::next_position, 100, 100},
                                         Rate{"other_direction", Bug::other_direction, 100, 100},
                                         Rate{"sine_for_cosine", Bug::sine_for_cosine, 100, 100},
                                         Rate{"whole_head", Bug::whole_head, 100, 100},
                                         Rate{"not_normed", Bug::not_normed, 100, 100},
                                         Rate{"normed_after", Bug::normed_after, 100, 100},
                                         Rate{"no_one_plus", Bug::no_one_plus, 100, 100},
                                         Rate{"other_heads_mean", Bug::other_heads_mean, 100, 100},
                                         Rate{"n_minus_1", Bug::n_minus_1, 97, 97},
                                         Rate{"no_eps", Bug::no_eps, 10, 100},
                                         Rate{"bf16_table", Bug::bf16_table, 97, 97},
                                         Rate{"rounded_between", Bug::rounded_between, 97, 97}),
                         [](const auto& info) { return std::string(info.param.name); });

// The norm of heads with 1 + w: a kernel rounds the sum to fp32 and stays inside; w alone does not.
TEST(HeadNormBudget, OnePlusWeight) {
  double score = 0;
  for (std::uint64_t seed = 0; seed < 1000; ++seed) {
    Drawn d = drawn(seed, seed % 2 ? Fill::dense : Fill::exact);
    d.norm = Norm::per_head_1p;
    d.positions.assign(std::size_t(d.tokens), 0);  // rope's twin, turned by nothing
    const Budget budget =
        reference::head_norm(d.x, {&d.weight, 1}, d.head_dim, d.head_dim, d.eps, d.profile());
    const Comparison right = compare(d.t, twin(d, Bug::none, seed).data(), budget);
    EXPECT_FALSE(right.first) << seed;
    if (d.t == DType::f32) score = std::max(score, right.score);
    EXPECT_TRUE(compare(d.t, twin(d, Bug::no_one_plus, seed).data(), budget).first) << seed;
    const Budget half =
        reference::head_norm(d.x, {&d.weight, 1}, d.head_dim, 1, d.eps, d.profile());
    if (seed % 2) {
      EXPECT_TRUE(compare(d.t, twin(d, Bug::none, seed).data(), half).first) << seed;
    }
  }
  EXPECT_GT(score, 0.2);
  EXPECT_LT(score, 1);
}

// The sum of a residual norm is bitwise: rounded to fp32 first it is the same, in every type.
TEST(RoundedSum, IsThatOfAKernelThatAddsInFp32) {
  int ties = 0, inexact = 0;
  for (const DType t : {DType::f32, DType::f16, DType::bf16}) {
    Matrix x(1, 1), residual(1, 1);
    for (std::uint64_t i = 0; i < 300000; ++i) {
      const Random4 r = philox(i, stream_of("sum"), 0);
      // Exponents up to 30 apart, and significands that often end in ones or zeros.
      const auto value = [&](std::uint32_t bits, std::uint32_t shape) {
        const double fraction = shape % 3 == 0   ? double(bits % 3) / 2
                                : shape % 3 == 1 ? 1 - double(bits % 4) * 0x1p-9
                                                 : double(bits & 0xFFFFFF) * 0x1p-24;
        const double size = std::ldexp(1 + fraction, int(shape / 3 % 30) - 15);
        return round_to(t, bits >> 31 ? -size : size);
      };
      x.values[0] = value(r[0], r[1]);
      residual.values[0] = value(r[2], r[3]);
      const float kernel = float(x.values[0]) + float(residual.values[0]);
      const double sum = x.values[0] + residual.values[0];
      inexact += double(kernel) != sum;
      ties += t != DType::f32 && std::fabs(sum - round_to(t, sum)) == half_ulp(t, sum);
      ASSERT_EQ(reference::rounded_sum(t, x, residual).values[0], round_to(t, kernel))
          << name_of(t) << " " << x.values[0] << " + " << residual.values[0];
    }
  }
  EXPECT_GT(inexact, 1000);  // it is about them
  EXPECT_GT(ties, 1000);
}

}  // namespace
}  // namespace tp
