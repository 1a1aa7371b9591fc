// The budgets of LoRA: the reference agrees with a second, differently written algorithm; correct
// kernels stay inside, whatever their order and whether one fmaf scales and adds, if they declare
// it; and wrong ones are rejected, each where it is wrong (numerics.md sections 5.5 and 6.5).

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "harness/base/philox.h"
#include "properties/budget_testing.h"
#include "reference/lora.h"

namespace tp {
namespace {

// Of x, A and B; of what is between the two; of base and y.
struct Types {
  DType t, h, out;
};
constexpr DType f32 = DType::f32, f16 = DType::f16, bf16 = DType::bf16;
constexpr Types kTypes[] = {{f32, f32, f32},   {f16, f16, f16},   {f16, f32, f16},
                            {f16, f16, f32},   {f16, f32, f32},   {bf16, bf16, bf16},
                            {bf16, f32, bf16}, {bf16, bf16, f32}, {bf16, f32, f32}};

std::string name_of_types(const Types& types) {
  return fmt::format("{}, h {}, out {}", name_of(types.t), name_of(types.h), name_of(types.out));
}

constexpr std::int64_t kTokens = 6, kOut = 6;
constexpr int kAdapters = 3, kMaxRank = 16;

struct Data {
  Types types;
  Matrix x, base;
  // Of each adapter.
  std::vector<Matrix> a, b, bias;  // the last one has no bias
  std::vector<double> alpha;
  reference::AdapterOfToken adapters = {1, -1, 0, 2, 0, -1};

