// The commands end to end, as a person runs them.

#include <algorithm>
#include <set>

#include "harness/fuzz/commands_testing.h"

namespace tp {
namespace {

TEST_F(CommandsTest, ACleanRunIsZeroAndSaysWhatItDid) {
  const Ran ran = tpcheck("fuzz --ops canary --cases 200 --seed 3 -n 2");
  EXPECT_EQ(ran.code, 0) << errors();
  EXPECT_TRUE(mentions(ran.out, "200 cases in ")) << ran.out;
  EXPECT_TRUE(mentions(ran.out, "kv_heads below tp_size")) << ran.out;
  EXPECT_TRUE(mentions(errors(), "seed 3")) << errors();
  EXPECT_FALSE(fs::exists(folder_ / "findings"));
}

TEST_F(CommandsTest, AFindingIsKeptShrunkNamedAndReplays) {
  const Ran ran = tpcheck("fuzz --ops canary_wrong --seed 3 -n 2");
  EXPECT_EQ(ran.code, 1) << errors();
  EXPECT_TRUE(mentions(ran.out, "FINDING 1  canary_wrong  WrongValue")) << ran.out;
  EXPECT_TRUE(mentions(ran.out, "num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 num_tokens=1"))
      << ran.out;
  EXPECT_TRUE(mentions(ran.out, "looks like  counts a replicated shard once (tpcheck/canary#1)"))
      << ran.out;
  EXPECT_EQ(tpcheck("replay findings").code, 1);
  ASSERT_NE(replay_arguments(ran.out), "") << ran.out;
  EXPECT_EQ(tpcheck(replay_arguments(ran.out)).code, 1);
}

TEST_F(CommandsTest, TheReplayLineRunsItAsItWasSeen) {
  const Ran ran = tpcheck("fuzz --ops canary_wrong --seed 3 -n 5 --jobs 1 --timeout 20s");
  const std::string replay = replay_arguments(ran.out);
  EXPECT_TRUE(mentions(replay, " -n 5 --timeout 20000ms")) << ran.out;
  EXPECT_EQ(replay_arguments(tpcheck(replay).out), replay);
}

TEST_F(CommandsTest, AFindingThatCannotBeKeptIsStillAFinding) {
  const std::string fuzz = "fuzz --ops canary_wrong --seed 3 -n 1 --jobs 1";
  tpcheck(fuzz);
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(folder_ / "findings"))
    files.push_back(entry.path());
  ASSERT_FALSE(files.empty());
  for (const fs::path& file : files) {  // folders of these names cannot be written as files
    fs::remove(file);
    fs::create_directories(file / "x");
  }
  const Ran ran = tpcheck(fuzz);
  EXPECT_EQ(ran.code, 1) << errors();
  EXPECT_TRUE(mentions(ran.out, "FINDING 1")) << ran.out;
  EXPECT_TRUE(mentions(ran.out, " cases in ")) << ran.out;
  EXPECT_TRUE(mentions(errors(), "not kept: ")) << errors();
}

TEST_F(CommandsTest, AFullStandardOutputIsThree) {
  for (const char* arguments : {"fuzz --ops canary --cases 5 --seed 1 -n 1", "list ops"}) {
    EXPECT_EQ(tpcheck(fmt::format("{} >/dev/full", arguments)).code, 3) << arguments;
  }
}

TEST_F(CommandsTest, AMutantIsFoundAndItsLinePassesWithout) {
  const Ran ran = tpcheck("fuzz --ops canary --mutant 0:unique_shards --seed 5 -n 1");
  EXPECT_EQ(ran.code, 1) << errors();
  const std::string replay = replay_arguments(ran.out);
  ASSERT_TRUE(mentions(replay, " --mutant 0:unique_shards")) << ran.out;
  EXPECT_EQ(tpcheck(replay).code, 1);
  EXPECT_EQ(tpcheck(replay.substr(0, replay.find(" --mutant"))).code, 0);
}

TEST_F(CommandsTest, CrashesAreShrunkAndKeepGoingGoesOn) {
  const Ran ran =
      tpcheck("fuzz --ops canary_segv,canary_exit --keep-going --cases 12 --seed 3 -n 2");
  EXPECT_EQ(ran.code, 1) << errors();
  EXPECT_TRUE(mentions(ran.out, "canary_segv  Crash   killed by SIGSEGV")) << ran.out;
  EXPECT_TRUE(mentions(ran.out, "canary_exit  Crash   exited with 3")) << ran.out;
  EXPECT_TRUE(mentions(ran.out, "num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1"))
      << ran.out;
  EXPECT_TRUE(mentions(ran.out, "12 cases in ")) << ran.out;
  EXPECT_TRUE(mentions(ran.out, " like an earlier finding")) << ran.out;
}

TEST_F(CommandsTest, AFailureThatItsReplayDoesNotShowIsFive) {
  const Ran ran = tpcheck("fuzz --ops canary_once --cases 20 --seed 3 -n 1 --jobs 1");
  EXPECT_EQ(ran.code, 5) << errors();
  EXPECT_TRUE(mentions(ran.out, "UNSTABLE  canary_once  WrongValue")) << ran.out;
}

// canary_wrong_in_file fails where the process that runs it has a checkpoint with a tensor "wrong".
TEST_F(CommandsTest, CasesRunOnTheUsersCheckpoint) {
  write_checkpoint(folder_ / "my model", "wrong");
  write_checkpoint(folder_ / "right", "right");
  const std::string fuzz = "fuzz --ops canary_wrong_in_file --seed 3 --cases 20 ";
  const Ran wrong = tpcheck(fuzz + "-n 2 --model 'my model'");
  EXPECT_EQ(wrong.code, 1) << errors();
  EXPECT_TRUE(mentions(
      errors(),
      "\ncheckpoint my model: 1 file, 1 tensor, fp8_block (native, activations token_groups)\n"))
      << errors();
  const std::string replay = replay_arguments(wrong.out);
  ASSERT_TRUE(mentions(replay, "' --model 'my model'")) << wrong.out;
  const Ran again = tpcheck(replay);
  EXPECT_EQ(again.code, 1) << errors();
  EXPECT_EQ(replay_arguments(again.out), replay);
  EXPECT_TRUE(mentions(errors(), "checkpoint my model: ")) << errors();
  EXPECT_EQ(tpcheck(replay.substr(0, replay.find(" --model"))).code, 0);
  EXPECT_EQ(tpcheck(fuzz + "-n 1 --model right").code, 0) << errors();

  // In processes that mpirun started
  const std::string mpirun =
      "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "
      "OMPI_MCA_rmaps_base_oversubscribe=1 "
      "mpirun --bind-to none -n 2 " TPCHECK_CANARY " ";
  const Ran inside = shell(mpirun + fuzz + "--model 'my model' 2>stderr.txt");
  EXPECT_EQ(inside.code, 1) << errors();
  EXPECT_TRUE(mentions(errors(), "checkpoint my model: ")) << errors();
  ASSERT_NE(replay_arguments(inside.out), "") << inside.out;
  EXPECT_EQ(shell(mpirun + replay_arguments(inside.out) + " 2>stderr.txt").code, 1) << errors();
}

// canary_wrong_in_adapter fails where the process that runs it has an adapter of that module.
TEST_F(CommandsTest, CasesRunOnTheUsersAdapter) {
  write_base(folder_ / "my base");
  write_adapter(folder_ / "my adapter", "model.layers.0.wrong");
  write_adapter(folder_ / "right", "model.layers.0.right");
  const std::string fuzz = "fuzz --seed 3 --cases 20 --model 'my base' ";
  const Ran wrong = tpcheck(fuzz + "-n 2 --adapter 'my adapter'");
  EXPECT_EQ(wrong.code, 1) << errors();
  EXPECT_TRUE(mentions(errors(), "\nadapter my adapter: 1 module (wrong), rank 1\n")) << errors();
  EXPECT_FALSE(mentions(errors(), "checkpoint")) << errors();
  EXPECT_TRUE(mentions(wrong.out, " layer=1 ") || mentions(wrong.out, " layer=1'")) << wrong.out;
  EXPECT_TRUE(mentions(wrong.out, "cases ran on its tensors")) << wrong.out;
  const std::string replay = replay_arguments(wrong.out);
  ASSERT_TRUE(mentions(replay, "' --model 'my base' --adapter 'my adapter'")) << wrong.out;
  const Ran again = tpcheck(replay);
  EXPECT_EQ(again.code, 1) << errors();
  EXPECT_EQ(replay_arguments(again.out), replay);
  EXPECT_TRUE(mentions(errors(), "\nadapter my adapter: ")) << errors();
  EXPECT_EQ(tpcheck(replay.substr(0, replay.find(" --model"))).code, 0);
  // Others have nothing to run, and what there is runs on this one.
  const Ran right = tpcheck(fuzz + "-n 1 --adapter right");
  EXPECT_EQ(right.code, 0) << errors();
  EXPECT_TRUE(std::regex_search(right.out, std::regex("  adapter     [0-9]+ of 20 cases ran")))
      << right.out;
  EXPECT_TRUE(mentions(right.out, "covered     canary_wrong_in_adapter 20\n")) << right.out;
  EXPECT_EQ(tpcheck(fuzz + "--each -n 1 --adapter 'my adapter'").code, 1) << errors();

  // In processes that mpirun started
  const std::string mpirun =
      "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "
      "OMPI_MCA_rmaps_base_oversubscribe=1 "
      "mpirun --bind-to none -n 2 " TPCHECK_CANARY " ";
  const Ran inside = shell(mpirun + fuzz + "--adapter 'my adapter' 2>stderr.txt");
  EXPECT_EQ(inside.code, 1) << errors();
  ASSERT_TRUE(mentions(replay_arguments(inside.out), "--adapter 'my adapter'")) << inside.out;
  EXPECT_EQ(shell(mpirun + replay_arguments(inside.out) + " 2>stderr.txt").code, 1) << errors();
}

TEST_F(CommandsTest, AnAdapterOnACheckpointHasBoth) {
  write_checkpoint(folder_ / "base", "w");
  write_adapter(folder_ / "adapter", "model.layers.0.wrong");
  const Ran ran = tpcheck("fuzz --seed 3 --cases 20 --model base --adapter adapter -n 2");
  EXPECT_EQ(ran.code, 1) << errors();
  EXPECT_TRUE(mentions(errors(), "\ncheckpoint base: 1 file, 1 tensor, ")) << errors();
  EXPECT_TRUE(mentions(errors(), "\nadapter adapter: ")) << errors();
  EXPECT_EQ(tpcheck(replay_arguments(ran.out)).code, 1) << errors();
  EXPECT_TRUE(mentions(errors(), "\ncheckpoint base: 1 file, 1 tensor, ")) << errors();
}

TEST_F(CommandsTest, ABadAdapterIsTwoBeforeAnythingStarts) {
  write_base(folder_ / "base");
  write_base(folder_ / "other");
  write_adapter(folder_ / "adapter", "model.layers.0.wrong");
  write_adapter(folder_ / "unfit", "model.layers.0.unfit");
  write_adapter(folder_ / "cut", "model.layers.0.wrong");
  fs::resize_file(folder_ / "cut" / "adapter_model.safetensors", 20);
  std::ofstream(folder_ / "mpirun") << "#!/bin/sh\ntouch started\n";
  fs::permissions(folder_ / "mpirun", fs::perms::all);
  const std::string replay =
      "replay 'v1 canary num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 num_tokens=1 dtype=bf16 "
      "seed=1' -n 2 ";
  const std::string fuzz = "fuzz -n 2 ";
  const struct {
    std::string command;
    std::string word;
  } table[] = {
      {fuzz + "--adapter adapter", "--adapter goes with one --model DIR"},
      {fuzz + "--adapter adapter --model base --model other",
       "--adapter goes with one --model DIR"},
      {fuzz + "--adapter adapter --model MiniMax-M2.5", "MiniMax-M2.5 is no directory"},
      {fuzz + "--adapter adapter --model adapter", "adapter has no config.json"},
      {fuzz + "--adapter base --model base", "base: there is no adapter_config.json"},
      {fuzz + "--adapter none --model base", "none is no directory with an adapter"},
      {fuzz + "--adapter cut --model base", "cut/adapter_model.safetensors: "},
      {fuzz + "--adapter unfit --model base",
       "unfit: canary_wrong_in_adapter runs on none of its tensors: model.layers.0.unfit does not "
       "fit"},
      {fuzz + "--adapter '' --model base", "--adapter is empty"},
      {fuzz + "--adapter adapter --model base --ops canary", "canary runs no adapter"},
      {fuzz + "--adapter adapter --model base --tp 3", "no model fits any of the tp sizes"},
      {replay + "--adapter adapter", "--adapter goes with one --model DIR"},
      {replay + "--adapter adapter --model MiniMax-M2.5", "MiniMax-M2.5 is no directory"},
      {replay + "--adapter cut --model base", "cut/adapter_model.safetensors: "},
  };
  for (const auto& row : table) {
    const Ran ran = shell(fmt::format("PATH={}:$PATH {} {} 2>stderr.txt", folder_.string(),
                                      TPCHECK_CANARY, row.command));
    EXPECT_EQ(ran.code, 2) << row.command << errors();
    EXPECT_TRUE(mentions(errors(), row.word)) << row.command << ": " << errors();
    const std::string said = errors();
    EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
  }
  EXPECT_FALSE(fs::exists(folder_ / "started"));
  // A worker whose machine has another file than the supervisor's
  const Ran worker = tpcheck("worker --adapter=cut --base=base </dev/null");
  EXPECT_EQ(worker.code, 3);
  EXPECT_TRUE(mentions(worker.out, "tpcheck-cannot ")) << worker.out;
  EXPECT_TRUE(mentions(worker.out, "adapter_model.safetensors")) << worker.out;
}

TEST_F(CommandsTest, ABadCheckpointIsTwoBeforeAnythingStarts) {
  write_checkpoint(folder_ / "model", "wrong");
  fs::resize_file(folder_ / "model" / "model.safetensors", 20);
  std::ofstream(folder_ / "mpirun") << "#!/bin/sh\ntouch started\n";
  fs::permissions(folder_ / "mpirun", fs::perms::all);
  const std::string line =
      "'v1 canary num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 num_tokens=1 dtype=bf16 "
      "seed=1'";
  for (const std::string& command : {std::string("fuzz --ops canary "), "replay " + line + " "}) {
    const Ran ran = shell(fmt::format("PATH={}:$PATH {} {} --model model -n 2 2>stderr.txt",
                                      folder_.string(), TPCHECK_CANARY, command));
    EXPECT_EQ(ran.code, 2) << command << errors();
    EXPECT_TRUE(mentions(errors(), "model.safetensors")) << errors();
    const std::string said = errors();
    EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
  }
  EXPECT_FALSE(fs::exists(folder_ / "started"));
  const Ran inside = shell(
      "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "
      "OMPI_MCA_rmaps_base_oversubscribe=1 timeout 30 "
      "mpirun --bind-to none -n 2 " TPCHECK_CANARY " fuzz --ops canary --model model 2>stderr.txt");
  EXPECT_EQ(inside.code, 2) << errors();
  // A worker whose machine has another file than the supervisor's
  const Ran worker = tpcheck("worker --checkpoint=model </dev/null");
  EXPECT_EQ(worker.code, 3);
  EXPECT_TRUE(mentions(worker.out, "tpcheck-cannot ")) << worker.out;
  EXPECT_TRUE(mentions(worker.out, "model.safetensors")) << worker.out;
}

TEST_F(CommandsTest, WorkersThatNeverStartEndTheSupervisor) {
  std::ofstream(folder_ / "mpirun") << "#!/bin/sh\necho no slots today >&2\nexit 1\n";
  fs::permissions(folder_ / "mpirun", fs::perms::all);
  EXPECT_EQ(shell(fmt::format("PATH={} {} fuzz --ops canary -n 2 2>stderr.txt", folder_.string(),
                              TPCHECK_CANARY))
                .code,
            70);
  EXPECT_TRUE(mentions(errors(), "no slots today")) << errors();
  EXPECT_EQ(
      shell(fmt::format("PATH=/nowhere {} fuzz --ops canary -n 2 2>stderr.txt", TPCHECK_CANARY))
          .code,
      3);
  EXPECT_EQ(shell(fmt::format("PATH=/nowhere {} fuzz --ops canary -n 1 --cases 9 2>stderr.txt",
                              TPCHECK_CANARY))
                .code,
            0);
}

TEST_F(CommandsTest, WorkersThatAreNeverReadyEndTheSupervisor) {
  std::ofstream(folder_ / "mpirun") << "#!/bin/sh\nexec sleep 600\n";
  fs::permissions(folder_ / "mpirun", fs::perms::all);
  const auto with_limit = [&](const char* seconds) {
    return shell(
        fmt::format("TPCHECK_START_LIMIT={} PATH={}:$PATH {} fuzz --ops canary -n 2 --jobs 1 "
                    "2>stderr.txt",
                    seconds, folder_.string(), TPCHECK_CANARY));
  };
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(with_limit("0.5").code, 70) << errors();
  EXPECT_TRUE(mentions(errors(), "died 3 times before it ran a case: did not start")) << errors();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20));
  EXPECT_EQ(with_limit("soon").code, 2);
  EXPECT_TRUE(mentions(errors(), "TPCHECK_START_LIMIT=soon")) << errors();
}

