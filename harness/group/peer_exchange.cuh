#pragma once
// The exchange of a few words between kernels of all ranks while they run: one way over NVLink and
// nothing else. Each value travels beside the number of its exchange, in a word that arrives whole
// (NCCL's LL protocol), so that the data are their own flag: no fence, no barrier, and whatever
// bits a value has. Whoever polls waits for the number in every word. Slots are used by turns in
// two places, which is enough: a rank sends its exchange n + 2 only when it has everybody's n + 1,
// and whoever sent that had read exchange n. Nothing has to be filled again (as with Lamport's
// empty words, FlashInfer's and TensorRT-LLM's, which take a third place for that), and the numbers
// go on from launch to launch, in device memory, so that graphs can be replayed.

#include <bit>
#include <cstdint>
#include <limits>

#include "harness/device/device.h"
#include "harness/group/peers.h"

namespace tp {

// What the tests replace.
struct PeerProtocol {
  static constexpr std::uint32_t kPlaces = 2;
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
        exchanges_(peers.tp_size > 1 && Protocol::kGoesOnNumbering ? peers.exchanges[channel] : 0) {
  }

  // Sends `mine` to `rank` and returns what it sent: NaN where nothing comes for too long.
  __device__ Values exchange(const Peers& peers, int rank, const Values& mine) {
    const std::uint32_t number = ++exchanges_;
    if (rank == peers.tp_rank) return mine;
    send_words(peers.slots[rank] + place(peers, peers.tp_rank),
               {packed(mine[0], number), packed(mine[1], number)});
    const PeerWords* const from = peers.slots[peers.tp_rank] + place(peers, rank);
    const SpinLimit limit;
    for (;;) {
      const PeerWords got = poll_words(from);
      if (std::uint32_t(got.first >> 32) == number &&
          (!Protocol::kPollsBothWords || std::uint32_t(got.second >> 32) == number))
        return {{value(got.first), value(got.second)}};
      if (limit.is_over()) return {{kNever, kNever}};
    }
  }

  // After the last exchange, by one thread of the block.
  __device__ void close(const Peers& peers) const {
    if (peers.tp_size > 1) peers.exchanges[channel_] = exchanges_;
  }

 private:
  static constexpr float kNever = std::numeric_limits<float>::quiet_NaN();

  __device__ static std::uint64_t packed(float value, std::uint32_t number) {
    return std::uint64_t{number} << 32 | std::bit_cast<std::uint32_t>(value);
  }
  __device__ static float value(std::uint64_t word) {
    return std::bit_cast<float>(std::uint32_t(word));
  }
  // Where a sender's words are in the slots of a rank.
  __device__ std::int64_t place(const Peers& peers, int sender) const {
    const std::uint32_t turn = exchanges_ % Protocol::kPlaces;
    return (std::int64_t{channel_} * 2 + turn) * peers.tp_size + sender;
  }

  int channel_;
  std::uint32_t exchanges_;
};

}  // namespace tp
