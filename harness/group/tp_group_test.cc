// The collectives, on as many processes as this test was started with.

#include "harness/group/tp_group.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "harness/base/philox.h"
#include "harness/device/buffer.h"
#include "harness/device/scheduler.h"
#include "harness/group/mpi_testing.h"
#include "harness/group/place.h"
#include "harness/group/ranks_testing.h"

namespace tp {
namespace {

template <typename T>
T value(int rank, std::int64_t i) {
  return from_float<T>(float(philox(1, std::uint64_t(rank), std::uint64_t(i))[0]) * 0x1p-30f -
                       2.0f);
}

// values[i]: value<T>(rank, i).
template <typename T>
std::vector<T> values_of(int rank, std::int64_t count) {
  std::vector<T> values;
  for (std::int64_t i = 0; i < count; ++i) values.push_back(value<T>(rank, i));
  return values;
}

// The sum of all ranks' values, folded in tp_rank order and rounded to T each time, whatever the
// processes are.
template <typename T>
T folded(int tp_size, std::int64_t i) {
  T total = value<T>(0, i);
  for (int r = 1; r < tp_size; ++r)
    total = from_float<T>(to_float(total) + to_float(value<T>(r, i)));
  return total;
}

template <typename T>
bool same_bits(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0;
}

template <typename T>
Buffer buffer_of(const std::vector<T>& values, Stream& stream) {
  Buffer b("values", sizeof(T) * values.size(), 0);
  from_host(stream, b.data(), values.data(), b.bytes());
  return b;
}

// Once the stream is there.
template <typename T>
std::vector<T> contents(const Buffer& b, Stream& stream) {
  std::vector<T> values(b.bytes() / sizeof(T));
  to_host(stream, values.data(), b.data(), b.bytes());
  stream.synchronize();
  return values;
}

template <typename T>
void check_all_reduce(int tp_size) {
  constexpr std::int64_t kCount = 37;
  int wrong = 0;
  const Outcomes result = run_ranks(tp_size, 3, [&](TpGroup& group, Stream& stream) {
    const std::vector<T> data = values_of<T>(group.tp_rank(), kCount);
    const Buffer sum = buffer_of(data, stream), max = buffer_of(data, stream);
    group.all_reduce_sum(sum.as<T>(), kCount, stream);
    group.all_reduce_max(max.as<T>(), kCount, stream);
    const std::vector<T> sums = contents<T>(sum, stream), maxima = contents<T>(max, stream);
    for (std::int64_t i = 0; i < kCount; ++i) {
      float largest = to_float(value<T>(0, i));
      for (int r = 1; r < tp_size; ++r) largest = std::max(largest, to_float(value<T>(r, i)));
      wrong += !same_bits(sums[std::size_t(i)], folded<T>(tp_size, i));
      wrong += to_float(maxima[std::size_t(i)]) != largest;
    }
  });
  EXPECT_FALSE(result.fault) << result.fault->what;
  EXPECT_EQ(wrong, 0) << "tp_size " << tp_size;
}

TEST(TpGroup, AllReduceFoldsInRankOrderForEveryTypeAndSize) {
  for (int tp_size : {1, 2, 3, 4, 7, 16}) {
    check_all_reduce<float>(tp_size);
    check_all_reduce<f16>(tp_size);
    check_all_reduce<bf16>(tp_size);
  }
}

// Into memory of its own, and into its own place, beside which nothing may change.
template <typename T>
void check_reduce_scatter(int tp_size) {
  constexpr std::int64_t kCount = 37;
  int wrong = 0;
  const Outcomes result = run_ranks(tp_size, 3, [&](TpGroup& group, Stream& stream) {
    const std::vector<T> data = values_of<T>(group.tp_rank(), tp_size * kCount);
    const std::int64_t begin = group.tp_rank() * kCount;
    const Buffer all = buffer_of(data, stream), in_place = buffer_of(data, stream);
    const Buffer mine("mine", sizeof(T) * kCount, 0);
    group.reduce_scatter_sum(all.as<const T>(), mine.as<T>(), kCount, stream);
    group.reduce_scatter_sum(in_place.as<const T>(), in_place.as<T>() + begin, kCount, stream);
    const std::vector<T> apart = contents<T>(mine, stream), placed = contents<T>(in_place, stream);
    const std::vector<T> kept = contents<T>(all, stream);
    for (std::int64_t i = 0; i < tp_size * kCount; ++i) {
      const std::int64_t j = i - begin;
      const bool is_mine = j >= 0 && j < kCount;
      const T& input = data[std::size_t(i)];
      wrong += !same_bits(kept[std::size_t(i)], input);
      wrong += !same_bits(placed[std::size_t(i)], is_mine ? folded<T>(tp_size, i) : input);
      wrong += is_mine && !same_bits(apart[std::size_t(j)], folded<T>(tp_size, i));
    }
  });
  EXPECT_FALSE(result.fault) << result.fault->what;
  EXPECT_EQ(wrong, 0) << "tp_size " << tp_size;
}

TEST(TpGroup, ReduceScatterFoldsInRankOrderForEveryTypeAndSize) {
  for (int tp_size = 1; tp_size <= 16; ++tp_size) {
    check_reduce_scatter<float>(tp_size);
    check_reduce_scatter<f16>(tp_size);
    check_reduce_scatter<bf16>(tp_size);
  }
}

template <typename T>
void check_all_reduce_in_halves(int tp_size) {
  constexpr std::int64_t kCount = 300;  // more than a block has threads
  int wrong = 0;
  const Outcomes result = run_ranks(tp_size, 4, [&](TpGroup& group, Stream& stream) {
    const std::vector<T> data = values_of<T>(group.tp_rank(), tp_size * kCount);
    const Buffer halves = buffer_of(data, stream), whole = buffer_of(data, stream);
    T* const mine = halves.as<T>() + group.tp_rank() * kCount;
    group.reduce_scatter_sum(halves.as<const T>(), mine, kCount, stream);
    group.all_gather(mine, halves.as<T>(), kCount, stream);
    group.all_reduce_sum(whole.as<T>(), tp_size * kCount, stream);
    const std::vector<T> got = contents<T>(halves, stream), expected = contents<T>(whole, stream);
    for (std::size_t i = 0; i < got.size(); ++i) wrong += !same_bits(got[i], expected[i]);
  });
  EXPECT_FALSE(result.fault) << result.fault->what;
  EXPECT_EQ(wrong, 0) << "tp_size " << tp_size;
}

TEST(TpGroup, AReduceScatterAndAnAllGatherAreAnAllReduce) {
  for (int tp_size : {1, 2, 5, 6, 13}) {
    check_all_reduce_in_halves<float>(tp_size);
    check_all_reduce_in_halves<f16>(tp_size);
    check_all_reduce_in_halves<bf16>(tp_size);
  }
}

template <typename T>
void check_broadcast(int tp_size) {
  constexpr std::int64_t kCount = 37;
  int wrong = 0;
  const Outcomes result = run_ranks(tp_size, 6, [&](TpGroup& group, Stream& stream) {
    for (int root = 0; root < tp_size; ++root) {
      const Buffer data = buffer_of(values_of<T>(group.tp_rank(), kCount), stream);
      group.broadcast(data.as<T>(), kCount, root, stream);
      const std::vector<T> got = contents<T>(data, stream);
      for (std::int64_t i = 0; i < kCount; ++i)
        wrong += !same_bits(got[std::size_t(i)], value<T>(root, i));
    }
  });
  EXPECT_FALSE(result.fault) << result.fault->what;
  EXPECT_EQ(wrong, 0) << "tp_size " << tp_size;
}

TEST(TpGroup, ABroadcastGivesTheDataOfEveryRoot) {
  for (int tp_size : {1, 2, 3, 4, 7, 16}) {
    check_broadcast<float>(tp_size);
    check_broadcast<f16>(tp_size);
    check_broadcast<bf16>(tp_size);
  }
}

TEST(TpGroup, NoElementsAreAsGoodAsAny) {
  const Outcomes result = run_ranks(5, 2, [&](TpGroup& group, Stream& stream) {
    const std::vector<float> data = values_of<float>(group.tp_rank(), 1);
    const Buffer b = buffer_of(data, stream);
    group.reduce_scatter_sum(b.as<const float>(), b.as<float>(), 0, stream);
    group.broadcast(b.as<float>(), 0, 3, stream);
    EXPECT_EQ(contents<float>(b, stream), data);
  });
  EXPECT_FALSE(result.fault) << result.fault->what;
}

TEST(TpGroup, ATraceSaysWhatWentInAndWhatCameOut) {
  std::vector<std::string> lines(2);
  std::vector<std::string> expected(2);
  const Outcomes result = run_ranks(
      2, 1,
      [&](TpGroup& group, Stream& stream) {
        const Buffer b = buffer_of<float>({1.0f + float(group.tp_rank()), 5.0f}, stream);
        group.reduce_scatter_sum(b.as<const float>(), b.as<float>() + group.tp_rank(), 1, stream);
        group.broadcast(b.as<float>(), 2, 1, stream);
        stream.synchronize();
        expected[std::size_t(group.tp_rank())] =
            group.tp_rank() == 0
                ? "tp_rank  0  #1 reduce_scatter_sum of 1 f32  in 1 5  out 3\n"
                  "tp_rank  0  #2 broadcast of 2 f32 from root 1  in  out 2 10\n"
                : "tp_rank  1  #1 reduce_scatter_sum of 1 f32  in 2 5  out 10\n"
                  "tp_rank  1  #2 broadcast of 2 f32 from root 1  in 2 10  out 2 10\n";
      },
      std::chrono::seconds(20), false,
      [&](const std::string& line) { lines[contains(line, "tp_rank  1")] += line + "\n"; });
  EXPECT_FALSE(result.fault) << result.fault->what;
  EXPECT_EQ(lines, expected);
}

TEST(TpGroup, AMaximumKeepsNaN) {
  const Outcomes result = run_ranks(4, 1, [&](TpGroup& group, Stream& stream) {
    Buffer b("x", sizeof(float), 0);
    const float mine = group.tp_rank() == 1 ? NAN : float(group.tp_rank());
    from_host(stream, b.data(), &mine, sizeof(float));
    group.all_reduce_max(b.as<float>(), 1, stream);
    float got = 0;
    to_host(stream, &got, b.data(), sizeof(float));
    stream.synchronize();
    EXPECT_TRUE(std::isnan(got));
  });
  EXPECT_FALSE(result.fault);
}

TEST(TpGroup, AllGatherPutsRanksInOrder) {
  for (int tp_size : {1, 3, 8}) {
    const Outcomes result = run_ranks(tp_size, 5, [&](TpGroup& group, Stream& stream) {
      const float mine[2] = {float(group.tp_rank()), float(10 * group.tp_rank())};
      Buffer in("in", sizeof(mine), 0), all("all", sizeof(mine) * std::size_t(tp_size), 0);
      from_host(stream, in.data(), mine, sizeof(mine));
      group.all_gather(in.as<const float>(), all.as<float>(), 2, stream);
      group.barrier(stream);
      std::vector<float> got(2 * std::size_t(tp_size));
      to_host(stream, got.data(), all.data(), all.bytes());
      stream.synchronize();
      for (int r = 0; r < tp_size; ++r) {
        EXPECT_EQ(got[2 * std::size_t(r)], float(r));
        EXPECT_EQ(got[2 * std::size_t(r) + 1], float(10 * r));
      }
    });
    EXPECT_FALSE(result.fault);
  }
}

// What must be a sentence at once, and never a hang.
TEST(TpGroup, ARankThatSkipsACollectiveIsAMismatchAtOnce) {
  const auto start = Clock::now();
  const Outcomes result = run_ranks(4, 1, [&](TpGroup& group, Stream& stream) {
    Buffer b("x", 16, 0);
    if (group.tp_rank() != 2) group.all_reduce_sum(b.as<float>(), 4, stream);
    group.barrier(stream);
    stream.synchronize();
  });
  EXPECT_LT(Clock::now() - start, std::chrono::seconds(5));
  ASSERT_TRUE(result.fault);
  EXPECT_EQ(result.fault->outcome, Outcome::CollectiveMismatch);
  EXPECT_NE(result.fault->what.find("tp_rank 2"), std::string::npos) << result.fault->what;
  EXPECT_NE(result.fault->what.find("#1 barrier"), std::string::npos) << result.fault->what;
  EXPECT_FALSE(result.broken);
}

TEST(TpGroup, ARankThatEndsEarlyIsAMismatchAtOnce) {
  for (int silent : {0, 3}) {
    const std::string text = text_of(run_ranks(4, 1, [&](TpGroup& group, Stream& stream) {
      if (group.tp_rank() == silent) return;
      group.barrier(stream);
      stream.synchronize();
    }));
    EXPECT_TRUE(contains(text, "CollectiveMismatch")) << text;
    EXPECT_TRUE(contains(text, "end of case")) << text;
    EXPECT_TRUE(contains(text, "tp_rank " + std::to_string(silent))) << text;
  }
}

TEST(TpGroup, CountsAndTypesMustAgree) {
  const std::string count = text_of(run_ranks(4, 1, [&](TpGroup& group, Stream& stream) {
    Buffer b("x", 64, 0);
    group.all_reduce_sum(b.as<float>(), group.tp_rank() == 3 ? 5 : 4, stream);
    stream.synchronize();
  }));
  EXPECT_TRUE(contains(count, "CollectiveMismatch")) << count;
  const std::string type = text_of(run_ranks(4, 1, [&](TpGroup& group, Stream& stream) {
    Buffer b("x", 64, 0);
    if (group.tp_rank() == 1) group.all_reduce_sum(b.as<bf16>(), 4, stream);
    if (group.tp_rank() != 1) group.all_reduce_sum(b.as<f16>(), 4, stream);
    stream.synchronize();
  }));
  EXPECT_TRUE(contains(type, "CollectiveMismatch")) << type;
}

TEST(TpGroup, RootsMustAgree) {
  const std::string text = text_of(run_ranks(4, 1, [&](TpGroup& group, Stream& stream) {
    const Buffer b("x", 64, 0);
    group.broadcast(b.as<float>(), 4, group.tp_rank() == 2 ? 1 : 0, stream);
    stream.synchronize();
  }));
  EXPECT_EQ(text,
            "CollectiveMismatch: tp_rank 2 is at #1 broadcast of 4 f32 from root 1, most others at "
            "#1 broadcast of 4 f32 from root 0");
}

TEST(TpGroup, ARootOutsideTheGroupIsABadLaunch) {
  for (int root : {-1, 4}) {
    const std::string text = text_of(run_ranks(4, 1, [&](TpGroup& group, Stream& stream) {
      const Buffer b("x", 64, 0);
      group.broadcast(b.as<float>(), 4, root, stream);
      stream.synchronize();
    }));
    EXPECT_EQ(text, "BadLaunch: broadcast: root " + std::to_string(root) + " is none of 4 ranks");
  }
}

TEST(TpGroup, AReduceScatterAmongAllReducesIsAMismatch) {
  const std::string text = text_of(run_ranks(4, 1, [&](TpGroup& group, Stream& stream) {
    const Buffer b("x", 64, 0);
    float* const x = b.as<float>();
    if (group.tp_rank() == 1) group.reduce_scatter_sum(x, x + 4, 4, stream);
    if (group.tp_rank() != 1) group.all_reduce_sum(x, 4, stream);
    stream.synchronize();
  }));
  EXPECT_EQ(text,
            "CollectiveMismatch: tp_rank 1 is at #1 reduce_scatter_sum of 4 f32, most others at #1 "
            "all_reduce_sum of 4 f32");
}

// Legal in NCCL: the order is that of the calls, whichever stream gets there first.
TEST(TpGroup, CollectivesOnTwoStreamsOfARankMeetInTheOrderOfTheCalls) {
  for (std::uint64_t seed = 0; seed < 20; ++seed) {
    const std::string text = text_of(run_ranks(4, seed, [&](TpGroup& group, Stream& stream) {
      Stream& other = stream.scheduler().add_stream(group.tp_rank());
      Buffer b("x", 64, 0);
      group.all_reduce_sum(b.as<float>(), 4, stream);
      group.barrier(other);
      stream.synchronize();
      other.synchronize();
    }));
    EXPECT_EQ(text, "no fault") << "seed " << seed;
  }
}

// Rank 1 reads what rank 0 wrote into its memory, after a barrier or, by mistake, without one.
bool barrier_holds(bool barrier, std::uint64_t seed) {
  const Buffer shared("peer memory", sizeof(float), 0);
  float got = 0;
  const std::string text = text_of(run_ranks(
      2, seed,
      [&](TpGroup& group, Stream& stream) {
        const float value = 7;
        if (group.tp_rank() == 0) from_host(stream, shared.data(), &value, sizeof(value));
        if (barrier) group.barrier(stream);
        if (group.tp_rank() == 1) to_host(stream, &got, shared.data(), sizeof(got));
        stream.synchronize();
      },
      std::chrono::seconds(20), true));
  EXPECT_EQ(text, "no fault");
  return got == 7;
}

TEST(TpGroup, DelaysShowAMissingBarrier) {
  if (test_world().processes() > 1) GTEST_SKIP() << "peer memory is that of one process";
  int shown = 0;
  for (std::uint64_t seed = 0; seed < 30; ++seed) {
    EXPECT_TRUE(barrier_holds(true, seed)) << seed;
    const bool holds = barrier_holds(false, seed);
    // The same seed is the same schedule, but for a GPU's own.
    if (executor_name() == "emulator") {
      EXPECT_EQ(barrier_holds(false, seed), holds) << seed;
    }
    shown += !holds;
  }
  EXPECT_GE(shown, 3) << "of 30";
}

// A rank that waits for something else is no disagreement: it is a Hang, and it is that rank's.
TEST(TpGroup, ARankThatWaitsForAnEventThatNeverComesIsAHang) {
  Gate never;
  const Outcomes result = run_ranks(
      4, 1,
      [&](TpGroup& group, Stream& stream) {
        if (group.tp_rank() == 2) stream.wait(never);
        group.barrier(stream);
        stream.synchronize();
      },
      std::chrono::milliseconds(500));
  const bool hosts_it =
      ranks_of_process(4, test_world().processes(), test_world().process()).offset <= 2 &&
      ranks_of_process(4, test_world().processes(), test_world().process()).end() > 2;
  const std::string text = text_of(result);
  EXPECT_EQ(contains(text, "Hang"), hosts_it) << text;
  EXPECT_EQ(result.only_waits, !hosts_it);
  EXPECT_FALSE(result.broken) << text;
}

// A rank that fails never leaves the others waiting, on whichever process they are.
TEST(TpGroup, AFaultOnOneRankEndsTheCaseOnAllProcesses) {
  const auto start = Clock::now();
  const std::string text = text_of(run_ranks(4, 1, [&](TpGroup& group, Stream& stream) {
    if (group.tp_rank() == 3) throw Fault{Outcome::BadLaunch, "planted", 3};
    group.barrier(stream);
    stream.synchronize();
  }));
  EXPECT_LT(Clock::now() - start, std::chrono::seconds(5));
  const bool hosts_it = test_world().process() == std::min(4, test_world().processes()) - 1;
  EXPECT_TRUE(contains(text, hosts_it ? "BadLaunch: planted" : "reports a fault")) << text;
  // And the next case runs.
  EXPECT_EQ(text_of(run_ranks(4, 1,
                              [&](TpGroup& group, Stream& stream) {
                                group.barrier(stream);
                                stream.synchronize();
                              })),
            "no fault");
}

TEST(TpGroup, RanksOfProcessesAreConsecutiveAndComplete) {
  for (int tp_size : {1, 2, 5, 16}) {
    for (int processes : {1, 2, 3, 4, 20}) {
      std::int64_t next = 0;
      for (int p = 0; p < processes; ++p) {
        const Shard ranks = ranks_of_process(tp_size, processes, p);
        if (p >= tp_size) {
          EXPECT_EQ(ranks.size, 0);
          continue;
        }
        EXPECT_EQ(ranks.offset, next);
        EXPECT_GE(ranks.size, 1);
        next = ranks.end();
      }
      EXPECT_EQ(next, tp_size);
    }
  }
}

// What crosses processes is collectives and nothing else: every rank's ledger has all of them.
TEST(Ledger, HasEveryCollectiveOfEveryLocalRank) {
  run_ranks(4, 1, [&](TpGroup& group, Stream& stream) {
    Buffer b("x", 64, 0);
    group.all_reduce_sum(b.as<float>(), 4, stream);
    group.barrier(stream);
    group.reduce_scatter_sum(b.as<const float>(), b.as<float>() + group.tp_rank(), 1, stream);
    group.broadcast(b.as<float>(), 2, 3, stream);
    stream.synchronize();
  });
  CollectiveHeader broadcast = make_header(4, "broadcast", 2, "f32");
  broadcast.root = 3;
  const LedgerPage& page = ledger_page(test_world().process());
  const Shard local = ranks_of_process(4, test_world().processes(), test_world().process());
  EXPECT_EQ(page.num_ranks, local.size);
  for (std::int64_t r = 0; r < local.size; ++r) {
    EXPECT_EQ(page.ranks[std::size_t(r)].entered, 4);
    EXPECT_EQ(page.ranks[std::size_t(r)].ring[0], make_header(1, "all_reduce_sum", 4, "f32"));
    EXPECT_EQ(page.ranks[std::size_t(r)].ring[1], make_header(2, "barrier", 0, ""));
    EXPECT_EQ(page.ranks[std::size_t(r)].ring[2], make_header(3, "reduce_scatter_sum", 1, "f32"));
    EXPECT_EQ(page.ranks[std::size_t(r)].ring[3], broadcast);
  }
}

// The last test, because its exchange can never be taken back. A process that gives up on another
// one says so, and no exchange writes into memory it has freed.
TEST(ZLast, AProcessThatIsLateIsGivenUpAndTheJobRetires) {
  if (test_world().processes() < 2) GTEST_SKIP() << "needs two processes";
  const Outcomes result = run_ranks(
      4, 1,
      [&](TpGroup& group, Stream& stream) {
        if (group.tp_rank() == 3) std::this_thread::sleep_for(std::chrono::seconds(4));
        group.barrier(stream);
        stream.synchronize();
      },
      std::chrono::milliseconds(300));
  std::vector<std::vector<char>> memory(1000, std::vector<char>(200, 'x'));
  test_world().max(0);
  for (const auto& block : memory) EXPECT_EQ(block, std::vector<char>(200, 'x'));
  EXPECT_NE(text_of(result), "no fault");
  EXPECT_EQ(test_world().max(result.broken), 1);
}

}  // namespace
}  // namespace tp
