// CUDA's rules as kernels see them, on whichever backend this build has. The kernels' results are
// known, bit by bit.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "harness/device/kernels_testing.h"
#include "harness/device/larger.h"
#include "harness/device/sanitizer.h"
#include "harness/device/testing.h"

namespace tp::testing {
namespace {

using ::testing::Each;

std::vector<float> noise(int count, unsigned seed = 7) {
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  std::vector<float> values(count);
  for (float& value : values) value = uniform(generator) * std::exp2(float(generator() % 20));
  return values;
}

TEST(Kernels, EveryThreadOfEveryBlockRunsOnce) {
  const auto out = results<unsigned>(12 * 24, indices);
  for (unsigned i = 0; i < out.size(); ++i) EXPECT_EQ(out[i], i / 24 * 1000 + i % 24);
}

TEST(Kernels, WarpFunctionsAreCudas) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const auto out = results<std::int64_t>(32 * kWarpProbes, warp_functions, seed);
    for (int lane = 0; lane < 32; ++lane) {
      const std::int64_t* mine = out.data() + lane * kWarpProbes;
      EXPECT_EQ(mine[0], (lane / 8 * 8 + (lane + 3) % 8) * 10);
      EXPECT_EQ(mine[1], std::int64_t(lane ^ 5) << 33);
      EXPECT_EQ(mine[2], lane % 16 < 3 ? lane : lane - 3);
      EXPECT_EQ(mine[3], (lane < 30 ? lane + 2 : lane) * 2 + 1);
      EXPECT_EQ(mine[4], 0x49249249);
      EXPECT_EQ(mine[5], 2);
      EXPECT_EQ(mine[6], 2);
      EXPECT_EQ(mine[7], lane / 8 % 2 == 1 ? lane - 8 : lane)
          << "only earlier segments can be read";
    }
  }
}

TEST(Kernels, DisjointMasksMeetApart) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const auto out = results<unsigned>(64, half_masks, seed);
    for (unsigned lane = 0; lane < 32; ++lane) {
      EXPECT_EQ(out[lane], lane % 2 == 0 ? 0x55550000u : 0xAAAA0000u);
      EXPECT_EQ(out[32 + lane], lane % 2);
    }
  }
}

TEST(Kernels, ALaneMayWaitWhileAnotherMeetsSomebodyElseFirst) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const auto out = results<unsigned>(2, nested_masks, seed);
    EXPECT_THAT(out, Each(2u));
  }
}

TEST(Kernels, WarpSumHasTheBitsOfTheButterfly) {
  for (unsigned data = 0; data < 20; ++data) {
    const auto out = results<float>(64, [&](Stream& stream, float* out) {
      const Buffer x = upload(stream, noise(32, data));
      warp_sums(stream, x.as<float>(), out, out + 32);
    });
    for (int lane = 0; lane < 32; ++lane) EXPECT_EQ(out[lane], out[32 + lane]);
  }
}

// The order that reduce.h documents, written independently of it.
float documented_sum(std::vector<float> values) {
  std::vector<float> warps;
  for (std::size_t first = 0; first < values.size(); first += 32) {
    for (int distance = 16; distance >= 1; distance /= 2) {
      for (int i = 0; i < distance; ++i) values[first + i] += values[first + i + distance];
    }
    warps.push_back(values[first]);
  }
  while ((warps.size() & (warps.size() - 1)) != 0) warps.push_back(0.0f);
  for (; warps.size() > 1; warps.resize(warps.size() / 2)) {
    for (std::size_t i = 0; i < warps.size() / 2; ++i) warps[i] = warps[2 * i] + warps[2 * i + 1];
  }
  return warps[0];
}

TEST(Kernels, BlockSumIsTheDocumentedTreeUnderEverySchedule) {
  for (int threads : {32, 64, 96, 128, 160, 288, 512, 544, 1024}) {
    const std::vector<float> x = noise(threads);
    for (std::uint64_t seed = 0; seed < 5; ++seed) {
      const auto out = results<float>(
          threads,
          [&](Stream& stream, float* out) {
            const Buffer in = upload(stream, x);
            block_sums(stream, in.as<float>(), out, threads);
          },
          seed);
      EXPECT_THAT(out, Each(documented_sum(x))) << threads;
    }
  }
}

