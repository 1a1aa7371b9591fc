// The commands end to end, as a person runs them: TPCHECK_CANARY is the path of tpcheck with the
// canary for its operators.

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <regex>
#include <set>
#include <thread>

namespace {

namespace fs = std::filesystem;

struct Ran {
  int code = -1;
  std::string out;
};

// Runs a shell command in an empty folder.
class CommandsTest : public testing::Test {
 protected:
  void SetUp() override {
    std::string path = "/tmp/tpcheck-test-XXXXXX";
    ASSERT_NE(mkdtemp(path.data()), nullptr);
    folder_ = path;
  }
  void TearDown() override { fs::remove_all(folder_); }

  Ran shell(const std::string& command) const {
    Ran ran;
    std::FILE* pipe = popen(fmt::format("cd {} && {}", folder_.string(), command).c_str(), "r");
    std::array<char, 4096> buffer;
    for (std::size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;)
      ran.out.append(buffer.data(), n);
    const int status = pclose(pipe);
    ran.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    return ran;
  }
  Ran tpcheck(const std::string& arguments) const {
    return shell(fmt::format("{} {} 2>stderr.txt", TPCHECK_CANARY, arguments));
  }
  std::string errors() const {
    std::ifstream in(folder_ / "stderr.txt");
    return {std::istreambuf_iterator<char>(in), {}};
  }
  static std::string replay_arguments(const std::string& out) {
    std::smatch match;
    return std::regex_search(out, match, std::regex("\\./tpcheck (replay '[^']*'.*)"))
               ? match[1].str()
               : "";
  }

  fs::path folder_;
};

bool mentions(const std::string& text, const std::string& word) {
  return text.find(word) != std::string::npos;
}

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
  EXPECT_TRUE(mentions(ran.out, "50 more refused")) << ran.out;
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
  }
  tpcheck("fuzz --ops canary --artifacts /dev/null/x");
  EXPECT_TRUE(mentions(errors(), "/dev/null/x")) << errors();
  tpcheck("replay bad.case");
  EXPECT_TRUE(mentions(errors(), "bad.case:3")) << errors();
  EXPECT_EQ(tpcheck("fuzz --on gpu").code, 3);
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
  EXPECT_TRUE(mentions(tpcheck("zoo --seed 1 -n 1 --json").out, "\"found\": true"));
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

std::set<fs::path> job_folders() {
  std::set<fs::path> folders;
  for (const auto& entry : fs::directory_iterator("/dev/shm")) {
    if (mentions(entry.path().filename(), "tpcheck-")) folders.insert(entry.path());
  }
  return folders;
}

// Starts a long fuzz in its own process group, sends it a signal and returns its exit status.
int interrupt_fuzz(const std::string& arguments, int signal, std::chrono::milliseconds after) {
  const pid_t pid = fork();
  if (pid == 0) {
    setpgid(0, 0);
    const std::string command =
        fmt::format("exec {} {} >/dev/null 2>&1", TPCHECK_CANARY, arguments);
    execl("/bin/sh", "sh", "-c", command.c_str(), nullptr);
    _exit(127);
  }
  std::this_thread::sleep_for(after);
  kill(pid, signal);
  int status = 0;
  waitpid(pid, &status, 0);
  return status;
}

TEST_F(CommandsTest, CtrlCIsSeventyTwoAndLeavesNothingBehind) {
  const std::set<int> before = canaries();
  const std::set<fs::path> folders = job_folders();
  const std::string fuzz =
      fmt::format("fuzz --ops canary --for 60s -n 2 --artifacts {}/f", folder_.string());
  const int status = interrupt_fuzz(fuzz, SIGINT, std::chrono::milliseconds(1500));
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 72);
  EXPECT_EQ(canaries(), before);
  const std::string hanging =
      fmt::format("fuzz --ops canary_loop --for 60s -n 2 --artifacts {}/f", folder_.string());
  const int in_hang = interrupt_fuzz(hanging, SIGTERM, std::chrono::milliseconds(1500));
  ASSERT_TRUE(WIFEXITED(in_hang));
  EXPECT_EQ(WEXITSTATUS(in_hang), 72);
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  EXPECT_EQ(canaries(), before);
  EXPECT_EQ(job_folders(), folders);
}

TEST_F(CommandsTest, AKilledSupervisorTakesItsWorkersAlong) {
  const std::set<int> before = canaries();
  const std::set<fs::path> folders = job_folders();
  const std::string hanging =
      fmt::format("fuzz --ops canary_loop --for 60s -n 2 --artifacts {}/f", folder_.string());
  const int status = interrupt_fuzz(hanging, SIGKILL, std::chrono::milliseconds(1500));
  EXPECT_TRUE(WIFSIGNALED(status));
  for (int i = 0; i < 50 && canaries() != before; ++i)
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
  EXPECT_EQ(canaries(), before);
  // Its folder is what a killed supervisor cannot take along.
  for (const fs::path& folder : job_folders()) {
    if (!folders.contains(folder)) fs::remove_all(folder);
  }
}

}  // namespace
