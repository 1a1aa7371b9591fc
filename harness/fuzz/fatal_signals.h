#pragma once
// What a process still does when a signal is about to kill it, and the case that it was running.

#include <string_view>

namespace tp {

// From now on `last` is called before SIGSEGV, SIGBUS, SIGFPE, SIGILL or SIGABRT kills. It may do
// only what a signal handler may.
void on_fatal_signal(void (*last)(int signal));

// The case line that is being run, where a signal handler can read it.
void set_in_flight(std::string_view case_line);

// In a signal handler: prints "<what>: <the case line in flight>" on standard output.
void say_in_flight(const char* what);

}  // namespace tp
