#pragma once
// Who runs cases for the fuzz loop: worker jobs under a supervisor (supervisor.h), or the processes
// of this very job (in_process.h).

#include <stdexcept>
#include <string>
#include <vector>

#include "harness/base/exit_codes.h"
#include "harness/base/verdict.h"
#include "harness/fuzz/protocol.h"

namespace tp {

// Nothing can be run any more: workers die before they run anything (kExitGaveUp), or say that
// this machine cannot run them (kExitUnavailable).
struct GaveUp : std::runtime_error {
  explicit GaveUp(const std::string& sentence, int code = kExitGaveUp)
      : std::runtime_error(sentence), exit_code(code) {}
  int exit_code;
};

// Of two executors (--on both): which of them show a finding. `bits`: neither, but their bits
// differ.
enum class Side { unasked, gpu, emulator, both, bits };

struct Answer {
  Request request;
  Verdict verdict;
  Side side = Side::unasked;  // unasked: one executor only, or no finding
  std::vector<std::string> trace;
  std::string log;  // the last lines of the job's standard error, where the case killed it
};

class Runner {
 public:
  virtual ~Runner() = default;

  // What runs where, a line for each executor: "emulator, 1 job of 2 processes on HOST".
  virtual std::string where() const = 0;
  // Whether submit() may be called.
  virtual bool has_room() const = 0;
  virtual void submit(Request request) = 0;
  // The next answer to anything submitted. Throws Interrupted (interrupt.h) and GaveUp.
  virtual Answer wait() = 0;
  // The runner for cases that crash or hang: a single process, with a spare one ready to take over.
  virtual Runner& alone() = 0;

  // Submit and wait, where nothing else is under way.
  Answer run(Request request) {
    submit(std::move(request));
    return wait();
  }
};

}  // namespace tp
