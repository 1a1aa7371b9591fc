#pragma once
// The commands of tpcheck: their flags, and what the flags mean.

#include <string>
#include <variant>
#include <vector>

#include "harness/cli/explain.h"
#include "harness/cli/flags.h"
#include "harness/fuzz/fuzz.h"
#include "harness/fuzz/replay.h"
#include "harness/fuzz/worker.h"
#include "harness/fuzz/zoo.h"

namespace tp {

struct HelpText {
  std::string text;
  bool asked = true;  // by --help or --version; else nothing was said at all
};
struct ListOptions {
  std::string subject;
};
struct BenchOptions {
  std::vector<std::string> arguments;  // Google Benchmark's
};
struct WorkerOptions {
  Link link = Link::best;
  UserFiles files = {};
};

using Command = std::variant<HelpText, FuzzOptions, ReplayOptions, ExplainOptions, ZooOptions,
                             ListOptions, BenchOptions, WorkerOptions>;

struct CommandSpec {
  const char* name;
  const char* help;
  const char* example;
  bool hidden;
  void (*declare)(Flags&);
  Command (*command)(const Flags&);  // throws BadInput
};

// All but `bench`, whose flags are Google Benchmark's.
const std::vector<CommandSpec>& commands();

}  // namespace tp
