#include "harness/cli/parse.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/CLI.hpp>
#include <algorithm>

#include "harness/base/check.h"
#include "harness/base/text.h"
#include "harness/fuzz/driver.h"

namespace tp {

namespace {

constexpr const char* kBenchHelp = "time it, with Google Benchmark's flags";

// CLI11 splits the command line and writes the help; what it splits stays text.
void add_options(CLI::App& app, Flags& flags) {
  for (const FlagSpec& spec : flags.specs()) {
    switch (spec.kind) {
      case FlagSpec::Kind::text:
        app.add_option(spec.name, flags.text_place(spec.name), spec.help)->type_name(spec.what);
        break;
      case FlagSpec::Kind::list: {
        CLI::Option* option = app.add_option(spec.name, flags.list_place(spec.name), spec.help);
        option->type_name(spec.what);
        if (spec.name.starts_with('-')) option->allow_extra_args(false);
        break;
      }
      case FlagSpec::Kind::on_off:
        app.add_flag(spec.name, flags.on_off_place(spec.name), spec.help);
        break;
    }
  }
}

bool is_command(const std::string& word) {
  return std::any_of(commands().begin(), commands().end(),
                     [&](const CommandSpec& spec) { return spec.name == word; });
}

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
  app.set_version_flag("--version", fmt::format("tpcheck {}", kTpcheckVersion));
  app.require_subcommand(1);
  app.footer(
      "Exit codes: 0 all agreed, 1 a finding, 2 bad usage or input, 3 not possible here,\n"
      "4 nothing that could be trusted ran, 5 a failure did not replay, 70 gave up,\n"
      "72 interrupted.\n"
      "Example: tpcheck fuzz --for 60s");

  std::vector<std::string> names = {"bench"};
  std::vector<Flags> flags(commands().size());
  for (std::size_t i = 0; i < commands().size(); ++i) {
    const CommandSpec& spec = commands()[i];
    CLI::App* sub = app.add_subcommand(spec.name, spec.help);
    sub->footer(std::string("Example: ") + spec.example);
    spec.declare(flags[i]);
    add_options(*sub, flags[i]);
    if (spec.hidden)
      sub->group("");  // left out of the help
    else
      names.push_back(spec.name);
  }
  app.add_subcommand("bench", kBenchHelp);

  if (arguments.empty()) return HelpText{.text = app.help(), .asked = false};
  // Whatever follows belongs to Google Benchmark, --help included.
  if (arguments[0] == "bench") return BenchOptions{{arguments.begin() + 1, arguments.end()}};
  if (!arguments[0].starts_with('-') && !is_command(arguments[0])) {
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
  for (std::size_t i = 0; i < commands().size(); ++i) {
    if (app.got_subcommand(commands()[i].name)) return commands()[i].command(flags[i]);
  }
  throw BadInput("no command (see tpcheck --help)");
}

}  // namespace tp
