#pragma once
// The exchange of a few words between kernels of all ranks while they run: one way over NVLink and
// nothing else. Each value travels beside the number of its exchange, in a word that arrives whole
// (NCCL's LL protocol), so that the data are their own flag: no fence, no barrier, and whatever
// bits a value has. Whoever polls waits for the number in every word. Nothing has to be emptied
// again (as with Lamport's empty words, FlashInfer's and TensorRT-LLM's), and the numbers go on
// from launch to launch, in device memory, so that graphs can be replayed.
//
// A rank may send one exchange before it has received the one before. Then four places, used by
// turns, are enough: who sends exchange n + 4 has received everybody's n + 2, and who sent that had
// received all of n, which was in the same place.

#include <bit>
#include <cstdint>
#include <limits>

#include "harness/device/device.h"
#include "harness/group/peers.h"

namespace tp {

// What the tests replace.
struct PeerProtocol {
  static constexpr std::uint32_t kPlaces = kPeerPlaces;
  static constexpr bool kPollsBothWords = true;
  static constexpr bool kGoesOnNumbering = true;  // from launch to launch
};

// One thread's end of a channel: it talks to one rank. All ranks' blocks of this number make the
// same exchanges, and all of them run at the same time.
template <typename Protocol = PeerProtocol>
class PeerChannel {
 public:
  using Values = Vec<float, 2>;

  __device__ PeerChannel(const Peers& peers, int channel)
      : channel_(channel),
        sent_(peers.tp_size > 1 && Protocol::kGoesOnNumbering ? peers.exchanges[channel] : 0),
        received_(sent_) {}

  __device__ void send(const Peers& peers, int rank, const Values& mine) {
    ++sent_;
    if (rank == peers.tp_rank) return;
    send_words(slot(peers, rank, sent_, peers.tp_rank),
               {packed(mine[0], sent_), packed(mine[1], sent_)});
  }

  // What `rank` sent in the first exchange that was not received yet, NaN where nothing comes for
  // too long. `mine`: what this rank sent in it.
  __device__ Values receive(const Peers& peers, int rank, const Values& mine) {
    ++received_;
    if (rank == peers.tp_rank) return mine;
    const PeerWords* const from = slot(peers, peers.tp_rank, received_, rank);
    const SpinLimit limit;
    for (;;) {
      const PeerWords got = poll_words(from);
      if (number(got.first) == received_ &&
          (!Protocol::kPollsBothWords || number(got.second) == received_))
        return {{value(got.first), value(got.second)}};
      if (limit.is_over()) return {{kNever, kNever}};
    }
  }

  // After the last exchange, by one thread of the block.
  __device__ void close(const Peers& peers) const {
    if (peers.tp_size > 1) peers.exchanges[channel_] = received_;
  }

 private:
  static constexpr float kNever = std::numeric_limits<float>::quiet_NaN();

  __device__ static std::uint64_t packed(float value, std::uint32_t number) {
    return std::uint64_t{number} << 32 | std::bit_cast<std::uint32_t>(value);
  }
  __device__ static float value(std::uint64_t word) {
    return std::bit_cast<float>(std::uint32_t(word));
  }
  __device__ static std::uint32_t number(std::uint64_t word) { return std::uint32_t(word >> 32); }
  // Where a sender's words of this exchange are, in a rank's memory.
  __device__ PeerWords* slot(const Peers& peers, int rank, std::uint32_t exchange,
                             int sender) const {
    const std::int64_t place = std::int64_t{channel_} * kPeerPlaces + exchange % Protocol::kPlaces;
    return peers.slots[rank] + place * peers.tp_size + sender;
  }

  int channel_;
  std::uint32_t sent_, received_;  // the last exchanges
};

}  // namespace tp
