#pragma once
// How tpcheck says no. Two kinds of "no" end a command with one sentence; a wrong *result* of the
// code under test is neither: it is a Verdict (verdict.h) and travels as a value.

#include <stdexcept>
#include <string>

namespace tp {

// What the user gave cannot be meant: a shape, a case line, a file, a flag. Exit code 2.
struct BadInput : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// What was asked is fine, but this machine cannot do it: no GPU, too few ranks. Exit code 3.
struct Unavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The harness itself is broken (not the code under test). Prints and ends the whole job.
[[noreturn]] void die(const char* file, int line, const std::string& message);

}  // namespace tp

// An invariant of the harness. Never an assert: it stays in release builds.
#define TP_CHECK(condition, message)                                                           \
  do {                                                                                         \
    if (!(condition)) ::tp::die(__FILE__, __LINE__, std::string(#condition ": ") + (message)); \
  } while (0)
