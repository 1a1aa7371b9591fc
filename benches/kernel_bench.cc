#include "benches/kernel_bench.h"

#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <sstream>
#include <thread>
#include <utility>
#include <vector>

#include "benches/bench_data.h"
#include "harness/device/cache.h"
#include "harness/device/ceilings.h"
#include "harness/device/scheduler.h"
#include "harness/device/work.h"
#include "harness/group/place.h"
#include "harness/group/world.h"

namespace tp {

namespace {

constexpr double kSweptBytes = 200e6;  // what is no larger fits in 4 caches of 50 MB
constexpr int kMaxCopies = 50, kMinCopies = 4, kSamples = 21, kWarmUps = 2;
constexpr double kReplayUs = 20e3;  // about as long is a replay, if it can be
// Compute-bound kernels rest before each replay, as peers do: at the power limit nothing repeats.
constexpr std::chrono::milliseconds kRest{50};
constexpr std::uint64_t kSeedBefore = 1, kSeedTimed = 2, kSeedAfter = 3;

enum class Cache : std::uint8_t { cold, warm };

double bytes_of(const KernelWork& work) { return work.read + work.written; }

// The least that this device could take.
double floor_us(const KernelWork& work, Cache cache, const Ceilings& c) {
  const double bytes = bytes_of(work);
  double rate = work.written < 0.2 * work.read ? c.read_bytes_per_us : c.bytes_per_us;
  if (cache == Cache::warm && bytes <= c.l2_bytes) rate = c.l2_bytes_per_us;
  const double matrix = work.matrix_flops + work.fp8_flops / 2;  // e4m3 goes twice as fast
  const double together =
      std::max({bytes / rate, work.flops / c.flops_per_us, matrix / c.matrix_flops_per_us});
  constexpr double kSignalUs =
      0.6;  // one way over NVLink: tx_volatile_16B_us of benches/peers/ceilings
  return std::max(work.launches * c.launch_us + work.signals * kSignalUs, together);
}

bool is_compute_bound(const KernelWork& work, const Ceilings& c) {
  return work.flops / c.flops_per_us > bytes_of(work) / c.bytes_per_us ||
         (work.matrix_flops + work.fp8_flops / 2) / c.matrix_flops_per_us >
             bytes_of(work) / c.bytes_per_us;
}

// What one rank found.
struct RankTimes {
  std::vector<double> us;  // of one call, by replay
  int copies = 0, sets = 0;
  std::string wrong;
};

class Runner {
 public:
  Runner(const KernelBench& bench, Cache cache, Stream& stream, TpGroup& group, RankTimes& times)
      : bench_(bench),
        cache_(cache),
        stream_(stream),
        group_(group),
        flag_(stream, "the ranks' flag", sizeof(float), std::nullopt),
        times_(times) {}

  void run() {
    if (!agree_that_right(*one(kSeedBefore))) return;
    if (times_kernels() ? !time() : !run_once()) return;
    agree_that_right(*one(kSeedAfter));
  }

 private:
  using Call = std::unique_ptr<KernelCall>;

  Call make(std::uint64_t seed) { return bench_.make({stream_, group_}, seed); }
  Call one(std::uint64_t seed) {
    Call call = make(seed);
    call->launch(stream_);
    return call;
  }

  // The largest of all ranks' values; the streams of all of them get here at about the same time.
  float largest(float value) {
    from_host(stream_, flag_.data(), &value, sizeof(value));
    group_.all_reduce_max(flag_.as<float>(), 1, stream_);
    to_host(stream_, &value, flag_.data(), sizeof(value));
    stream_.synchronize();
    return value;
  }
  // Ranks go on together, or none does: where one is wrong, others would wait for it in vain.
  bool agree_that_right(KernelCall& call) {
    times_.wrong = call.verify(stream_);
    return largest(times_.wrong.empty() ? 0 : 1) == 0;
  }

  bool run_once() {
    const Call call = make(kSeedTimed);
    times_.copies = times_.sets = 1;
    times_.us = {measure([&] { call->launch(stream_); })};
    return agree_that_right(*call);
  }

