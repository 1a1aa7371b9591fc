// The commands with two executors: the canary, and one that says it is a GPU's (place_testing.cc).

#include <algorithm>

#include "harness/fuzz/commands_testing.h"
#include "harness/fuzz/protocol.h"

namespace tp {
namespace {

class ExecutorsTest : public CommandsTest {
 protected:
  // As tpcheck(), with the pretended GPU, which is gone as soon as gone.txt exists.
  Ran with_gpu(const std::string& arguments, const std::string& environment = "") const {
    return shell(fmt::format("{} TPCHECK_TEST_CANNOT={}/gone.txt TPCHECK_GPU={} {} {} 2>stderr.txt",
                             environment, folder_.string(), TPCHECK_CANARY_GPU, TPCHECK_CANARY,
                             arguments));
  }
  // Exit code 3, one sentence that mentions `text`, and nothing else.
  void expect_unavailable(const Ran& ran, const std::string& text) const {
    const std::string said = errors();
    EXPECT_EQ(ran.code, 3) << said;
    EXPECT_EQ(ran.out, "");
    EXPECT_TRUE(mentions(said, text)) << said;
    EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
    EXPECT_FALSE(fs::exists(folder_ / "findings"));
  }
  static std::string case_with(const std::string& fault, int tp_size = 4) {
    return fmt::format(
        "'v1 canary num_heads=8 num_kv_heads=2 head_dim=8 tp_size={} num_tokens=1 dtype=f32 seed=1 "
        "fault={}'",
        tp_size, fault);
  }
};

TEST_F(ExecutorsTest, TheHeaderSaysWhereCasesRun) {
  EXPECT_EQ(with_gpu("fuzz --ops canary --cases 20 --seed 1 --on gpu").code, 0) << errors();
  EXPECT_TRUE(mentions(errors(), "  gpu: Pretend GPU (--group best), 1 job of 1 process on "))
      << errors();
  EXPECT_EQ(with_gpu("fuzz --ops canary --cases 20 --seed 1 --on gpu --group mpi -n 2").code, 0);
  EXPECT_TRUE(mentions(errors(), "  gpu: Pretend GPU (--group mpi), 1 job of 2 processes on "))
      << errors();
  EXPECT_EQ(with_gpu("fuzz --ops canary --cases 20 --seed 1 --jobs 1 -n 2").code, 0);
  EXPECT_TRUE(mentions(errors(), "  emulator, 1 job of 2 processes on ")) << errors();
  EXPECT_EQ(with_gpu("fuzz --ops canary --cases 20 --seed 1 --on both -n 1 --jobs 2").code, 0);
  EXPECT_TRUE(mentions(errors(), "  gpu: Pretend GPU (--group best), 2 jobs of 1 process on "))
      << errors();
  EXPECT_TRUE(mentions(errors(), "\n               emulator, 2 jobs of 1 process on ")) << errors();
  EXPECT_EQ(with_gpu("zoo --on gpu --seed 1").code, 0) << errors();
  EXPECT_TRUE(mentions(errors(), "  gpu: Pretend GPU")) << errors();
  EXPECT_EQ(with_gpu("replay --on gpu " + case_with("none")).code, 0) << errors();
  EXPECT_TRUE(mentions(errors(), "  gpu: Pretend GPU")) << errors();
}

TEST_F(ExecutorsTest, AFindingOfTheGpuIsReplayedThere) {
  const Ran ran = with_gpu("fuzz --ops canary_wrong_on_gpu --on gpu --seed 3");
  EXPECT_EQ(ran.code, 1) << errors();
  const std::string replay = replay_arguments(ran.out);
  ASSERT_TRUE(mentions(replay, " --on gpu")) << ran.out;
  EXPECT_EQ(with_gpu(replay).code, 1);
  EXPECT_EQ(with_gpu(replay.substr(0, replay.find(" --on gpu"))).code, 0);
  EXPECT_EQ(with_gpu("fuzz --ops canary_wrong_on_gpu --cases 50 --seed 3").code, 0) << errors();
}

TEST_F(ExecutorsTest, BothSidesRunOnTheCheckpoint) {
  write_checkpoint(folder_ / "model", "wrong");
  const Ran ran = with_gpu("fuzz --ops canary_wrong_in_file --on both --seed 3 --model model");
  EXPECT_EQ(ran.code, 1) << errors();
  EXPECT_TRUE(mentions(ran.out, "WrongValue   on both: ")) << ran.out;
  const std::string replay = replay_arguments(ran.out);
  ASSERT_TRUE(mentions(replay, "' --model model --on both")) << ran.out;
  EXPECT_EQ(with_gpu(replay).code, 1) << errors();
}

TEST_F(ExecutorsTest, BothSidesRunOnTheAdapter) {
  write_base(folder_ / "base");
  write_adapter(folder_ / "adapter", "model.layers.0.wrong");
  const Ran ran = with_gpu("fuzz --on both --seed 3 --model base --adapter adapter");
  EXPECT_EQ(ran.code, 1) << errors();
  EXPECT_TRUE(mentions(ran.out, "WrongValue   on both: ")) << ran.out;
  const std::string replay = replay_arguments(ran.out);
  ASSERT_TRUE(mentions(replay, "' --model base --adapter adapter --on both")) << ran.out;
  EXPECT_EQ(with_gpu(replay).code, 1) << errors();
}

TEST_F(ExecutorsTest, BothFindsWhatOnlyOneSideDoes) {
  const struct {
    const char *op, *detail;
  } faults[] = {{"canary_wrong_on_gpu", "on the gpu only: "},
                {"canary_wrong_in_emulator", "in the emulator only: "},
                {"canary_wrong", "on both: "}};
  for (const auto& [op, detail] : faults) {
    const Ran ran = with_gpu(fmt::format("fuzz --ops {} --on both --seed 3", op));
    EXPECT_EQ(ran.code, 1) << op << errors();
    EXPECT_TRUE(mentions(ran.out, fmt::format("{}  WrongValue   {}", op, detail))) << ran.out;
    EXPECT_EQ(with_gpu(replay_arguments(ran.out)).code, 1) << ran.out;
  }
  EXPECT_EQ(with_gpu("fuzz --ops canary --on both --cases 100 --seed 3").code, 0) << errors();
}

TEST_F(ExecutorsTest, DifferentBitsAreFoundShrunkAndPrinted) {
  const Ran ran = with_gpu("fuzz --ops canary_other_bits --on both --seed 3");
  EXPECT_EQ(ran.code, 1) << errors();
  EXPECT_TRUE(mentions(ran.out,
                       "canary_other_bits  LawBroken   gpu and emulator give different bits: "
                       "digests "))
      << ran.out;
  EXPECT_TRUE(mentions(ran.out, "head_dim=1 tp_size=2 num_tokens=1")) << ran.out;
  const std::string replay = replay_arguments(ran.out);
  EXPECT_TRUE(mentions(replay, " --on both")) << ran.out;
  const Ran again = with_gpu(replay);
  EXPECT_EQ(again.code, 1) << errors();
  EXPECT_TRUE(mentions(again.out, "stands alone: the gpu\n")) << again.out;
  for (const char* on : {"gpu", "emulator"}) {
    EXPECT_EQ(with_gpu(fmt::format("fuzz --ops canary_other_bits --on {} --cases 50", on)).code, 0);
  }
}

TEST_F(ExecutorsTest, WhatOnlyTheGpuShowsIsAFindingOfItsOwn) {
  const Ran ran =
      with_gpu("fuzz --ops canary_wrong_more_on_gpu --on both --seed 3 --cases 60 --keep-going");
  EXPECT_EQ(ran.code, 1) << errors();
  EXPECT_TRUE(mentions(ran.out, "WrongValue   on both: ")) << ran.out;
  EXPECT_TRUE(mentions(ran.out, "WrongValue   on the gpu only: ")) << ran.out;
  EXPECT_TRUE(mentions(ran.out, "FINDING 2")) << ran.out;
  EXPECT_FALSE(mentions(ran.out, "FINDING 3")) << ran.out;
}

TEST_F(ExecutorsTest, CrashesOfEitherSideAreShrunkAlone) {
  const Ran ran = with_gpu("fuzz --ops canary_segv --on both --seed 3 -n 2");
  EXPECT_EQ(ran.code, 1) << errors();
  EXPECT_TRUE(mentions(ran.out, "canary_segv  Crash   on both: killed by SIGSEGV")) << ran.out;
  EXPECT_TRUE(mentions(ran.out, "tp_size=1 num_tokens=1")) << ran.out;
  EXPECT_TRUE(mentions(replay_arguments(ran.out), " --on both -n 1")) << ran.out;
}

TEST_F(ExecutorsTest, ThreeAnswersNameWhatStandsAlone) {
  const struct {
    std::string arguments;
    int code;
    const char* sentence;
  } replays[] = {
      {case_with("none"), 0, "all three agree\n"},
      {case_with("none", 1), 0, "all three agree\n"},
      {case_with("wrong_on_gpu"), 1, "stands alone: the gpu\n"},
      {case_with("other_bits"), 1, "stands alone: the gpu\n"},
      {case_with("wrong_in_emulator"), 1, "stands alone: the emulator\n"},
      {case_with("wrong"), 1, "stands alone: one rank with the whole problem: the ranks agree"},
      {case_with("none") + " --mutant 0:unique_shards", 1,
       "stands alone: one rank with the whole problem: the ranks agree"},
      {case_with("needs_poison"), 1, "all three agree: neither the gpu nor the sharding"},
  };
  for (const auto& [arguments, code, sentence] : replays) {
    const Ran ran = with_gpu(fmt::format("replay --on both {}", arguments));
    EXPECT_EQ(ran.code, code) << arguments << errors();
    EXPECT_TRUE(mentions(ran.out, sentence)) << arguments << "\n" << ran.out;
    for (const char* row : {"  gpu  ", "  emulator  ", "  one rank with the whole problem  "}) {
      EXPECT_TRUE(mentions(ran.out, row)) << ran.out;
    }
  }
  const Ran twice = with_gpu("replay --on both --times 2 --trace " + case_with("wrong_on_gpu"));
  EXPECT_TRUE(mentions(twice.out, "2 of 2 runs failed")) << twice.out;
  EXPECT_TRUE(mentions(twice.out, "\none rank  ")) << twice.out;
}

TEST_F(ExecutorsTest, NoPoisonReachesTheOperatorAndIsSaid) {
  const Ran found = with_gpu("fuzz --ops canary_needs_poison --seed 3");
  EXPECT_EQ(found.code, 1) << errors();
  EXPECT_FALSE(mentions(found.out + errors(), "--no-poison"));
  const std::string replay = replay_arguments(found.out);
  EXPECT_EQ(with_gpu(replay + " --no-poison").code, 0);
  EXPECT_TRUE(mentions(errors(), "poison and guard oracles are off")) << errors();

  const Ran blind = with_gpu("fuzz --ops canary_needs_poison --seed 3 --cases 50 --no-poison");
  EXPECT_EQ(blind.code, 0) << errors();
  EXPECT_TRUE(mentions(errors(), "poison and guard oracles are off")) << errors();
  EXPECT_TRUE(mentions(blind.out, "poison and guard oracles are off")) << blind.out;
  const Ran other = with_gpu("fuzz --ops canary_wrong --seed 3 --no-poison");
  EXPECT_TRUE(mentions(replay_arguments(other.out), " --no-poison")) << other.out;
}

TEST_F(ExecutorsTest, AMachineThatCannotIsThreeWithItsReason) {
  std::ofstream(folder_ / "gone.txt") << "no GPU 0: nvidia-smi lists none\n";
  for (const char* arguments :
       {"fuzz --on gpu", "fuzz --on gpu -n 2", "fuzz --on both", "zoo --on gpu"}) {
    expect_unavailable(with_gpu(arguments), "tpcheck: no GPU 0: nvidia-smi lists none\n");
  }
  for (const char* on : {"gpu", "both"}) {
    expect_unavailable(with_gpu(fmt::format("replay {} --on {}", case_with("none"), on)),
                       "tpcheck: no GPU 0: nvidia-smi lists none\n");
  }
  expect_unavailable(tpcheck("fuzz --ops canary --group nccl"), "--group nccl");
}

TEST_F(ExecutorsTest, AGpuThatDisappearsLeavesWhatWasSeen) {
  // The GPU is gone before the crash can be replayed: it was seen nevertheless.
  for (const char* on : {"gpu", "both"}) {
    fs::remove(folder_ / "gone.txt");
    const Ran ran =
        with_gpu(fmt::format("fuzz --ops canary_gone --seed 3 --keep-going --for 20s --on {}", on));
    EXPECT_EQ(ran.code, 1) << errors();
    EXPECT_TRUE(mentions(ran.out, "NOT REPLAYED  canary_gone  Crash")) << ran.out << errors();
    EXPECT_TRUE(mentions(ran.out, " cases in ")) << ran.out;
    EXPECT_TRUE(mentions(errors(), "\ntpcheck: no GPU 0: it was there a moment ago\n")) << errors();
    EXPECT_TRUE(kept_a_case());
    fs::remove_all(folder_ / "findings");
  }
  // Nothing had been found yet.
  fs::remove(folder_ / "gone.txt");
  const Ran replayed =
      with_gpu(fmt::format("replay --on gpu {} {}", case_with("gone"), case_with("none")));
  EXPECT_EQ(replayed.code, 1) << errors();
  EXPECT_TRUE(mentions(replayed.out, "1 of 1 runs failed")) << replayed.out;
  EXPECT_TRUE(mentions(errors(), "tpcheck: no GPU 0: it was there")) << errors();
}

TEST_F(ExecutorsTest, CtrlCKeepsWhatOneSideHasSeen) {
  // The emulator never answers, and the GPU has done so long before the signal comes.
  environment_ = fmt::format("TPCHECK_GPU={}", TPCHECK_CANARY_GPU);
  const auto gpu_has_answered = [&] {
    if (!mentions(errors(), "  gpu: Pretend GPU")) return false;
    std::this_thread::sleep_for(std::chrono::seconds(1));
    return true;
  };
  int status =
      interrupt("replay --on both -n 1 " + case_with("loop_in_emulator"), SIGINT, gpu_has_answered);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 72) << errors();
  EXPECT_TRUE(mentions(output(), "FINDING 1  canary  WrongValue   on the gpu: ")) << output();
  EXPECT_TRUE(mentions(output(), "in the emulator: Skipped: no answer")) << output();
  EXPECT_TRUE(mentions(errors(), "interrupted: what there is so far")) << errors();

