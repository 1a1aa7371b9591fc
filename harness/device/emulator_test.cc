// What the emulator adds to CUDA: orders drawn from a seed, poison, and sentences about broken
// rules.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <set>

#include "harness/device/kernels_testing.h"
#include "harness/device/sanitizer.h"
#include "harness/device/testing.h"

namespace tp::testing {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;

TEST(Emulator, CountsItsThreads) {
  const Report report = run_rank([](Stream& stream) { launch_sized(stream, 5, 33, 2, 0); });
  EXPECT_EQ(report.blocks, 5u);
  EXPECT_EQ(report.threads, 330u);
}

std::vector<unsigned> order(std::uint64_t seed) {
  return results<unsigned>(
      4 * 96 + 1, [](Stream& stream, unsigned* out) { trace_order(stream, out + 1, out, 4, 96); },
      seed);
}

TEST(Emulator, TheSeedDecidesTheOrder) {
  std::set<std::vector<unsigned>> orders;
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    orders.insert(order(seed));
    EXPECT_EQ(order(seed), order(seed));
  }
  EXPECT_EQ(orders.size(), 10u);
  // Whatever the order, each thread comes once.
  std::vector<unsigned> threads(orders.begin()->begin() + 1, orders.begin()->end());
  std::sort(threads.begin(), threads.end());
  for (unsigned i = 0; i < threads.size(); ++i) EXPECT_EQ(threads[i], i);
}

TEST(Emulator, TheSeedDecidesTheOrderBehindABarrier) {
  std::set<std::vector<unsigned>> orders;
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    orders.insert(results<unsigned>(
        65, [](Stream& stream, unsigned* out) { trace_barrier(stream, out + 1, out, 64); }, seed));
  }
  EXPECT_EQ(orders.size(), 10u);
}

TEST(Emulator, SharedMemoryIsPoisonedForEveryBlock) {
  EXPECT_THAT(
      results<unsigned>(
          5 * 64, [](Stream& stream, unsigned* out) { read_fresh_shared(stream, out, 5, 64); }),
      Each(0xFFFFFFFFu));
}

TEST(EmulatorFault, BarrierDivergence) {
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    EXPECT_THAT(
        fault_of(some_skip_barrier, seed),
        MatchesRegex("BadLaunch: barrier divergence in kernel some_skip_barrier, block 0: "
                     "7 at __syncthreads \\(kernels_testing.cu:[0-9]+\\), 121 exited, of 128"));
  }
}

TEST(EmulatorFault, BarriersAtDifferentLines) {
  EXPECT_THAT(fault_of(barrier_at_two_lines),
              AllOf(HasSubstr("barrier divergence in kernel barrier_at_two_lines, block (0, "),
                    HasSubstr("7 at __syncthreads (kernels_testing.cu:"),
                    HasSubstr("57 at __syncthreads (kernels_testing.cu:"), HasSubstr(", of 64")));
}

TEST(EmulatorFault, WarpDivergence) {
  EXPECT_THAT(fault_of(some_skip_warp_sum),
              MatchesRegex(
                  "BadLaunch: warp collective divergence in kernel some_skip_warp_sum, block 0, "
                  "warp 1: 20 of 32 lanes at warp_sum \\(kernels_testing.cu:[0-9]+\\), 12 exited"));
}

TEST(EmulatorFault, MaskMustNameItsCaller) {
  EXPECT_THAT(fault_of(mask_without_caller),
              AllOf(HasSubstr("BadLaunch"), HasSubstr("warp 0: lane 3 is at __syncwarp"),
                    HasSubstr("mask 0xfffffff7, which does not name it")));
}

TEST(EmulatorFault, MasksMustNotOverlap) {
  EXPECT_THAT(fault_of(overlapping_masks), AllOf(HasSubstr("0x0001ffff"), HasSubstr("0xffff8000"),
                                                 HasSubstr("others wait at __syncwarp")));
}

TEST(EmulatorFault, MasksInACircle) {
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    EXPECT_THAT(fault_of(masks_in_a_circle, seed), HasSubstr("warp 0: 1 of 2 lanes at __syncwarp"));
  }
}

