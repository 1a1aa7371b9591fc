// Shrinking: candidates are legal and smaller, and the descent reaches the smallest case in few
// runs.

#include "harness/fuzz/shrink.h"

#include <gtest/gtest.h>

#include <numeric>

#include "harness/fuzz/canary_testing.h"
#include "harness/fuzz/domain.h"
#include "harness/fuzz/draw.h"

namespace tp {
namespace {

class ShrinkTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (operators().empty()) add_canaries();
  }
};

Case big() {
  return case_from_line(
      "v1 canary num_heads=48 num_kv_heads=8 head_dim=128 tp_size=16 num_tokens=37 dtype=bf16 "
      "fill=dense "
      "seed=7 fault_rank=9");
}

// Goes down with every step, so that every way down ends.
std::int64_t size_of_case(const Case& c) {
  std::int64_t size = 0;
  for (const Key& key : find_operator(c.op).keys) {
    if (key.shrink == Shrink::to_min) size += key.get(c) - key.min;
    if (key.shrink == Shrink::to_fallback) size += key.get(c) != key.fallback;
  }
  return size;
}

Shrunk shrink_while(const Case& from, const std::function<bool(const Case&)>& fails,
                    const ShrinkLimits& limits = {}) {
  const Verdict wrong{Outcome::WrongValue, "", 0, 0, 0, 0};
  EXPECT_TRUE(fails(from));
  return minimise(
      from, wrong, [&](const Case& c) { return fails(c) ? std::optional(wrong) : std::nullopt; },
      limits);
}

TEST_F(ShrinkTest, CandidatesAreLegalSmallerAndUnlikeEachOther) {
  std::vector<int> tp_sizes(16);
  std::iota(tp_sizes.begin(), tp_sizes.end(), 1);
  Draw draw(make_domain({"canary"}, tp_sizes, {}, ""), 11);
  for (int i = 0; i < 300; ++i) {
    const Case c = draw.next();
    for (const auto& candidates : {shrinks(c), sweep(c)}) {
      std::set<std::string> lines;
      for (const Case& smaller : candidates) {
        ASSERT_FALSE(find_operator(c.op).refuse(smaller)) << to_line(smaller);
        ASSERT_LT(size_of_case(smaller), size_of_case(c)) << to_line(c) << "\n" << to_line(smaller);
        ASSERT_TRUE(lines.insert(to_line(smaller)).second) << to_line(smaller);
        ASSERT_EQ(smaller.seed, c.seed);
        ASSERT_EQ(smaller.dtype, c.dtype);
      }
    }
  }
}

TEST_F(ShrinkTest, ReplicationBugReachesTwoRanksAtOnce) {
  const Shrunk s =
      shrink_while(big(), [](const Case& c) { return c.tp_size > c.model.num_kv_heads; });
  EXPECT_EQ(heads_of(s.smallest), (HeadTriple{2, 1, 2}));
  EXPECT_EQ(s.smallest.num_tokens, 1);
  EXPECT_EQ(s.smallest.model.head_dim, 1);
  EXPECT_EQ(s.smallest.fill, Fill::exact);
  EXPECT_LE(s.runs, 10);
}

// Conditions of the zoo's variants, and some that stand in the way of a jump to the bottom.
TEST_F(ShrinkTest, ReachesTheSmallestCaseWithinAHundredRuns) {
  struct Bug {
    const char* what;
    std::function<bool(const Case&)> fails;
    HeadTriple smallest;
    int head_dim, num_tokens;
  };
  const Bug bugs[] = {
      {"two replicated KV heads",
       [](const Case& c) {
         return c.model.num_kv_heads >= 2 && c.tp_size >= 2 * c.model.num_kv_heads;
       },
       {4, 2, 4},
       1,
       1},
      {"head_dim of 3 and two tokens",
       [](const Case& c) {
         return c.tp_size > c.model.num_kv_heads && c.model.head_dim >= 3 && c.num_tokens >= 2;
       },
       {2, 1, 2},
       3,
       2},
      {"data that are not exact",
       [](const Case& c) { return c.tp_size > c.model.num_kv_heads && c.fill == Fill::dense; },
       {2, 1, 2},
       1,
       1},
      {"four replicas",
       [](const Case& c) { return c.tp_size >= 4 * c.model.num_kv_heads; },
       {4, 1, 4},
       1,
       1},
      {"more than one rank", [](const Case& c) { return c.tp_size > 1; }, {2, 1, 2}, 1, 1},
      {"always", [](const Case&) { return true; }, {1, 1, 1}, 1, 1},
  };
  for (const Bug& bug : bugs) {
    SCOPED_TRACE(bug.what);
    Case start = big();
    if (!bug.fails(start)) set_heads(start, {48, 2, 16});
    const Shrunk s = shrink_while(start, bug.fails);
    EXPECT_EQ(heads_of(s.smallest), bug.smallest) << to_line(s.smallest);
    EXPECT_EQ(s.smallest.model.head_dim, bug.head_dim);
    EXPECT_EQ(s.smallest.num_tokens, bug.num_tokens);
    EXPECT_LE(s.runs, 100);
  }
}

TEST_F(ShrinkTest, NoCaseIsRunTwiceAndTheBudgetHolds) {
  std::set<std::string> seen;
  int runs = 0;
  const auto picky = [&](const Case& c) {
    EXPECT_TRUE(seen.insert(to_line(c)).second || runs == 0) << to_line(c);
    ++runs;
    return c.num_tokens >= 30 && c.model.head_dim >= 100 && c.tp_size >= 12;
  };
  const Shrunk s = shrink_while(big(), picky, {.runs = 40});
  EXPECT_LE(s.runs, 40);
  EXPECT_GE(s.smallest.num_tokens, 30);
  const Shrunk none = shrink_while(big(), [](const Case&) { return true; }, {.runs = 0});
  EXPECT_EQ(none.smallest, big());
}

TEST_F(ShrinkTest, ACrashStaysACrash) {
  const auto verdict = [](Outcome o) { return Verdict{o, "", 0, 0, 0, 0}; };
  EXPECT_TRUE(same_failure(verdict(Outcome::WrongValue), verdict(Outcome::ReplicaMismatch)));
  EXPECT_TRUE(same_failure(verdict(Outcome::Crash), verdict(Outcome::Crash)));
  EXPECT_FALSE(same_failure(verdict(Outcome::Crash), verdict(Outcome::WrongValue)));
  EXPECT_FALSE(same_failure(verdict(Outcome::WrongValue), verdict(Outcome::Hang)));
  EXPECT_FALSE(same_failure(verdict(Outcome::WrongValue), verdict(Outcome::Pass)));
  EXPECT_FALSE(same_failure(verdict(Outcome::WrongValue), verdict(Outcome::Mistrusted)));
}

}  // namespace
}  // namespace tp
