#include "harness/fuzz/in_process.h"

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <utility>

#include "harness/base/check.h"
#include "harness/fuzz/fatal_signals.h"
#include "harness/fuzz/interrupt.h"
#include "harness/fuzz/where.h"
#include "harness/fuzz/worker.h"
#include "harness/group/world.h"

namespace tp {

namespace {

// What the worker code gets beyond a case's deadline to report what hangs in the emulator itself.
constexpr std::chrono::seconds kGrace{2};

// A case that does not come back, and nobody outside to notice: say which, and let mpirun end the
// rest.
void too_late(int) {
  say_in_flight("Hang");
  _exit(1);
}

void crashed(int) { say_in_flight("Crash"); }

}  // namespace

void name_crashes() { on_fatal_signal(crashed); }

InProcess::InProcess(World& world, std::string place) : world_(world), place_(std::move(place)) {
  catch_interrupts();
  std::signal(SIGALRM, too_late);
}

InProcess::~InProcess() { end_everywhere(world_); }

std::string InProcess::where() const {
  return fmt::format("{}, in the {} process{} it was started with, without crash recovery",
                     place_phrase(executor_name(), place_), world_.processes(),
                     world_.processes() == 1 ? "" : "es");
}

Answer InProcess::wait() {
  throw_if_interrupted();
  if (world_.retired())
    throw GaveUp("the processes have parted in the middle of a collective and can run no more");
  TP_CHECK(!waiting_.empty(), "waiting for nothing");
  Answer answer;
  answer.request = std::move(waiting_.front());
  waiting_.pop_front();
  const auto limit = answer.request.deadline + kGrace;
  alarm(unsigned(std::chrono::ceil<std::chrono::seconds>(limit).count()));
  answer.verdict = run_everywhere(world_, answer.request,
                                  [&](const std::string& line) { answer.trace.push_back(line); });
  alarm(0);
  return answer;
}

}  // namespace tp
