#pragma once
// The meetings of a warp's lanes.

#include <cstdint>

#include "harness/device/emulator/thread.h"

namespace tp::emulator {

// Lanes of one mask that wait for each other.
struct Meeting {
  const WarpOperation* operation = nullptr;
  std::uint32_t mask = 0;
  std::uint32_t arrived = 0;
  Where where;
};

struct Warp {
  static constexpr int kMeetings = 16;  // disjoint masks of two lanes or more

  std::uint64_t value[32];  // what each lane brought, then what it gets
  std::uint32_t parameter[32];
  Meeting meetings[kMeetings];
  int open = 0;  // meetings that wait
  std::uint32_t exited = 0;
  std::uint32_t parity = 0;  // TSan: of the meetings that were led by a lane
  std::uint64_t clock[2][32] = {};
};

}  // namespace tp::emulator
