#pragma once
// What came of a case. A verdict is a value: it travels from rank to rank, from worker to
// supervisor, and is printed as one line.

#include <cstdint>
#include <string>
#include <string_view>

namespace tp {

enum class Outcome : std::uint8_t {
  Pass,
  // Findings: the code under test is wrong.
  WrongValue,          // outside the budget
  NotFinite,           // NaN or infinity where the reference expects a number
  ReplicaMismatch,     // ranks that must hold equal bits do not
  Uninitialised,       // the result depends on what memory held before
  OutOfBounds,         // a guard was overwritten, or a slice lies outside its tensor
  InputModified,       // an input, or a column the operator does not own, has changed
  CollectiveMismatch,  // ranks disagree on which collective comes next
  BadLaunch,           // barrier divergence, sizes that do not fit each other
  LawBroken,           // a metamorphic law does not hold
  Crash,
  Hang,
  OutOfMemory,
  // No finding.
  Refused,     // an illegal case, with its reason
  Mistrusted,  // the data could not have shown the mistakes this shape allows: not a pass
  Skipped,     // the machine lacks something, with its reason
};

std::string_view name_of(Outcome outcome);
constexpr bool is_finding(Outcome o) { return o > Outcome::Pass && o < Outcome::Refused; }

// Where the time of a case went, by the GPU's own clock. The emulator has none.
struct Timing {
  // Of the slowest rank, all kernels of all stages; and of the slowest rank, its collectives.
  double kernel_us = 0;
  double collective_us = 0;
  int slowest_rank = -1;  // the one of kernel_us; -1: nothing was timed
  double bytes = 0;       // that the kernels of that rank must read and write at least
  double flops = 0;       // that they must do
  double floor_us = 0;    // the least that this GPU could take for them

  bool measured() const { return slowest_rank >= 0; }
};

// "x12.3 of its floor of 1.1 us: kernels 13.5 us on tp_rank 3, collectives 20.1 us"; empty where
// nothing was measured.
std::string timing_text(const Timing& timing);

struct Verdict {
  Outcome outcome = Outcome::Pass;
  std::string detail;        // one line: where, got, accepted; or the reason
  std::uint64_t digest = 0;  // xxHash of every gathered output, 0 if there was none
  // Functions of this executor's own are in it (exp, log, tanh): other executors may have other
  // bits, as many processes of this one may not.
  bool own_bits = false;
  double score = 0;  // largest |error| / budget (research/numerics.md section 4); <= 1 if accepted
  std::uint64_t threads = 0;  // emulated CUDA threads run, all ranks
  double seconds = 0;         // wall time of the case on the driving process
  Timing timing;              // counts only where the outcome is Pass

  bool finding() const { return is_finding(outcome); }
};

// One line without a newline, and back; the timing is in it where it was measured. from_line throws
// BadInput on anything to_line cannot have made.
std::string to_line(const Verdict& verdict);
Verdict verdict_from_line(std::string_view line);

}  // namespace tp
