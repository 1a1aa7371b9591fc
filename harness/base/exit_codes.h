#pragma once
// What tpcheck returns (design.md section 6); 0: all agreed.

namespace tp {

inline constexpr int kExitFinding = 1;   // the code under test is wrong; or a mutant was not found
inline constexpr int kExitBadInput = 2;  // BadInput
inline constexpr int kExitUnavailable = 3;  // the machine cannot do what was asked
inline constexpr int kExitNothingRan = 4;   // or nothing that could be trusted
inline constexpr int kExitUnstable = 5;     // a failure was seen that its own replay did not show
inline constexpr int kExitGaveUp = 70;      // the harness itself cannot go on
inline constexpr int kExitInterrupted = 72;

}  // namespace tp
