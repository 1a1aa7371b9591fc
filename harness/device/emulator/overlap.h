#pragma once
// Overlapping kernels of the emulator: their launches run side by side (grid.cc), and a wait yields
// until the other one has ended.

#include "harness/device/emulator/thread.h"
#include "harness/device/overlap.h"

namespace tp {

inline void wait_for_previous_kernel(Where where) { emulator::wait_for_previous(where); }
inline void let_next_kernel_start(Where where) { emulator::let_next_start(where); }

}  // namespace tp
