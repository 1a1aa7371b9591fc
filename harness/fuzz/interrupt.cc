#include "harness/fuzz/interrupt.h"

#include <fcntl.h>
#include <unistd.h>

#include <csignal>

#include "harness/base/check.h"

namespace tp {

namespace {

volatile std::sig_atomic_t interrupted = 0;
int pipe_ends[2] = {-1, -1};

void note(int) {
  interrupted = 1;
  // The byte stays in the pipe, so that every later poll sees it as well.
  [[maybe_unused]] const auto written = write(pipe_ends[1], "!", 1);
}

}  // namespace

void catch_interrupts() {
  if (pipe_ends[0] >= 0) return;
  TP_CHECK(pipe2(pipe_ends, O_CLOEXEC | O_NONBLOCK) == 0, "no pipe for signals");
  struct sigaction action = {};
  action.sa_handler = note;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  struct sigaction before = {};
  sigaction(SIGHUP, nullptr, &before);
  if (before.sa_handler != SIG_IGN) sigaction(SIGHUP, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
}

int interrupt_fd() { return pipe_ends[0]; }

void throw_if_interrupted() {
  if (interrupted) throw Interrupted{};
}

}  // namespace tp
