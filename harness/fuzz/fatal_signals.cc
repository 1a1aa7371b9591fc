#include "harness/fuzz/fatal_signals.h"

#include <unistd.h>

#include <algorithm>
#include <csignal>
#include <cstring>

#include "harness/base/mapped_file.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define TP_SANITIZED 1
#endif
#endif
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TP_SANITIZED 1
#endif

namespace tp {

namespace {

char in_flight[2048];
void (*last_act)(int) = nullptr;
struct sigaction after[NSIG];

void act(int signal, siginfo_t* info, void*) {
  end_if_mapped_file_was_cut(*info);  // a file's fault, not the case's
  last_act(signal);
  sigaction(signal, &after[signal], nullptr);
  // A fault comes again by itself, and from where it happened; a signal that was sent does not.
  if (info->si_code <= 0) raise(signal);
}

}  // namespace

void on_fatal_signal(void (*last)(int)) {
  last_act = last;
  struct sigaction action = {};
  action.sa_sigaction = act;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) {
    sigaction(signal, &action, &after[signal]);
#if !defined(TP_SANITIZED)
    after[signal] = {};  // SIG_DFL: a backtrace of Open MPI's would only drown what was said
#endif
  }
#if !defined(TP_SANITIZED)
  // On a stack of its own, because running off the end of a fiber's stack is one of the ways to get
  // here. The sanitizers have set up theirs.
  static char stack[64 * 1024];
  const stack_t alternative = {.ss_sp = stack, .ss_flags = 0, .ss_size = sizeof(stack)};
  sigaltstack(&alternative, nullptr);
#endif
}

void set_in_flight(std::string_view case_line) {
  const std::size_t size = std::min(case_line.size(), sizeof(in_flight) - 1);
  std::memcpy(in_flight, case_line.data(), size);
  in_flight[size] = 0;
}

void say_in_flight(const char* what) {
  for (const char* text : {what, ": ", static_cast<const char*>(in_flight), "\n"}) {
    [[maybe_unused]] const auto written = write(STDOUT_FILENO, text, std::strlen(text));
  }
}

}  // namespace tp