  bool time() {
    std::vector<Call> sets;
    sets.push_back(one(kSeedTimed));
    constexpr int kTrials = 3;
    const double estimate = largest(float(measure([&] {
                              for (int i = 0; i < kTrials; ++i) sets[0]->launch(stream_);
                            }))) /
                            kTrials;
    const int copies =
        int(std::clamp(kReplayUs / estimate, double{kMinCopies}, double{kMaxCopies}));
    if (cache_ == Cache::cold) {
      // No more than so many are needed for the first to have left the caches before its turn.
      const double wanted = std::max(2.0, std::ceil(kSweptBytes / bytes_of(bench_.work)));
      while (double(sets.size()) < std::min(wanted, double(copies)))
        sets.push_back(make(kSeedTimed));
    }
    times_.copies = copies;
    times_.sets = int(sets.size());
    Recording recording;
    const auto replay = [&] {
      stream_.begin_recording(recording);
      for (int i = 0; i < copies; ++i) sets[std::size_t(i) % sets.size()]->launch(stream_);
      stream_.end_recording();
    };
    const bool rests = is_compute_bound(bench_.work, *ceilings());
    for (int i = 0; i < kWarmUps + kSamples; ++i) {
      if (rests) std::this_thread::sleep_for(kRest);
      if (cache_ == Cache::cold) sweep_caches(stream_);
      group_.all_reduce_max(flag_.as<float>(), 1, stream_);  // they begin together
      const double us = measure(replay);
      if (i >= kWarmUps) times_.us.push_back(us / copies);
    }
    return agree_that_right(*sets[0]);
  }

  template <typename F>
  double measure(const F& enqueue) {
    const Stopwatch watch;
    stream_.start(watch);
    enqueue();
    stream_.stop(watch);
    stream_.synchronize();
    return watch.us();
  }

