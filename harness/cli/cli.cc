#include "harness/cli/cli.h"

#include <fmt/format.h>

#include <cstdio>
#include <exception>
#include <new>

#include "harness/base/check.h"
#include "harness/base/exit_codes.h"
#include "harness/cli/bench.h"
#include "harness/cli/list.h"
#include "harness/cli/parse.h"
#include "harness/fuzz/interrupt.h"
#include "harness/fuzz/worker.h"
#include "harness/group/world.h"

namespace tp {

namespace {

void print(std::FILE* to, const std::string& text) { std::fwrite(text.data(), 1, text.size(), to); }

// The commands. Those that run cases are called by every process of the world and agree on their
// exit code; the others are process 0's alone.
class Run {
 public:
  explicit Run(World& world) : world_(world) {}

  int operator()(const FuzzOptions& options) const { return fuzz_main(launched_world(), options); }
  int operator()(const ReplayOptions& options) const {
    return replay_main(launched_world(), options);
  }
  int operator()(const ZooOptions& options) const { return zoo_main(launched_world(), options); }
  int operator()(const WorkerOptions& options) const {
    return worker_main(world_, options.link, options.files);
  }
  int operator()(const ExplainOptions& options) const {
    return world_.is_root() ? explain_main(options) : 0;
  }
  int operator()(const BenchOptions& options) const {
    return bench_main(world_, options.arguments);
  }
  int operator()(const ListOptions& options) const {
    if (world_.is_root()) print(stdout, list_text(options.subject));
    return 0;
  }
  int operator()(const HelpText& help) const {
    if (world_.is_root()) print(help.asked ? stdout : stderr, help.text);
    return help.asked ? 0 : kExitBadInput;
  }

 private:
  // Without a launcher, fuzz, replay and zoo are supervisors outside MPI.
  World* launched_world() const { return World::launched() ? &world_ : nullptr; }

  World& world_;
};

// What `f` returns, or the exit code of what it throws.
template <typename F>
int guarded(const World& world, F f) {
  const auto say = [&](const std::string& sentence, int code) {
    std::fflush(stdout);
    if (world.is_root()) print(stderr, fmt::format("tpcheck: {}\n", sentence));
    return code;
  };
  try {
    return f();
  } catch (const BadInput& e) {
    return say(e.what(), kExitBadInput);
  } catch (const Unavailable& e) {
    return say(e.what(), kExitUnavailable);
  } catch (const GaveUp& e) {
    return say(e.what(), e.exit_code);
  } catch (const Interrupted&) {
    return say("interrupted", kExitInterrupted);
  } catch (const std::bad_alloc&) {
    return say("out of memory", kExitUnavailable);
  } catch (const std::exception& e) {
    return say(fmt::format("internal error: {}", e.what()), kExitGaveUp);
  }
}

}  // namespace

int cli_main(World& world, int argc, char** argv) {
  Command command;
  int code = guarded(world, [&] {
    command = parse_command({argv + 1, argv + argc});
    return 0;
  });
  // A config.json may be readable on one host and not on another, so the processes agree before
  // they start.
  code = world.max(code);
  if (code != 0) return code;

  return world.max(guarded(world, [&] {
    const int done = std::visit(Run(world), command);
    // An earlier flush may have failed, and dropped what it could not write.
    const bool lost = std::fflush(stdout) != 0 || std::ferror(stdout);
    if (lost && done == 0) throw Unavailable("standard output cannot be written");
    return done;
  }));
}

}  // namespace tp
