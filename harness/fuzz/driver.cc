#include "harness/fuzz/driver.h"

#include <fmt/format.h>

#include <exception>
#include <sstream>

#include "harness/base/check.h"
#include "harness/base/exit_codes.h"
#include "harness/fuzz/both.h"
#include "harness/fuzz/executor.h"
#include "harness/fuzz/in_process.h"
#include "harness/fuzz/interrupt.h"
#include "harness/fuzz/worker.h"
#include "harness/group/place.h"
#include "harness/group/world.h"

namespace tp {

namespace {

int code_of(const std::function<int()>& body) {
  try {
    return body();
  } catch (const GaveUp& e) {
    fmt::print(stderr, "tpcheck: {}\n", e.what());
    return e.exit_code;
  } catch (const Interrupted&) {
    fmt::print(stderr, "tpcheck: interrupted\n");
    return kExitInterrupted;
  }
}

// tpcheck was started by mpirun: kernels run in the processes that there are.
int in_process(World& world, Where where, const std::function<int(Runner&, const Where&)>& body) {
  if (where.on != executor_name()) {
    throw Unavailable(
        where.on == kBoth
            ? std::string("--on both starts worker jobs of its own, and cannot under mpirun")
            : fmt::format("--on {}: mpirun has started the tpcheck of the {}; let it start {}",
                          where.on, executor_name(),
                          find_executor(where.on, where.link).binary.string()));
  }
  where.processes = world.processes();
  where.jobs = 1;
  const std::string place = take_place(world, where.link);
  catch_interrupts();  // on all processes: process 0 still has a summary to print
  name_crashes();
  if (!world.is_root()) {
    serve(world);
    return std::stoi(world.broadcast(""));
  }
  int code = kExitGaveUp;
  std::exception_ptr failed;
  try {
    code = code_of([&] {
      InProcess runner(world, place);
      return body(runner, where);
    });
  } catch (const BadInput&) {
    code = kExitBadInput;
    failed = std::current_exception();
  } catch (const Unavailable&) {
    code = kExitUnavailable;
    failed = std::current_exception();
  }
  world.broadcast(std::to_string(code));
  // Processes that cannot meet any more have to be ended, and only this one knows the exit code.
  if (world.retired() && !failed) world.abort(code);
  if (failed) std::rethrow_exception(failed);
  return code;
}

}  // namespace

void on_all_processes(World* world, const std::function<void()>& f) {
  if (!world) return f();
  std::string why;
  try {
    f();
  } catch (const BadInput& e) {
    why = e.what();
  }
  std::string first;
  for (const std::string& said : world->gather(why)) {
    if (first.empty()) first = said;
  }
  first = world->broadcast(first);
  if (!first.empty()) throw BadInput(first);
}

int with_runner(World* world, const Where& where,
                const std::function<int(Runner&, const Where&)>& body) {
  if (World::launched()) return in_process(*world, where, body);
  if (where.on == kBoth) {
    return with_both(where, [&](Supervisor& gpu, Supervisor& emulator) {
      Both runner(gpu, emulator);
      return body(runner, where);
    });
  }
  return code_of([&] {
    const Where filled = settled(where);
    Supervisor runner(filled.jobs, filled.processes, executor_of(filled));
    runner.wait_until_ready();
    return body(runner, filled);
  });
}

int with_both(const Where& where,
              const std::function<int(Supervisor& gpu, Supervisor& emulator)>& body) {
  if (where.link == Link::nccl)
    throw Unavailable("--group nccl with --on both: NCCL connects GPUs, and not emulators");
  return code_of([&] {
    Where gpu_side = where, emulator_side = where;
    gpu_side.on = kGpu;
    emulator_side.on = kEmulator;
    gpu_side = settled(gpu_side);
    emulator_side = settled(emulator_side);
    // Both binaries, before anything is started.
    const Executor on_gpu = executor_of(gpu_side);
    const Executor in_emulator = executor_of(emulator_side);
    Supervisor gpu(gpu_side.jobs, gpu_side.processes, on_gpu);
    Supervisor emulator(emulator_side.jobs, emulator_side.processes, in_emulator);
    gpu.wait_until_ready();
    emulator.wait_until_ready();
    return body(gpu, emulator);
  });
}

std::string header_text(const std::string& where, bool poison) {
  std::string text = fmt::format("tpcheck {}", kTpcheckVersion);
  const std::size_t column = text.size() + 2;
  std::istringstream lines(where);
  for (std::string line; std::getline(lines, line);) {
    const std::size_t begin = text.rfind('\n') + 1;  // 0 where there is none
    text += std::string(column - (text.size() - begin), ' ') + line + "\n";
  }
  if (!poison) text += fmt::format("{}\n", kNoPoison);
  return text;
}

}  // namespace tp
