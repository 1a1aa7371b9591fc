// Every oracle is seen to fail, each for its own reason and with the place in its sentence.

#include <gtest/gtest.h>

#include "harness/group/mpi_testing.h"
#include "properties/run/faulty_testing.h"
#include "properties/run/stage.h"

namespace tp {
namespace {

constexpr std::int64_t kRows = 3, kCols = 10, kStride = 13;

struct Plan {
  Mistake mistake = Mistake::none;
  int bad_rank = -1;  // the rank that makes the mistake; -1: all
  bool slice_outside = false;
  bool launch_nothing = false;  // a grid of no blocks
  bool skip_collective = false;
  bool blind = false;
  bool twice = false;      // of two stages, the first one makes the mistake, too
  bool huge = false;       // needs more memory than any machine has
  bool scattered = false;  // rank r has row r of y alone; ranks beyond the last row have none
  int withheld = -1;       // the row that then nobody has
  // The host reads x[0, 0], and what it launches is right only if that is this number.
  std::optional<float> baked = {};
};

// One stage, to = from on every rank, with a budget of 1 %.
Stage copy_stage(const Plan& plan, const std::string& from, const std::string& to) {
  const auto tensor = [](const std::string& name) {
    return TensorSpec{name, DType::f32, kRows, kCols, Role::activation, kCols};
  };
  Stage stage{.name = "copy_to_" + to, .inputs = {tensor(from)}, .outputs = {tensor(to)}};
  stage.buffers = [=](int tp_rank) -> std::vector<LocalBuffer> {
    const bool outside = plan.slice_outside && tp_rank == plan.bad_rank;
    std::vector<LocalBuffer> buffers = {
        {from, Use::input, DType::f32, kRows, kStride, {{from, {outside ? 1 : 0, kCols}}}},
        {to, Use::output, DType::f32, kRows, kStride, {{to, {0, kCols}}}}};
    if (plan.scattered) {
      buffers[1].rows = 1;
      buffers[1].pieces[0].rows = Shard{tp_rank, 1};
      if (tp_rank >= kRows || tp_rank == plan.withheld) buffers[1].pieces.clear();
    }
    if (plan.huge && tp_rank == plan.bad_rank)
      buffers.push_back({"huge", Use::workspace, DType::f32, 1 << 20, 1 << 20});
    return buffers;
  };
  stage.run = [=](RankRun& run) {
    const bool bad = plan.bad_rank < 0 || run.group.tp_rank() == plan.bad_rank;
    View<float> x = run.view<float>(from).columns(0, kCols),
                y = run.view<float>(to).columns(0, kCols);
    if (plan.launch_nothing && bad) x.rows = 0;
    if (plan.scattered) {
      x.data += run.group.tp_rank() * x.row_stride;
      x.rows = run.group.tp_rank() < kRows && run.group.tp_rank() != plan.withheld ? 1 : 0;
    }
    Mistake mistake = bad ? plan.mistake : Mistake::none;
    if (plan.baked) {
      float first = 0;
      to_host(run.stream, &first, x.data, sizeof(first));
      run.stream.synchronize();
      if (first != *plan.baked) mistake = Mistake::wrong_value;
    }
    if (!plan.scattered || x.rows > 0) faulty_copy(x, y, mistake, run.stream);
    if (!(plan.skip_collective && bad)) run.group.barrier(run.stream);
  };
  stage.reference = [from](const WholeInputs& in) -> std::vector<Budget> {
    Budget b(kRows, kCols);
    b.r = in[from].values;
    for (std::size_t i = 0; i < b.r.size(); ++i) b.rho[i] = 0.01 * std::fabs(b.r[i]);
    return {b};
  };
  if (plan.blind) {
    stage.blind_to = [](const auto&, const auto&) {
      return std::optional<std::string>("everything");
    };
  }
  return stage;
}

// y = x, or with `second` z = y = x in two stages of which the second makes the mistake.
Operator faulty(const Plan& plan, bool second = false) {
  OperatorSpec spec{
      .name = "faulty", .what = "a copy", .laws = {law_tp1(), law_scale(), law_tokens()}};
  for (const char* k : {"tp_size", "num_tokens", "fill", "seed"})
    spec.keys.push_back(shared_key(k));
  spec.refuse = [](const Case&) { return std::nullopt; };
  spec.regime = [](const Case& c, const Variation& v) -> DataRegime {
    return {c.fill, c.seed, 1e-6, v.scale_log2, v.rotate_rows};
  };
  spec.stages = [=](const Case&, const ShardingRules&, const Variation&) -> std::vector<Stage> {
    if (!second) return {copy_stage(plan, "x", "y")};
    return {copy_stage(plan.twice ? plan : Plan{}, "x", "y"), copy_stage(plan, "y", "z")};
  };
  return make_operator(spec);
}

Verdict run(const Plan& plan, const std::string& law = "none", int tp_size = 4, bool second = false,
            bool graph = false) {
  const Operator op = faulty(plan, second);
  Case c = op.blank();
  c.tp_size = tp_size;
  c.num_tokens = int(kRows);
  c.fill = Fill::dense;
  c.seed = 5;
  c.options["law"] = op.key("law")->parse(law);
  if (plan.blind) c.options["discriminate"] = 1;
  c.options["graph"] = graph;
  return op.run(test_world(), c, {.deadline = std::chrono::seconds(10)});
}

void expect(const Verdict& v, Outcome outcome, const std::string& detail) {
  EXPECT_EQ(name_of(v.outcome), name_of(outcome)) << v.detail;
  EXPECT_NE(v.detail.find(detail), std::string::npos) << v.detail;
}

TEST(Oracles, ACorrectCopyPasses) {
  for (const char* law : {"none", "tp1", "tokens"}) expect(run({}, law), Outcome::Pass, "");
}

TEST(Oracles, AScatteredOutputIsPutTogetherRowByRow) {
  for (const char* law : {"none", "tokens"})
    expect(run({.scattered = true}, law), Outcome::Pass, "");
  expect(run({.mistake = Mistake::wrong_value, .bad_rank = 2, .scattered = true}),
         Outcome::WrongValue, "tp_rank 2, y[2, 0]");
  expect(run({.mistake = Mistake::skips_last_column, .bad_rank = 1, .scattered = true}),
         Outcome::Uninitialised, "tp_rank 1, y[1, 9]");
  expect(run({.scattered = true, .withheld = 2}), Outcome::WrongValue, "no rank holds y[2, 0]");
}

TEST(Oracles, ACopyIsNoNormAndBreaksTheLawOfScale) {
  expect(run({}, "scale"), Outcome::LawBroken, "law scale: y[0, 0]");
}

TEST(Oracles, UnwrittenOutputIsUninitialised) {
  expect(run({Mistake::skips_last_column}), Outcome::Uninitialised,
         "y[0, 9] depends on what memory held before");
}

TEST(Oracles, AWrittenInputIsInputModified) {
  expect(run({Mistake::writes_input, 2}), Outcome::InputModified, "tp_rank 2, x[0, 1]");
}

TEST(Oracles, WrittenPaddingIsOutOfBounds) {
  expect(run({Mistake::writes_padding, 1}), Outcome::OutOfBounds, "tp_rank 1, y[0, 10]");
}

// Under AddressSanitizer the guards are fenced off and the process ends with its report instead.
#if !defined(__SANITIZE_ADDRESS__)
TEST(Oracles, AnOverrunGuardIsOutOfBounds) {
  expect(run({Mistake::overruns, 3}), Outcome::OutOfBounds, "behind its 156 bytes");
  expect(run({Mistake::underruns, 0}), Outcome::OutOfBounds, "before its 156 bytes");
}
#endif

TEST(Oracles, NaNIsNotFinite) {
  expect(run({Mistake::not_a_number, 0}), Outcome::NotFinite, "tp_rank 0, y[0, 0]");
}

TEST(Oracles, AValueOutsideTheBudgetIsWrongValue) {
  expect(run({Mistake::wrong_value, 0}), Outcome::WrongValue, "tp_rank 0, y[0, 0]");
}

TEST(Oracles, ReplicasThatDifferAreAMismatchEvenWithinTheBudget) {
  expect(run({Mistake::drifts, 2}), Outcome::ReplicaMismatch, "its replica on tp_rank 2");
}

TEST(Oracles, ADriftWithinTheBudgetBreaksTheLawOfTokens) {
  expect(run({Mistake::drifts}), Outcome::Pass, "");
  expect(run({Mistake::drifts}, "tokens"), Outcome::LawBroken, "law tokens: y[");
}

TEST(Oracles, ASliceBeyondATensorIsOutOfBounds) {
  Plan plan;
  plan.bad_rank = 1;
  plan.slice_outside = true;
  expect(run(plan), Outcome::OutOfBounds, "tp_rank 1, takes columns 1 .. 11 of x, which has 10");
}

TEST(Oracles, AnImpossibleLaunchIsABadLaunch) {
  Plan plan;
  plan.bad_rank = 2;
  plan.launch_nothing = true;
  expect(run(plan), Outcome::BadLaunch, "tp_rank 2, ");
}

TEST(Oracles, ASkippedCollectiveIsAMismatch) {
  Plan plan;
  plan.bad_rank = 3;
  plan.skip_collective = true;
  expect(run(plan), Outcome::CollectiveMismatch, "tp_rank 3 is at end of case");
}

// The second stage reads what the first one really produced, where it lies.
TEST(Oracles, EveryStageIsJudgedByItself) {
  expect(run({}, "tokens", 4, true), Outcome::Pass, "");
  expect(run({Mistake::wrong_value, 1}, "none", 4, true), Outcome::WrongValue,
         "stage copy_to_z, tp_rank 1, z[0, 0]: got");
  expect(run({Mistake::writes_input, 3}, "none", 4, true), Outcome::InputModified,
         "tp_rank 3, y[0, 1]");
  expect(run({Mistake::skips_last_column, 2}, "none", 4, true), Outcome::Uninitialised,
         "tp_rank 2, z[0, 9]");
  expect(run({Mistake::drifts, 2}, "none", 4, true), Outcome::ReplicaMismatch,
         "stage copy_to_z, z[1, 0]: tp_rank 0 has");
}

// With the inputs that it really had the second stage is wrong, too, but that may be the first
// one's doing.
TEST(Oracles, OfSeveralBadStagesTheFirstIsNamed) {
  const Verdict v =
      run({.mistake = Mistake::wrong_value, .bad_rank = 0, .twice = true}, "none", 4, true);
  expect(v, Outcome::WrongValue, "stage copy_to_y, tp_rank 0, y[0, 0]: got");
  EXPECT_EQ(v.detail.find("copy_to_z"), std::string::npos) << v.detail;
}

TEST(Oracles, AnOnlyStageIsNotNamed) {
  EXPECT_EQ(run({Mistake::wrong_value, 0}).detail.find("tp_rank 0, y[0, 0]: got"), 0u);
}

// A kernel that is launched again from a recording has the arguments of the recording: what the
// host made of the data then.
TEST(Oracles, ArgumentsBakedIntoARecordingAreWrongValues) {
  Plan plan;
  plan.baked = 0.0f;
  const std::string said = run(plan).detail;  // "... accepted -0.123 .. -0.121 ...": twice 1 % of x
  float lo = 0, hi = 0;
  ASSERT_EQ(std::sscanf(said.c_str() + said.find("accepted"), "accepted %g .. %g", &lo, &hi), 2)
      << said;
  ASSERT_EQ(std::sscanf(said.c_str() + said.find("got"), "got %g", &lo), 1) << said;
  plan.baked = -lo;  // the mistake is the sign
  expect(run(plan), Outcome::Pass, "");
  expect(run(plan, "none", 4, false, true), Outcome::WrongValue, "y[0, 0]");
  expect(run({}, "none", 4, true, true), Outcome::Pass, "");
}

TEST(Oracles, TooLittleMemoryIsSkippedWithTheNumbers) {
  Plan plan;
  plan.bad_rank = 3;
  plan.huge = true;
  const Verdict v = run(plan);
  expect(v, Outcome::Skipped, "need 4.4e+03 GB of device memory, of which ");
}

TEST(Oracles, BlindDataAreMistrusted) {
  Plan plan;
  plan.blind = true;
  expect(run(plan), Outcome::Mistrusted, "could not have shown everything");
}

// A key that does nothing would be drawn all the same.
TEST(Oracles, OnlyDataThatCanBeBlindAreAskedWhetherTheyAre) {
  EXPECT_EQ(faulty({}).key("discriminate"), nullptr);
  EXPECT_NE(faulty({.blind = true}).key("discriminate"), nullptr);
}

}  // namespace
}  // namespace tp
