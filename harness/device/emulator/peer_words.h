#pragma once
// Words between ranks in the emulator: each is delivered by itself, late, in a drawn order.

#include "harness/device/emulator/atomics.h"
#include "harness/device/emulator/peer_stores.h"
#include "harness/device/peer_words.h"

namespace tp {

inline void send_words(PeerWords* address, PeerWords words, Where where = Where::here()) {
  emulator::yield("send_words", where);
  emulator::store_late(&address->first, &words.first, sizeof(words.first));
  emulator::store_late(&address->second, &words.second, sizeof(words.second));
}
inline PeerWords poll_words(const PeerWords* address, Where where = Where::here()) {
  emulator::yield("poll_words", where);
  PeerWords words;
  words.first = __atomic_load_n(&address->first, __ATOMIC_RELAXED);
  words.second = __atomic_load_n(&address->second, __ATOMIC_RELAXED);
  return words;
}

// The scheduler's deadline ends what spins, and says who it was.
class SpinLimit {
 public:
  bool is_over() const { return false; }
};

}  // namespace tp