TEST_F(CommandsTest, WorkersThatStartNoMoreLeaveWhatWasFound) {
  std::ofstream(folder_ / "mpirun") << "#!/bin/sh\n[ -e started ] && exit 1\n"
                                       "touch started\nPATH=${PATH#*:}\nexec mpirun \"$@\"\n";
  fs::permissions(folder_ / "mpirun", fs::perms::all);
  const Ran ran = shell(
      fmt::format("PATH={}:$PATH {} fuzz --ops canary_segv --keep-going --for 30s --seed 3 -n 2 "
                  "--jobs 1 2>stderr.txt",
                  folder_.string(), TPCHECK_CANARY));
  EXPECT_EQ(ran.code, 1) << errors();
  EXPECT_TRUE(mentions(ran.out, "canary_segv  Crash")) << ran.out;
  EXPECT_TRUE(mentions(ran.out, " cases in ")) << ran.out;
  EXPECT_TRUE(mentions(errors(), "died 3 times")) << errors();
}

TEST_F(CommandsTest, TooFewFileDescriptorsAreSeventyAndNoAbort) {
  const Ran ran = shell(fmt::format(
      "ulimit -n 12; {} fuzz --ops canary --cases 9 -n 1 --jobs 8 2>stderr.txt", TPCHECK_CANARY));
  EXPECT_EQ(ran.code, 70) << errors();
}

