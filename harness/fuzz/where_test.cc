// What two executors say, made one: verdicts, the answer that stands alone, the flags that bring a
// case back to where it was seen.

#include "harness/fuzz/where.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <thread>

#include "harness/base/operator.h"
#include "harness/fuzz/both.h"
#include "harness/fuzz/canary_testing.h"
#include "harness/fuzz/driver.h"
#include "harness/fuzz/executor.h"
#include "harness/fuzz/finding.h"
#include "harness/fuzz/fuzz.h"
#include "harness/fuzz/three_answers.h"

namespace tp {
namespace {

Verdict pass(std::uint64_t digest = 7) { return {.outcome = Outcome::Pass, .digest = digest}; }
Verdict wrong(std::uint64_t digest = 8) {
  return {.outcome = Outcome::WrongValue, .detail = "got 1, accepted 2", .digest = digest};
}
Verdict skipped() { return {.outcome = Outcome::Skipped, .detail = "no room"}; }

std::string text(const Verdict& v) {
  return v.detail.empty() ? std::string(name_of(v.outcome))
                          : fmt::format("{}: {}", name_of(v.outcome), v.detail);
}

TEST(Merged, AFindingOfEitherSideIsOneAndSaysWhere) {
  EXPECT_EQ(text(merged(wrong(), wrong())), "WrongValue: on both: got 1, accepted 2");
  EXPECT_EQ(text(merged(wrong(), pass())), "WrongValue: on the gpu only: got 1, accepted 2");
  EXPECT_EQ(text(merged(pass(), wrong())), "WrongValue: in the emulator only: got 1, accepted 2");
  EXPECT_EQ(text(merged(wrong(), skipped())),
            "WrongValue: on the gpu: got 1, accepted 2; in the emulator: Skipped: no room");
  const Verdict hang{.outcome = Outcome::Hang, .detail = "no answer"};
  EXPECT_EQ(text(merged(hang, wrong())),
            "Hang: on the gpu: no answer; in the emulator: WrongValue: got 1, accepted 2");
}

// What exp and log make differs between executors: such passes are not told apart by their bits.
TEST(Merged, OwnBitsAreNoDifference) {
  Verdict gpu = pass(), emulator = pass();
  gpu.digest = 1;
  emulator.digest = 2;
  EXPECT_EQ(merged(gpu, emulator).outcome, Outcome::LawBroken);
  gpu.own_bits = emulator.own_bits = true;
  EXPECT_EQ(merged(gpu, emulator).outcome, Outcome::Pass);
  emulator = wrong();
  EXPECT_EQ(merged(gpu, emulator).outcome, Outcome::WrongValue);
}

TEST(Merged, TwoPassesWithOtherBitsAreAFinding) {
  EXPECT_EQ(text(merged(pass(7), pass(7))), "Pass");
  EXPECT_EQ(text(merged(pass(7), pass(10))),
            "LawBroken: gpu and emulator give different bits: digests 0000000000000007 and "
            "000000000000000a");
}

TEST(Merged, WhatOneSideCouldNotSayIsNoPass) {
  EXPECT_EQ(text(merged(pass(), skipped())), "Skipped: in the emulator: no room");
  EXPECT_EQ(text(merged(skipped(), pass())), "Skipped: on the gpu: no room");
  EXPECT_EQ(text(merged(skipped(), skipped())), "Skipped: no room");
  const Verdict mistrusted{.outcome = Outcome::Mistrusted, .detail = "blind"};
  EXPECT_EQ(text(merged(mistrusted, skipped())), "Skipped: in the emulator: no room");
  EXPECT_EQ(text(merged(mistrusted, pass())), "Mistrusted: on the gpu: blind");
}

TEST(Merged, ItIsKnownWhoseFindingItIs) {
  EXPECT_EQ(side_of(wrong(), wrong()), Side::both);
  EXPECT_EQ(side_of(wrong(), pass()), Side::gpu);
  EXPECT_EQ(side_of(wrong(), skipped()), Side::gpu);
  EXPECT_EQ(side_of(pass(), wrong()), Side::emulator);
  EXPECT_EQ(side_of(pass(7), pass(8)), Side::bits);
  EXPECT_EQ(side_of(pass(), pass()), Side::unasked);
  EXPECT_EQ(side_of(pass(), skipped()), Side::unasked);
}

TEST(Signature, SaysOperatorOutcomeAndSide) {
  if (operators().empty()) add_canaries();
  Answer answer;
  Case c = find_operator("canary").blank();
  answer.request.line = to_line(c);
  answer.verdict = wrong();
  answer.side = Side::both;
  const std::string on_both = signature(answer);
  c.seed = 2;
  answer.request.line = to_line(c);
  EXPECT_EQ(signature(answer), on_both);
  answer.side = Side::gpu;
  EXPECT_NE(signature(answer), on_both);
  answer.side = Side::both;
  answer.verdict.outcome = Outcome::LawBroken;
  EXPECT_NE(signature(answer), on_both);
}

TEST(Merged, TimeIsTheGpusAndTheLongerOne) {
  Verdict gpu = pass(), emulator = pass();
  gpu.seconds = 1;
  gpu.timing = {.kernel_us = 5, .slowest_rank = 2};
  emulator.seconds = 3;
  emulator.threads = 64;
  const Verdict v = merged(gpu, emulator);
  EXPECT_EQ(v.seconds, 3);
  EXPECT_EQ(v.threads, 64u);
  EXPECT_EQ(v.timing.kernel_us, 5);
  EXPECT_EQ(v.timing.slowest_rank, 2);
}

TEST(ThreeAnswers, EachThatCanStandAloneIsNamed) {
  EXPECT_EQ(stands_alone({pass(), pass(), pass()}), "all three agree");
  // Another order of rounding.
  EXPECT_EQ(stands_alone({pass(7), pass(7), pass(9)}), "all three agree");
  EXPECT_EQ(stands_alone({wrong(), wrong(), wrong()}),
            "all three agree: neither the gpu nor the sharding makes it fail");
  EXPECT_EQ(stands_alone({wrong(), pass(), pass()}), "stands alone: the gpu");
  EXPECT_EQ(stands_alone({pass(), wrong(), pass()}), "stands alone: the emulator");
  EXPECT_EQ(stands_alone({wrong(), pass(), wrong()}), "stands alone: the emulator");
  EXPECT_EQ(stands_alone({wrong(), wrong(), pass()}),
            "stands alone: one rank with the whole problem: the ranks agree with each other and "
            "not with it, which is a sharding mistake");
  EXPECT_EQ(stands_alone({pass(), pass(), wrong()}),
            "stands alone: one rank with the whole problem: it fails where the ranks pass");
}

TEST(ThreeAnswers, BitsOfOneRankSettleAQuarrel) {
  EXPECT_EQ(stands_alone({pass(7), pass(8), pass(8)}), "stands alone: the gpu");
  EXPECT_EQ(stands_alone({pass(7), pass(8), pass(7)}), "stands alone: the emulator");
  EXPECT_EQ(stands_alone({pass(7), pass(8), pass(9)}),
            "no two agree: gpu and emulator pass with different bits, and one rank with the whole "
            "problem agrees with neither");
  EXPECT_EQ(stands_alone({wrong(7), wrong(8), pass(9)}),
            "no two agree: gpu and emulator fail each in its own way, and one rank with the whole "
            "problem passes");
}

TEST(ThreeAnswers, WhoCrashedHasNoBits) {
  const Verdict crash{.outcome = Outcome::Crash}, hang{.outcome = Outcome::Hang};
  EXPECT_EQ(stands_alone({crash, crash, crash}),
            "all three agree: neither the gpu nor the sharding makes it fail");
  EXPECT_EQ(stands_alone({crash, pass(), pass()}), "stands alone: the gpu");
  EXPECT_EQ(stands_alone({crash, hang, hang}), "stands alone: the gpu");
  EXPECT_EQ(stands_alone({crash, hang, pass()}),
            "no two agree: gpu and emulator fail each in its own way, and one rank with the whole "
            "problem passes");
}

TEST(ThreeAnswers, FailingOtherwiseIsNoAgreement) {
  const Verdict crash{.outcome = Outcome::Crash}, hang{.outcome = Outcome::Hang};
  EXPECT_EQ(stands_alone({wrong(), wrong(), crash}),
            "stands alone: one rank with the whole problem: the ranks agree with each other, and "
            "it fails otherwise");
  EXPECT_EQ(stands_alone({crash, crash, wrong()}),
            "stands alone: one rank with the whole problem: the ranks agree with each other, and "
            "it fails otherwise");
  EXPECT_EQ(stands_alone({crash, wrong(), crash}), "stands alone: the emulator");
  EXPECT_EQ(stands_alone({wrong(), pass(), crash}),
            "no two agree: gpu and emulator end differently, and one rank with the whole problem "
            "fails otherwise");
  EXPECT_EQ(stands_alone({crash, wrong(), hang}),
            "no two agree: gpu and emulator fail each in its own way, and one rank with the whole "
            "problem fails otherwise");
  EXPECT_EQ(stands_alone({pass(7), pass(8), crash}),
            "no two agree: gpu and emulator pass with different bits, and one rank with the whole "
            "problem fails");
}

TEST(ThreeAnswers, OnlyWrongValuesPointToTheSharding) {
  for (const Outcome outcome : {Outcome::Crash, Outcome::Hang, Outcome::OutOfMemory,
                                Outcome::CollectiveMismatch, Outcome::BadLaunch}) {
    const Verdict v{.outcome = outcome};
    EXPECT_EQ(stands_alone({v, v, pass()}),
              "stands alone: one rank with the whole problem: it passes where the ranks fail");
  }
}

TEST(ThreeAnswers, WhoSaysNothingStandsNowhere) {
  EXPECT_EQ(stands_alone({skipped(), pass(), pass()}), "nothing to compare: the gpu says Skipped");
  EXPECT_EQ(stands_alone({pass(), skipped(), pass()}),
            "nothing to compare: the emulator says Skipped");
  EXPECT_EQ(stands_alone({pass(7), pass(8), skipped()}),
            "gpu and emulator do not agree; one rank with the whole problem says Skipped");
}

TEST(ThreeAnswers, AnyOfThemFailsTheCase) {
  EXPECT_FALSE(overall({pass(), pass(), pass(9)}).finding());
  EXPECT_TRUE(overall({pass(7), pass(8), pass(7)}).finding());
  EXPECT_TRUE(overall({wrong(), pass(), pass()}).finding());
  EXPECT_EQ(text(overall({pass(), pass(), wrong()})),
            "WrongValue: on one rank with the whole problem only: got 1, accepted 2");
}

TEST(GaveUp, SaysItsExitCodeUnlessSomethingWasSeen) {
  FuzzResult result;
  result.gave_up = GaveUp("no GPU", 3);
  EXPECT_EQ(result.exit_code(), 3);
  result.gave_up = GaveUp("died 3 times");
  EXPECT_EQ(result.exit_code(), 70);
  result.not_replayed.emplace_back();
  EXPECT_EQ(result.exit_code(), 1);
}

TEST(Where, AReplayLineSaysWhatAPlainReplayWouldNotDo) {
  const int usual = default_processes(kEmulator);
  const auto flags = [](const char* on, int processes, Link link = Link::best) {
    return replay_flags({.on = on, .link = link, .processes = processes});
  };
  EXPECT_EQ(flags("emulator", usual), "");
  EXPECT_EQ(flags("emulator", usual + 1), fmt::format(" -n {}", usual + 1));
  EXPECT_EQ(flags("emulator", usual, Link::mpi), " --group mpi");
  EXPECT_EQ(flags("gpu", 1), " --on gpu");
  EXPECT_EQ(flags("gpu", 4, Link::nccl), " --on gpu --group nccl -n 4");
  EXPECT_EQ(flags("both", 0), " --on both");
  EXPECT_EQ(flags("both", 2), " --on both -n 2");
}

TEST(Where, AReplayLineNamesTheCheckpointBehindTheCase) {
  if (operators().empty()) add_canaries();
  Finding finding;
  finding.smallest = find_operator("canary").blank();
  finding.where = settled({.on = std::string(kEmulator), .jobs = 1});
  const std::string plain = replay_command(finding);
  EXPECT_EQ(plain, fmt::format("./tpcheck replay '{}'", to_line(finding.smallest)));
  finding.mutant = "0:unique_shards";
  finding.where.checkpoint = "my models/7b";
  EXPECT_EQ(replay_command(finding), plain + " --model 'my models/7b' --mutant 0:unique_shards");
}

TEST(Where, AReplayLineNamesTheAdapterBehindItsBase) {
  if (operators().empty()) add_canaries();
  Finding finding;
  finding.smallest = find_operator("canary").blank();
  finding.where = settled({.on = std::string(kEmulator), .jobs = 1});
  const std::string plain = replay_command(finding);
  finding.where.adapter = "my adapter";
  finding.where.base = "base";
  EXPECT_EQ(replay_command(finding), plain + " --model base --adapter 'my adapter'");
  finding.where.checkpoint = "base";
  EXPECT_EQ(replay_command(finding), plain + " --model base --adapter 'my adapter'");
}

TEST(Where, WorkersAreToldOfTheAdapter) {
  const Executor told = executor_of(
      settled({.on = std::string(executor_name()), .adapter = "adapter", .base = "base"}));
  EXPECT_EQ(told.adapter, "adapter");
  EXPECT_EQ(told.base, "base");
}

TEST(Where, WorkersAreToldOfTheCheckpoint) {
  EXPECT_EQ(executor_of({.on = std::string(executor_name())}).checkpoint, "");
  EXPECT_EQ(
      executor_of(settled({.on = std::string(executor_name()), .checkpoint = "dir"})).checkpoint,
      "dir");
}

TEST(Where, DefaultsAreTheExecutors) {
  EXPECT_EQ(settled({.on = "gpu"}).processes, 1);
  EXPECT_EQ(settled({.on = "gpu"}).jobs, 1);
  EXPECT_EQ(settled({.on = "gpu", .processes = 8}).jobs, 1);
  EXPECT_EQ(settled({.on = "both"}).processes, 0);
  EXPECT_EQ(settled({.on = "emulator", .processes = 3, .jobs = 2}).jobs, 2);
  const int cores = int(std::thread::hardware_concurrency());
  EXPECT_EQ(settled({.on = "emulator", .processes = 1}).jobs, cores);
  // Processes of one job wait for each other.
  EXPECT_EQ(settled({.on = "emulator", .processes = cores + 1}).jobs, 2);
}

TEST(Where, TheHeaderHasALineForEachExecutor) {
  const std::string version(kTpcheckVersion);
  const std::string indent(8 + version.size() + 2, ' ');
  EXPECT_EQ(header_text("emulator, 1 job", true), "tpcheck " + version + "  emulator, 1 job\n");
  EXPECT_EQ(header_text("gpu: G\nemulator", true),
            "tpcheck " + version + "  gpu: G\n" + indent + "emulator\n");
  EXPECT_EQ(header_text("gpu: G", false),
            fmt::format("tpcheck {}  gpu: G\n{}\n", version, kNoPoison));
}

}  // namespace
}  // namespace tp
