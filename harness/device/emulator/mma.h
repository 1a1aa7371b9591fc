#pragma once
// The meeting of a warp at a tensor core.

#include <cstdint>

#include "harness/device/emulator/thread.h"

namespace tp::emulator {

// What a lane brings: its value there is the address.
struct MmaOperands {
  const std::uint32_t* a;
  const std::uint32_t* b;
  float* c;
};

extern const WarpOperation kMmaF16, kMmaBf16;

}  // namespace tp::emulator