TEST_F(CommandsTest, TheSeedDecidesWhatIsDrawn) {
  const auto of = [&](const std::string& seed) {
    const Ran ran = tpcheck("fuzz --ops canary --cases 50 -n 1 --jobs 2 --json --seed " + seed);
    return ran.out.substr(ran.out.find("\"mix\""),
                          ran.out.find("\"scores\"") - ran.out.find("\"mix\""));
  };
  EXPECT_EQ(of("1"), of("1"));
  EXPECT_NE(of("1"), of("2"));
}

TEST_F(CommandsTest, EachRunsEveryLegalPairOnce) {
  const Ran ran = tpcheck("fuzz --ops canary --model all --each -n 1 --seed 1");
  EXPECT_EQ(ran.code, 0) << errors();
  EXPECT_TRUE(mentions(ran.out, "407 cases in ")) << ran.out;
  EXPECT_TRUE(mentions(ran.out, "407 of 407")) << ran.out;
  EXPECT_TRUE(mentions(ran.out, "50 more refused")) << ran.out;
}

TEST_F(CommandsTest, EachThatIsCutShortSaysSo) {
  const Ran ran = tpcheck("fuzz --ops canary --model all --each --cases 5 -n 1 --seed 1");
  EXPECT_EQ(ran.code, 4) << errors();
  EXPECT_TRUE(mentions(ran.out, "5 cases in ")) << ran.out;
  EXPECT_TRUE(mentions(ran.out, "5 of 407")) << ran.out;
}