  std::int64_t rank(std::size_t adapter) const { return a[adapter].rows; }
  float scale(std::size_t adapter) const { return float(alpha[adapter]) / float(a[adapter].rows); }
  bool has_bias(std::size_t adapter) const { return adapter + 1 < bias.size(); }
};

// About one, squared and added up over n.
void shrink_by_root(Matrix& m, std::int64_t n, DType t) {
  const double factor = std::ldexp(1.0, -int(std::ceil(std::log2(double(n)) / 2)));
  for (double& v : m.values) v = round_to(t, v * factor);
}

// Three adapters of different ranks. As a fill has them: with h and the deltas about as large as x
// and base, and scales that are no power of two. Or small integers, with scales of 2, 1/2 and 3.
Data data_of(const Types& types, Fill fill, std::int64_t k, std::uint64_t seed) {
  const bool exact = fill == Fill::exact;
  const DType t = types.t;
  // 17 binades would leave f16.
  const DataRegime g{.fill = fill, .seed = seed, .eps = 1e-6, .scale_log2 = t == f16 ? -6 : 0};
  const auto made = [&](const std::string& name, DType type, std::int64_t rows, std::int64_t cols,
                        int largest, Role role = Role::weight) {
    return exact ? integers(name.c_str(), rows, cols, largest, seed)
                 : filled({name, type, rows, cols, role, 16}, g);
  };
  Data d{types, made("x", t, kTokens, k, 2, Role::activation),
         made("base", types.out, kTokens, kOut, 99, Role::activation)};
  const int first = int(philox(seed, stream_of("ranks"), 0)[0] % kMaxRank);
  const double exact_scales[] = {2, 0.5, 3};
  for (int adapter = 0; adapter < kAdapters; ++adapter) {
    const std::int64_t rank = 1 + (first + 5 * adapter) % kMaxRank;
    const std::string at = std::to_string(adapter);
    d.a.push_back(made("a" + at, t, rank, k, 2));
    d.b.push_back(made("b" + at, t, kOut, rank, 3));
    d.bias.push_back(made("bias" + at, t, 1, kOut, 31));
    d.alpha.push_back(exact ? exact_scales[adapter] * double(rank) : 16 + 7 * adapter);
    if (exact) continue;
    shrink_by_root(d.a.back(), k, t);
    shrink_by_root(d.b.back(), rank, t);
  }
  return d;
}

enum class Bug {
  none,
  // Of h.
  last_rank_missing,
  last_columns_missing,  // 16 of k
  other_a,
  h_for_tokens_of_none,
  coarse_h,  // rounded to the type of x, though it is declared to be kept in f32
  // Of y.
  last_rank_left_out,
  other_b,
  next_rows_of_b,  // as a wrong slice of a packed one has them
  h_not_rounded,
  scale_twice,
  scale_of_max_rank,  // alpha / the largest rank
  scale_of_other,
  base_missing,
  delta_twice,
  delta_missing,
  bias_missing,
  bias_not_scaled,
  coarse_delta,  // rounded to 16 bits before it is added
  delta_for_tokens_of_none
};

bool is_of_h(Bug bug) { return bug >= Bug::last_rank_missing && bug <= Bug::coarse_h; }

// Whether it is a mistake at all where these types are declared.
bool is_wrong(Bug bug, const Types& types) {
  if (bug == Bug::coarse_h || bug == Bug::h_not_rounded) return types.t != types.h;
  if (bug == Bug::coarse_delta) return types.t != f32;
  return true;
}

std::optional<std::size_t> adapter_of(const Data& d, std::int64_t token, bool even_of_none) {
  const std::int32_t adapter = d.adapters[std::size_t(token)];
  if (adapter < 0) return even_of_none ? std::optional<std::size_t>(0) : std::nullopt;
  return std::size_t(adapter);
}

float twin_dot(Order order, const double* a, const double* b, std::int64_t n) {
  return n > 0 ? twin_sum(order, a, b, n) : 0.0f;
}

// h as a kernel stores it.
Matrix twin_h(const Data& d, Order order, Bug bug) {
  Matrix h(kTokens, std::max({d.rank(0), d.rank(1), d.rank(2)}));
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const auto adapter = adapter_of(d, t, bug == Bug::h_for_tokens_of_none);
    if (!adapter) continue;
    const Matrix& a = d.a[bug == Bug::other_a ? (*adapter + 1) % kAdapters : *adapter];
    const std::int64_t n = d.x.cols - (bug == Bug::last_columns_missing ? 16 : 0);
    for (std::int64_t j = 0; j < a.rows; ++j) {
      const float sum = twin_dot(order, d.x.row(t), a.row(j), n);
      h.row(t)[j] = rounded(d.types.h, bug == Bug::coarse_h ? rounded(d.types.t, sum) : sum);
    }
    if (bug == Bug::last_rank_missing) h.row(t)[a.rows - 1] = 0;
  }
  return h;
}

// What a token of this adapter gets beside its base.
struct Delta {
  float sum, bias, scale;
};

Delta twin_delta(const Data& d, const double* h, std::size_t adapter, std::int64_t n, Order order,
                 Bug bug) {
  const std::size_t other = (adapter + 1) % kAdapters;
  const Matrix& b = d.b[bug == Bug::other_b ? other : adapter];
  std::int64_t rank = std::min(d.rank(adapter), b.cols);
  if (bug == Bug::last_rank_left_out) --rank;
  std::vector<double> operands(h, h + rank);
  for (double& v : operands) v = bug == Bug::h_not_rounded ? v : round_to(d.types.t, v);
  const std::int64_t row = bug == Bug::next_rows_of_b ? (n + 1) % kOut : n;
  Delta delta{twin_dot(order, operands.data(), b.row(row), rank), 0, d.scale(adapter)};
  if (d.has_bias(adapter) && bug != Bug::bias_missing)
    delta.bias = float(d.bias[adapter].values[std::size_t(n)]);
  if (bug == Bug::scale_twice) delta.scale *= delta.scale;
  if (bug == Bug::scale_of_other) delta.scale = d.scale(other);
  if (bug == Bug::scale_of_max_rank)
    delta.scale = float(d.alpha[adapter]) / float(std::max({d.rank(0), d.rank(1), d.rank(2)}));
  return delta;
}

std::vector<std::byte> twin_y(const Data& d, const Matrix& h, Order order, bool fused, Bug bug) {
  const DType out = d.types.out;
  std::vector<std::byte> y(std::size_t(kTokens * kOut * size_of(out)));
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const auto adapter = adapter_of(d, t, bug == Bug::delta_for_tokens_of_none);
    // A token of none has no h, so the bias is all that it can get.
    for (std::int64_t n = 0; n < kOut; ++n) {
      float v = float(d.base.row(t)[n]);
      if (adapter && bug != Bug::delta_missing) {
        const auto [sum, bias, scale] = twin_delta(d, h.row(t), *adapter, n, order, bug);
        if (bug == Bug::base_missing) v = 0;
        for (int times = bug == Bug::delta_twice ? 2 : 1; times > 0; --times) {
          const float scaled = scale * (sum + bias);
          if (bug == Bug::coarse_delta) {
            v += rounded(d.types.t, scaled);
          } else if (bug == Bug::bias_not_scaled) {
            v = std::fma(scale, sum, bias) + v;
          } else {
            v = fused ? std::fma(scale, sum + bias, v) : scaled + v;
          }
        }
      }
      store(out, y.data(), t * kOut + n, rounded(out, v));
    }
  }
  return y;
}

