#pragma once
// From a failing case to something a person can act on: replayed, shrunk, compared with known bugs,
// and printed with one line to paste.

#include <functional>
#include <optional>
#include <string>

#include "harness/base/operator.h"
#include "harness/fuzz/runner.h"
#include "harness/fuzz/shrink.h"
#include "harness/fuzz/where.h"

namespace tp {

struct Finding {
  Case original;
  Case smallest;
  Verdict verdict;                // of `smallest`
  int runs = 0;                   // spent on shrinking
  bool replayed = false;          // its own replay came to an end
  bool reproduced = false;        // and failed again; if not, nothing else was tried
  bool interrupted = false;       // Ctrl-C came while it was replayed or shrunk
  std::optional<GaveUp> gave_up;  // why nothing can be run since
  Where where;                    // it was seen last
  bool poison = true;             // Request::poison
  bool serial = false;            // Request::serial of the run that failed
  double timeout = 0;             // the case's deadline in seconds, where one was asked for; else 0
  std::string mutant;             // id of the mutant that was run; empty: none
  std::string looks_like;         // known bugs that give the same bits
  std::string log;                // what the worker last said, if it died
};

using FindingReport = std::function<void(const Finding&)>;
using MakeRequest = std::function<Request(const Case&)>;

// Replays and shrinks the failing case of `answer`, and looks for the mutant that gives the same
// output. `where` is the runner's. Ctrl-C ends that and is noted, and so is a runner that
// gives up.
Finding investigate(Runner& runner, const Answer& answer, const MakeRequest& request,
                    const Where& where, const ShrinkLimits& limits);

// The failing case of `answer` as it was seen.
Finding not_replayed(const Answer& answer, const Where& where);

// One finding of each signature is enough: operator, outcome, and whose it is.
std::string signature(const Answer& failure);

// The command that runs the finding again.
std::string replay_command(const Finding& finding);

// The block of design.md section 7.
std::string finding_text(const Finding& finding, int number);

}  // namespace tp
