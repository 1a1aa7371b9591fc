#include "harness/cli/parse.h"

#include <gtest/gtest.h>

#include "harness/base/check.h"

namespace tp {
namespace {

std::string refusal(const std::vector<std::string>& arguments) {
  try {
    parse_command(arguments);
    return "";
  } catch (const BadInput& e) {
    return e.what();
  }
}

TEST(Parse, EveryFlagOfFuzz) {
  const Command command = parse_command({"fuzz",
                                         "--ops",
                                         "rms_norm,qk_norm",
                                         "--tp",
                                         "1..3,8",
                                         "--model",
                                         "all",
                                         "--model",
                                         "a.json",
                                         "--adapter",
                                         "an adapter",
                                         "--for",
                                         "10m",
                                         "--cases",
                                         "5",
                                         "--seed",
                                         "7",
                                         "-n",
                                         "2",
                                         "--jobs",
                                         "3",
                                         "--on",
                                         "gpu",
                                         "--group",
                                         "nccl",
                                         "--no-poison",
                                         "--timeout",
                                         "500ms",
                                         "--artifacts",
                                         "out",
                                         "--keep-going",
                                         "--mutant",
                                         "1:k",
                                         "--each",
                                         "--json"});
  const auto& o = std::get<FuzzOptions>(command);
  EXPECT_EQ(o.ops, (std::vector<std::string>{"rms_norm", "qk_norm"}));
  EXPECT_EQ(o.tp_sizes, (std::vector<int>{1, 2, 3, 8}));
  EXPECT_EQ(o.models, (std::vector<std::string>{"all", "a.json"}));
  EXPECT_EQ(o.adapter, "an adapter");
  EXPECT_EQ(o.for_seconds, 600);
  EXPECT_EQ(o.cases, 5);
  EXPECT_EQ(o.seed, 7u);
  EXPECT_EQ(o.where.processes, 2);
  EXPECT_EQ(o.where.jobs, 3);
  EXPECT_EQ(o.where.on, "gpu");
  EXPECT_EQ(o.where.link, Link::nccl);
  EXPECT_FALSE(o.poison);
  EXPECT_EQ(o.timeout, 0.5);
  EXPECT_EQ(o.artifacts, "out");
  EXPECT_TRUE(o.keep_going && o.each && o.json);
  EXPECT_EQ(o.mutant, "1:k");
}

TEST(Parse, DefaultsAreThoseOfTheOptions) {
  const auto o = std::get<FuzzOptions>(parse_command({"fuzz"}));
  EXPECT_TRUE(o.ops.empty() && o.tp_sizes.empty() && o.models.empty() && !o.seed);
  EXPECT_EQ(o.artifacts, FuzzOptions{}.artifacts);
  EXPECT_EQ(o.where.on, executor_name());
  EXPECT_TRUE(o.where.link == Link::best && o.poison);
  EXPECT_EQ(std::get<WorkerOptions>(parse_command({"worker", "--group", "mpi"})).link, Link::mpi);
  EXPECT_EQ(std::get<WorkerOptions>(parse_command({"worker"})).files.checkpoint, "");
  EXPECT_EQ(
      std::get<WorkerOptions>(parse_command({"worker", "--checkpoint=-dir"})).files.checkpoint,
      "-dir");
  const auto files = std::get<WorkerOptions>(parse_command({"worker", "--adapter=-a", "--base=b"}));
  EXPECT_EQ(files.files.adapter, "-a");
  EXPECT_EQ(files.files.base, "b");
  EXPECT_EQ(std::get<ZooOptions>(parse_command({"zoo"})).for_seconds, ZooOptions{}.for_seconds);
}

TEST(Parse, ReplayTakesALineWithAndWithoutQuotes) {
  const std::string line = "v1 qk_norm num_heads=2 seed=7";
  const auto quoted = std::get<ReplayOptions>(
      parse_command({"replay", line, "--trace", "--times", "3", "--serial"}));
  EXPECT_EQ(quoted.inputs, std::vector<std::string>{line});
  EXPECT_TRUE(quoted.trace);
  EXPECT_TRUE(quoted.serial);
  EXPECT_EQ(quoted.times, 3);
  EXPECT_EQ(quoted.model, "");
  EXPECT_EQ(std::get<ReplayOptions>(parse_command({"replay", line, "--model", "a dir"})).model,
            "a dir");
  EXPECT_EQ(quoted.adapter, "");
  EXPECT_EQ(std::get<ReplayOptions>(
                parse_command({"replay", line, "--model", "a dir", "--adapter", "an adapter"}))
                .adapter,
            "an adapter");
  const auto bare =
      std::get<ReplayOptions>(parse_command({"replay", "v1", "qk_norm", "num_heads=2", "seed=7"}));
  EXPECT_EQ(bare.inputs, quoted.inputs);
  EXPECT_FALSE(bare.serial);
  EXPECT_EQ(std::get<ReplayOptions>(parse_command({"replay", "a.case", "b"})).inputs.size(), 2u);
}

TEST(Parse, BenchTakesEverything) {
  const auto o = std::get<BenchOptions>(parse_command({"bench", "--benchmark_filter=x", "--help"}));
  EXPECT_EQ(o.arguments, (std::vector<std::string>{"--benchmark_filter=x", "--help"}));
}

TEST(Parse, Help) {
  EXPECT_TRUE(std::get<HelpText>(parse_command({"--help"})).asked);
  EXPECT_FALSE(std::get<HelpText>(parse_command({})).asked);
  const std::string all = std::get<HelpText>(parse_command({"--help"})).text;
  for (const char* name : {"fuzz", "replay", "explain", "zoo", "list", "bench"}) {
    EXPECT_NE(all.find(name), all.npos) << name;
    if (name == std::string("bench")) continue;
    const std::string help = std::get<HelpText>(parse_command({name, "--help"})).text;
    EXPECT_NE(help.find(std::string("Example: tpcheck ") + name), help.npos) << help;
  }
  EXPECT_EQ(all.find("worker"), all.npos) << "worker is not for people";
}

TEST(Parse, Refusals) {
  const struct {
    std::vector<std::string> arguments;
    const char* expected;
  } table[] = {
      {{"fuz"}, "unknown command 'fuz' (did you mean fuzz? see tpcheck --help)"},
      {{"--tp"}, "see tpcheck --help"},
      {{"fuzz", "--mutants", "1:k"}, "did you mean --mutant? see tpcheck fuzz --help"},
      {{"fuzz", "extra"}, "unknown argument 'extra'"},
      {{"fuzz", "--seed"}, "--seed"},
      {{"fuzz", "--seed", "1", "--seed", "2"}, "--seed"},
      {{"fuzz", "-n", "0"}, "-n 0 is outside 1.."},
      {{"fuzz", "-n", "-1"}, "-n -1 is outside 1.."},
      {{"fuzz", "-n", "many"}, "-n 'many' is not a whole number"},
      {{"fuzz", "--cases", "0"}, "--cases 0"},
      {{"fuzz", "--on", "moon"}, "--on 'moon' is none of emulator, gpu, both"},
      {{"fuzz", "--artifacts", ""}, "--artifacts is empty"},
      {{"fuzz", "--tp", "0"}, "--tp 0 is outside 1..1024"},
      {{"replay"}, "replay needs a case line"},
      {{"replay", "x", "--times", "0"}, "--times 0"},
      {{"explain", "--tp", "2"}, "needs a model"},
      {{"explain", "MiniMax-M2.5", "--heads", "4", "--tp", "2"}, "needs a model, or"},
      {{"explain", "MiniMax-M2.5"}, "needs --tp"},
      {{"explain", "MiniMax-M2.5", "--tp", "16", "--rank", "16"}, "--rank 16 is outside 0..15"},
      {{"explain", "--heads", "4", "--kv-heads", "2", "--tp", "2"}, "needs --head-dim"},
      {{"explain", "--heads", "99999999999", "--kv-heads", "2", "--head-dim", "4", "--tp", "2"},
       "--heads 99999999999"},
      {{"list"}, "list needs one of ops, models, mutants, laws"},
      {{"list", "operators"}, "none of ops"},
  };
  for (const auto& row : table) {
    const std::string said = refusal(row.arguments);
    EXPECT_NE(said.find(row.expected), said.npos)
        << "said: " << said << "\nexpected: " << row.expected;
    EXPECT_EQ(said.find('\n'), said.npos);
  }
}

}  // namespace
}  // namespace tp
