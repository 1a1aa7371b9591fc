// What a fuzz job says of the times that GPUs measured.

#include "harness/fuzz/summary.h"

#include <gtest/gtest.h>

#include <deque>
#include <nlohmann/json.hpp>
#include <utility>

#include "harness/base/operator.h"
#include "harness/fuzz/canary_testing.h"
#include "harness/fuzz/fuzz.h"
#include "harness/fuzz/progress.h"
#include "harness/fuzz/report_json.h"

namespace tp {
namespace {

class SummaryTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (operators().empty()) add_canaries();
  }
};

Case a_case(const std::string& op, int num_tokens, std::uint64_t seed = 1) {
  Case c = find_operator(op).blank();
  c.num_tokens = num_tokens;
  c.seed = seed;
  return c;
}

Verdict timed(double kernel_us, Outcome outcome = Outcome::Pass, double floor_us = 1.1) {
  return {.outcome = outcome,
          .timing = {.kernel_us = kernel_us,
                     .collective_us = 20.1,
                     .slowest_rank = 3,
                     .bytes = 4096,
                     .flops = 1024,
                     .floor_us = floor_us}};
}

bool mentions(const std::string& text, const std::string& words) {
  return text.find(words) != std::string::npos;
}

TEST_F(SummaryTest, EndsWithTheSlowestCasesOfDistinctShapes) {
  Summary s;
  s.seconds = 2;
  s.add(a_case("canary", 1), timed(13.5));
  s.add(a_case("canary", 1, 2), timed(12.5));  // another seed is no other shape
  s.add(a_case("canary", 2), timed(4.4));
  s.add(a_case("canary_wrong", 2), timed(5.5));
  s.add(a_case("canary_wrong", 3), timed(2.2));
  ASSERT_EQ(s.slowest().size(), 3u);
  EXPECT_EQ(s.slowest()[0].c, a_case("canary", 1));
  EXPECT_EQ(s.slowest()[1].c, a_case("canary_wrong", 2));
  EXPECT_EQ(s.slowest()[2].c, a_case("canary", 2));
  const std::string text = summary_text(s);
  EXPECT_TRUE(mentions(
      text,
      "  slowest     x12.3 of its floor of 1.1 us: kernels 13.5 us on tp_rank 3, collectives "
      "20.1 us: " +
          to_line(a_case("canary", 1)) + "\n"))
      << text;
  EXPECT_FALSE(mentions(text, "12.5 us"));
}

TEST_F(SummaryTest, TheSlowerOfTwoCasesOfAShapeIsKept) {
  Summary s;
  s.add(a_case("canary", 1), timed(2));
  s.add(a_case("canary", 1, 2), timed(3));
  ASSERT_EQ(s.slowest().size(), 1u);
  EXPECT_EQ(s.slowest()[0].c.seed, 2u);
}

TEST_F(SummaryTest, MediansAreOfEachOperator) {
  Summary s;
  for (int i = 1; i <= 99; ++i) s.add(a_case("canary", i), timed(1.1 * i));
  s.add(a_case("canary_wrong", 1), timed(1.1 * 0.5));
  EXPECT_EQ(s.ratios.at("canary").count(), 99);
  EXPECT_NEAR(s.ratios.at("canary").median(), 50, 0.5);
  EXPECT_NEAR(s.ratios.at("canary_wrong").median(), 0.5, 0.005);
  EXPECT_TRUE(mentions(summary_text(s), "  time/floor, median (cases)   canary x"))
      << summary_text(s);
}

TEST_F(SummaryTest, OnlyPassingCasesHaveATime) {
  Summary s;
  for (const Outcome outcome : {Outcome::WrongValue, Outcome::Hang, Outcome::Refused,
                                Outcome::Mistrusted, Outcome::Skipped}) {
    s.add(a_case("canary", 1), timed(13.5, outcome));
  }
  s.add(a_case("canary", 1), timed(13.5, Outcome::Pass, 0));
  s.add(a_case("canary", 1), timed(0));
  s.add(a_case("canary", 1), {.outcome = Outcome::Pass});
  EXPECT_TRUE(s.ratios.empty());
  EXPECT_FALSE(mentions(summary_text(s), "slowest")) << summary_text(s);
  EXPECT_FALSE(mentions(summary_text(s), "time/floor")) << summary_text(s);
}

