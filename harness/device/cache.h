#pragma once
// The device's caches, for who measures.

#include "harness/device/stream.h"

namespace tp {

// Reads so much of other memory, once the stream gets here, that no cache holds anything older.
// Nothing is written, so that no write is still to come when the next work begins.
void sweep_caches(Stream& stream);

}  // namespace tp