TEST_F(CommandsTest, BadInputIsTwoWithOneSentence) {
  std::ofstream(folder_ / "bad.case") << "# a comment\n\nv1 canary num_heads=48\n";
  for (const char* arguments :
       {"fuzz --ops canary --artifacts /dev/null/x", "fuzz --ops nobody", "fuzz --mutant 9:nothing",
        "fuzz --ops canary --tp 12 --model MiniMaxAI/MiniMax-M2.5", "fuzz -n 0", "fuzz --jobs 0",
        "replay bad.case", "replay nowhere.case", "replay 'v1 canary what=1'", "replay ''",
        "zoo 9:nothing"}) {
    const Ran ran = tpcheck(arguments);
    EXPECT_EQ(ran.code, 2) << arguments << "\n" << errors();
    EXPECT_EQ(ran.out, "") << arguments;
    EXPECT_FALSE(mentions(errors(), "MPI")) << errors();
    const std::string said = errors();
    EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
  }
  tpcheck("fuzz --ops canary --artifacts /dev/null/x");
  EXPECT_TRUE(mentions(errors(), "/dev/null/x")) << errors();
  tpcheck("replay bad.case");
  EXPECT_TRUE(mentions(errors(), "bad.case:3")) << errors();
}

TEST_F(CommandsTest, ReplayTakesLinesFilesAndFolders) {
  const std::string good =
      "v1 canary num_heads=2 num_kv_heads=1 head_dim=8 tp_size=2 num_tokens=1 dtype=f32 seed=1";
  std::ofstream(folder_ / "good.txt") << "# passes\n" << good << "\n";
  fs::create_directory(folder_ / "cases");
  std::ofstream(folder_ / "cases/a.case") << good << " fault=wrong\n";
  std::ofstream(folder_ / "cases/ignored.log") << "this is no case\n";
  EXPECT_EQ(tpcheck("replay good.txt --times 3").code, 0);
  EXPECT_EQ(tpcheck("replay cases").code, 1);
  EXPECT_EQ(tpcheck(fmt::format("replay '{}' cases good.txt", good)).code, 1);
  EXPECT_TRUE(mentions(tpcheck(fmt::format("replay '{}' --trace -n 2", good)).out, "barrier"));
}