TEST_F(SummaryTest, EmulatedThreadsAreNamedWhereThereAreAny) {
  Summary s;
  s.seconds = 2;
  s.seed = 5;
  s.add(a_case("canary", 1), {.outcome = Outcome::Pass});
  EXPECT_TRUE(mentions(summary_text(s), "1 cases in 2.0 s, 0.5 cases/s, seed 5\n"));
  s.add(a_case("canary", 1), {.outcome = Outcome::Pass, .threads = 200});
  EXPECT_TRUE(mentions(summary_text(s), "2 cases in 2.0 s, 1.0 cases/s, 100 emulated threads/s"));
}

TEST_F(SummaryTest, TheFirstReasonOfEachKindIsSaid) {
  FuzzResult result;
  Summary& s = result.summary;
  for (const char* reason : {"no GPU 7", "no GPU 8"}) {
    s.add(a_case("canary", 1), {.outcome = Outcome::Skipped, .detail = reason});
  }
  s.add(a_case("canary", 1), {.outcome = Outcome::Mistrusted, .detail = "all heads are alike"});
  s.add(a_case("canary", 1), {.outcome = Outcome::WrongValue, .detail = "got 1"});
  const std::string text = summary_text(s);
  EXPECT_TRUE(mentions(text, "\n  mistrusted  all heads are alike\n  skipped     no GPU 7\n"))
      << text;
  EXPECT_FALSE(mentions(text, "no GPU 8") || mentions(text, "got 1")) << text;
  const auto json = nlohmann::json::parse(to_json(result));
  EXPECT_EQ(json.at("reasons").size(), 2u);
  EXPECT_EQ(json.at("reasons").at("Skipped"), "no GPU 7");
}

// Passes everything, in the same time.
class TimedRunner : public Runner {
 public:
  std::string where() const override { return "a test"; }
  bool has_room() const override { return waiting_.empty(); }
  void submit(Request request) override { waiting_.push_back(std::move(request)); }
  Answer wait() override {
    Answer answer{.request = std::move(waiting_.front()), .verdict = timed(13.5)};
    waiting_.pop_front();
    return answer;
  }
  Runner& alone() override { return *this; }

 private:
  std::deque<Request> waiting_;
};

TEST_F(SummaryTest, OfSeveralJobsNothingIsTimed) {
  // Whether they were asked for or are the executor's default.
  for (const int jobs : {1, 2}) {
    TimedRunner runner;
    FuzzOptions options;
    options.cases = 5;
    Progress progress(Progress::Show::no);
    const FuzzResult result =
        fuzz(runner, {.processes = 1, .jobs = jobs}, make_domain({"canary"}, up_to(4), {}, ""),
             options, 1, nullptr, progress, [](const Finding&) {});
    EXPECT_EQ(result.summary.ran(), 5);
    EXPECT_EQ(result.summary.ratios.empty(), jobs > 1);
  }
}

TEST_F(SummaryTest, JsonHasTheTimes) {
  FuzzResult result;
  EXPECT_EQ(nlohmann::json::parse(to_json(result)).at("slowest").size(), 0u);
  result.summary.add(a_case("canary", 1), timed(13.5));
  const auto json = nlohmann::json::parse(to_json(result));
  const auto& slowest = json.at("slowest").at(0);
  EXPECT_EQ(slowest.at("case"), to_line(a_case("canary", 1)));
  EXPECT_EQ(slowest.at("kernel_us"), 13.5);
  EXPECT_EQ(slowest.at("floor_us"), 1.1);
  EXPECT_EQ(slowest.at("collective_us"), 20.1);
  EXPECT_EQ(slowest.at("slowest_rank"), 3);
  EXPECT_EQ(slowest.at("bytes"), 4096);
  EXPECT_EQ(slowest.at("flops"), 1024);
  EXPECT_NEAR(json.at("floor_ratios").at(0).at("median"), 12.27, 0.13);
}

}  // namespace
}  // namespace tp
