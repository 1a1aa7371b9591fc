#pragma once
// tpcheck explain: what every rank holds of a model, or why the model cannot be spread over so many
// ranks.

#include <optional>
#include <string>

#include "harness/base/models.h"

namespace tp {

struct ExplainOptions {
  Model model;  // id empty: a shape given on the command line
  int tp_size = 1;
  std::optional<int> tp_rank;  // this rank only
  int lora_rank = 0;           // 0: not asked for
  bool json = false;
};

// The table for people. Throws BadInput for an illegal pair of model and tp_size, or a rank outside
// of it.
std::string explain_table(const ExplainOptions& options);

// One line of JSON, with the same keys in the same order always; ranges are half-open, in rows of
// the unsharded tensor. An illegal pair has "valid":false, a reason and no ranks.
std::string explain_json(const ExplainOptions& options);

// Prints one of the two on standard output. Returns 0, or 2 for an illegal pair.
int explain_main(const ExplainOptions& options);

}  // namespace tp
