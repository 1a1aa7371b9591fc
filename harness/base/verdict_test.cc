// The line a verdict travels as.

#include "harness/base/verdict.h"

#include <gtest/gtest.h>

#include "harness/base/check.h"

namespace tp {
namespace {

Verdict example() {
  return {.outcome = Outcome::Pass,
          .detail = "tp_rank 0, y[0, 1] | and a bar",
          .digest = 0x0123456789abcdef,
          .score = 0.25,
          .threads = 123456789012,
          .seconds = 0.5};
}

Timing example_timing() {
  return {.kernel_us = 13.5,
          .collective_us = 20.125,
          .slowest_rank = 3,
          .bytes = 123456789012345.0,
          .flops = 3e15,
          .floor_us = 1.1};
}

void expect_equal(const Verdict& a, const Verdict& b) {
  EXPECT_EQ(a.outcome, b.outcome);
  EXPECT_EQ(a.detail, b.detail);
  EXPECT_EQ(a.digest, b.digest);
  EXPECT_EQ(a.own_bits, b.own_bits);
  EXPECT_EQ(a.score, b.score);
  EXPECT_EQ(a.threads, b.threads);
  EXPECT_EQ(a.seconds, b.seconds);
  EXPECT_EQ(a.timing.slowest_rank, b.timing.slowest_rank);
  EXPECT_EQ(a.timing.kernel_us, b.timing.kernel_us);
  EXPECT_EQ(a.timing.collective_us, b.timing.collective_us);
  EXPECT_EQ(a.timing.floor_us, b.timing.floor_us);
  EXPECT_EQ(a.timing.bytes, b.timing.bytes);
  EXPECT_EQ(a.timing.flops, b.timing.flops);
}

TEST(VerdictLine, GoesThereAndBack) {
  Verdict v = example();
  expect_equal(verdict_from_line(to_line(v)), v);
  v.own_bits = true;
  expect_equal(verdict_from_line(to_line(v)), v);
  v.timing = example_timing();
  expect_equal(verdict_from_line(to_line(v)), v);
  EXPECT_EQ(to_line(verdict_from_line(to_line(v))), to_line(v));
  for (int outcome = 0; outcome <= int(Outcome::Skipped); ++outcome) {
    v.outcome = Outcome(outcome);
    expect_equal(verdict_from_line(to_line(v)), v);
  }
  v.detail = "two\nlines";
  EXPECT_EQ(verdict_from_line(to_line(v)).detail, "two lines");
}

TEST(VerdictLine, SaysNothingOfATimingThatThereIsNot) {
  EXPECT_EQ(to_line(example()),
            "Pass digest=0123456789abcdef score=0.25 threads=123456789012 seconds=0.5 | tp_rank 0, "
            "y[0, 1] | and a bar");
}

// Lines of workers that knew no timing.
TEST(VerdictLine, ReadsTheOldForm) {
  const Verdict v =
      verdict_from_line("Hang digest=00000000000000ff score=0 threads=7 seconds=1.5 | a detail");
  EXPECT_EQ(v.outcome, Outcome::Hang);
  EXPECT_EQ(v.digest, 0xffu);
  EXPECT_EQ(v.detail, "a detail");
  EXPECT_FALSE(v.timing.measured());
}

TEST(VerdictLine, RefusesWhatItCannotHaveMade) {
  const std::string head = "Pass digest=0 score=0 threads=0 seconds=0";
  const std::string timing =
      " slowest_rank=0 kernel_us=1 collective_us=1 floor_us=1 bytes=1 flops=1";
  EXPECT_NO_THROW(verdict_from_line(head + timing + " | "));
  for (const std::string& line :
       {std::string(), std::string("Pass"), head, head + " more | ", head + timing + " more | ",
        head + timing.substr(0, timing.size() - 2) + " | ",
        head + " slowest_rank=-1 kernel_us=1 collective_us=1 floor_us=1 bytes=1 flops=1 | ",
        "Passed" + head.substr(4) + " | "}) {
    EXPECT_THROW(verdict_from_line(line), BadInput) << line;
  }
}

TEST(TimingText, IsAPhrase) {
  EXPECT_EQ(timing_text(example_timing()),
            "x12.3 of its floor of 1.1 us: kernels 13.5 us on tp_rank 3, collectives 20.12 us");
  EXPECT_EQ(timing_text({}), "");
  Timing no_floor = example_timing();
  no_floor.floor_us = 0;
  EXPECT_EQ(timing_text(no_floor), "kernels 13.5 us on tp_rank 3, collectives 20.12 us");
}

}  // namespace
}  // namespace tp
