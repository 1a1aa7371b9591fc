#include "harness/cli/parse.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <functional>
#include <map>
#include <memory>
#include <optional>

#include "harness/base/case.h"
#include "harness/base/check.h"
#include "harness/base/text.h"
#include "harness/cli/arguments.h"
#include "harness/cli/list.h"

namespace tp {

namespace {

constexpr std::int64_t kMaxProcesses = 1024;
constexpr std::int64_t kMaxLoraRank = 1 << 16;

// The flags of one command. CLI11 splits the command line and writes the help; what it splits stays
// text, and arguments.h makes values of it, so that every number is refused in the same words.
class Flags {
 public:
  explicit Flags(CLI::App* app) : app_(app) {}

  void text(const std::string& flag, const char* what, const char* help) {
    app_->add_option(flag, texts_[flag], help)->type_name(what);
  }
  // May be repeated; a positional (without dashes) takes what is left.
  void list(const std::string& flag, const char* what, const char* help) {
    CLI::Option* option = app_->add_option(flag, lists_[flag], help)->type_name(what);
    if (flag[0] == '-') option->allow_extra_args(false);
  }
  void flag(const std::string& flag, const char* help) { app_->add_flag(flag, flags_[flag], help); }

  bool given(const std::string& flag) const { return texts_.at(flag).has_value(); }
  std::string text_or(const std::string& flag, const std::string& fallback) const {
    return texts_.at(flag).value_or(fallback);
  }
  std::int64_t number(const std::string& flag, std::int64_t min, std::int64_t max,
                      std::int64_t fallback) const {
    return given(flag) ? whole_number(flag, *texts_.at(flag), min, max) : fallback;
  }
  double seconds(const std::string& flag, double fallback) const {
    return given(flag) ? duration(flag, *texts_.at(flag)) : fallback;
  }
  // A number in the range of the case key `key`.
  int size(const std::string& flag, const char* key, int fallback) const {
    const Key range = shared_key(key);
    return int(number(flag, range.min, range.max, fallback));
  }
  std::optional<std::uint64_t> seed() const {
    if (!given("--seed")) return std::nullopt;
    const Key range = shared_key("seed");
    return std::uint64_t(number("--seed", range.min, range.max, 0));
  }
  std::string on() const {
    return one_of("--on", text_or("--on", "emulator"), {"emulator", "gpu", "both"});
  }
  const std::vector<std::string>& list_of(const std::string& flag) const { return lists_.at(flag); }
  bool is_set(const std::string& flag) const { return flags_.at(flag); }

