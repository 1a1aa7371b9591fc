#include "harness/fuzz/driver.h"

#include <fmt/format.h>

#include <exception>

#include "harness/base/check.h"
#include "harness/fuzz/in_process.h"
#include "harness/fuzz/interrupt.h"
#include "harness/fuzz/supervisor.h"
#include "harness/fuzz/worker.h"
#include "harness/group/world.h"

namespace tp {

namespace {

int code_of(const std::function<int()>& body) {
  try {
    return body();
  } catch (const GaveUp& e) {
    fmt::print(stderr, "tpcheck: {}\n", e.what());
    return 70;
  } catch (const Interrupted&) {
    fmt::print(stderr, "tpcheck: interrupted\n");
    return 72;
  }
}

int in_process(World& world, const std::function<int(Runner&)>& body) {
  catch_interrupts();  // on all processes: process 0 still has a summary to print
  name_crashes();
  if (!world.is_root()) {
    serve(world);
    return std::stoi(world.broadcast(""));
  }
  int code = 70;
  std::exception_ptr failed;
  try {
    code = code_of([&] {
      InProcess runner(world);
      return body(runner);
    });
  } catch (const BadInput&) {
    code = 2;
    failed = std::current_exception();
  } catch (const Unavailable&) {
    code = 3;
    failed = std::current_exception();
  }
  world.broadcast(std::to_string(code));
  // Processes that cannot meet any more have to be ended, and only this one knows the exit code.
  if (world.retired() && !failed) world.abort(code);
  if (failed) std::rethrow_exception(failed);
  return code;
}

}  // namespace

int processes_of(const World* world, const RunnerOptions& options) {
  if (World::launched()) return world->processes();
  return options.processes != 0 ? options.processes : default_processes();
}

int with_runner(World* world, const RunnerOptions& options,
                const std::function<int(Runner&)>& body) {
  if (options.on != "emulator") {
    throw Unavailable(fmt::format("--on {}: this build has the emulator only", options.on));
  }
  if (World::launched()) return in_process(*world, body);
  return code_of([&] {
    const int processes = processes_of(world, options);
    const int jobs = options.jobs != 0 || processes < 1 ? options.jobs : default_jobs(processes);
    Supervisor runner(jobs, processes);
    return body(runner);
  });
}

}  // namespace tp