  status =
      interrupt("fuzz --on both -n 1 --jobs 1 --ops canary_loop_in_emulator --seed 3 --for 30s",
                SIGINT, gpu_has_answered);
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 72) << errors();
  EXPECT_TRUE(
      mentions(output(), "NOT REPLAYED  canary_loop_in_emulator  WrongValue   on the gpu: "))
      << output() << errors();
  EXPECT_TRUE(mentions(output(), "1 failures not replayed")) << output();
  EXPECT_TRUE(kept_a_case());
}

TEST_F(ExecutorsTest, AnEmulatorThatStartsNoMoreLeavesWhatTheGpuSaw) {
  // Starts once: for both sides' crash, and no more for the one rank with the whole problem.
  std::ofstream(folder_ / "once") << "#!/bin/sh\n[ -e started ] && exit 1\ntouch started\nexec "
                                  << TPCHECK_CANARY << " \"$@\"\n";
  fs::permissions(folder_ / "once", fs::perms::all);
  const Ran ran = with_gpu(fmt::format("replay --on both -n 1 --times 3 {}", case_with("segv")),
                           fmt::format("TPCHECK_EMULATOR={}/once", folder_.string()));
  EXPECT_EQ(ran.code, 1) << errors();
  EXPECT_TRUE(mentions(ran.out, "FINDING 1  canary  Crash   on both: ")) << ran.out << errors();
  EXPECT_TRUE(mentions(ran.out, "1 of 1 runs failed")) << ran.out;
  EXPECT_TRUE(mentions(errors(), "died 3 times")) << errors();
}

