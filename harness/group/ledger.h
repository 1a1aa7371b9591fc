#pragma once
// What each rank of a process was doing, in a mapped file that survives a killed process. So a
// crash or a hang is blamed on a rank, and ranks that disagree on their collectives are told apart.

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "harness/device/running.h"

namespace tp {

// One collective as a rank entered it. Messages between processes start with it, too. Plain data
// without padding, so that headers can be compared and sent as bytes.
struct CollectiveHeader {
  std::int64_t sequence = 0;  // 1, 2, ... of this rank in this case
  std::int64_t count = 0;     // elements, as its caller counts them
  char operation[24] = {};    // "all_reduce_sum", ..., or kEnd
  char dtype[8] = {};
  std::int64_t communicator = 0;  // 0: the group's own
  std::int64_t root = -1;         // whose data everybody gets; -1: not of this operation

  bool operator==(const CollectiveHeader&) const = default;
};
CollectiveHeader make_header(std::int64_t sequence, std::string_view operation, std::int64_t count,
                             std::string_view dtype);
std::string describe(const CollectiveHeader& header);
// The end of a rank's case is a header, too: whoever still waits learns of it at once.
inline constexpr std::string_view kEnd = "end of case";

struct LedgerPage {
  static constexpr int kRanks = 1024;  // ranks a process can host
  static constexpr int kRing = 8;      // last collectives kept of each
  struct Rank {
    std::int64_t entered;  // collectives entered so far in this case
    std::array<CollectiveHeader, kRing> ring;
  };

  RunningNow running;
  std::int32_t first_rank = 0;
  std::int32_t num_ranks = 0;  // 0: no case is running
  std::array<Rank, kRanks> ranks{};

  void begin_case(int first, int count);
  void enter(int tp_rank, const CollectiveHeader& header);
};

// The page of this process: the file process-<number> in the folder $TPCHECK_LEDGER names, or plain
// memory where that is unset. Mapped on the first call.
LedgerPage& ledger_page(int process);

// What the ledgers in `folder` say of a job that died or hung, as one sentence: which rank was
// running what, and which ranks' collectives lag behind. Empty if they say nothing.
std::string read_ledgers(const std::string& folder);

}  // namespace tp