TEST(Kernels, BlockMaxKeepsNanAndTheSignOfZero) {
  const auto maximum = [](std::vector<float> x) {
    const int threads = int(x.size());
    const auto out = results<float>(threads, [&](Stream& stream, float* out) {
      const Buffer in = upload(stream, x);
      block_maxima(stream, in.as<float>(), out, threads);
    });
    for (float value : out) EXPECT_EQ(std::signbit(value), std::signbit(out[0]));
    return out.back();
  };
  std::vector<float> x = noise(96);
  EXPECT_EQ(maximum(x), *std::max_element(x.begin(), x.end()));
  x[50] = NAN;
  EXPECT_TRUE(std::isnan(maximum(x)));
  x.assign(64, -0.0f);
  EXPECT_TRUE(std::signbit(maximum(x)));
  x[33] = 0.0f;
  EXPECT_FALSE(std::signbit(maximum(x)));
}

TEST(Kernels, AtomicsAddUp) {
  constexpr int kBlocks = 6;
  constexpr int kThreads = 40;
  constexpr int n = kBlocks * kThreads;
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    const AtomicResults r = results<AtomicResults>(
        1, [](Stream& stream, AtomicResults* out) { atomics(stream, out, kBlocks, kThreads); },
        seed)[0];
    EXPECT_EQ(r.add_int, -n * (n - 1) / 2);
    EXPECT_EQ(r.max_int, n - 1);
    EXPECT_EQ(r.min_int, 1 - n);
    EXPECT_EQ(r.add_unsigned, 2u * n);
    EXPECT_EQ(r.add_wide, (1ull << 33) * n);
    EXPECT_EQ(r.add_float, float(n));
    EXPECT_EQ(r.exchanged, 5u);
    EXPECT_EQ(r.locked, n);
    EXPECT_EQ(r.lock, 0);
  }
}

TEST(Kernels, ABlockMayWaitForAnother) {
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    EXPECT_EQ(
        results<int>(
            2, [](Stream& stream, int* out) { blocks_wait(stream, out, out + 1, 6); }, seed)[1],
        1);
  }
}

TEST(Kernels, VectorsAreCopiedWhole) {
  std::vector<std::uint16_t> x(64);
  std::iota(x.begin(), x.end(), 1);
  const auto out = results<std::uint16_t>(64, [&](Stream& stream, std::uint16_t* out) {
    const Buffer in = upload(stream, x);
    reverse_vectors(stream, in.as<std::uint16_t>(), out, 64);
  });
  for (int i = 0; i < 64; ++i) EXPECT_EQ(out[i], x[i / 8 * 8 + 7 - i % 8]);
}

constexpr std::uint64_t kRoundingHashes[kRoundings] = {
    0x9c7b3df44ebc3683, 0xeed2664881f14cc9, 0x461550cd54206eb1, 0xc4d1087e18d4be11,
    0xbe03d5e1a3c841dd, 0x7222cce746b12325, 0xbd1caa6a06436325, 0xc957273dc6c7e04b};

// Values whose bits depend on how each operation rounds: the same on the emulator and on a GPU.
TEST(Kernels, GiveTheSameBitsOnEveryBackend) {
  const std::vector<float> x = noise(4096, 3);
  const auto bits = results<std::uint32_t>(kRoundings * 4096, [&](Stream& stream, unsigned* out) {
    const Buffer in = upload(stream, x);
    roundings(stream, in.as<float>(), out, 4096);
  });
  for (int i = 0; i < kRoundings; ++i) {
    std::uint64_t hash = 0xcbf29ce484222325ull;
    for (int j = 0; j < 4096; ++j) hash = (hash ^ bits[i * 4096 + j]) * 0x100000001b3ull;
    EXPECT_EQ(hash, kRoundingHashes[i]) << "operation " << i << std::hex << ": 0x" << hash;
  }
}