TEST_F(ExecutorsTest, ACrashIsReplayedAsSeriallyAsItWasSeen) {
  const Ran alone = with_gpu("fuzz --ops canary_segv --seed 3 -n 1");
  EXPECT_TRUE(mentions(replay_arguments(alone.out), " --serial")) << alone.out << errors();
  // Not seen where kernels run one at a time, and so not to be replayed like that.
  const Ran parallel = with_gpu("fuzz --ops canary_segv_parallel --seed 3 -n 1");
  EXPECT_EQ(parallel.code, 1) << errors();
  const std::string replay = replay_arguments(parallel.out);
  EXPECT_FALSE(mentions(replay, "--serial")) << parallel.out;
  EXPECT_EQ(with_gpu(replay).code, 1) << errors();
  const std::string line = "replay -n 1 " + case_with("segv_serial");
  EXPECT_EQ(with_gpu(line).code, 0) << errors();
  const Ran serial = with_gpu(line + " --serial");
  EXPECT_EQ(serial.code, 1) << errors();
  EXPECT_TRUE(mentions(replay_arguments(serial.out), " --serial")) << serial.out;
}

TEST_F(ExecutorsTest, TheOtherExecutorIsInTheFolderBesideOurs) {
  fs::create_directories(folder_ / "build/emulator");
  fs::create_directories(folder_ / "build/cuda");
  fs::copy_file(TPCHECK_CANARY, folder_ / "build/emulator/tpcheck");
  const auto run = [&](const std::string& on) {
    return shell(
        fmt::format("build/emulator/tpcheck fuzz --ops canary --cases 9 --on {} 2>stderr.txt", on));
  };
  for (const char* on : {"gpu", "both"}) {
    expect_unavailable(run(on), (folder_ / "build/cuda/tpcheck").string());
    EXPECT_TRUE(mentions(errors(), "TPCHECK_PRESET=cuda ./tpcheck build tpcheck")) << errors();
  }
  fs::copy_file(TPCHECK_CANARY_GPU, folder_ / "build/cuda/tpcheck");
  EXPECT_EQ(run("gpu").code, 0) << errors();
  EXPECT_TRUE(mentions(errors(), "  gpu: Pretend GPU")) << errors();
  EXPECT_EQ(run("both").code, 0) << errors();

  const Ran nowhere =
      shell(fmt::format("TPCHECK_GPU=/nowhere/x {} fuzz --on gpu 2>stderr.txt", TPCHECK_CANARY));
  expect_unavailable(nowhere, "TPCHECK_GPU=/nowhere/x");
}

