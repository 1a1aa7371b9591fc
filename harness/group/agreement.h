#pragma once
// Whether ranks are at the same collective: what each process says before any data move, and what
// all of them make of it.

#include <cstdint>
#include <optional>
#include <vector>

#include "harness/device/fault.h"
#include "harness/group/ledger.h"

namespace tp {

// Where the ranks of one process are. Plain data without padding, sent as bytes.
struct Whereabouts {
  CollectiveHeader header;        // where most of them are
  std::int32_t ranks = 0;         // how many are there
  std::int32_t first_rank = -1;   // the first of them
  std::int32_t other_rank = -1;   // the first one that is not
  std::int32_t fault = 0;         // whether the process has a fault of its own
  CollectiveHeader other_header;  // where other_rank is
};

// headers[i]: where tp_rank first_rank + i is.
Whereabouts whereabouts_of(const std::vector<CollectiveHeader>& headers, int first_rank,
                           bool fault);

// Ranks that do not agree, as a fault, from what every process says; the same text on all of them.
// That a process has a fault of its own is a Pass: its own process says which.
std::optional<Fault> disagreement(const std::vector<Whereabouts>& processes, int tp_size);

}  // namespace tp
