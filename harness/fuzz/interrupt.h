#pragma once
// Ctrl-C: a flag and a file descriptor to poll, so that the loop can stop its jobs and print what
// it has.

namespace tp {

// Thrown where work stops because of Ctrl-C, SIGTERM or SIGHUP: kExitInterrupted.
struct Interrupted {};

// From now on SIGINT, SIGTERM and SIGHUP are noted instead of ending the process, and SIGPIPE is
// ignored. A SIGHUP that nohup has us ignore stays ignored.
void catch_interrupts();

// A file descriptor that is readable once a signal has come; -1 before catch_interrupts().
int interrupt_fd();

// Throws Interrupted once a signal has come.
void throw_if_interrupted();

}  // namespace tp