TEST_F(CommandsTest, ZooFindsTheCanarysMutant) {
  const Ran ran = tpcheck("zoo --seed 1 -n 1");
  EXPECT_EQ(ran.code, 0) << errors();
  EXPECT_TRUE(mentions(ran.out, "0:unique_shards  found")) << ran.out;
  const std::string json = tpcheck("zoo --seed 1 -n 1 --json").out;
  EXPECT_TRUE(mentions(json, "\"found\": true")) << json;
  EXPECT_TRUE(mentions(json, "\"where\": \"emulator, ")) << json;
  const std::string quoted = replay_arguments(json);  // with the quotation mark that ends it
  const std::string replay = quoted.substr(0, quoted.find('"'));
  EXPECT_TRUE(mentions(replay, " --mutant 0:unique_shards")) << json;
  EXPECT_EQ(tpcheck(replay).code, 1) << replay << errors();
}

TEST_F(CommandsTest, UnderMpirunAllProcessesAgree) {
  const std::string mpirun =
      "OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "
      "OMPI_MCA_rmaps_base_oversubscribe=1 "
      "mpirun --bind-to none -n 4 " TPCHECK_CANARY " ";
  const Ran clean = shell(mpirun + "fuzz --ops canary --cases 50 --seed 1 2>stderr.txt");
  EXPECT_EQ(clean.code, 0) << errors();
  EXPECT_TRUE(mentions(clean.out, "50 cases in ")) << clean.out;
  const Ran wrong = shell(mpirun + "fuzz --ops canary_wrong --seed 1 2>stderr.txt");
  EXPECT_EQ(wrong.code, 1) << errors();
  EXPECT_TRUE(mentions(wrong.out, "num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2")) << wrong.out;
  EXPECT_EQ(shell(mpirun + "fuzz --ops canary --artifacts /dev/null/x 2>stderr.txt").code, 2);
  // Nobody is outside to blame the case, so it is named by whoever dies of it.
  const Ran crash = shell(mpirun + "fuzz --ops canary_segv --seed 1 2>stderr.txt");
  EXPECT_NE(crash.code, 0);
  EXPECT_TRUE(mentions(crash.out, "Crash: v1 canary_segv ")) << crash.out << errors();
  const Ran hang = shell("timeout 30 env " + mpirun +
                         "fuzz --ops canary_loop --timeout 300ms --seed 1 2>stderr.txt");
  EXPECT_EQ(hang.code, 1) << errors();
  EXPECT_TRUE(mentions(hang.out, "Hang: v1 canary_loop ")) << hang.out << errors();
}

