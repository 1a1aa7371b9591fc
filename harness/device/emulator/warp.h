#pragma once
// The meetings of a warp's lanes.

#include <cstdint>

#include "harness/device/emulator/thread.h"

namespace tp::emulator {

// Lanes of one mask that wait for each other. Masks of meetings that wait at the same time may
// overlap: a lane is at one of them only, and comes to the others later.
struct Meeting {
  const WarpOperation* operation = nullptr;
  std::uint32_t mask = 0;
  std::uint32_t arrived = 0;
  Where where;
  std::uint64_t* clock = nullptr;  // TSan
};

struct Warp {
  static constexpr int kMeetings = 32;  // in each a lane that is nowhere else

  std::uint64_t value[32];  // what each lane brought, then what it gets
  std::uint32_t parameter[32];
  Meeting meetings[kMeetings];
  int open = 0;  // meetings that wait
  std::uint32_t exited = 0;
  std::uint32_t parity = 0;  // TSan: of the meetings to which a lane was the first to come
  std::uint64_t clock[2][32] = {};
};

}  // namespace tp::emulator
