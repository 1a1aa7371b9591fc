#pragma once
// tpcheck replay: runs case lines again and says whether they still fail.

#include <string>
#include <vector>

#include "harness/fuzz/where.h"

namespace tp {

class World;

struct ReplayOptions {
  std::vector<std::string>
      inputs;           // case lines, files of case lines ('#' starts a comment), folders of *.case
  Where where;          // one job of it
  bool poison = true;   // RunOptions::poison
  bool serial = false;  // RunOptions::serial
  int times = 1;        // how often each case is run
  double timeout = 0;   // of a case, in seconds; 0: 30
  bool trace = false;   // print each stage's values and each collective of every rank
  std::string mutant;
  std::string model;    // directory of the checkpoint whose tensors the cases run on; empty: none
  std::string adapter;  // folder of one for `model`, which needs no tensors then; empty: none
};

// Exit code 1 if a case still fails, 0 if all pass. With --on both each case is run three times,
// and what stands alone is named (three_answers.h). Throws BadInput for a line or file that cannot
// be meant.
int replay_main(World* world, const ReplayOptions& options);

}  // namespace tp