// Processes in this process's session whose command line has the canary's path.
std::set<int> canaries() {
  std::set<int> found;
  for (const auto& entry : fs::directory_iterator("/proc")) {
    const std::string name = entry.path().filename();
    if (name.find_first_not_of("0123456789") != std::string::npos) continue;
    std::ifstream in(entry.path() / "cmdline");
    const std::string line{std::istreambuf_iterator<char>(in), {}};
    if (mentions(line, TPCHECK_CANARY) && getsid(std::stoi(name)) == getsid(0))
      found.insert(std::stoi(name));
  }
  return found;
}

TEST_F(CommandsTest, CtrlCIsSeventyTwoAndLeavesNothingBehind) {
  const std::set<int> before = canaries();
  const auto started = [&] { return mentions(errors(), "seed "); };
  const auto in_a_case = [&] {
    if (!started()) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    return true;
  };
  const struct {
    const char* op;
    int signal;
    std::function<bool()> ready;
  } runs[] = {{"canary", SIGINT, started},
              {"canary", SIGHUP, in_a_case},
              {"canary_loop", SIGTERM, in_a_case}};
  for (const auto& [op, signal, ready] : runs) {
    const int status = interrupt(fmt::format("fuzz --ops {} --for 60s -n 2", op), signal, ready);
    ASSERT_TRUE(WIFEXITED(status)) << signal;
    EXPECT_EQ(WEXITSTATUS(status), 72) << signal << errors();
    EXPECT_TRUE(mentions(output(), " cases in ")) << output();
    // The ranks of a killed mpirun die a moment later.
    EXPECT_TRUE(soon([&] { return canaries() == before; })) << signal;
    EXPECT_TRUE(fs::is_empty(folder_ / "jobs")) << signal;
  }
}

