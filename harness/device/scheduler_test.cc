// Ranks, streams and what becomes of a run when one of them goes wrong.

#include "harness/device/scheduler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <set>
#include <stdexcept>

#include "harness/device/kernels_testing.h"
#include "harness/device/testing.h"

namespace tp::testing {
namespace {

using ::testing::AllOf;
using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using namespace std::chrono_literals;

TEST(Stream, NothingHasHappenedBeforeTheStreamRanIt) {
  run_rank([](Stream& stream) {
    const Buffer x = upload(stream, std::vector<float>(8, 1.0f));
    std::vector<float> out(8, -1.0f);
    bool called = false;
    fill(stream, x.as<float>(), 8, 2.0f);
    to_host(stream, out.data(), x.data(), 32);
    stream.call([&] { called = true; });
    EXPECT_THAT(out, Each(-1.0f));
    EXPECT_FALSE(called);
    stream.synchronize();
    EXPECT_THAT(out, Each(2.0f));
    EXPECT_TRUE(called);
  });
}

TEST(Stream, RunsItsOperationsInOrder) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    run_rank(
        [](Stream& stream) {
          std::vector<int> order;
          const Buffer x = upload(stream, std::vector<float>(8));
          Buffer y = upload(stream, std::vector<float>(8, 9.0f));
          std::vector<float> before(8), after(8), poisoned(8);
          stream.call([&] { order.push_back(1); });
          fill(stream, x.as<float>(), 8, 3.0f);
          copy(stream, x.as<float>(), y.as<float>(), 8);
          to_host(stream, before.data(), y.data(), 32);
          fill(stream, x.as<float>(), 8, 4.0f);
          to_host(stream, after.data(), x.data(), 32);
          poison(stream, y, 0x01);
          to_host(stream, poisoned.data(), y.data(), 32);
          stream.call([&] { order.push_back(2); });
          stream.synchronize();
          EXPECT_THAT(order, ElementsAre(1, 2));
          EXPECT_THAT(before, Each(3.0f));
          EXPECT_THAT(after, Each(4.0f));
          EXPECT_THAT(poisoned, Each(std::bit_cast<float>(0x01010101)));
        },
        seed);
  }
}

TEST(Stream, FromHostCopiesItsSourceAtOnce) {
  run_rank([](Stream& stream) {
    Buffer x("x", 4, 0);
    int source = 5;
    from_host(stream, x.data(), &source, 4);
    source = 6;
    EXPECT_THAT(download<int>(stream, x), ElementsAre(5));
  });
}

TEST(Stream, WaitsForAGate) {
  Gate gate;
  bool passed = false;
  int asked = 0;
  Scheduler scheduler({});
  scheduler.add_rank(0, [&](Stream& stream) {
    stream.wait(gate);
    stream.call([&] { passed = true; });
    stream.synchronize();
    EXPECT_TRUE(gate.is_open);
  });
  const Report report = scheduler.run([&] {
    EXPECT_FALSE(passed);
    if (++asked < 3) return Idle::waiting;
    gate.is_open = true;
    return Idle::moved;
  });
  EXPECT_FALSE(report.fault);
  EXPECT_EQ(asked, 3);
  EXPECT_TRUE(passed);
}

TEST(Stream, WaitsForAnotherStreamsEvent) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    run_rank(
        [](Stream& stream) {
          Stream& other = stream.scheduler().add_stream(stream.tp_rank());
          const Buffer x = upload(stream, std::vector<float>(4, 0.0f));
          const Buffer y = upload(stream, std::vector<float>(4, 0.0f));
          stream.synchronize();
          {
            const Event event;
            other.wait(event);
            copy(other, x.as<float>(), y.as<float>(), 4);
            fill(stream, x.as<float>(), 4, 7.0f);
            stream.record(event);
          }
          other.synchronize();
          EXPECT_THAT(download<float>(stream, y), Each(7.0f));
        },
        seed);
  }
}

std::string interleaving(std::uint64_t seed) {
  std::string order;
  Scheduler scheduler({.seed = seed});
  for (int rank = 0; rank < 4; ++rank) {
    scheduler.add_rank(rank, [&order](Stream& stream) {
      for (int i = 0; i < 3; ++i) {
        order += std::to_string(stream.tp_rank());
        stream.call([&order, &stream] { order += char('a' + stream.tp_rank()); });
        stream.synchronize();
      }
    });
  }
  EXPECT_FALSE(scheduler.run().fault);
  return order;
}

TEST(Scheduler, TheSeedDecidesHowRanksInterleave) {
  std::set<std::string> orders;
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    orders.insert(interleaving(seed));
    EXPECT_EQ(interleaving(seed), interleaving(seed));
  }
  EXPECT_EQ(orders.size(), 10u);
}

