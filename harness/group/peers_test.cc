// Kernels that meet while they run.

#include "harness/group/peers.h"

#include <gtest/gtest.h>

#include "harness/device/buffer.h"
#include "harness/group/peers_testing.h"
#include "harness/group/place.h"
#include "harness/group/ranks_testing.h"

namespace tp {
namespace {

bool is_emulator() { return executor_name() == "emulator"; }
// Kernels of emulators in several processes cannot meet.
bool can_meet() { return !is_emulator() || test_world().processes() == 1; }

constexpr int kChannels = 2, kExchanges = 6, kLaunches = 3;

struct Met {
  unsigned wrong = 0;  // values, on all ranks of this process
  std::string text;
};

// Launches one after another with nothing in between, some of them from a graph.
Met meet(Twin twin, int tp_size, std::uint64_t seed, bool graph,
         std::chrono::milliseconds patience = std::chrono::seconds(20)) {
  Met met;
  met.text = text_of(run_ranks(
      tp_size, seed,
      [&](TpGroup& group, Stream& stream) {
        const Buffer counter("counter", sizeof(unsigned), 0);
        Recording recording;
        const std::optional<Peers> peers = group.peers(stream);
        EXPECT_TRUE(peers);
        for (int turn = 0; turn < 2 && peers; ++turn) {
          group.peer_exchange<float>(2 * kChannels * kExchanges * kLaunches, stream);
          if (graph) stream.begin_recording(recording);
          for (int launch = 0; launch < kLaunches; ++launch)
            launch_exchanges(*peers, twin, kChannels, kExchanges, launch, counter.as<unsigned>(),
                             stream);
          if (graph) stream.end_recording();
        }
        unsigned wrong = 0;
        to_host(stream, &wrong, counter.data(), sizeof(wrong));
        stream.synchronize();
        met.wrong += wrong;
      },
      patience, /*delays=*/true));
  return met;
}

TEST(Peers, KernelsGetWhatTheOthersSent) {
  if (!can_meet()) GTEST_SKIP() << "kernels of several emulators cannot meet";
  for (const int tp_size : {1, 2, 3, 5, 16}) {
    for (std::uint64_t seed = 0; seed < 10; ++seed) {
      const Met met = meet(Twin::right, tp_size, seed, seed % 2 == 1);
      EXPECT_EQ(met.text, "no fault") << tp_size << " ranks, seed " << seed;
      EXPECT_EQ(met.wrong, 0u) << tp_size << " ranks, seed " << seed;
    }
  }
}

// Words that come late, without each other and in any order show each of the mistakes: as values
// that nobody sent, or as a rank that waits for what was overwritten.
TEST(Peers, TheEmulatorShowsWhatIsWrongWithAProtocol) {
  if (!is_emulator() || !can_meet()) GTEST_SKIP() << "for one emulator";
  constexpr int kSeeds = 12;
  for (const Twin twin : {Twin::polls_one_word, Twin::two_places, Twin::numbers_again}) {
    int shown = 0;
    for (std::uint64_t seed = 0; seed < kSeeds; ++seed) {
      const Met met = meet(twin, 3, seed, false, std::chrono::milliseconds(200));
      shown += met.wrong > 0 || contains(met.text, "Hang");
    }
    EXPECT_GE(shown, kSeeds / 3) << "twin " << int(twin);
  }
}

// Before a kernel waits for others, it is known that they come.
TEST(Peers, ARankThatComesToSomethingElseIsAMismatch) {
  if (!can_meet()) GTEST_SKIP() << "kernels of several emulators cannot meet";
  const auto start = Clock::now();
  for (const bool other_count : {false, true}) {
    const std::string text = text_of(run_ranks(4, 1, [&](TpGroup& group, Stream& stream) {
      const Buffer counter("counter", sizeof(unsigned), 0);
      const std::optional<Peers> peers = group.peers(stream);
      if (!peers) return;
      const bool differs = group.tp_rank() == 2;
      if (differs && !other_count) {
        group.barrier(stream);
      } else {
        group.peer_exchange<float>(differs ? 5 : 4, stream);
        launch_exchanges(*peers, Twin::right, 1, 1, 0, counter.as<unsigned>(), stream);
      }
      stream.synchronize();
    }));
    EXPECT_EQ(text, std::string("CollectiveMismatch: tp_rank 2 is at #1 ") +
                        (other_count ? "peer_exchange of 5 f32" : "barrier") +
                        ", most others at #1 peer_exchange of 4 f32");
  }
  EXPECT_LT(Clock::now() - start, std::chrono::seconds(5));
}

TEST(Peers, ThereAreNoneWhereKernelsCannotMeet) {
  const auto has_peers = [](int tp_size, bool serial) {
    bool some = false;
    run_ranks(
        tp_size, 1,
        [&](TpGroup& group, Stream& stream) { some |= group.peers(stream).has_value(); },
        std::chrono::seconds(20), false, {}, serial);
    return some;
  };
  EXPECT_FALSE(has_peers(kMaxPeers + 1, false));
  EXPECT_FALSE(has_peers(2, true)) << "one kernel at a time";
  const bool hosts_one = test_world().process() < 2;  // a rank of two
  if (is_emulator()) {
    EXPECT_EQ(has_peers(2, false), hosts_one && can_meet());
  }
}

}  // namespace
}  // namespace tp
