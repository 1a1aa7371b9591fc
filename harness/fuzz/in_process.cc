#include "harness/fuzz/in_process.h"

#include <fmt/format.h>
#include <unistd.h>

#include <csignal>
#include <cstring>

#include "harness/base/check.h"
#include "harness/fuzz/interrupt.h"
#include "harness/fuzz/worker.h"
#include "harness/group/world.h"

namespace tp {

namespace {

char in_flight[2048];

// A case that does not come back, and nobody outside to notice: say which, and let mpirun end the
// rest.
void too_late(int) {
  for (const char* text : {"Hang: ", static_cast<const char*>(in_flight), "\n"}) {
    [[maybe_unused]] const auto written = write(STDOUT_FILENO, text, std::strlen(text));
  }
  _exit(1);
}

}  // namespace

InProcess::InProcess(World& world) : world_(world) {
  catch_interrupts();
  std::signal(SIGALRM, too_late);
}

InProcess::~InProcess() { end_everywhere(world_); }

std::string InProcess::where() const {
  return fmt::format("in the {} process{} it was started with, without crash recovery",
                     world_.processes(), world_.processes() == 1 ? "" : "es");
}

Answer InProcess::wait() {
  throw_if_interrupted();
  if (world_.retired())
    throw GaveUp("the processes have parted in the middle of a collective and can run no more");
  TP_CHECK(!waiting_.empty(), "waiting for nothing");
  Answer answer;
  answer.request = std::move(waiting_.front());
  waiting_.pop_front();
  answer.request.line.copy(in_flight, sizeof(in_flight) - 1);
  in_flight[std::min(answer.request.line.size(), sizeof(in_flight) - 1)] = 0;
  const auto seconds = answer.request.deadline.count() / 1000;
  if (seconds > 0)
    alarm(unsigned(seconds + 2));  // the worker code itself reports what hangs in the emulator
  answer.verdict = run_everywhere(world_, answer.request,
                                  [&](const std::string& line) { answer.trace.push_back(line); });
  alarm(0);
  return answer;
}

}  // namespace tp