// A producer and a consumer on two streams, ordered by an event or, by mistake, by nothing.
bool order_holds(bool event, bool delays, std::uint64_t seed) {
  std::vector<float> got;
  Scheduler scheduler({.seed = seed, .delays = delays});
  scheduler.add_rank(0, [&](Stream& stream) {
    Stream& other = stream.scheduler().add_stream(0);
    const Buffer x = upload(stream, std::vector<float>(4, 0.0f));
    const Buffer y = upload(stream, std::vector<float>(4, 0.0f));
    stream.synchronize();
    fill(stream, x.as<float>(), 4, 7.0f);
    const Event filled;
    stream.record(filled);
    if (event) other.wait(filled);
    copy(other, x.as<float>(), y.as<float>(), 4);
    other.synchronize();
    got = download<float>(stream, y);
  });
  const Report report = scheduler.run();
  EXPECT_FALSE(report.fault) << report.fault->what;
  return got == std::vector<float>(4, 7.0f);
}

TEST(Delays, ShowAMissingEvent) {
  if (kTsan) GTEST_SKIP() << "ThreadSanitizer itself sees the race, and fails the test for it";
  int shown = 0;
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    EXPECT_TRUE(order_holds(true, true, seed)) << seed;
    const bool holds = order_holds(false, true, seed);
    shown += !holds;
  }
  EXPECT_GE(shown, 3) << "of 30";
}

// What is launched again is what was recorded: the same arguments, over new data.
TEST(Recording, LaunchesTheSameKernelsAgain) {
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    run_rank(
        [](Stream& stream) {
          const Buffer x = upload(stream, std::vector<float>(8, 1.0f));
          const Buffer y = upload(stream, std::vector<float>(8, 0.0f));
          const Buffer z = upload(stream, std::vector<float>(8, 0.0f));
          Recording recording;
          std::vector<std::vector<float>> got;
          for (float value : {2.0f, 3.0f}) {
            const std::vector<float> data(8, value);
            from_host(stream, x.data(), data.data(), 32);
            stream.begin_recording(recording);
            copy(stream, x.as<float>(), y.as<float>(), 8);
            fill(stream, x.as<float>(), 4, 10 * value);
            stream.pass([] {});
            copy(stream, x.as<float>(), z.as<float>(), 8);
            stream.end_recording();
            got.push_back(download<float>(stream, y));
            got.push_back(download<float>(stream, z));
          }
          EXPECT_THAT(got[0], Each(2.0f));
          EXPECT_THAT(got[1], ::testing::ElementsAre(20, 20, 20, 20, 2, 2, 2, 2));
          EXPECT_THAT(got[2], Each(3.0f));
          // The value that was filled in is the recorded one.
          EXPECT_THAT(got[3], ::testing::ElementsAre(20, 20, 20, 20, 3, 3, 3, 3));
        },
        seed);
  }
}

TEST(Recording, OtherKernelsTheSecondTimeAreRefused) {
  for (const int second : {0, 2}) {
    EXPECT_THAT(fault_of([&](Stream& stream) {
                  const Buffer x = upload(stream, std::vector<float>(8, 1.0f));
                  Recording recording;
                  for (const int kernels : {1, second}) {
                    stream.begin_recording(recording);
                    for (int i = 0; i < kernels; ++i) fill(stream, x.as<float>(), 8, 1.0f);
                    stream.end_recording();
                  }
                }),
                ::testing::HasSubstr("BadLaunch: the second time"));
  }
}

TEST(Larger, IsAnOrderOfFloats) {
  EXPECT_EQ(larger(1.0f, 2.0f), 2.0f);
  EXPECT_EQ(larger(2.0f, 1.0f), 2.0f);
  EXPECT_TRUE(std::isnan(larger(NAN, 1.0f)));
  EXPECT_TRUE(std::isnan(larger(1.0f, NAN)));
  EXPECT_FALSE(std::signbit(larger(-0.0f, 0.0f)));
  EXPECT_FALSE(std::signbit(larger(0.0f, -0.0f)));
}

}  // namespace
}  // namespace tp::testing
