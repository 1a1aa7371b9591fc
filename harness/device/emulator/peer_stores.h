#pragma once
// Stores into another rank's memory on their way there: each word arrives by itself, some steps of
// the scheduler later, in an order drawn from the seed. Only words of one thread for one address
// keep their order. A fence of the block and the end of the launch wait for all of theirs.

#include <cstddef>

#include "harness/device/random.h"

namespace tp::emulator {

struct BlockInfo;
struct Launch;

// A word of 1, 2, 4 or 8 bytes, aligned to its size, from the running thread.
void store_late(void* address, const void* word, std::size_t bytes);

// Some of the words that are on their way arrive. Nothing is drawn where there are none.
void deliver_some(Random& random);
// All of a block's, of a launch's.
void deliver_all(const BlockInfo& block);
void deliver_all(const Launch& launch);
// Words of a launch that is given up never arrive.
void lose_all(const Launch& launch);

}  // namespace tp::emulator
