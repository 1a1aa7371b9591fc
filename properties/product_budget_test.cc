// The budgets of products: the reference agrees with a second, differently written algorithm;
// correct kernels stay inside, whatever their order and arithmetic, if they declare it; and wrong
// ones are rejected (numerics.md sections 5.2, 5.3 and 6.7).

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "harness/base/philox.h"
#include "properties/budget_testing.h"
#include "reference/qkv_linear.h"
#include "reference/row_linear.h"

namespace tp {
namespace {

struct Data {
  DType t;
  Matrix x, w, bias;
};

// x [3, k], w [8, k], bias [1, 8]: as a fill has them, or small integers.
Data data_of(DType t, Fill fill, std::int64_t k, std::uint64_t seed) {
  if (fill == Fill::exact)
    return {t, integers("x", 3, k, 2, seed), integers("w", 8, k, 3, seed),
            integers("b", 1, 8, 31, seed)};
  // 17 binades would leave f16.
  const DataRegime g{
      .fill = fill, .seed = seed, .eps = 1e-6, .scale_log2 = t == DType::f16 ? -6 : 0};
  return {t, filled({"x", t, 3, k, Role::activation, 16}, g),
          filled({"w", t, 8, k, Role::weight, 16}, g), filled({"b", t, 1, 8, Role::weight, 1}, g)};
}

enum class Bug {
  none,
  element_missing,
  swapped_columns,
  scaled,      // by 1.01
  coarse_sum,  // kept in the type of the inputs
  bias_missing,
  rank_missing,  // from here on: of a sum over ranks
  rank_twice,
  bias_on_every_rank,
  next_ranks_columns
};

// One row of x times one of w over columns `run`, with a bug.
float partial(const Data& d, Order order, std::int64_t i, std::int64_t j, Shard run, Shard of_w,
              Bug bug) {
  const double *a = d.x.row(i) + run.offset, *b = d.w.row(j) + of_w.offset;
  const std::int64_t n = run.size - (bug == Bug::element_missing);
  if (bug == Bug::coarse_sum) {
    float sum = 0;
    for (std::int64_t k = 0; k < n; ++k) sum = rounded(d.t, sum + float(a[k] * b[k]));
    return sum;
  }
  return n > 0 ? twin_sum(order, a, b, n) : 0.0f;
}

std::vector<std::byte> linear_twin(const Data& d, Order order, Bug bug) {
  std::vector<std::byte> out(std::size_t(d.x.rows * d.w.rows * size_of(d.t)));
  for (std::int64_t i = 0; i < d.x.rows; ++i) {
    for (std::int64_t j = 0; j < d.w.rows; ++j) {
      const std::int64_t from = bug == Bug::swapped_columns ? j ^ 1 : j;
      float y = partial(d, order, i, from, {0, d.x.cols}, {0, d.x.cols}, bug);
      if (bug != Bug::bias_missing) y += float(d.bias.values[std::size_t(from)]);
      if (bug == Bug::scaled) y *= 1.01f;
      store(d.t, out.data(), i * d.w.rows + j, rounded(d.t, y));
    }
  }
  return out;
}

// Percent of the cases that are rejected, of all orders and depths.
double linear_rejected(Bug bug, Fill fill, DType t, int cases, double* score = nullptr) {
  int rejected = 0, counted = 0;
  for (int seed = 0; seed < cases; ++seed) {
    const Random4 r = philox(std::uint64_t(seed), stream_of("linear"), 0);
    const std::int64_t k = 1 + r[0] % (seed % 2 ? 40u : 600u);
    for (const Order order : kOrders) {
      if (t == DType::f32 && order == Order::matrix_steps) continue;  // they take 16-bit elements
      const Data d = data_of(t, fill, k, std::uint64_t(seed));
      const Budget budget = reference::projection(d.x, d.w, &d.bias, declared(order, k), t);
      const Comparison c = compare(t, linear_twin(d, order, bug).data(), budget);
      ++counted;
      rejected += c.first.has_value();
      if (score) *score = std::max(*score, c.score);
    }
  }
  return 100.0 * rejected / counted;
}

constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

// The same sums by another road: long double, from the other end, compensated.
TEST(ProductReference, AgreesWithASecondAlgorithm) {
  for (std::uint64_t seed = 0; seed < 120; ++seed) {
    const std::int64_t k = 1 + std::int64_t(philox(seed, 1, 0)[0] % 700);
    const Data d = data_of(DType::f32, Fill(seed % 6), k, seed);
    const Budget b = reference::product(d.x, d.w, {0, k}, &d.bias, {.depth = k}, false);
    for (std::int64_t i = 0; i < d.x.rows; ++i) {
      for (std::int64_t j = 0; j < d.w.rows; ++j) {
        long double sum = d.bias.values[std::size_t(j)], lost = 0, magnitude = std::fabs(sum);
        for (std::int64_t n = k - 1; n >= 0; --n) {
          const long double product = (long double)(d.x.row(i)[n]) * d.w.row(j)[n];
          const long double term = product - lost, next = sum + term;
          lost = (next - sum) - term;
          sum = next;
          magnitude += std::fabs(product);
        }
        ASSERT_LE(std::fabs(b.r[std::size_t(i * d.w.rows + j)] - double(sum)),
                  double(k + 1) * 0x1p-53 * double(magnitude))
            << "seed " << seed << " at " << i << "," << j;
      }
    }
  }
}

TEST(ProductReference, LeastBits) {
  EXPECT_EQ(reference::least_bit(1), 0);
  EXPECT_EQ(reference::least_bit(-6), 1);
  EXPECT_EQ(reference::least_bit(0.75), -2);
  EXPECT_EQ(reference::least_bit(0x1p-149), -149);
  EXPECT_EQ(reference::least_bit(1 + 0x1p-52), -52);
  EXPECT_GT(reference::least_bit(0.0), 1000);
  EXPECT_EQ(reference::least_bit(-0.0), reference::least_bit(0.0));
}

// The rule of exactness holds to the last bit, and not one bit further.
TEST(ProductReference, KnowsWhatIsExact) {
  const std::vector<double> ones(2, 1.0);
  const auto rho = [&](double a, double b) {
    const double values[] = {a, b};
    const int q = std::min(reference::least_bit(a), reference::least_bit(b));
    return reference::sum_of_products(values, ones.data(), 2, q, {.depth = 2}).rho;
  };
  EXPECT_EQ(rho(0x1p24 - 1, 1), 0);
  EXPECT_GT(rho(0x1p24, 1), 0);
  EXPECT_EQ(rho(0x1p24, 2), 0);
  EXPECT_EQ(rho(0x1p25 - 2, 2), 0);
  EXPECT_GT(rho(-0x1p24, 1), 0);  // a sum that cancels had a large part on its way
  EXPECT_GT(rho(0x1p-149, 0x1p-150), 0);

  EXPECT_EQ(reference::plus({3, 0}, 4, false).rho, 0);
  EXPECT_GT(reference::plus({0x1p24, 0}, 1, false).rho, 0);
  EXPECT_EQ(reference::plus({0x1p24, 0}, 1, true).rho, 0);  // compare() rounds it
  EXPECT_GT(reference::plus({0x1p54, 0}, 1, true).rho, 0);  // the reference itself rounds
  EXPECT_EQ(reference::stored(DType::bf16, {255, 0}).rho, 0);
  EXPECT_EQ(reference::stored(DType::bf16, {257, 0}).rho, 1);
  EXPECT_EQ(reference::stored(DType::bf16, {255, 0.25}).rho, 0.75);
}

// A matrix step takes 2^-24 of f16 to be as large as 2^-14, and cuts the other products off where
// beside 2^-14 nothing of them would be kept.
TEST(ProductBudget, KnowsWhatIsCutOffBesideSubnormalOperands) {
  constexpr int kDepth = 16;
  const Accumulation knows{.depth = 1, .matrix_steps = true, .least_normal = 0x1p-14},
      does_not{.depth = 1, .matrix_steps = true};
  int beyond = 0;
  for (std::uint64_t seed = 0; seed < 100; ++seed) {
    Matrix x(1, kDepth), w(1, kDepth);
    double largest = 0;
    for (int k = 0; k < kDepth; ++k) {
      const Random4 bits = philox(seed, 1, std::uint64_t(k));
      x.values[k] = std::ldexp(1024 + bits[0] % 1024, -18);
      w.values[k] = std::ldexp(1024 + bits[1] % 1024, -18);
      if (k == int(seed % kDepth)) x.values[k] = 0x1p-24, w.values[k] = 1024;
      largest =
          std::max({largest, x.values[k] * w.values[k], knows.raised(x.values[k], w.values[k])});
    }
    const double unit = std::ldexp(1.0, std::ilogb(largest) - 25);
    double sum = 0;
    for (int k = 0; k < kDepth; ++k) sum += std::trunc(x.values[k] * w.values[k] / unit) * unit;
    const float y = float(sum);  // no more than 24 bits of it are left
    const auto rejected = [&](const Accumulation& accumulation) {
      const Budget b = reference::product(x, w, {0, kDepth}, nullptr, accumulation, true);
      return compare(DType::f32, &y, b).first.has_value();
    };
    EXPECT_FALSE(rejected(knows)) << seed;
    beyond += rejected(does_not);
  }
  EXPECT_GE(beyond, 90);
}

// Multiples of 2^-28 that fp32 adds exactly; a matrix step that takes one of them to be 1 does not
// keep their last bits.
TEST(ProductBudget, FindsNoExactnessBesideSubnormalOperands) {
  Matrix x(1, 2), w(1, 2);
  x.values = {0x1p-24, 0x1p-12};
  w.values = {0x1p14, 0x1p-4};
  const auto rho = [&](double least) {
    return reference::product(x, w, {0, 2}, nullptr,
                              {.depth = 1, .matrix_steps = true, .least_normal = least}, true)
        .rho[0];
  };
  EXPECT_EQ(rho(0), 0);
  EXPECT_GT(rho(0x1p-14), 0);
}

// Hopper's steps of e4m3 as published (numerics.md section 3): 32 products and the accumulator are
// cut off below the bit that is `bits` below the largest of them.
float narrow_sum(const double* a, const double* b, std::int64_t n, int bits) {
  double total = 0;
  for (std::int64_t first = 0; first < n; first += 32) {
    const std::int64_t end = std::min(n, first + 32);
    double largest = std::fabs(total);
    for (std::int64_t k = first; k < end; ++k) largest = std::max(largest, std::fabs(a[k] * b[k]));
    if (largest == 0) continue;
    const double unit = std::ldexp(1.0, std::ilogb(largest) - bits);
    double sum = std::trunc(total / unit) * unit;
    for (std::int64_t k = first; k < end; ++k) sum += std::trunc(a[k] * b[k] / unit) * unit;
    total = sum;
  }
  return float(total);
}

// Of 16 x 16 sums of k random codes each (`positive`: of one sign), those that are rejected.
int narrow_rejected(std::int64_t k, bool positive, int bits, bool declared, bool whole = false) {
  Matrix x(16, k), w(16, k);
  for (Matrix* m : {&x, &w}) {
    for (std::int64_t i = 0; i < 16 * k; ++i) {
      const Random4 r = philox(std::uint64_t(k + bits), m == &x ? 1 : 2, std::uint64_t(i));
      double v = (double(r[0]) + double(r[1]) + double(r[2]) - 1.5 * 0x1p32) * 0x1p-31;
      if (whole) v = r[0] % 2 ? 1 : 2;
      if (whole && r[1] % 2 != 0) v = -v;
      m->values[std::size_t(i)] = round_to(DType::e4m3, positive ? std::fabs(v) : v);
    }
  }
  Accumulation accumulation{.depth = (k + 15) / 16, .matrix_steps = true};
  accumulation.narrow_steps = declared;
  const Budget budget = reference::product(x, w, {0, k}, nullptr, accumulation, true);
  std::vector<float> out;
  for (std::int64_t i = 0; i < 16; ++i)
    for (std::int64_t j = 0; j < 16; ++j) out.push_back(narrow_sum(x.row(i), w.row(j), k, bits));
  const Comparison c = compare(DType::f32, out.data(), budget);
  return c.first ? int(c.first->count) : 0;
}

TEST(ProductBudget, KnowsNarrowSteps) {
  for (const std::int64_t k : {32, 100, 1024, 4096}) {
    for (const bool positive : {false, true})
      EXPECT_EQ(narrow_rejected(k, positive, 13, true), 0) << k << positive;
    EXPECT_EQ(narrow_rejected(k, false, 13, true, true), 0) << k;  // exact
    // Steps that keep less, and those that were not declared, are found.
    EXPECT_GE(narrow_rejected(k, true, 8, true), 200) << k;
    EXPECT_GE(narrow_rejected(k, true, 13, false), 100) << k;
  }
}

TEST(ProductBudget, AcceptsCorrectKernelsInAnyOrder) {
  for (int fill = 0; fill < 6; ++fill) {
    for (const DType t : kTypes) {
      double score = 0;
      EXPECT_EQ(linear_rejected(Bug::none, Fill(fill), t, 60, &score), 0)
          << fill << " " << name_of(t);
      EXPECT_LE(score, 1.0);
      // Exact data have no error at all, others must come near enough for the budget to be worth
      // something.
      if (t == DType::f32 && Fill(fill) == Fill::exact) {
        EXPECT_EQ(score, 0);
      } else if (Fill(fill) == Fill::dense) {
        EXPECT_GT(score, 0.2) << name_of(t);
      }
    }
  }
}

struct Rate {
  const char* name;
  Bug bug;
  double exact, dense;  // percent at least, in each type
};

class ProductMutants : public testing::TestWithParam<Rate> {};

TEST_P(ProductMutants, AreRejected) {
  const Rate& rate = GetParam();
  for (const DType t : kTypes) {
    if (rate.bug == Bug::coarse_sum && t == DType::f32) continue;  // it is none there
    EXPECT_GE(linear_rejected(rate.bug, Fill::exact, t, 60), rate.exact) << name_of(t);
    EXPECT_GE(linear_rejected(rate.bug, Fill::dense, t, 60), rate.dense) << name_of(t);
  }
}

INSTANTIATE_TEST_SUITE_P(Section67, ProductMutants,
                         testing::Values(Rate{"element_missing", Bug::element_missing, 100, 100},
                                         Rate{"swapped_columns", Bug::swapped_columns, 100, 100},
                                         Rate{"scaled", Bug::scaled, 100, 100},
                                         Rate{"coarse_sum", Bug::coarse_sum, 0, 80},
                                         Rate{"bias_missing", Bug::bias_missing, 100, 100}),
                         [](const auto& info) { return std::string(info.param.name); });

// The sum over runs of x[:, run] w[:, run]^T, plus bias (or nullptr), added to the first run's.
Budget row_linear(const Matrix& x, const Matrix& w, const Matrix* bias,
                  const std::vector<Shard>& runs, const Accumulation& accumulation,
                  const reference::RowLinearTypes& types) {
  std::vector<Budget> parts;
  for (std::size_t run = 0; run < runs.size(); ++run) {
    parts.push_back(reference::product(x, w, runs[run], run == 0 ? bias : nullptr, accumulation,
                                       reference::run_is_last(runs.size(), types)));
  }
  return reference::sum_of_runs(parts, types);
}

// How a twin adds the ranks' partial sums up.
enum class Fold { in_order, backwards, tree };

std::vector<std::byte> row_twin(const Data& d, Order order, Fold fold, int ranks, DType type,
                                Bug bug) {
  std::vector<std::byte> out(std::size_t(d.x.rows * d.w.rows * size_of(d.t)));
  const std::int64_t width = d.x.cols / ranks;
  for (std::int64_t i = 0; i < d.x.rows; ++i) {
    for (std::int64_t j = 0; j < d.w.rows; ++j) {
      std::vector<float> sums;
      for (int rank = 0; rank < ranks; ++rank) {
        const int loaded = bug == Bug::next_ranks_columns ? (rank + 1) % ranks : rank;
        float sum = partial(d, order, i, j, {rank * width, width}, {loaded * width, width},
                            rank == ranks - 1 ? bug : Bug::none);
        const bool biased =
            bug != Bug::bias_missing && (rank == 0 || bug == Bug::bias_on_every_rank);
        if (biased) sum += float(d.bias.values[std::size_t(j)]);
        sums.push_back(rounded(type, sum));
      }
      if (bug == Bug::rank_missing) sums[0] = 0;
      if (bug == Bug::rank_twice) sums.push_back(sums[0]);
      if (fold == Fold::backwards) std::reverse(sums.begin(), sums.end());
      while (sums.size() > 1) {
        if (fold == Fold::tree) {
          std::vector<float> next;
          for (std::size_t s = 0; s < sums.size(); s += 2)
            next.push_back(s + 1 < sums.size() ? rounded(type, sums[s] + sums[s + 1]) : sums[s]);
          sums = next;
        } else {
          sums[1] = rounded(type, sums[0] + sums[1]);
          sums.erase(sums.begin());
        }
      }
      store(d.t, out.data(), i * d.w.rows + j, rounded(d.t, sums[0]));
    }
  }
  return out;
}

double row_rejected(Bug bug, Fill fill, DType t, DType type, int cases, double* score = nullptr) {
  int rejected = 0, counted = 0;
  for (int seed = 0; seed < cases; ++seed) {
    const Random4 r = philox(std::uint64_t(seed), stream_of("rows"), 0);
    const int ranks = bug == Bug::none ? 1 + int(r[0] % 8) : 2 + int(r[0] % 7);
    const std::int64_t width = 1 + r[1] % 100;
    const Order order = t == DType::f32 ? kOrders[r[2] % 5] : kOrders[r[2] % 6];
    const Data d = data_of(t, fill, width * ranks, std::uint64_t(seed));
    std::vector<Shard> runs;
    for (int rank = 0; rank < ranks; ++rank) runs.push_back({rank * width, width});
    const Budget budget =
        row_linear(d.x, d.w, &d.bias, runs, declared(order, width), {.partial = type, .out = t});
    for (const Fold fold : {Fold::in_order, Fold::backwards, Fold::tree}) {
      const Comparison c = compare(t, row_twin(d, order, fold, ranks, type, bug).data(), budget);
      ++counted;
      rejected += c.first.has_value();
      if (score) *score = std::max(*score, c.score);
    }
  }
  return 100.0 * rejected / counted;
}

TEST(RowLinearBudget, AcceptsCorrectKernelsInAnyOrder) {
  for (int fill = 0; fill < 6; ++fill) {
    for (const DType t : kTypes) {
      for (const DType type : {DType::f32, t}) {
        double score = 0;
        EXPECT_EQ(row_rejected(Bug::none, Fill(fill), t, type, 150, &score), 0)
            << fill << " " << name_of(t) << " summed in " << name_of(type);
        EXPECT_LE(score, 1.0);
        if (Fill(fill) == Fill::dense) {
          EXPECT_GT(score, 0.1);
        }
      }
    }
  }
}

// Integers that the sums' type holds: no budget is left, and one that it does not hold has some.
TEST(RowLinearBudget, IsNothingWhereEveryPartialSumIsAnInteger) {
  Data d = data_of(DType::bf16, Fill::exact, 32, 1);
  const std::vector<Shard> runs = {{0, 8}, {8, 8}, {16, 8}, {24, 8}};
  const auto largest = [&](DType type) {
    const Budget b =
        row_linear(d.x, d.w, &d.bias, runs, {.depth = 8}, {.partial = type, .out = DType::bf16});
    return *std::max_element(b.rho.begin(), b.rho.end());
  };
  EXPECT_EQ(largest(DType::bf16), 0);
  EXPECT_EQ(largest(DType::f32), 0);
  for (double& v : d.x.values) v *= 127;
  EXPECT_GT(largest(DType::bf16), 0);
  EXPECT_EQ(largest(DType::f32), 0);
}

class RowLinearMutants : public testing::TestWithParam<Rate> {};

TEST_P(RowLinearMutants, AreRejected) {
  const Rate& rate = GetParam();
  for (const DType t : kTypes) {
    for (const DType type : {DType::f32, t}) {
      EXPECT_GE(row_rejected(rate.bug, Fill::exact, t, type, 100), rate.exact)
          << name_of(t) << " summed in " << name_of(type);
      EXPECT_GE(row_rejected(rate.bug, Fill::dense, t, type, 100), rate.dense)
          << name_of(t) << " summed in " << name_of(type);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Section67, RowLinearMutants,
    testing::Values(Rate{"element_missing", Bug::element_missing, 100, 100},
                    Rate{"bias_missing", Bug::bias_missing, 100, 100},
                    Rate{"rank_missing", Bug::rank_missing, 100, 100},
                    Rate{"rank_twice", Bug::rank_twice, 100, 100},
                    Rate{"bias_on_every_rank", Bug::bias_on_every_rank, 100, 100},
                    Rate{"next_ranks_columns", Bug::next_ranks_columns, 100, 100}),
    [](const auto& info) { return std::string(info.param.name); });

// 60000 + 60000 - 70000: the result fits f16, a sum of two of the ranks does not.
TEST(RowLinearBudget, SaysNothingOfSumsThatMayOverflowOnTheWay) {
  Matrix x(1, 3), weight(2, 3);
  x.values = {60000, 60000, -35000};
  weight.values = {1, 1, 2, 0.25, 0.25, 0.5};
  const Budget budget = row_linear(x, weight, nullptr, {{0, 1}, {1, 1}, {2, 1}}, {.depth = 1},
                                   {.partial = DType::f16, .out = DType::f16});
  EXPECT_EQ(budget.rho[0], HUGE_VAL);
  EXPECT_LT(budget.rho[1], 64);
  const Budget wide = row_linear(x, weight, nullptr, {{0, 1}, {1, 1}, {2, 1}}, {.depth = 1},
                                 {.partial = DType::f32, .out = DType::f16});
  EXPECT_EQ(wide.rho[0], 0);
}

}  // namespace
}  // namespace tp
