#pragma once
// What kernels of all ranks of a group need to meet while they run (peer_exchange.cuh): a rank's
// part of the group's peer memory, and where the parts of the other ranks are.

#include <cstddef>
#include <cstdint>

#include "harness/device/peer_words.h"

namespace tp {

// Ranks of a group whose kernels can meet, at most.
inline constexpr int kMaxPeers = 16;
// Places that a channel has for the words of a sender.
inline constexpr int kPeerPlaces = 4;

// A kernel argument. A channel connects a block of this rank with the blocks of the same number of
// all other ranks. All of the memory is zero before the group's first exchange.
struct Peers {
  int tp_rank = 0;
  int tp_size = 1;
  int channels = 0;          // of each rank
  int ranks_per_device = 1;  // at most: they share its multiprocessors
  // slots[rank] [channels][kPeerPlaces][tp_size]: what each rank sent to `rank`; as this rank's
  // kernels reach it.
  PeerWords* slots[kMaxPeers] = {};
  std::uint32_t* exchanges = nullptr;  // [channels]: how many each has had, in this rank's memory
};

// Of a rank's memory: what the slots take, and all of it.
constexpr std::size_t peer_slot_bytes(int tp_size, int channels) {
  return std::size_t(channels) * kPeerPlaces * std::size_t(tp_size) * sizeof(PeerWords);
}
constexpr std::size_t peer_bytes(int tp_size, int channels) {
  const std::size_t bytes = peer_slot_bytes(tp_size, channels) + std::size_t(channels) * 4;
  return (bytes + 255) / 256 * 256;
}

}  // namespace tp