  const KernelBench& bench_;
  Cache cache_;
  Stream& stream_;
  TpGroup& group_;
  Buffer flag_;
  RankTimes& times_;
};

// All ranks of this process. What ended the run early is in every rank's `wrong`.
std::vector<RankTimes> run_local_ranks(World& world, const KernelBench& bench, Cache cache,
                                       bool& broken) {
  GroupSession session(world, bench.tp_size, std::nullopt);
  const Shard local = session.local_ranks();
  std::vector<RankTimes> times(std::size_t(local.size));
  std::vector<TpGroup> groups;
  for (std::int64_t i = 0; i < local.size; ++i)
    groups.push_back(session.group(int(local.offset + i)));
  std::string fault;
  {
    Scheduler scheduler({.seed = 1});
    for (std::int64_t i = 0; i < local.size; ++i) {
      scheduler.add_rank(int(local.offset + i), [&, i](Stream& stream) {
        Runner(bench, cache, stream, groups[std::size_t(i)], times[std::size_t(i)]).run();
        session.end_rank(int(local.offset + i), stream);
      });
    }
    const Report report = scheduler.run([&] { return session.progress(); });
    if (report.fault) fault = report.fault->what;
    if (const auto in_group = session.finish(report.fault)) fault = in_group->what;
    broken = session.broken() || device_is_lost();
  }
  for (RankTimes& rank : times)
    if (rank.wrong.empty()) rank.wrong = fault;
  forget_bench_data();
  return times;
}

// One line a rank: copies, sets, number of times, times, what is wrong.
std::string to_text(const std::vector<RankTimes>& ranks) {
  std::string text;
  for (const RankTimes& rank : ranks) {
    text += fmt::format("{} {} {}", rank.copies, rank.sets, rank.us.size());
    for (const double us : rank.us) text += fmt::format(" {:.17g}", us);
    std::string wrong = rank.wrong;
    std::replace(wrong.begin(), wrong.end(), '\n', ' ');
    text += " " + wrong + "\n";
  }
  return text;
}
std::vector<RankTimes> from_text(const std::vector<std::string>& processes) {
  std::vector<RankTimes> ranks;
  for (const std::string& process : processes) {
    std::istringstream lines(process);
    for (std::string line; std::getline(lines, line);) {
      std::istringstream words(line);
      RankTimes& rank = ranks.emplace_back();
      std::size_t count = 0;
      words >> rank.copies >> rank.sets >> count;
      rank.us.resize(count);
      for (double& us : rank.us) words >> us;
      std::getline(words >> std::ws, rank.wrong);
    }
  }
  return ranks;
}

double quantile(std::vector<double> values, double p) {
  std::sort(values.begin(), values.end());
  const double at = p * double(values.size() - 1);
  const auto low = std::size_t(at);
  const double next = values[std::min(low + 1, values.size() - 1)];
  return values[low] + (next - values[low]) * (at - double(low));
}

void report(benchmark::State& state, const KernelBench& bench, Cache cache,
            const std::vector<RankTimes>& ranks) {
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    if (ranks[r].wrong.empty()) continue;
    state.SkipWithError(fmt::format("tp_rank {}: {}", r, ranks[r].wrong).c_str());
    return;
  }
  std::vector<double> slowest = ranks[0].us;
  std::size_t straggler = 0;
  for (std::size_t r = 0; r < ranks.size(); ++r) {
    for (std::size_t i = 0; i < slowest.size(); ++i)
      slowest[i] = std::max(slowest[i], ranks[r].us[i]);
    if (quantile(ranks[r].us, 0.5) > quantile(ranks[straggler].us, 0.5)) straggler = r;
  }
  const double us = quantile(slowest, 0.5);
  state.SetIterationTime(us * 1e-6);
  auto& counters = state.counters;
  const KernelWork& work = bench.work;
  counters["p10_us"] = quantile(slowest, 0.1);
  counters["p90_us"] = quantile(slowest, 0.9);
  counters["bytes_per_second"] = bytes_of(work) / us * 1e6;
  if (const double flops = work.flops + work.matrix_flops + work.fp8_flops; flops > 0)
    counters["flops_per_second"] = flops / us * 1e6;
  if (ceilings()) {
    const double floor = floor_us(work, cache, *ceilings());
    counters["floor_us"] = floor;
    counters["fraction_of_floor"] = floor / us;
    counters["time_over_t0"] = us / ceilings()->launch_us;
  }
  counters["copies"] = ranks[0].copies;
  counters["sets"] = ranks[0].sets;
  if (ranks.size() > 1) {
    counters["slowest_rank"] = double(straggler);
    counters["processes"] = std::min(World::current().processes(), bench.tp_size);
  }
}

void run(benchmark::State& state, const KernelBench& bench, Cache cache) {
  static bool lost = false;
  World& world = World::current();
  for (auto _ : state) {
    if (lost) {
      state.SkipWithError("nothing runs any more after what broke the group or its GPU");
      return;
    }
    bool broken = false;
    const std::vector<RankTimes> local = run_local_ranks(world, bench, cache, broken);
    const std::vector<RankTimes> ranks = from_text(world.gather(to_text(local)));
    if (world.is_root()) {
      report(state, bench, cache, ranks);
    } else {
      state.SetIterationTime(1e-6);
    }
    lost = world.max(broken) > 0;
    if (lost) world.retire();
  }
}

}  // namespace

bool times_kernels() { return executor_name() == "gpu"; }

void register_kernel_bench(KernelBench bench) {
  const auto add = [&](Cache cache, const char* name) {
    benchmark::RegisterBenchmark(
        (bench.name + "/cache:" + name).c_str(),
        [bench, cache](benchmark::State& state) { run(state, bench, cache); })
        ->UseManualTime()
        ->Iterations(1)
        ->Unit(benchmark::kMicrosecond);
  };
  if (times_kernels()) add(Cache::cold, "cold");
  if (!times_kernels() || bytes_of(bench.work) <= kSweptBytes) add(Cache::warm, "warm");
}

}  // namespace tp