TEST(EmulatorFault, NoMemoryForStacks) {
  if (kAsan || kTsan) GTEST_SKIP() << "their own memory exceeds every limit";
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // a process that has no stacks yet
  const auto run = [] {
    rlimit limit;
    getrlimit(RLIMIT_AS, &limit);
    long pages = 0;
    std::ifstream("/proc/self/statm") >> pages;
    limit.rlim_cur = rlim_t(pages) * 4096 + (16 << 20);
    setrlimit(RLIMIT_AS, &limit);
    std::cerr << fault_of([](Stream& stream) { barriers(stream, 1024); });
    std::exit(0);
  };
  EXPECT_EXIT(run(), ::testing::ExitedWithCode(0), "OutOfMemory: out of memory in barriers");
}

TEST(EmulatorFault, HalfAWarpHasNoWarpSum) {
  EXPECT_THAT(fault_of(half_warp_sum), HasSubstr("warp 1: 16 of 32 lanes at warp_sum"));
  EXPECT_THAT(fault_of(half_warp_sum), HasSubstr("16 beyond the block's 48 threads"));
}

TEST(EmulatorFault, ShuffleReadsOnlyItsMask) {
  EXPECT_THAT(fault_of(read_outside_mask),
              HasSubstr("a lane reads a lane that mask 0x0000ffff does not"));
}

TEST(EmulatorFault, MisalignedVector) {
  EXPECT_THAT(
      fault_of([](Stream& stream) {
        Buffer x("x", 64, 0);
        misaligned_load(stream, x.as<float>(), x.as<float>() + 12);
        stream.synchronize();
      }),
      MatchesRegex("BadLaunch: load_vector \\(kernels_testing.cu:[0-9]+\\) in kernel "
                   "misaligned_load, block 0: the address is 4 bytes past a multiple of 16"));
}

// Until the wait that covers a copy, its destination is poison, whatever was there before.
TEST(Emulator, CopiesArriveAtTheirWait) {
  const std::vector<std::uint32_t> in = {11, 12, 13, 14, 15};
  const auto out = results<std::uint32_t>(20, [&](Stream& stream, std::uint32_t* out) {
    const Buffer x = upload(stream, in);
    copies_in_flight(stream, x.as<std::uint32_t>(), out);
  });
  constexpr std::uint32_t kPoison = 0xFFFFFFFF;
  const auto look = [&](int i) {
    return std::vector<std::uint32_t>(out.begin() + i * 5, out.begin() + i * 5 + 5);
  };
  EXPECT_THAT(look(0), Each(kPoison));
  EXPECT_THAT(look(1), ElementsAre(11, 12, kPoison, kPoison, kPoison));
  EXPECT_THAT(look(2), ElementsAre(11, 12, 13, 14, kPoison));
  EXPECT_THAT(look(3), ElementsAre(11, 12, 13, 14, 15));
}

std::string fault_of_copy(void (*kernel)(Stream&, const std::uint32_t*)) {
  return fault_of([=](Stream& stream) {
    const Buffer x("x", 64, 0);
    kernel(stream, x.as<std::uint32_t>());
    stream.synchronize();
  });
}

TEST(EmulatorFault, MisalignedCopy) {
  EXPECT_THAT(
      fault_of_copy(misaligned_copy),
      MatchesRegex("BadLaunch: copy_async \\(kernels_testing.cu:[0-9]+\\) in kernel "
                   "misaligned_copy, block 0: the address is 4 bytes past a multiple of 8"));
}

TEST(EmulatorFault, CopyBeyondSharedMemory) {
  EXPECT_THAT(fault_of_copy(copy_beyond_shared),
              MatchesRegex("BadLaunch: copy_async \\(kernels_testing.cu:[0-9]+\\) in kernel "
                           "copy_beyond_shared, block 0: the destination is not in its shared "
                           "memory"));
}

TEST(EmulatorFault, ACopyThatNobodyWaitsFor) {
  EXPECT_EQ(fault_of_copy(copy_nobody_waits_for),
            "BadLaunch: kernel copy_nobody_waits_for, block 0: thread 3 exits with 1 asynchronous "
            "copies for which it did not wait");
}

