#pragma once
// Why a run on a device ended early: the verdict's outcome, one sentence, and the rank to blame.

#include <string>

#include "harness/base/verdict.h"

namespace tp {

// Thrown by host code of a rank (a launch that cannot be), or recorded by the scheduler for what a
// kernel did. A Fault is a finding about the code under test, never a broken harness.
struct Fault {
  Outcome outcome = Outcome::BadLaunch;
  std::string what;
  int tp_rank = -1;  // -1: no single rank
  // What went wrong may well be the consequence of what another process does or does not do.
  bool of_others = false;
};

}  // namespace tp
