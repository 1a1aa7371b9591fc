#include "harness/device/device.h"
#include "harness/group/peer_exchange.cuh"
#include "harness/group/peers_testing.h"

namespace tp {

namespace {

struct PollsOneWord : PeerProtocol {
  static constexpr bool kPollsBothWords = false;
};
struct TwoPlaces : PeerProtocol {
  static constexpr std::uint32_t kPlaces = 2;
};
struct NumbersAgain : PeerProtocol {
  static constexpr bool kGoesOnNumbering = false;
};

// Other in every exchange; NaN, infinity and zeros of both signs among them.
__device__ Vec<float, 2> value(int rank, int channel, int exchange, int launch) {
  const std::uint32_t n = std::uint32_t(((launch * 64 + exchange) * 64 + channel) * 32 + rank);
  const std::uint32_t special[] = {0x7FC00000u, 0xFF800000u, 0x80000000u, 0u};
  return {{std::bit_cast<float>(n % 5 == 0 ? special[n / 5 % 4] : n),
           std::bit_cast<float>(0x80000000u | n)}};
}

template <typename Protocol>
__global__ void exchange_kernel(Peers peers, int exchanges, int launch, unsigned* wrong) {
  const int rank = int(threadIdx.x), channel = int(blockIdx.x);
  PeerChannel<Protocol> end(peers, channel);
  const auto mine = [&](int e) { return value(peers.tp_rank, channel, e, launch); };
  if (rank < peers.tp_size) {
    end.send(peers, rank, mine(0));
    for (int e = 0; e < exchanges; ++e) {
      if (e + 1 < exchanges) end.send(peers, rank, mine(e + 1));
      const Vec<float, 2> got = end.receive(peers, rank, mine(e));
      const Vec<float, 2> sent = value(rank, channel, e, launch);
      for (int i = 0; i < 2; ++i) {
        if (std::bit_cast<std::uint32_t>(got[i]) != std::bit_cast<std::uint32_t>(sent[i]))
          atomicAdd(wrong, 1u);
      }
    }
  }
  __syncwarp();
  if (threadIdx.x == 0) end.close(peers);
}

}  // namespace

void launch_exchanges(const Peers& peers, Twin twin, int channels, int exchanges, int launch_number,
                      unsigned* wrong, Stream& stream) {
  const auto run = [&](auto* kernel) {
    launch("exchange", kernel, dim3(unsigned(channels)), dim3(32), 0, stream, peers, exchanges,
           launch_number, wrong);
  };
  switch (twin) {
    case Twin::right:
      return run(exchange_kernel<PeerProtocol>);
    case Twin::polls_one_word:
      return run(exchange_kernel<PollsOneWord>);
    case Twin::two_places:
      return run(exchange_kernel<TwoPlaces>);
    case Twin::numbers_again:
      return run(exchange_kernel<NumbersAgain>);
  }
}

}  // namespace tp
