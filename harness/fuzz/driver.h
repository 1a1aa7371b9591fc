#pragma once
// What every command that runs cases has in common: it gets a runner, and its exit code is the same
// on all processes.

#include <functional>
#include <string>
#include <string_view>

#include "harness/fuzz/runner.h"

namespace tp {

class World;

inline constexpr std::string_view kTpcheckVersion = TP_VERSION;  // CMake's

struct RunnerOptions {
  int processes = 0;  // of one worker job; 0: the cores, at most 4
  int jobs = 0;       // 0: as many as fill the cores
  std::string on = "emulator";
};

// How many processes one job has: of the launched world, or as the options say.
int processes_of(const World* world, const RunnerOptions& options);

// Runs `body` with a runner: in-process where the world was launched by mpirun (then on process 0,
// while the others serve it), else with a supervisor. Returns body's code on all processes; 70
// where the runner gave up, 72 where Ctrl-C came. BadInput and Unavailable leave it on process 0
// only; the other processes return 2 and 3.
int with_runner(World* world, const RunnerOptions& options,
                const std::function<int(Runner&)>& body);

}  // namespace tp