Budget budget_of_h(const Data& d, Order order) {
  return reference::lora_shrink(d.x, d.a, d.adapters, {0, d.x.cols}, declared(order, d.x.cols));
}

std::vector<reference::LoraDelta> deltas_of(const Data& d) {
  std::vector<reference::LoraDelta> deltas;
  for (std::size_t i = 0; i < kAdapters; ++i)
    deltas.push_back({&d.b[i], d.has_bias(i) ? &d.bias[i] : nullptr, d.scale(i)});
  return deltas;
}

Budget budget_of_y(const Data& d, const Matrix& h, Order order) {
  std::vector<reference::LoraDelta> deltas = deltas_of(d);
  for (reference::LoraDelta& delta : deltas) delta.accumulation = declared(order, kMaxRank);
  return reference::lora_expand(d.base, h, deltas, d.adapters, d.types.t, d.types.out);
}

std::vector<std::byte> bytes_of(const Matrix& m, DType t) {
  std::vector<std::byte> bytes(m.values.size() * std::size_t(size_of(t)));
  for (std::size_t i = 0; i < m.values.size(); ++i)
    store(t, bytes.data(), std::int64_t(i), m.values[i]);
  return bytes;
}

struct Result {
  double h = 0, y = 0;  // percent of the cases where it is rejected
  double score = 0;     // largest of all
  double score_y = 0;
};

Result rejected(Bug bug, Fill fill, const Types& types, int cases) {
  int of_h = 0, of_y = 0, counted = 0;
  Result result;
  for (int seed = 0; seed < cases; ++seed) {
    const std::int64_t k =
        1 + philox(std::uint64_t(seed), stream_of("k"), 0)[0] % (seed % 2 ? 40u : 400u) +
        (is_of_h(bug) ? 16 : 0);
    const Data d = data_of(types, fill, k, std::uint64_t(seed));
    for (const Order order : kOrders) {
      if (types.t == f32 && order == Order::matrix_steps) continue;  // they take 16-bit elements
      const Matrix h = twin_h(d, order, bug);
      const Comparison shrunk =
          compare(types.h, bytes_of(h, types.h).data(), budget_of_h(d, order));
      of_h += shrunk.first.has_value();
      const Budget budget = budget_of_y(d, h, order);
      bool bad_y = false;
      for (const bool fused : {false, true}) {
        const Comparison expanded =
            compare(types.out, twin_y(d, h, order, fused, bug).data(), budget);
        EXPECT_EQ(expanded.unchecked, 0);
        bad_y |= expanded.first.has_value();
        result.score_y = std::max(result.score_y, expanded.score);
      }
      of_y += bad_y;
      ++counted;
      result.score = std::max({result.score, shrunk.score, result.score_y});
    }
  }
  result.h = 100.0 * of_h / counted;
  result.y = 100.0 * of_y / counted;
  return result;
}