TEST(Scheduler, KernelsOfTwoRanksSignalThroughPeerMemory) {
  for (const bool fenced : {false, true}) {
    for (std::uint64_t seed = 0; seed < 10; ++seed) {
      Scheduler scheduler({.seed = seed});
      Buffer shared("peer memory", 8, 0);
      int* data = shared.as<int>();
      int got = 0;
      scheduler.add_rank(0, [&](Stream& stream) {
        Buffer out("out", 4, 0);
        (fenced ? await_fenced : await)(stream, data, data + 1, out.as<int>());
        got = download<int>(stream, out)[0];
      });
      scheduler.add_rank(1, [&](Stream& stream) {
        (fenced ? publish_fenced : publish)(stream, data, data + 1, 42);
        stream.synchronize();
      });
      const Report report = scheduler.run();
      EXPECT_FALSE(report.fault) << report.fault->what;
      EXPECT_EQ(got, 42);
    }
  }
}

TEST(Scheduler, HoldsManyBlocksOfManyRanks) {
  constexpr int kRanks = 8;
  constexpr int kBlocks = 6;
  constexpr int kThreads = 1024;
  Scheduler scheduler({.seed = 3});
  for (int rank = 0; rank < kRanks; ++rank) {
    scheduler.add_rank(rank, [](Stream& stream) {
      const Buffer counter = upload(stream, std::vector<unsigned>(1));
      const Buffer trace("trace", kBlocks * kThreads * sizeof(unsigned), 0);
      trace_order(stream, trace.as<unsigned>(), counter.as<unsigned>(), kBlocks, kThreads);
      std::vector<unsigned> order = download<unsigned>(stream, trace);
      std::sort(order.begin(), order.end());
      for (unsigned i = 0; i < order.size(); ++i) EXPECT_EQ(order[i], i);
    });
  }
  const Report report = scheduler.run();
  EXPECT_FALSE(report.fault) << report.fault->what;
  EXPECT_EQ(report.threads, std::uint64_t{kRanks} * kBlocks * kThreads);
}

TEST(Scheduler, ASignalThatNeverComesIsAHang) {
  const auto begin = std::chrono::steady_clock::now();
  RunningNow running;
  Scheduler scheduler({.deadline = begin + 50ms, .running = &running});
  Buffer shared("peer memory", 8, 0);
  int* data = shared.as<int>();
  scheduler.add_rank(0, [&](Stream&) {});
  scheduler.add_rank(1, [&](Stream& stream) {
    Buffer out("out", 4, 0);
    await(stream, data, data + 1, out.as<int>());
    stream.synchronize();
  });
  int asked = 0;
  const Report report = scheduler.run([&] {
    ++asked;
    return Idle::waiting;
  });
  ASSERT_TRUE(report.fault);
  EXPECT_EQ(report.fault->outcome, Outcome::Hang);
  EXPECT_EQ(report.fault->tp_rank, 1);
  EXPECT_THAT(report.fault->what,
              AllOf(HasSubstr("the deadline has passed: rank 1 runs"),
                    HasSubstr("kernel await, block 0: 1 at load_acquire (kernels_testing.cu:"),
                    HasSubstr("of 1")));
  EXPECT_GT(asked, 0) << "others must be able to go on while a kernel spins";
  EXPECT_LT(std::chrono::steady_clock::now() - begin, 5s);
  EXPECT_EQ(running.tp_rank, -1);
}

TEST(Scheduler, RanksThatNothingWillWakeAreAHang) {
  Gate gate{false, "all_reduce 2"};
  Scheduler scheduler({});
  for (int rank = 4; rank < 10; ++rank) {
    scheduler.add_rank(rank, [&gate, rank](Stream& stream) {
      if (rank == 4) return;
      stream.wait(gate);
      stream.synchronize();
      ADD_FAILURE() << "the gate never opened";
    });
  }
  const Report report = scheduler.run([] { return Idle::stuck; });
  ASSERT_TRUE(report.fault);
  EXPECT_EQ(report.fault->outcome, Outcome::Hang);
  EXPECT_EQ(report.fault->tp_rank, 5);
  EXPECT_EQ(
      report.fault->what,
      "nothing will ever go on: rank 5 waits for all_reduce 2; rank 6 waits for all_reduce 2; "
      "rank 7 waits for all_reduce 2; rank 8 waits for all_reduce 2; and 1 more");
}

TEST(Scheduler, AHangIsBlamedOnWhoRunsNotOnWhoWaits) {
  Gate gate{false, "all_reduce 1"};
  Scheduler scheduler({.deadline = std::chrono::steady_clock::now() + 50ms});
  Buffer shared("peer memory", 8, 0);
  for (int rank = 0; rank < 16; ++rank) {
    scheduler.add_rank(rank, [&](Stream& stream) {
      int* data = shared.as<int>();
      if (stream.tp_rank() == 15) await(stream, data, data + 1, data);
      stream.wait(gate);
      stream.synchronize();
    });
  }
  const Report report = scheduler.run([] { return Idle::waiting; });
  ASSERT_TRUE(report.fault);
  EXPECT_EQ(report.fault->tp_rank, 15);
  EXPECT_THAT(report.fault->what,
              AllOf(HasSubstr("the deadline has passed: rank 15 runs"), HasSubstr("kernel await"),
                    HasSubstr("; rank 0 waits for all_reduce 1"), HasSubstr("and 12 more")));
}

