#pragma once
// The command line as a value: which command, with which options.

#include <string>
#include <variant>
#include <vector>

#include "harness/cli/explain.h"
#include "harness/fuzz/fuzz.h"
#include "harness/fuzz/replay.h"
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
struct WorkerOptions {};

using Command = std::variant<HelpText, FuzzOptions, ReplayOptions, ExplainOptions, ZooOptions,
                             ListOptions, BenchOptions, WorkerOptions>;

// `arguments`: without the program's name. Throws BadInput with one sentence.
Command parse_command(const std::vector<std::string>& arguments);

}  // namespace tp