// The same by another road: long double, from the other end, all in one sum.
TEST(LoraReference, AgreesWithASecondAlgorithm) {
  for (std::uint64_t seed = 0; seed < 120; ++seed) {
    const Types& types = kTypes[seed % std::size(kTypes)];
    const std::int64_t k = 1 + std::int64_t(philox(seed, 1, 0)[0] % 300);
    const Data d = data_of(types, Fill(seed % kPlainFills), k, seed);
    const Budget shrunk = budget_of_h(d, Order::ascending);
    const Matrix h = twin_h(d, Order::ascending, Bug::none);
    const Budget expanded = budget_of_y(d, h, Order::ascending);
    for (std::int64_t t = 0; t < kTokens; ++t) {
      const auto adapter = adapter_of(d, t, false);
      for (std::int64_t j = 0; j < shrunk.cols; ++j) {
        long double sum = 0, magnitude = 0;
        for (std::int64_t i = k - 1; i >= 0 && adapter && j < d.rank(*adapter); --i) {
          sum += (long double)(d.x.row(t)[i]) * d.a[*adapter].row(j)[i];
          magnitude += std::fabs(d.x.row(t)[i] * d.a[*adapter].row(j)[i]);
        }
        ASSERT_LE(std::fabs(shrunk.r[std::size_t(t * shrunk.cols + j)] - double(sum)),
                  double(k) * 0x1p-53 * double(magnitude));
      }
      for (std::int64_t n = 0; n < kOut; ++n) {
        long double sum = d.base.row(t)[n], magnitude = std::fabs(sum), delta = 0;
        for (std::int64_t j = adapter ? d.rank(*adapter) - 1 : -1; j >= 0; --j) {
          const long double product = (long double)(round_to(types.t, h.row(t)[j])) *
                                      d.b[*adapter].row(n)[j] * d.scale(*adapter);
          delta += product;
          magnitude += std::fabs(product);
        }
        if (adapter && d.has_bias(*adapter)) {
          const long double bias =
              (long double)(d.scale(*adapter)) * d.bias[*adapter].values[std::size_t(n)];
          delta += bias;
          magnitude += std::fabs(bias);
        }
        // Where the sum is known exactly, r lies half way to what fp32 has of the scaled sum.
        ASSERT_LE(std::fabs(expanded.r[std::size_t(t * kOut + n)] - double(sum + delta)),
                  40 * 0x1p-53 * double(magnitude) + 0x1p-25 * double(std::fabs(delta)))
            << "seed " << seed << " at " << t << "," << n;
      }
    }
  }
}

TEST(LoraBudget, AcceptsCorrectKernelsInAnyOrder) {
  for (int fill = 0; fill < kPlainFills; ++fill) {
    for (const Types& types : kTypes) {
      const Result result = rejected(Bug::none, Fill(fill), types, 40);
      EXPECT_EQ(result.h, 0) << fill << " " << name_of_types(types);
      EXPECT_EQ(result.y, 0) << fill << " " << name_of_types(types);
      EXPECT_LE(result.score, 1.0);
      // Exact data have no error at all, others must come near enough for the budget to be worth
      // something.
      if (types.t == f32 && Fill(fill) == Fill::exact) {
        EXPECT_EQ(result.score, 0);
      } else if (Fill(fill) == Fill::dense) {
        EXPECT_GT(result.score_y, 0.3) << name_of_types(types);
      }
    }
  }
}

struct Rate {
  const char* name;
  Bug bug;
  double exact, dense;  // percent at least, in all types
};

class LoraMutants : public testing::TestWithParam<Rate> {};

