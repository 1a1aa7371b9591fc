#pragma once
// What every command that runs cases has in common: it gets a runner, and its exit code is the same
// on all processes.

#include <functional>
#include <string>
#include <string_view>

#include "harness/fuzz/runner.h"
#include "harness/fuzz/supervisor.h"
#include "harness/fuzz/where.h"

namespace tp {

class World;

inline constexpr std::string_view kTpcheckVersion = TP_VERSION;  // CMake's

// Runs `body` with a runner that has its place and knows it (Runner::where): in-process where the
// world was launched by mpirun (then on process 0, while the others serve it), else with one
// supervisor or, for --on both, two. `settled` is what became of `where`. Returns body's code on
// all processes; the runner's where it gave up, 72 where Ctrl-C came. BadInput and Unavailable
// leave it on process 0 only; the other processes return 2 and 3.
int with_runner(World* world, const Where& where,
                const std::function<int(Runner&, const Where& settled)>& body);

// The same for --on both, with each side by itself. Never in-process.
int with_both(const Where& where,
              const std::function<int(Supervisor& gpu, Supervisor& emulator)>& body);

// Runs `f` on this process, and where it throws BadInput on any process of a launched world (not
// null), all of them throw one: none goes on alone to where they meet.
void on_all_processes(World* world, const std::function<void()>& f);

// The lines that open a command's output on standard error: version, where cases run, and what is
// not checked there.
std::string header_text(const std::string& where, bool poison);

// What --no-poison costs, in words.
inline constexpr std::string_view kNoPoison =
    "memory is neither poisoned nor guarded (--no-poison): the poison and guard oracles are off";

}  // namespace tp
