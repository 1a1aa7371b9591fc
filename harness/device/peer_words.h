#pragma once
// What kernels of different ranks send each other while they run. The dialects define
//   - send_words(address, words): one store of 16 bytes, to any rank's memory;
//   - poll_words(address): what is there just now;
//   - SpinLimit: how long to poll.
// Nothing orders what is sent: each of the two words arrives whole, but at any time, without the
// other and before what was sent earlier. So a word must say for itself that it is there, and a
// kernel must not send to where the last words may not have been read.

#include <cstdint>

namespace tp {

struct alignas(16) PeerWords {
  std::uint64_t first = 0, second = 0;
};

}  // namespace tp