TEST_F(CommandsTest, CtrlCKeepsAFailureThatWasSeen) {
  // The failure waits for a case that hangs.
  const int status =
      interrupt("fuzz --ops canary_loop,canary_wrong -n 1 --jobs 3 --seed 5 --keep-going --for 30s",
                SIGINT, [&] { return kept_a_case(); });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 72) << errors();
  EXPECT_TRUE(mentions(output(), "NOT REPLAYED  canary_wrong  WrongValue")) << output();
  EXPECT_TRUE(mentions(output(), "1 failures not replayed")) << output();
}

TEST_F(CommandsTest, CtrlCInAReplayPrintsWhatThereIs) {
  const int status = interrupt(
      "replay v1 canary num_heads=2 num_kv_heads=1 head_dim=8 tp_size=2 num_tokens=1 dtype=f32 "
      "seed=1 --times 1000000 -n 1",
      SIGINT, [&] { return mentions(output(), "Pass"); });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 72) << errors();
  EXPECT_TRUE(mentions(output(), " runs failed")) << errors();
}

TEST_F(CommandsTest, AKilledSupervisorTakesItsWorkersAlong) {
  const std::set<int> before = canaries();
  const int status = interrupt("fuzz --ops canary_loop --for 60s -n 2", SIGKILL, [&] {
    if (!mentions(errors(), "seed ")) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(500));
    return true;
  });
  EXPECT_TRUE(WIFSIGNALED(status));
  EXPECT_TRUE(soon([&] { return canaries() == before; }));
}

}  // namespace
}  // namespace tp