TEST(EmulatorFault, MisalignedTile) {
  const auto fault = [](int stride) {
    return fault_of([=](Stream& stream) { misaligned_tile(stream, stride); });
  };
  EXPECT_EQ(fault(16), "");
  EXPECT_THAT(
      fault(20),
      MatchesRegex("BadLaunch: load_a \\(kernels_testing.cu:[0-9]+\\) in kernel "
                   "misaligned_tile, block 0: the address is 8 bytes past a multiple of 16"));
  EXPECT_THAT(fault(0), HasSubstr("the address is 8 bytes past a multiple of 16"));
}

TEST(EmulatorFault, MmaIsForWholeWarps) {
  EXPECT_THAT(fault_of(half_warp_mma), AllOf(HasSubstr("BadLaunch: warp collective divergence"),
                                             HasSubstr("warp 1: 16 of 32 lanes at mma"),
                                             HasSubstr("16 beyond the block's 48 threads")));
  EXPECT_THAT(fault_of(some_skip_mma),
              MatchesRegex("BadLaunch: warp collective divergence in kernel some_skip_mma, block "
                           "0, warp 0: 20 of 32 lanes at mma \\(.*\\), 12 exited"));
  EXPECT_THAT(fault_of(two_kinds_of_mma), HasSubstr("others wait at mma"));
}

// A kernel that overlaps may begin before the one before it, and what it then has not waited for
// shows: that one, or the one before that.
TEST(Emulator, OverlappingKernelsNeedTheirWait) {
  if (kTsan) GTEST_SKIP() << "under TSan the kernels of a stream are in order";
  for (const OverlapMistake mistake : {OverlapMistake::no_wait, OverlapMistake::early_start}) {
    for (const bool recorded : {false, true}) {
      int shown = 0;
      for (std::uint64_t seed = 0; seed < 20; ++seed) {
        const Report report = run_rank(
            [&](Stream& stream) {
              const Buffer data = upload(stream, std::vector<int>((1 + kHandOvers) * kHandedOver));
              Recording recording;
              if (recorded) stream.begin_recording(recording);
              hand_over(stream, data.as<int>(), mistake);
              if (recorded) stream.end_recording();
              const std::vector<int> all = download<int>(stream, data);
              shown += std::count(all.end() - kHandedOver, all.end(), kHandOvers) != kHandedOver;
            },
            seed);
        EXPECT_FALSE(report.fault);
      }
      EXPECT_GE(shown, 8) << "of 20";
    }
  }
}

TEST(EmulatorFault, SharedMemoryOverrun) {
  if (kAsan) GTEST_SKIP() << "ASan itself ends the process: planted_bugs shared_overrun";
  EXPECT_EQ(fault_of([](Stream& stream) { write_shared(stream, 4, 3); }), "");
  EXPECT_THAT(
      fault_of([](Stream& stream) { write_shared(stream, 4, 4); }),
      MatchesRegex(
          "OutOfBounds: kernel write_shared, block [012] wrote its shared memory at byte 16, "
          "but has 16 bytes"));
  EXPECT_THAT(fault_of([](Stream& stream) { write_shared(stream, 4, -1); }),
              HasSubstr("wrote its shared memory 1 bytes before its start"));
}

TEST(EmulatorFault, ImpossibleLaunches) {
  const auto launch = [](unsigned grid, unsigned x, unsigned y, std::size_t shared) {
    return fault_of([=](Stream& stream) { launch_sized(stream, grid, x, y, shared); });
  };
  EXPECT_EQ(launch(1, 1024, 1, 227 * 1024), "");
  EXPECT_EQ(launch(0, 32, 1, 0), "BadLaunch: kernel sized: a grid of 0 x 1 x 1 blocks is empty");
  EXPECT_EQ(launch(1, 32, 0, 0), "BadLaunch: kernel sized: a block of 32 x 0 x 1 threads is empty");
  EXPECT_EQ(launch(1, 1025, 1, 0),
            "BadLaunch: kernel sized: a block of 1025 x 1 x 1 threads exceeds 1024 x 1024 x 64");
  EXPECT_EQ(launch(1, 64, 17, 0),
            "BadLaunch: kernel sized: a block of 64 x 17 x 1 = 1088 threads exceeds 1024");
  EXPECT_EQ(launch(1, 32, 1, 232449),
            "BadLaunch: kernel sized: 232449 bytes of shared memory exceed 232448");
}

}  // namespace
}  // namespace tp::testing