TEST_P(LoraMutants, AreRejectedWhereTheyAre) {
  const Rate& rate = GetParam();
  for (const Types& types : kTypes) {
    for (const Fill fill : {Fill::exact, Fill::dense}) {
      const Result result = rejected(rate.bug, fill, types, 40);
      const double wanted = !is_wrong(rate.bug, types) ? 0
                            : fill == Fill::exact      ? rate.exact
                                                       : rate.dense;
      const double found = is_of_h(rate.bug) ? result.h : result.y,
                   elsewhere = is_of_h(rate.bug) ? result.y : result.h;
      EXPECT_GE(found, wanted) << name_of_types(types) << " " << int(fill);
      // What is declared is not rejected, and what is wrong is not so in the other kernel.
      if (!is_wrong(rate.bug, types)) {
        EXPECT_EQ(found, 0) << name_of_types(types) << " " << int(fill);
      }
      EXPECT_EQ(elsewhere, 0) << name_of_types(types) << " " << int(fill);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    Section65, LoraMutants,
    testing::Values(Rate{"last_rank_missing", Bug::last_rank_missing, 100, 100},
                    Rate{"last_columns_missing", Bug::last_columns_missing, 100, 100},
                    Rate{"other_a", Bug::other_a, 100, 100},
                    Rate{"h_for_tokens_of_none", Bug::h_for_tokens_of_none, 100, 100},
                    Rate{"coarse_h", Bug::coarse_h, 0, 100},
                    Rate{"last_rank_left_out", Bug::last_rank_left_out, 100, 100},
                    Rate{"other_b", Bug::other_b, 100, 100},
                    Rate{"next_rows_of_b", Bug::next_rows_of_b, 100, 100},
                    Rate{"h_not_rounded", Bug::h_not_rounded, 0, 100},
                    Rate{"scale_twice", Bug::scale_twice, 100, 100},
                    Rate{"scale_of_max_rank", Bug::scale_of_max_rank, 100, 100},
                    Rate{"scale_of_other", Bug::scale_of_other, 100, 100},
                    Rate{"base_missing", Bug::base_missing, 100, 100},
                    Rate{"delta_twice", Bug::delta_twice, 100, 100},
                    Rate{"delta_missing", Bug::delta_missing, 100, 100},
                    Rate{"bias_missing", Bug::bias_missing, 100, 100},
                    Rate{"bias_not_scaled", Bug::bias_not_scaled, 100, 100},
                    Rate{"coarse_delta", Bug::coarse_delta, 0, 100},
                    Rate{"delta_for_tokens_of_none", Bug::delta_for_tokens_of_none, 100, 100}),
    [](const auto& info) { return std::string(info.param.name); });

// Integers, and scales that keep them or their halves: bitwise, all the way.
TEST(LoraBudget, IsNothingWhereEveryStepIsExact) {
  for (const Types& types : kTypes) {
    const Data d = data_of(types, Fill::exact, 40, 1);
    const Matrix h = twin_h(d, Order::ascending, Bug::none);
    for (const Budget& b : {budget_of_h(d, Order::ascending), budget_of_y(d, h, Order::ascending)})
      EXPECT_EQ(*std::max_element(b.rho.begin(), b.rho.end()), 0) << name_of_types(types);
    // Nor is there any for tokens of no adapter, whatever the data.
    const Data dense = data_of(types, Fill::dense, 40, 1);
    const Budget y =
        budget_of_y(dense, twin_h(dense, Order::ascending, Bug::none), Order::ascending);
    for (std::int64_t t = 0; t < kTokens; ++t) {
      for (std::int64_t n = 0; n < kOut; ++n) {
        const std::size_t at = std::size_t(t * kOut + n);
        if (d.adapters[std::size_t(t)] >= 0) continue;
        EXPECT_EQ(y.rho[at], 0);
        EXPECT_EQ(y.r[at], dense.base.values[at]);
      }
    }
    // Sums of products of 16 bits may be exact, too.
    if (types.t == f32) {
      EXPECT_GT(*std::max_element(y.rho.begin(), y.rho.end()), 0);
    }
  }
}

// y of one element: base + scale h, with B = 1.
Budget one(double base, double h, float scale, DType operand = f32, DType out = f32) {
  Matrix m(1, 1), of_h(1, 1), b(1, 1);
  m.values[0] = base;
  of_h.values[0] = h;
  b.values[0] = 1;
  return reference::lora_expand(m, of_h, {{&b, nullptr, scale, {.depth = 1}}}, {0}, operand, out);
}

bool takes(const Budget& budget, float y) { return !compare(f32, &y, budget).first.has_value(); }

// Two roundings, or one: nothing on either side of them.
TEST(LoraBudget, HasWhatIsScaledRoundedOrNot) {
  int differ = 0;
  for (std::uint64_t seed = 0; seed < 2000; ++seed) {
    const Random4 bits = philox(seed, stream_of("fmaf"), 0);
    const float h = 1 + float(bits[0] >> 8) * 0x1p-24f, scale = 16.0f / float(1 + bits[1] % 64),
                base = -scale * h + float(int(bits[2] >> 8)) * 0x1p-24f * scale;
    const float scaled = scale * h, rounded_twice = base + scaled,
                rounded_once = std::fma(scale, h, base);
    const Budget b = one(base, h, scale);
    EXPECT_TRUE(takes(b, rounded_twice)) << seed;
    EXPECT_TRUE(takes(b, rounded_once)) << seed;
    EXPECT_FALSE(takes(b, std::nextafter(std::max(rounded_twice, rounded_once), HUGE_VALF)));
    EXPECT_FALSE(takes(b, std::nextafter(std::min(rounded_twice, rounded_once), -HUGE_VALF)));
    differ += rounded_twice != rounded_once;
  }
  EXPECT_GT(differ, 500);
}

// 257 + 2^-20 becomes 257 in fp32, and that 256 in bf16; rounded once it is 258.
TEST(LoraBudget, HasASumThatIsRoundedTwice) {
  const Budget b = one(256, 1 + 0x1p-20, 1, f32, bf16);
  for (const double y : {256.0, 258.0}) {
    std::byte bytes[2];
    store(bf16, bytes, 0, y);
    EXPECT_FALSE(compare(bf16, bytes, b).first.has_value()) << y;
  }
  EXPECT_EQ(one(256, 1 + 0x1p-20, 1, f32, f32).rho[0], 0);
}

// 257 lies between two numbers of bf16; which one is taken is no matter of order.
TEST(LoraBudget, RoundsWhatIsMultiplied) {
  EXPECT_EQ(one(0, 257, 1, bf16).r[0], 256);
  EXPECT_EQ(one(0, 259, 1, bf16).r[0], 260);
  EXPECT_EQ(one(0, 257, 1, bf16).rho[0], 0);
  EXPECT_EQ(one(0, 257, 1, f16).r[0], 257);
}

// Beyond the largest float if it is rounded, but not so in an fmaf; what is infinite or NaN in h,
// or by rounding it to f16, or in base, is so in y.
TEST(LoraBudget, KnowsWhatIsNotFinite) {
  const double inf = HUGE_VAL;
  EXPECT_EQ(one(-0x1p127, 0x1p127, 2).rho[0], HUGE_VAL);
  EXPECT_EQ(one(0, inf, 3).r[0], inf);
  EXPECT_TRUE(takes(one(0, inf, -3), -HUGE_VALF));
  EXPECT_FALSE(takes(one(0, inf, -3), HUGE_VALF));
  EXPECT_TRUE(takes(one(inf, 1, 3), HUGE_VALF));
  EXPECT_TRUE(takes(one(0, 70000, 1, f16), HUGE_VALF));
  EXPECT_FALSE(takes(one(0, 70000, 1, f16), 70000));
  EXPECT_TRUE(takes(one(0, inf, 0), std::nanf("")));
  EXPECT_FALSE(takes(one(0, inf, 0), 0));
}

// A matrix that the adapter leaves as it is, and one whose LoRA rank is 0 but has a bias.
TEST(LoraBudget, KnowsMatricesWithoutAnAdapter) {
  Matrix base(2, 1), h(2, 1), none(1, 0), bias(1, 1);
  base.values = {3, 5};
  h.values = {7, 11};
  bias.values = {2};
  const Budget y =
      reference::lora_expand(base, h, {{}, {&none, &bias, 3, {.depth = 1}}}, {0, 1}, f32, f32);
  EXPECT_EQ(y.r, (std::vector<double>{3, 11}));
  EXPECT_EQ(y.rho, (std::vector<double>{0, 0}));
}

// Only the rank's own columns.
TEST(LoraReference, TakesTheColumnsOfARank) {
  Matrix x(2, 4), a(1, 4), wide(3, 4);
  x.values = {1, 2, 3, 4, 10, 20, 30, 40};
  a.values = {1, 1, 1, 1};
  wide.values = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 1};
  const Budget h = reference::lora_shrink(x, {a, wide}, {0, 1}, {1, 2}, {.depth = 2});
  EXPECT_EQ(h.cols, 3);
  EXPECT_EQ(h.r, (std::vector<double>{5, 0, 0, 0, 20, 30}));
}

}  // namespace
}  // namespace tp
