// The budgets of quantisation and of scaled products: the references agree with second, differently
// written algorithms; correct kernels stay inside; and wrong ones are rejected (numerics.md 5.6 and
// 6.6).

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "harness/base/philox.h"
#include "properties/budget_testing.h"
#include "reference/quantise.h"
#include "reference/scaled_product.h"

namespace tp {
namespace {

constexpr DType kTypes[] = {DType::f32, DType::f16, DType::bf16};

// How activations are scaled.
enum class Kind { fixed, power_of_two, tensor, token, groups };
constexpr Kind kKinds[] = {Kind::fixed, Kind::power_of_two, Kind::tensor, Kind::token,
                           Kind::groups};

struct Quantisation {
  Matrix x, scales;
  std::int64_t block_cols, first_col;

  reference::Factors factors() const { return {&scales, block_cols, first_col}; }
};

constexpr std::int64_t kTokens = 4;

Quantisation quantisation_of(Kind kind, DType t, Fill fill, std::uint64_t seed) {
  const Random4 r = philox(seed, stream_of("sizes"), 0);
  const std::int64_t cols = 16 + r[0] % 300;
  const DataRegime g{.fill = fill, .seed = seed, .eps = 1e-6, .scale_log2 = 0};
  Matrix x = fill == Fill::exact ? integers("x", kTokens, cols, 15, seed)
                                 : filled({"x", t, kTokens, cols, Role::activation, 16}, g);
  const auto one = [&](double scale) {
    Quantisation q{x, Matrix(1, 1), 0, 0};
    q.scales.values[0] = scale;
    return q;
  };
  const double largest = reference::absolute_maximum(x);
  switch (kind) {
    case Kind::fixed:  // too small: some elements saturate
      return one(float(largest / 448 * (0.25 + r[1] * 0x1p-33)));
    case Kind::power_of_two:
      return one(std::ldexp(1.0, largest == 0 ? 0 : std::ilogb(largest) - 7));
    case Kind::tensor:
      return one(reference::scale_of(largest));
    default:
      break;
  }
  const std::int64_t block_cols = kind == Kind::token ? cols : 1 + r[2] % 128,
                     first_col = kind == Kind::token ? 0 : r[3] % block_cols;
  const Budget scales = reference::token_scales(x, block_cols, first_col);
  Quantisation q{x, Matrix(scales.rows, scales.cols), block_cols, first_col};
  q.scales.values = scales.r;
  return q;
}

// RN_e4m3(|x| / s) without a division: how many middles between two numbers, times s, lie below
// |x|. A middle has 5 bits, so its product with s is exact.
double nearest_code(double x, double s) {
  int bits = 0;
  while (bits < 0x7E) {
    const double lo = to_float(e4m3{std::uint8_t(bits)}),
                 hi = to_float(e4m3{std::uint8_t(bits + 1)}), middle = (lo + hi) / 2 * s;
    if (std::fabs(x) < middle || (std::fabs(x) == middle && bits % 2 == 0)) break;
    ++bits;
  }
  return std::copysign(to_float(e4m3{std::uint8_t(bits)}), x);
}

TEST(QuantiseReference, AgreesWithASecondAlgorithm) {
  int exact = 0, elements = 0, two_codes = 0;
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    for (const Kind kind : kKinds) {
      const Quantisation q = quantisation_of(kind, kTypes[seed % 3], Fill(seed % 6), seed);
      const Budget budget = reference::quantised(q.x, q.factors());
      for (std::int64_t i = 0; i < q.x.rows; ++i) {
        for (std::int64_t k = 0; k < q.x.cols; ++k) {
          const double r = budget.r[std::size_t(i * q.x.cols + k)],
                       rho = budget.rho[std::size_t(i * q.x.cols + k)];
          const double s = q.scales.row(
              q.scales.rows == 1 ? 0 : i)[q.block_cols == 0 ? 0 : (q.first_col + k) / q.block_cols];
          const double code = nearest_code(q.x.row(i)[k], s);
          const double lo = round_to(DType::e4m3, r - rho), hi = round_to(DType::e4m3, r + rho);
          ASSERT_TRUE(lo <= code && code <= hi) << q.x.row(i)[k] << " / " << s;
          exact += rho == 0;
          two_codes += lo < hi;
          ++elements;
        }
      }
    }
  }
  EXPECT_GT(exact, elements / 6);        // powers of two
  EXPECT_LT(two_codes, elements / 100);  // only beside a tie
  EXPECT_GT(two_codes, 0);
}

// The scales, by another road: a row's block is what has one index, in any order.
TEST(QuantiseReference, TakesTheScalesOfBlocks) {
  int tried = 0, seen = 0;
  for (std::uint64_t seed = 0; seed < 40; ++seed) {
    const Quantisation q = quantisation_of(Kind::groups, kTypes[seed % 3], Fill(seed % 6), seed);
    std::vector<float> largest(q.scales.values.size());
    for (std::int64_t k = q.x.cols - 1; k >= 0; --k) {
      for (std::int64_t i = 0; i < q.x.rows; ++i) {
        float& slot = largest[std::size_t(i * q.scales.cols + (k + q.first_col) / q.block_cols)];
        slot = std::max(slot, std::fabs(float(q.x.row(i)[k])));
      }
    }
    for (float& v : largest) v = std::max(v, 448 * 0x1p-126f) / 448;
    EXPECT_FALSE(
        compare(DType::f32, largest.data(), reference::token_scales(q.x, q.block_cols, q.first_col))
            .first);
    if (q.first_col > 0 && Fill(seed % 6) == Fill::dense) {
      const Budget shifted = reference::token_scales(q.x, q.block_cols, 0);
      ++tried;
      seen += shifted.cols != q.scales.cols ||
              compare(DType::f32, largest.data(), shifted).first.has_value();
    }
  }
  EXPECT_GE(seen, tried - 1);  // blocks that begin where the rank does are others
  EXPECT_GT(tried, 3);
  EXPECT_TRUE(std::isnan(reference::scale_of(NAN)));
  EXPECT_EQ(reference::scale_of(0), 0x1p-126);
  EXPECT_EQ(reference::scale_of(448), 1);
  EXPECT_EQ(reference::scale_of(7), double(7.0f / 448.0f));
}

enum class Bug {
  none,
  by_reciprocal,        // not wrong: x * (1 / s)
  by_rough_reciprocal,  // nor is this: 1 / s is an ulp off, as rcp.approx may be
  in_double,            // nor this
  scale_101,
  scale_2,
  inverted,
  truncated,
  through_bf16,
  up_to_240,
  e5m2_grid,
  next_scale,
  nan_for_saturation,
};

// Truncated toward zero, or rounded to e5m2's grid, and saturated.
float truncated(float v) {
  const float y = to_float(from_float<e4m3>(v));
  if (std::fabs(y) <= std::fabs(v)) return y;
  return to_float(e4m3{std::uint8_t(from_float<e4m3>(v).bits - 1)});
}
float on_e5m2_grid(float v) {
  if (v == 0) return 0;
  const float unit = std::ldexp(1.0f, std::max(std::ilogb(v), -14) - 2);
  return std::clamp(std::nearbyint(v / unit) * unit, -448.0f, 448.0f);
}

// The float on the other side of 1 / s, which 1.0f / s is not.
float other_reciprocal(float s) {
  const float nearest = 1.0f / s;
  const double excess = double(nearest) * double(s) - 1;  // exact
  return excess == 0 ? nearest : std::nextafter(nearest, excess > 0 ? -INFINITY : INFINITY);
}

float code_of(float x, float s, Bug bug) {
  switch (bug) {
    case Bug::by_reciprocal:
      return to_float(from_float<e4m3>(x * (1.0f / s)));
    case Bug::by_rough_reciprocal:
      return to_float(from_float<e4m3>(x * other_reciprocal(s)));
    case Bug::in_double:
      return float(round_to(DType::e4m3, double(x) / double(s)));
    case Bug::scale_101:
      return to_float(from_float<e4m3>(x / (s * 1.01f)));
    case Bug::scale_2:
      return to_float(from_float<e4m3>(x / (s * 2)));
    case Bug::inverted:
      return to_float(from_float<e4m3>(x * s));
    case Bug::truncated:
      return truncated(x / s);
    case Bug::through_bf16:
      return to_float(from_float<e4m3>(to_float(from_float<bf16>(x / s))));
    case Bug::up_to_240:
      return std::clamp(to_float(from_float<e4m3>(x / s)), -240.0f, 240.0f);
    case Bug::e5m2_grid:
      return on_e5m2_grid(x / s);
    case Bug::nan_for_saturation:
      return std::fabs(x / s) > 464 ? NAN : to_float(from_float<e4m3>(x / s));
    default:
      return to_float(from_float<e4m3>(x / s));
  }
}

struct Rejected {
  double elements = 0, cases = 0;  // percent
};

// Of the elements that are not 0.
Rejected rejected(Bug bug, Kind kind, DType t, Fill fill, int cases) {
  std::int64_t elements = 0, wrong = 0;
  int wrong_cases = 0;
  for (int seed = 0; seed < cases; ++seed) {
    const Quantisation q = quantisation_of(kind, t, fill, std::uint64_t(seed));
    std::vector<e4m3> codes;
    for (std::int64_t i = 0; i < q.x.rows; ++i) {
      for (std::int64_t k = 0; k < q.x.cols; ++k) {
        std::int64_t block = q.block_cols == 0 ? 0 : (k + q.first_col) / q.block_cols;
        if (bug == Bug::next_scale) block = (block + 1) % q.scales.cols;
        const float s = float(q.scales.row(q.scales.rows == 1 ? 0 : i)[block]);
        codes.push_back(from_float<e4m3>(code_of(float(q.x.row(i)[k]), s, bug)));
        elements += q.x.row(i)[k] != 0;
      }
    }
    const Comparison c = compare(DType::e4m3, codes.data(), reference::quantised(q.x, q.factors()));
    if (c.first) wrong += c.first->count, ++wrong_cases;
    if (bug <= Bug::in_double) {
      EXPECT_LE(c.score, 1.0);
    }
  }
  return {100.0 * double(wrong) / double(elements), 100.0 * wrong_cases / cases};
}

TEST(QuantiseBudget, AcceptsCorrectKernels) {
  for (const Bug twin : {Bug::none, Bug::by_reciprocal, Bug::by_rough_reciprocal, Bug::in_double}) {
    for (const Kind kind : kKinds) {
      for (int fill = 0; fill < 6; ++fill) {
        for (const DType t : kTypes) {
          EXPECT_EQ(rejected(twin, kind, t, Fill(fill), 40).elements, 0)
              << int(twin) << " " << int(kind) << " " << fill << " " << name_of(t);
        }
      }
    }
  }
}

struct Rate {
  const char* name;
  Bug bug;
  Kind kind;
  double elements, cases;  // percent at least, of dense data
};

class QuantiseMutants : public testing::TestWithParam<Rate> {};

TEST_P(QuantiseMutants, AreRejected) {
  const Rate& rate = GetParam();
  for (const DType t : kTypes) {
    const Rejected r = rejected(rate.bug, rate.kind, t, Fill::dense, 60);
    EXPECT_GE(r.elements, rate.elements) << name_of(t);
    EXPECT_GE(r.cases, rate.cases) << name_of(t);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Section66, QuantiseMutants,
    testing::Values(Rate{"scale_101", Bug::scale_101, Kind::tensor, 10, 98},
                    Rate{"scale_101_of_tokens", Bug::scale_101, Kind::token, 10, 98},
                    Rate{"scale_2", Bug::scale_2, Kind::tensor, 99, 98},
                    Rate{"inverted", Bug::inverted, Kind::tensor, 99, 98},
                    Rate{"truncated", Bug::truncated, Kind::tensor, 45, 98},
                    Rate{"through_bf16", Bug::through_bf16, Kind::tensor, 2.5, 90},
                    Rate{"up_to_240", Bug::up_to_240, Kind::tensor, 10, 98},
                    Rate{"e5m2_grid", Bug::e5m2_grid, Kind::tensor, 45, 98},
                    Rate{"next_scale", Bug::next_scale, Kind::groups, 60, 95},
                    Rate{"nan_for_saturation", Bug::nan_for_saturation, Kind::fixed, 15, 98}),
    [](const auto& info) { return std::string(info.param.name); });

// Whole numbers by a power of two leave no budget, and show neither a scale that is 1 % off nor a
// truncation: that is what dense data are for.
TEST(QuantiseBudget, IsBlindWhereEverythingIsExact) {
  const Quantisation q = quantisation_of(Kind::power_of_two, DType::bf16, Fill::exact, 1);
  const Budget budget = reference::quantised(q.x, q.factors());
  EXPECT_EQ(*std::max_element(budget.rho.begin(), budget.rho.end()), 0);
  EXPECT_EQ(rejected(Bug::scale_101, Kind::power_of_two, DType::bf16, Fill::exact, 40).elements, 0);
  EXPECT_EQ(rejected(Bug::truncated, Kind::power_of_two, DType::bf16, Fill::exact, 40).elements, 0);
  EXPECT_EQ(rejected(Bug::scale_2, Kind::power_of_two, DType::bf16, Fill::exact, 40).elements, 100);
}

// compare() as e4m3: its largest numbers, NaN, infinities, and both zeros.
TEST(QuantiseBudget, KnowsTheEndsOfE4m3) {
  const auto accepted = [](double x, double scale, std::uint8_t bits) {
    Matrix m(1, 1), scales(1, 1);
    m.values[0] = x, scales.values[0] = scale;
    return !compare(DType::e4m3, &bits, reference::quantised(m, {&scales})).first;
  };
  EXPECT_TRUE(accepted(1000, 1, 0x7E));
  EXPECT_TRUE(accepted(-1000, 1, 0xFE));
  EXPECT_FALSE(accepted(1000, 1, 0xFE));
  EXPECT_FALSE(accepted(1000, 1, 0x7D));
  EXPECT_FALSE(accepted(1000, 1, 0x7F));
  EXPECT_TRUE(accepted(1000, 0.3, 0x7E));
  EXPECT_TRUE(accepted(INFINITY, 0.3, 0x7E));
  EXPECT_FALSE(accepted(INFINITY, 0.3, 0x7F));
  EXPECT_TRUE(accepted(1, 0, 0x7E));
  EXPECT_TRUE(accepted(NAN, 0.3, 0x7F));
  EXPECT_TRUE(accepted(NAN, 0.3, 0xFF));
  EXPECT_FALSE(accepted(NAN, 0.3, 0x7E));
  EXPECT_TRUE(accepted(1, NAN, 0x7F));
  EXPECT_TRUE(accepted(0, 0.3, 0x00));
  EXPECT_TRUE(accepted(-1e-9, 0.3, 0x80));
  EXPECT_TRUE(accepted(-1e-9, 0.3, 0x00));  // compare() has no sign of a zero that was rounded
  EXPECT_FALSE(accepted(0, 0.3, 0x01));
  EXPECT_TRUE(accepted(464, 1, 0x7E));
  EXPECT_TRUE(accepted(432, 1, 0x7E));  // a tie has one answer
  EXPECT_FALSE(accepted(432, 1, 0x7D));
}

// ---- Weights that are quantised anew

enum class Anew { right, by_ratio, kept, inverted, smallest_scale, of_next_slot, truncating };

double requantised_rejected(Anew how) {
  int wrong = 0, cases = 0;
  for (std::uint64_t seed = 0; seed < 60; ++seed, ++cases) {
    constexpr std::int64_t kRows = 6, kCols = 64;
    Matrix codes(kRows, kCols);
    for (std::size_t i = 0; i < codes.values.size(); ++i) {
      const std::uint32_t bits = philox(seed, 1, i)[0];
      codes.values[i] = to_float(e4m3{std::uint8_t(bits % 0x7F | (bits >> 24 & 0x80))});
    }
    std::vector<double> slots;
    for (std::uint64_t s = 0; s < 3; ++s)
      slots.push_back(float(0.001 * (1 + philox(seed, 2, s)[0] * 0x1p-32)));
    const std::vector<std::int32_t> slot_of_row = {0, 0, 1, 2, 2, 1};
    const float largest = float(*std::max_element(slots.begin(), slots.end())),
                smallest = float(*std::min_element(slots.begin(), slots.end()));
    std::vector<e4m3> y;
    for (std::int64_t i = 0; i < kRows; ++i) {
      for (std::int64_t k = 0; k < kCols; ++k) {
        const std::int32_t slot = slot_of_row[std::size_t(i)];
        const float w = float(codes.row(i)[k]),
                    s = float(slots[std::size_t((slot + (how == Anew::of_next_slot)) % 3)]);
        const float v = how == Anew::by_ratio         ? w * (s / largest)
                        : how == Anew::kept           ? w
                        : how == Anew::inverted       ? w * largest / s
                        : how == Anew::smallest_scale ? w * s / smallest
                                                      : w * s / largest;
        y.push_back(from_float<e4m3>(how == Anew::truncating ? truncated(v) : v));
      }
    }
    wrong +=
        compare(DType::e4m3, y.data(), reference::requantised(codes, slot_of_row, slots, largest))
            .first.has_value();
  }
  return 100.0 * wrong / cases;
}

TEST(RequantiseBudget, TellsRightFromWrong) {
  EXPECT_EQ(requantised_rejected(Anew::right), 0);
  EXPECT_EQ(requantised_rejected(Anew::by_ratio), 0);
  for (const Anew how :
       {Anew::kept, Anew::inverted, Anew::smallest_scale, Anew::of_next_slot, Anew::truncating})
    EXPECT_GE(requantised_rejected(how), 98) << int(how);
}

// ---- Scaled products

// Where scales are: {cols_per, first_col} of x and of w; 0 columns: of all of them.
struct Layout {
  bool of_tokens, of_rows;
  std::int64_t x_cols, x_first, w_cols, w_first;
};
constexpr Layout kLayouts[] = {{false, false, 0, 0, 0, 0},   {true, true, 0, 0, 0, 0},
                               {true, true, 128, 0, 128, 0}, {true, true, 64, 37, 64, 37},
                               {true, true, 0, 0, 48, 5},    {true, true, 40, 0, 24, 7}};

struct Linear {
  Layout layout;
  Matrix x, w, of_x, of_w, bias;

  reference::Factors x_factors() const { return {&of_x, layout.x_cols, layout.x_first}; }
  reference::Factors w_factors() const { return {&of_w, layout.w_cols, layout.w_first}; }
};

Matrix scales_of(const char* name, std::int64_t rows, std::int64_t cols, bool exact,
                 std::uint64_t seed) {
  Matrix m(rows, cols);
  for (std::size_t i = 0; i < m.values.size(); ++i) {
    const Random4 r = philox(seed, stream_of(name), i);
    m.values[i] = exact ? std::ldexp(1.0, int(r[0] % 3) - 4)
                        : double(float(0.01 * (1 + 3 * (r[0] * 0x1p-32))));
  }
  return m;
}

// x [3, k] and w [8, k] of codes, as quantisation leaves them (dense data), or whole numbers.
Linear linear_of(const Layout& layout, Fill fill, std::int64_t k, std::uint64_t seed) {
  const bool exact = fill == Fill::exact;
  const auto codes = [&](const char* name, std::int64_t rows, Role role, int largest) {
    if (exact) return integers(name, rows, k, largest, seed);
    const Matrix m =
        filled({name, DType::f32, rows, k, role, 16}, {.fill = fill, .seed = seed, .eps = 1e-6});
    const double scale = reference::scale_of(reference::absolute_maximum(m));
    Matrix out(rows, k);
    for (std::size_t i = 0; i < m.values.size(); ++i)
      out.values[i] = round_to(DType::e4m3, m.values[i] / scale);
    return out;
  };
  const auto count = [&](std::int64_t cols, std::int64_t first) {
    return cols == 0 ? 1 : (first + k + cols - 1) / cols;
  };
  Linear l{
      layout,
      codes("x", 3, Role::activation, 2),
      codes("w", 8, Role::weight, 3),
      scales_of("of_x", layout.of_tokens ? 3 : 1, count(layout.x_cols, layout.x_first), exact,
                seed),
      scales_of("of_w", layout.of_rows ? 8 : 1, count(layout.w_cols, layout.w_first), exact, seed),
      integers("b", 1, 8, 31, seed)};
  return l;
}

enum class Wrong {
  none,
  descending_blocks,  // not wrong
  element_missing,
  tile_missing,  // the last 32 columns
  weight_scale_102,
  weight_scale_150,
  inverted_scale,
  next_block,  // the scale of the neighbouring block
  first_col_forgotten,
  one_scale,  // that of the first block for all of them
  bias_missing,
  bias_scaled,
};

std::int64_t index(std::int64_t col, std::int64_t cols_per, std::int64_t first_col) {
  return cols_per == 0 ? 0 : (col + first_col) / cols_per;
}

std::vector<std::byte> scaled_twin(const Linear& l, Order order, DType t, Wrong wrong) {
  const std::int64_t all = l.x.cols, k = wrong == Wrong::element_missing ? all - 1
                                         : wrong == Wrong::tile_missing
                                             ? std::max<std::int64_t>(0, all - 32)
                                             : all;
  const Layout& at = l.layout;
  std::vector<std::byte> out(std::size_t(l.x.rows * l.w.rows * size_of(t)));
  for (std::int64_t i = 0; i < l.x.rows; ++i) {
    for (std::int64_t j = 0; j < l.w.rows; ++j) {
      struct Term {
        float sum, scale;
      };
      std::vector<Term> terms;
      for (std::int64_t first = 0, end; first < k; first = end) {
        const std::int64_t bx = index(first, at.x_cols, at.x_first),
                           bw = index(first, at.w_cols, at.w_first);
        for (end = first + 1; end < k && index(end, at.x_cols, at.x_first) == bx &&
                              index(end, at.w_cols, at.w_first) == bw;) {
          ++end;
        }
        std::int64_t read = bw;
        if (wrong == Wrong::next_block) read = (bw + 1) % l.of_w.cols;
        if (wrong == Wrong::first_col_forgotten) read = index(first, at.w_cols, 0);
        if (wrong == Wrong::one_scale) read = 0;
        float of_w = float(l.of_w.row(at.of_rows ? j : 0)[read]);
        if (wrong == Wrong::weight_scale_102) of_w *= 1.02f;
        if (wrong == Wrong::weight_scale_150) of_w *= 1.5f;
        if (wrong == Wrong::inverted_scale) of_w = 1 / of_w;
        terms.push_back({twin_sum(order, l.x.row(i) + first, l.w.row(j) + first, end - first),
                         float(l.of_x.row(at.of_tokens ? i : 0)[bx]) * of_w});
      }
      if (wrong == Wrong::descending_blocks) std::reverse(terms.begin(), terms.end());
      float y = 0;
      for (const Term& term : terms) y = std::fma(term.sum, term.scale, y);
      const float b = float(l.bias.values[std::size_t(j)]);
      if (wrong == Wrong::bias_scaled) {
        y += b * terms.front().scale;
      } else if (wrong != Wrong::bias_missing) {
        y += b;
      }
      store(t, out.data(), i * l.w.rows + j, rounded(t, y));
    }
  }
  return out;
}

struct Outcome {
  double rejected = 0, score = 0;  // percent of the cases; the largest
};

std::int64_t longest_block(const Layout& at, std::int64_t k) {
  for (const std::int64_t cols : {at.x_cols, at.w_cols})
    if (cols > 0) k = std::min(k, cols);
  return k;
}

Outcome product_outcome(Wrong wrong, const Layout& layout, Fill fill, DType t, int cases) {
  Outcome outcome;
  int counted = 0;
  for (int seed = 0; seed < cases; ++seed) {
    const Random4 r = philox(std::uint64_t(seed), stream_of("scaled"), 0);
    const std::int64_t k = 1 + r[0] % (seed % 2 ? 40u : 600u);
    const Linear l = linear_of(layout, fill, k, std::uint64_t(seed));
    const bool hidden = (wrong == Wrong::next_block && l.of_w.cols == 1) ||
                        (wrong == Wrong::one_scale && l.of_w.cols == 1) ||
                        (wrong == Wrong::first_col_forgotten &&
                         (k + layout.w_first <= layout.w_cols || layout.w_first == 0));
    if (hidden) continue;
    for (const Order order : kOrders) {
      const Budget budget =
          reference::scaled_product(l.x, l.x_factors(), l.w, l.w_factors(), {0, k}, &l.bias,
                                    declared(order, longest_block(layout, k)), t == DType::f32);
      const Comparison c = compare(t, scaled_twin(l, order, t, wrong).data(), budget);
      ++counted;
      outcome.rejected += c.first.has_value();
      outcome.score = std::max(outcome.score, c.score);
    }
  }
  EXPECT_GT(counted, 0);
  outcome.rejected *= 100.0 / counted;
  return outcome;
}

// Elementwise, with the scales at every element, from the other end, in long double.
TEST(ScaledProductReference, AgreesWithASecondAlgorithm) {
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    const std::int64_t k = 1 + std::int64_t(philox(seed, 1, 0)[0] % 500);
    for (const Layout& layout : kLayouts) {
      const Linear l = linear_of(layout, Fill(seed % 6), k, seed);
      // A run of columns, as a rank has it: factors go by the columns of the whole matrices.
      const std::int64_t first = k / 3;
      const Shard inner{first, k - first};
      const Budget b = reference::scaled_product(l.x, l.x_factors(), l.w, l.w_factors(), inner,
                                                 &l.bias, {.depth = k}, false);
      for (std::int64_t i = 0; i < l.x.rows; ++i) {
        for (std::int64_t j = 0; j < l.w.rows; ++j) {
          long double sum = l.bias.values[std::size_t(j)], magnitude = std::fabs(sum);
          for (std::int64_t n = k - 1; n >= first; --n) {
            const long double x =
                (long double)(l.x.row(i)[n]) *
                l.of_x.row(layout.of_tokens ? i : 0)[index(n, layout.x_cols, layout.x_first)];
            const long double w =
                (long double)(l.w.row(j)[n]) *
                l.of_w.row(layout.of_rows ? j : 0)[index(n, layout.w_cols, layout.w_first)];
            sum += x * w;
            magnitude += std::fabs(x * w);
          }
          ASSERT_LE(std::fabs(b.r[std::size_t(i * l.w.rows + j)] - double(sum)),
                    double(2 * k + 2) * 0x1p-53 * double(magnitude));
        }
      }
    }
  }
}

TEST(ScaledProductBudget, AcceptsCorrectKernelsInAnyOrder) {
  for (const Wrong twin : {Wrong::none, Wrong::descending_blocks}) {
    for (const Layout& layout : kLayouts) {
      for (int fill = 0; fill < 6; ++fill) {
        for (const DType t : kTypes) {
          const Outcome outcome = product_outcome(twin, layout, Fill(fill), t, 12);
          EXPECT_EQ(outcome.rejected, 0)
              << "blocks of " << layout.x_cols << " and " << layout.w_cols << ", fill " << fill
              << ", " << name_of(t);
          EXPECT_LE(outcome.score, 1.0);
          if (t == DType::f32 && Fill(fill) == Fill::exact) {
            EXPECT_EQ(outcome.score, 0);
          } else if (Fill(fill) == Fill::dense) {
            EXPECT_GT(outcome.score, 0.1) << name_of(t);
          }
        }
      }
    }
  }
}

struct ProductRate {
  const char* name;
  Wrong wrong;
  int layout;
  double exact, dense;  // percent at least, in each type
};

class ScaledProductMutants : public testing::TestWithParam<ProductRate> {};

TEST_P(ScaledProductMutants, AreRejected) {
  const ProductRate& rate = GetParam();
  for (const DType t : kTypes) {
    const Layout& layout = kLayouts[rate.layout];
    EXPECT_GE(product_outcome(rate.wrong, layout, Fill::exact, t, 40).rejected, rate.exact)
        << name_of(t);
    EXPECT_GE(product_outcome(rate.wrong, layout, Fill::dense, t, 40).rejected, rate.dense)
        << name_of(t);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Section66, ScaledProductMutants,
    testing::Values(ProductRate{"element_missing", Wrong::element_missing, 1, 100, 100},
                    ProductRate{"tile_missing", Wrong::tile_missing, 1, 100, 100},
                    ProductRate{"tile_missing_of_blocks", Wrong::tile_missing, 2, 100, 100},
                    ProductRate{"weight_scale_102", Wrong::weight_scale_102, 0, 90, 98},
                    ProductRate{"weight_scale_150", Wrong::weight_scale_150, 1, 100, 100},
                    ProductRate{"inverted_scale", Wrong::inverted_scale, 1, 100, 100},
                    ProductRate{"next_block", Wrong::next_block, 2, 100, 100},
                    ProductRate{"next_block_between_ranks", Wrong::next_block, 3, 100, 100},
                    ProductRate{"first_col_forgotten", Wrong::first_col_forgotten, 3, 100, 100},
                    ProductRate{"one_scale", Wrong::one_scale, 4, 100, 100},
                    ProductRate{"bias_missing", Wrong::bias_missing, 2, 100, 100},
                    ProductRate{"bias_scaled", Wrong::bias_scaled, 1, 100, 100}),
    [](const auto& info) { return std::string(info.param.name); });

// The rule of exactness, block by block: sums and scales that are exact, and terms that fp32 adds.
TEST(ScaledProductBudget, KnowsWhatIsExact) {
  const auto rho = [](std::vector<double> x, std::vector<double> scales, bool is_last = false) {
    const std::int64_t k = std::int64_t(x.size());
    Matrix a(1, k), ones(1, k), of_x(1, std::int64_t(scales.size()));
    a.values = std::move(x);
    std::fill(ones.values.begin(), ones.values.end(), 1.0);
    of_x.values = std::move(scales);
    return reference::scaled_product(a, {&of_x, 1, 0}, ones, {}, {0, k}, nullptr, {.depth = k},
                                     is_last)
        .rho[0];
  };
  EXPECT_EQ(rho({3, 5}, {0.25, 8}), 0);
  EXPECT_EQ(rho({0x1p22, 1}, {1, 0.5}), 0);
  EXPECT_GT(rho({0x1p24, 1}, {1, 0.5}), 0);              // a bit more than a float has
  EXPECT_GT(rho({0x1p24, -0x1p24, 1}, {1, 1, 0.5}), 0);  // and on the way
  EXPECT_EQ(rho({3, 5}, {3, 5}), 0);                     // 9 + 25: no power of two, but exact
  EXPECT_GT(rho({3, 5}, {double(0.1f), 1}), 0);
  // What a scale loses when it is made: a product of two floats that is none.
  Matrix x(1, 1), w(1, 1), of_x(1, 1), of_w(1, 1);
  x.values = w.values = {1};
  of_x.values = of_w.values = {double(0.1f)};
  const auto rho_of_scales = [&] {
    return reference::scaled_product(x, {&of_x}, w, {&of_w}, {0, 1}, nullptr, {.depth = 1}, true)
        .rho[0];
  };
  EXPECT_GT(rho_of_scales(), 0.01 * 0x1p-25);
  EXPECT_LT(rho_of_scales(), 0.01 * 0x1p-22);
  of_x.values = {0.5};
  EXPECT_LT(rho_of_scales(), 0.1 * 0x1p-50);  // exact but for the output's own rounding
  // Scales so small that their product is no normal number.
  of_x.values = of_w.values = {0x1.000002p-70};
  EXPECT_GE(rho_of_scales(), 0x1p-150);
}

// Four bits, times a scale of the group, kept in the type of the activations.
TEST(Dequantised, IsRoundedOnce) {
  Matrix codes(2, 5), scales(2, 3);
  codes.values = {-8, -1, 0, 3, 7, 1, 2, -3, 5, -7};
  for (std::size_t i = 0; i < 6; ++i)
    scales.values[i] = to_float(from_float<f16>(0.03141f * float(i + 1)));
  for (const DType t : {DType::f16, DType::bf16}) {
    const Matrix w = reference::dequantised(t, codes, {&scales, 2, 1});
    int changed = 0;
    for (std::int64_t i = 0; i < 2; ++i) {
      for (std::int64_t k = 0; k < 5; ++k) {
        const float exact = float(codes.row(i)[k]) * float(scales.row(i)[(k + 1) / 2]);
        EXPECT_EQ(w.row(i)[k], rounded(t, exact));
        changed += w.row(i)[k] != exact;
      }
    }
    EXPECT_GT(changed, 0) << name_of(t);
  }
}

}  // namespace
}  // namespace tp
