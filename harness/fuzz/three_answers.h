#pragma once
// replay --on both: the same problem three times, so that the answer that stands alone can be
// named. The ranks on the GPU, the ranks in the emulator, and one rank with the whole problem.

#include <string>

#include "harness/base/verdict.h"

namespace tp {

struct ThreeAnswers {
  Verdict gpu, emulator;
  Verdict one_rank;  // tp_size=1, in the emulator, one process
};

// All that was found, as one verdict.
Verdict overall(const ThreeAnswers& answers);

// One sentence: "all three agree", or which of them stands alone, or why that cannot be said. GPU
// and emulator agree if they give the same bits; one rank rounds differently, and so agrees with
// whoever passes as it does, or fails as it does (same_failure of shrink.h). Bits of its own count
// only where they settle a quarrel.
std::string stands_alone(const ThreeAnswers& answers);

// A row for each, and the sentence.
std::string three_answers_text(const ThreeAnswers& answers);

}  // namespace tp
