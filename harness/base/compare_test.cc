#include "harness/base/compare.h"

#include <gtest/gtest.h>

#include <cmath>

namespace tp {
namespace {

Comparison judge(DType t, double y, double r, double rho) {
  Budget b(1, 1);
  b.r[0] = r;
  b.rho[0] = rho;
  std::byte bytes[4];
  store(t, bytes, 0, y);
  return compare(t, bytes, b);
}

TEST(Compare, ZeroRadiusIsBitwiseAfterTheLastRounding) {
  EXPECT_FALSE(judge(DType::f32, 1.0, 1.0, 0).first);
  EXPECT_TRUE(judge(DType::f32, std::nextafterf(1.0f, 2.0f), 1.0, 0).first);
  EXPECT_FALSE(judge(DType::bf16, 1.0, 1.003, 0).first);  // RN_bf16(1.003) = 1
  EXPECT_TRUE(judge(DType::bf16, 1.0078125, 1.003, 0).first);
}

TEST(Compare, AcceptsTheRoundingsOfEverythingWithinTheRadiusAndNothingElse) {
  // bf16 spacing at 1 is 2^-7. 1 + 0.4 * 2^-7 with radius 0.2 * 2^-7 reaches past the tie: both
  // neighbours pass.
  const double ulp = 0x1p-7;
  EXPECT_FALSE(judge(DType::bf16, 1.0, 1 + 0.4 * ulp, 0.2 * ulp).first);
  EXPECT_FALSE(judge(DType::bf16, 1.0 + ulp, 1 + 0.4 * ulp, 0.2 * ulp).first);
  EXPECT_TRUE(judge(DType::bf16, 1.0 + ulp, 1 + 0.4 * ulp, 0.05 * ulp).first);
  EXPECT_TRUE(judge(DType::bf16, 1.0 - ulp, 1 + 0.4 * ulp, 0.2 * ulp).first);
}

TEST(Compare, NothingWalksThroughNaNLeastOfAll) {
  EXPECT_TRUE(judge(DType::f32, NAN, 1.0, 1e30).first);
  EXPECT_TRUE(judge(DType::f32, INFINITY, 1.0, 1e30).first);
  EXPECT_TRUE(judge(DType::f32, 1.0, NAN, 0).first);
  EXPECT_TRUE(judge(DType::f32, 1.0, INFINITY, 0).first);
  EXPECT_TRUE(judge(DType::f32, -INFINITY, INFINITY, 0).first);
  EXPECT_FALSE(judge(DType::f32, NAN, NAN, 0).first);
  EXPECT_FALSE(judge(DType::f32, INFINITY, INFINITY, 0).first);
  EXPECT_FALSE(
      judge(DType::f16, INFINITY, 70000, 0).first);  // overflow of the last rounding is expected
}

TEST(Compare, NamesTheFirstElementAndCountsThemAll) {
  Budget b(2, 3);
  b.r = {1, 2, 3, 4, 5, 6};
  const float y[] = {1, 2, 3, 4, 50, 60};
  const Comparison c = compare(DType::f32, y, b);
  ASSERT_TRUE(c.first);
  EXPECT_EQ(c.first->row, 1);
  EXPECT_EQ(c.first->col, 1);
  EXPECT_EQ(c.first->got, 50);
  EXPECT_EQ(c.first->lo, 5);
  EXPECT_EQ(c.first->hi, 5);
  EXPECT_EQ(c.first->count, 2);
}

TEST(Compare, ScoreIsAtMostOneWhereverTheElementIsAccepted) {
  for (int i = -60; i <= 60; ++i) {
    const double y = round_to(DType::bf16, 1 + i * 0.001);
    const Comparison c = judge(DType::bf16, y, 1.01, 0.013);
    EXPECT_TRUE(c.first || c.score <= 1) << y;
  }
}

// Errors of a step are relative to a sum that has those of the steps before it: they compound.
TEST(Accumulation, CompoundsTheErrorsOfItsSteps) {
  for (const std::int64_t depth : {1, 64, 4096}) {
    for (const bool matrix_steps : {false, true}) {
      const double e = matrix_steps ? 17 * 0x1p-25 + 0x1p-23 : 0x1p-24;
      double error = 0;
      for (std::int64_t i = 0; i < depth; ++i) error += e * (1 + error);
      const Accumulation accumulation{.depth = depth, .matrix_steps = matrix_steps};
      EXPECT_GE(accumulation.error(), error);
      EXPECT_LE(accumulation.error(), error * 1.01);
      if (depth > 1) {
        EXPECT_GT(error, double(depth) * e);
      }
    }
  }
}

// Where a partial sum may overflow nothing can be said, and that is counted; not of its neighbours.
TEST(Compare, AnInfiniteRadiusIsNotChecked) {
  Budget budget(1, 3);
  budget.r = {1, 2, 3};
  budget.rho = {0, HUGE_VAL, 0};
  const float right[] = {1, -INFINITY, 3}, wrong[] = {1, NAN, 4};
  EXPECT_FALSE(compare(DType::f32, right, budget).first);
  EXPECT_EQ(compare(DType::f32, right, budget).unchecked, 1);
  ASSERT_TRUE(compare(DType::f32, wrong, budget).first);
  EXPECT_EQ(compare(DType::f32, wrong, budget).first->col, 2);
}

}  // namespace
}  // namespace tp