TEST(Scheduler, WaitingForOthersEndsAtTheDeadline) {
  Gate gate{false, "barrier 1"};
  Scheduler scheduler({.deadline = std::chrono::steady_clock::now() + 20ms});
  scheduler.add_rank(0, [&](Stream& stream) { stream.wait(gate); });
  const Report report = scheduler.run([] { return Idle::waiting; });
  ASSERT_TRUE(report.fault);
  EXPECT_EQ(report.fault->what, "the deadline has passed: rank 0 waits for barrier 1");
}

struct Tell {
  int& count;
  ~Tell() { ++count; }
};

TEST(Scheduler, AFaultOfOneRankUnwindsTheOthers) {
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    int unwound = 0;
    bool dropped = true;
    Gate gate;
    Scheduler scheduler({.seed = seed});
    Gate all_wait;
    int waiting = 0;
    for (int rank = 0; rank < 3; ++rank) {
      scheduler.add_rank(rank, [&](Stream& stream) {
        const Tell tell{unwound};
        const Buffer buffer("owned by the stack", 16, 0);
        fill(stream, buffer.as<float>(), 4, 1.0f);
        if (++waiting == 3) all_wait.is_open = true;
        stream.wait(all_wait);
        if (stream.tp_rank() == 1) {
          stream.synchronize();
          throw std::runtime_error("head_dim 96 is not supported");
        }
        stream.wait(gate);
        stream.call([&] { dropped = false; });
        stream.synchronize();
        ADD_FAILURE() << "went on after the fault";
      });
    }
    const Report report = scheduler.run();
    ASSERT_TRUE(report.fault);
    EXPECT_EQ(report.fault->outcome, Outcome::BadLaunch);
    EXPECT_EQ(report.fault->what, "head_dim 96 is not supported");
    EXPECT_EQ(report.fault->tp_rank, 1);
    EXPECT_EQ(unwound, 3);
    EXPECT_TRUE(dropped);
  }
}

TEST(Scheduler, SortsWhatHostCodeThrows) {
  EXPECT_EQ(fault_of([](Stream&) { throw std::bad_alloc(); }),
            "OutOfMemory: out of memory in host code");
  EXPECT_EQ(fault_of([](Stream&) {
              throw Fault{Outcome::OutOfBounds, "a slice", 3};
            }),
            "OutOfBounds: a slice");
  EXPECT_EQ(fault_of([](Stream&) { throw 1; }),
            "BadLaunch: host code threw something that is no std::exception");
  EXPECT_EQ(fault_of([](Stream& stream) {
              stream.call([] { throw Fault{Outcome::CollectiveMismatch, "in a call"}; });
            }),
            "CollectiveMismatch: in a call");
}

TEST(Scheduler, ExceptionsOfRanksDoNotMix) {
  // Two ranks wait inside their catch blocks; each must still find its own exception there.
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    Scheduler scheduler({.seed = seed});
    std::vector<std::string> caught(2);
    for (int rank = 0; rank < 2; ++rank) {
      scheduler.add_rank(rank, [&](Stream& stream) {
        try {
          throw std::runtime_error("of rank " + std::to_string(stream.tp_rank()));
        } catch (const std::exception&) {
          stream.call([] {});
          stream.synchronize();
          try {
            throw;
          } catch (const std::exception& mine) {
            caught[std::size_t(stream.tp_rank())] = mine.what();
          }
        }
      });
    }
    EXPECT_FALSE(scheduler.run().fault);
    EXPECT_THAT(caught, ElementsAre("of rank 0", "of rank 1"));
  }
}

TEST(Scheduler, FailEndsTheRun) {
  Gate gate;
  Scheduler scheduler({});
  scheduler.add_rank(0, [&](Stream& stream) {
    stream.wait(gate);
    stream.synchronize();
  });
  const Report report = scheduler.run([&] {
    scheduler.fail({Outcome::CollectiveMismatch, "rank 0 sums, rank 1 gathers"});
    scheduler.fail({Outcome::Crash, "too late"});
    return Idle::moved;
  });
  ASSERT_TRUE(report.fault);
  EXPECT_EQ(report.fault->what, "rank 0 sums, rank 1 gathers");
}

TEST(Scheduler, SaysWhoRuns) {
  RunningNow running;
  std::set<std::string> seen;
  Scheduler scheduler({.running = &running});
  scheduler.add_rank(3, [&](Stream& stream) {
    seen.insert(std::to_string(running.tp_rank) + " " + running.what);
    stream.call([&] { seen.insert(std::to_string(running.tp_rank) + " " + running.what); });
    launch_sized(stream, 1, 1, 1, 0);
    stream.call([&] {});
  });
  scheduler.run();
  EXPECT_THAT(seen, ElementsAre("3 host"));
  EXPECT_EQ(running.tp_rank, -1);
}

}  // namespace
}  // namespace tp::testing