TEST_F(ExecutorsTest, AnExecutorOfAnotherKindIsThree) {
  for (const char* on : {"gpu", "both"}) {
    const Ran ran = shell(fmt::format("TPCHECK_GPU={0} {0} fuzz --ops canary --on {1} 2>stderr.txt",
                                      TPCHECK_CANARY, on));
    expect_unavailable(ran, "is a tpcheck of the emulator");
  }
  const Ran ran = shell(fmt::format("TPCHECK_EMULATOR={} {} fuzz --ops canary 2>stderr.txt",
                                    TPCHECK_CANARY_GPU, TPCHECK_CANARY));
  expect_unavailable(ran, "is a tpcheck of the gpu");
}

TEST_F(ExecutorsTest, AnExecutorOfAnotherVersionIsThree) {
  const std::string older = fmt::format("tpcheck-ready {} gpu Old GPU", kProtocol - 1),
                    newer = fmt::format("tpcheck-ready {} emulator new", kProtocol + 1);
  for (const std::string& greeting :
       {std::string("tpcheck-ready gpu Old GPU"), older, newer, std::string("tpcheck-ready")}) {
    std::ofstream(folder_ / "other")
        << "#!/bin/sh\necho '" << greeting << " '\nexec cat >/dev/null\n";
    fs::permissions(folder_ / "other", fs::perms::all);
    for (const char* on : {"gpu", "both"}) {
      const Ran ran =
          shell(fmt::format("TPCHECK_GPU={}/other {} fuzz --ops canary -n 1 --on {} 2>stderr.txt",
                            folder_.string(), TPCHECK_CANARY, on));
      expect_unavailable(ran, fmt::format("{}/other is a tpcheck of another version: build it anew "
                                          "(TPCHECK_PRESET=cuda ./tpcheck build tpcheck)\n",
                                          folder_.string()));
    }
  }
}

TEST_F(ExecutorsTest, UnderMpirunTheExecutorIsWhatWasStarted) {
  const std::string mpirun = fmt::format(
      "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "
      "OMPI_MCA_rmaps_base_oversubscribe=1 TPCHECK_GPU={} mpirun --bind-to none -n 2 ",
      TPCHECK_CANARY_GPU);
  const auto run = [&](const char* binary, const char* on) {
    return shell(fmt::format("{} {} fuzz --ops canary --cases 20 --seed 1 --on {} 2>stderr.txt",
                             mpirun, binary, on));
  };
  EXPECT_EQ(run(TPCHECK_CANARY_GPU, "gpu").code, 0) << errors();
  EXPECT_TRUE(mentions(errors(), "  gpu: Pretend GPU (--group best), in the 2 processes"));
  EXPECT_EQ(run(TPCHECK_CANARY, "gpu").code, 3);
  EXPECT_TRUE(mentions(errors(), fmt::format("let it start {}", TPCHECK_CANARY_GPU))) << errors();
  EXPECT_EQ(run(TPCHECK_CANARY, "both").code, 3) << errors();
}

}  // namespace
}  // namespace tp