 private:
  CLI::App* app_;
  // Nodes of a map stay where they are, so CLI11 may keep references to them.
  std::map<std::string, std::optional<std::string>> texts_;
  std::map<std::string, std::vector<std::string>> lists_;
  std::map<std::string, bool> flags_;
};

// A flag that, where it is given, must not be empty.
std::string named(const Flags& f, const std::string& flag, const std::string& fallback) {
  const std::string text = f.text_or(flag, fallback);
  if (f.given(flag) && text.empty()) throw BadInput(fmt::format("{} is empty", flag));
  return text;
}

void fuzz_flags(Flags& f) {
  f.list("--ops", "LIST", "operators (default: all; see tpcheck list ops)");
  f.list("--tp", "LIST|A..B", "sizes of the tensor-parallel group (default: 1..16)");
  f.list("--model", "NAME|FILE",
         "draw shapes of this model only: a preset, a config.json, or all; repeatable");
  f.text("--for", "TIME", "stop after 500ms, 90s, 10m, 2h (default: 60s)");
  f.text("--cases", "N", "stop after so many cases");
  f.text("--seed", "S", "of everything that is drawn (default: a new one, printed)");
  f.text("-n", "PROCESSES", "MPI processes of one worker job (default: the cores, at most 4)");
  f.text("--jobs", "J", "worker jobs (default: as many as fill the cores)");
  f.text("--on", "WHERE", "emulator, gpu or both (default: emulator)");
  f.text("--timeout", "TIME",
         "deadline of a case (default: 2s, or 20 times the slowest passing one)");
  f.text("--artifacts", "DIR", "where findings are written (default: findings)");
  f.flag("--keep-going", "do not stop at the first finding");
  f.text("--mutant", "ID", "put this upstream mistake back (see tpcheck list mutants)");
  f.flag("--each", "one case for each legal model and tp_size instead of drawing");
  f.flag("--json", "the result as JSON");
}
Command fuzz_command(const Flags& f) {
  return FuzzOptions{.ops = words("--ops", f.list_of("--ops")),
                     .tp_sizes = tp_sizes("--tp", f.list_of("--tp")),
                     .models = f.list_of("--model"),
                     .for_seconds = f.seconds("--for", 0),
                     .cases = f.number("--cases", 1, INT64_MAX, 0),
                     .seed = f.seed(),
                     .processes = int(f.number("-n", 1, kMaxProcesses, 0)),
                     .jobs = int(f.number("--jobs", 1, kMaxProcesses, 0)),
                     .timeout = f.seconds("--timeout", 0),
                     .artifacts = named(f, "--artifacts", "findings"),
                     .keep_going = f.is_set("--keep-going"),
                     .mutant = named(f, "--mutant", ""),
                     .each = f.is_set("--each"),
                     .json = f.is_set("--json"),
                     .on = f.on()};
}

void replay_flags(Flags& f) {
  f.list("CASE", "CASE|FILE|DIR", "case lines in quotes, files of them, folders of *.case");
  f.text("-n", "PROCESSES", "MPI processes (default: the cores, at most 4)");
  f.text("--on", "WHERE", "emulator, gpu or both (default: emulator)");
  f.text("--times", "K", "run each case so often (default: 1)");
  f.text("--timeout", "TIME", "deadline of a case (default: 30s)");
  f.flag("--trace", "print each stage's values and each collective of every rank");
  f.text("--mutant", "ID", "put this upstream mistake back");
}
Command replay_command(const Flags& f) {
  std::vector<std::string> inputs = f.list_of("CASE");
  if (inputs.empty()) throw BadInput("replay needs a case line, a file or a folder");
  // A case line pasted without its quotes.
  if (inputs[0] == "v1") inputs = {fmt::format("{}", fmt::join(inputs, " "))};
  return ReplayOptions{.inputs = inputs,
                       .processes = int(f.number("-n", 1, kMaxProcesses, 0)),
                       .times = int(f.number("--times", 1, 1'000'000, 1)),
                       .timeout = f.seconds("--timeout", 0),
                       .trace = f.is_set("--trace"),
                       .mutant = named(f, "--mutant", ""),
                       .on = f.on()};
}

void explain_flags(Flags& f) {
  f.list("MODEL", "MODEL|FILE", "a preset (see tpcheck list models) or a config.json");
  f.text("--heads", "H", "or a shape: query heads");
  f.text("--kv-heads", "K", "key/value heads");
  f.text("--head-dim", "D", "width of a head");
  f.text("--hidden-size", "E", "width of the residual stream");
  f.text("--tp", "T", "ranks in the tensor-parallel group");
  f.text("--rank", "R", "this rank only");
  f.text("--lora-rank", "L", "rank of a LoRA adapter");
  f.flag("--json", "as JSON; ranges are half-open");
}
Command explain_command(const Flags& f) {
  ExplainOptions options;
  const std::vector<std::string>& model = f.list_of("MODEL");
  const bool shape = f.given("--heads") || f.given("--kv-heads") || f.given("--head-dim") ||
                     f.given("--hidden-size");
  if (model.size() > 1)
    throw BadInput(fmt::format("explain takes one model, not {}", model.size()));
  if (model.empty() == !shape)
    throw BadInput("explain needs a model, or --heads, --kv-heads and --head-dim");
  if (!f.given("--tp"))
    throw BadInput("explain needs --tp, the ranks in the tensor-parallel group");
  if (shape) {
    for (const char* flag : {"--heads", "--kv-heads", "--head-dim"}) {
      if (!f.given(flag)) throw BadInput(fmt::format("explain of a shape needs {}", flag));
    }
    options.model.shape = {.hidden_size = f.size("--hidden-size", "hidden_size", 0),
                           .num_heads = f.size("--heads", "num_heads", 0),
                           .num_kv_heads = f.size("--kv-heads", "num_kv_heads", 0),
                           .head_dim = f.size("--head-dim", "head_dim", 0)};
  } else {
    options.model = find_model(model[0]);
  }
  options.tp_size = f.size("--tp", "tp_size", 0);
  if (f.given("--rank")) options.tp_rank = int(f.number("--rank", 0, options.tp_size - 1, 0));
  options.lora_rank = int(f.number("--lora-rank", 1, kMaxLoraRank, 0));
  options.json = f.is_set("--json");
  return options;
}

void zoo_flags(Flags& f) {
  f.list("ID", "ID", "mutants (default: all; see tpcheck list mutants)");
  f.text("--for", "TIME", "hunt each for so long (default: 30s)");
  f.text("--seed", "S", "of everything that is drawn (default: a new one)");
  f.text("-n", "PROCESSES", "MPI processes of one worker job (default: the cores, at most 4)");
  f.text("--jobs", "J", "worker jobs (default: as many as fill the cores)");
  f.text("--on", "WHERE", "emulator, gpu or both (default: emulator)");
  f.flag("--json", "as JSON");
}
Command zoo_command(const Flags& f) {
  return ZooOptions{.mutants = words("ID", f.list_of("ID")),
                    .for_seconds = f.seconds("--for", 30),
                    .seed = f.seed(),
                    .processes = int(f.number("-n", 1, kMaxProcesses, 0)),
                    .jobs = int(f.number("--jobs", 1, kMaxProcesses, 0)),
                    .json = f.is_set("--json"),
                    .on = f.on()};
}

void list_flags(Flags& f) { f.list("WHAT", "ops|models|mutants|laws", "what to list"); }
Command list_command(const Flags& f) {
  const std::vector<std::string>& what = f.list_of("WHAT");
  if (what.size() != 1)
    throw BadInput(fmt::format("list needs one of {}", fmt::join(list_subjects(), ", ")));
  return ListOptions{one_of("list", what[0], list_subjects())};
}

void no_flags(Flags&) {}
Command worker_command(const Flags&) { return WorkerOptions{}; }

struct CommandSpec {
  const char* name;
  const char* help;
  const char* example;
  void (*add_flags)(Flags&);
  Command (*command)(const Flags&);
};

constexpr CommandSpec kCommands[] = {
    {"fuzz", "draw cases, compare them with the reference, shrink what fails",
     "tpcheck fuzz --ops qk_norm --tp 1..16 --for 10m", fuzz_flags, fuzz_command},
    {"replay", "run a case line again",
     "tpcheck replay 'v1 qk_norm num_heads=2 num_kv_heads=1 head_dim=8 tp_size=2 num_tokens=1 "
     "dtype=bf16 seed=7'",
     replay_flags, replay_command},
    {"explain", "which rank holds which rows of a model", "tpcheck explain MiniMax-M2.5 --tp 16",
     explain_flags, explain_command},
    {"zoo", "put every known upstream bug back and say which are found", "tpcheck zoo --for 10s",
     zoo_flags, zoo_command},
    {"list", "what there is to name: ops, models, mutants, laws", "tpcheck list mutants",
     list_flags, list_command},
    {"worker", "the processes that run cases", "mpirun -n 4 tpcheck worker", no_flags,
     worker_command},
};
constexpr const char* kBenchHelp = "time it, with Google Benchmark's flags";

// What was typed is no command or no flag: says so, with what may have been meant.
BadInput unknown(const char* what, const std::string& word, const std::vector<std::string>& known,
                 const std::string& help) {
  const std::vector<std::string> near = near_misses(word, known);
  const std::string hint =
      near.empty() ? "" : fmt::format("did you mean {}? ", fmt::join(near, ", "));
  return BadInput(
      fmt::format("unknown {} '{}' ({}see {} --help)", what, printable(word), hint, help));
}

std::vector<std::string> flags_of(const CLI::App* app) {
  std::vector<std::string> flags;
  for (const CLI::Option* option : app->get_options()) {
    for (const std::string& name : option->get_lnames()) flags.push_back("--" + name);
    for (const std::string& name : option->get_snames()) flags.push_back("-" + name);
  }
  return flags;
}

}  // namespace

Command parse_command(const std::vector<std::string>& arguments) {
  CLI::App app(
      "Finds bugs of tensor-parallel kernels: runs them sharded, compares with a single-rank "
      "reference.",
      "tpcheck");
  app.set_version_flag("--version", "tpcheck 0.1.0");
  app.require_subcommand(1);
  app.footer(
      "Exit codes: 0 all agreed, 1 a finding, 2 bad usage or input, 3 not possible on this "
      "machine,\n"
      "4 nothing that could be trusted ran, 5 a failure did not replay, 70 gave up, 72 "
      "interrupted.\n"
      "Example: tpcheck fuzz --for 60s");

  std::vector<std::string> names = {"bench"};
  std::vector<std::unique_ptr<Flags>> flags;
  for (const CommandSpec& spec : kCommands) {
    CLI::App* sub = app.add_subcommand(spec.name, spec.help);
    sub->footer(std::string("Example: ") + spec.example);
    spec.add_flags(*flags.emplace_back(std::make_unique<Flags>(sub)));
    if (std::string_view(spec.name) == "worker")
      sub->group("");  // not for people: left out of the help
    else
      names.push_back(spec.name);
  }
  app.add_subcommand("bench", kBenchHelp);

  if (arguments.empty()) return HelpText{.text = app.help(), .asked = false};
  // Whatever follows belongs to Google Benchmark, --help included.
  if (arguments[0] == "bench") return BenchOptions{{arguments.begin() + 1, arguments.end()}};
  if (!arguments[0].starts_with('-') && arguments[0] != "worker" &&
      std::find(names.begin(), names.end(), arguments[0]) == names.end()) {
    throw unknown("command", arguments[0], names, "tpcheck");
  }

  std::string help = "tpcheck";
  try {
    app.parse(std::vector<std::string>(arguments.rbegin(), arguments.rend()));
  } catch (const CLI::CallForHelp&) {
    return HelpText{.text = app.help()};
  } catch (const CLI::CallForVersion& version) {
    return HelpText{.text = std::string(version.what()) + "\n"};
  } catch (const CLI::ParseError& e) {
    const auto chosen = app.get_subcommands();
    const CLI::App* at = chosen.empty() ? &app : chosen[0];
    if (!chosen.empty()) help += " " + at->get_name();
    // An unknown flag before the command is reported as a missing command, and matters more.
    const std::vector<std::string> extras = app.remaining(true);
    if (!extras.empty()) throw unknown("argument", extras[0], flags_of(at), help);
    throw BadInput(fmt::format("{} (see {} --help)", e.what(), help));
  }
  for (std::size_t i = 0; i < std::size(kCommands); ++i) {
    if (app.got_subcommand(kCommands[i].name)) return kCommands[i].command(*flags[i]);
  }
  throw BadInput("no command (see tpcheck --help)");
}

}  // namespace tp
