// One case from line to verdict: the oracles in the order of their cost.

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <set>
#include <utility>

#include "harness/base/check.h"
#include "harness/base/partition_law.h"
#include "harness/device/ceilings.h"
#include "harness/device/memory.h"
#include "properties/run/judge.h"
#include "properties/run/laws.h"
#include "properties/run/pass.h"
#include "properties/run/share.h"
#include "properties/run/stage.h"

namespace tp {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// Runs one case's passes and gives process 0 everybody's outputs; elsewhere `outputs` is this
// process's.
class CaseRun {
 public:
  CaseRun(World& world, const OperatorSpec& spec, const RunOptions& options)
      : world_(world),
        spec_(spec),
        rules_(options.mutant ? options.mutant->rules : sharding_rules()),
        options_(options) {
    if (options.deadline.count() > 0) deadline_ = Clock::now() + options.deadline;
  }

  struct Gathering {
    std::vector<Stage> stages;
    InputData data;
    std::optional<Fault> fault = {};
    std::vector<std::byte> outputs = {};  // of all ranks, on process 0
    std::map<int, DeviceTime> times = {};
  };

  // The same data over each of the poisons: the outputs must not know the difference.
  Gathering run(const Case& c, const Variation& variation, std::vector<Poison> poisons,
                bool is_original) {
    Gathering all{spec_.stages(c, rules_, variation),
                  InputData(spec_.regime(c, variation), world_.is_root())};
    const std::size_t passes = options_.poison ? poisons.size() : 1;
    const bool delays = c.options.at("delays") == 1, graph = c.options.at("graph") == 1;
    Share mine;
    mine.fault = shortage_of_memory(c, all.stages);
    bool stop = world_.max(mine.fault.has_value()) != 0;
    for (std::size_t i = 0; i < passes && !stop; ++i) {
      PassOptions pass{.poison = options_.poison ? std::optional(poisons[i]) : std::nullopt,
                       .graph = graph,
                       .delays = delays,
                       .serial = options_.serial,
                       // Not what is slow on purpose, or runs twice.
                       .timed = is_original && !delays && !graph && !options_.serial,
                       .deadline = deadline_,
                       .trace = {}};
      if (is_original && i == 0 && options_.trace)
        pass.trace = [&](const std::string& line) { mine.trace += line + '\n'; };
      const auto start = Clock::now();
      const double data_before = all.data.seconds();
      PassResult result = run_pass(world_, c, all.stages, all.data, pass);
      times_.kernels += seconds_since(start) - (all.data.seconds() - data_before);
      mine.threads += result.threads;
      mine.fault = result.fault;
      // The quickest of the passes: whatever held the others up, it was not the kernels.
      for (const auto& [rank, time] : result.times) {
        const auto [known, is_first] = mine.times.emplace(rank, time);
        if (!is_first && time.kernel_us < known->second.kernel_us) known->second = time;
      }
      if (result.broken) world_.retire();
      if (i == 0) {
        mine.outputs = std::move(result.outputs);
      } else if (!mine.fault && (result.outputs.size() != mine.outputs.size() ||
                                 std::memcmp(result.outputs.data(), mine.outputs.data(),
                                             mine.outputs.size()) != 0)) {
        const auto [a, b] = std::mismatch(mine.outputs.begin(), mine.outputs.end(),
                                          result.outputs.begin(), result.outputs.end());
        const Shard local = ranks_of_process(c.tp_size, world_.processes(), world_.process());
        const std::string place =
            place_of(std::size_t(a - mine.outputs.begin()), all.stages, local);
        mine.fault =
            Fault{Outcome::Uninitialised,
                  fmt::format("{} depends on what memory held before: bytes {:#04x} or {:#04x}",
                              place, int(poisons[0]), int(poisons[i])),
                  -1};
      }
      // Whether to go on is decided by all processes or by none.
      stop = world_.max(mine.fault.has_value()) != 0;
    }
    int weight = -1;
    for (const std::string& text : world_.gather(pack(mine))) {
      const Share share = unpack(text);
      threads_ += share.threads;
      all.times.insert(share.times.begin(), share.times.end());
      for (std::size_t at = 0; at < share.trace.size();) {
        const std::size_t end = share.trace.find('\n', at);
        options_.trace(share.trace.substr(at, end - at));
        at = end + 1;
      }
      if (share.fault && weight_of(share) > weight) {
        weight = weight_of(share);
        all.fault = share.fault;
      }
      all.outputs.insert(all.outputs.end(), share.outputs.begin(), share.outputs.end());
    }
    return all;
  }

  // On process 0: what the gathered outputs are worth.
  Judgement judge_outputs(const Case& c, Gathering& all, bool discriminate) {
    const auto start = Clock::now();
    const double data_before = all.data.seconds();
    Judgement judgement = judge(c, all.stages, all.data, all.outputs, discriminate);
    times_.reference += judgement.reference_seconds;
    times_.comparison += seconds_since(start) - judgement.reference_seconds;
    // The reference makes the inputs that it is the first to ask for.
    times_.reference -= all.data.seconds() - data_before;
    times_.data += all.data.seconds();
    return judgement;
  }

  std::uint64_t threads() const { return threads_; }
  const CaseTimes& times() const { return times_; }

 private:
  // What the device lacks for this process's ranks, as the reason why the case is skipped.
  std::optional<Fault> shortage_of_memory(const Case& c, const std::vector<Stage>& stages) const {
    constexpr std::size_t kAlwaysThere = std::size_t{64} << 20;  // to ask costs more than to have
    std::size_t needed = 0;
    const Shard local = ranks_of_process(c.tp_size, world_.processes(), world_.process());
    for (std::int64_t r = local.offset; r < local.end(); ++r) {
      std::set<std::string> counted;  // stages share buffers
      for (const Stage& stage : stages) {
        for (const LocalBuffer& buffer : stage.buffers(int(r))) {
          if (counted.insert(buffer.name).second)
            needed += buffer_bytes(buffer) + 2 * Buffer::kGuard;
        }
      }
    }
    if (needed <= kAlwaysThere) return std::nullopt;
    const std::size_t available = device_memory::available();
    if (needed <= available) return std::nullopt;
    return Fault{
        Outcome::Skipped,
        fmt::format("the {} ranks of process {} need {:.3g} GB of device memory, of which "
                    "{:.3g} GB are free",
                    local.size, world_.process(), double(needed) / 1e9, double(available) / 1e9),
        -1};
  }

  World& world_;
  const OperatorSpec& spec_;
  ShardingRules rules_;
  const RunOptions& options_;
  std::optional<Clock::time_point> deadline_;
  std::uint64_t threads_ = 0;
  CaseTimes times_;
};

Verdict verdict_of(const Fault& fault) {
  const std::string rank = fault.tp_rank >= 0 ? fmt::format("tp_rank {}, ", fault.tp_rank) : "";
  return {.outcome = fault.outcome, .detail = rank + fault.what};
}

// What the devices measured, beside the least that they could have taken. Process 0's device stands
// for all of them.
Timing timing_of(const std::map<int, DeviceTime>& times, const std::vector<Stage>& stages) {
  Timing timing;
  if (times.empty() || !ceilings()) return timing;
  for (const auto& [rank, time] : times) {
    timing.collective_us = std::max(timing.collective_us, time.collective_us);
    if (rank < 0 || time.kernel_us <= timing.kernel_us) continue;
    timing.kernel_us = time.kernel_us;
    timing.slowest_rank = rank;
  }
  if (!timing.measured()) return timing;
  for (const Stage& stage : stages) {
    if (!stage.cost) continue;
    const Cost cost = stage.cost(timing.slowest_rank);
    timing.bytes += cost.bytes;
    timing.flops += cost.flops + cost.matrix_flops;
    timing.floor_us += ceilings()->floor_us(cost.bytes, cost.flops, cost.matrix_flops);
  }
  return timing;
}

bool wants_discrimination(const Case& c) {
  const auto key = c.options.find("discriminate");
  return key != c.options.end() && key->second == 1;
}

// The oracles, cheapest first. All processes run the passes; only process 0's verdict counts.
Verdict run_oracles(World& world, CaseRun& runs, const OperatorSpec& spec, const Case& c) {
  // Of an operator with heads; but a layer of its that has none is legal whatever they are.
  if (std::any_of(spec.keys.begin(), spec.keys.end(),
                  [](const Key& k) { return k.name == "num_heads"; }) &&
      !partitionable(c.model, c.tp_size)) {
    if (auto broken = broken_partition_law(c.model, c.tp_size))
      return {.outcome = Outcome::WrongValue, .detail = *broken};
  }
  std::vector<Poison> poisons = {Poison::large, Poison::tiny};
  if (c.options.at("poison") == 1) poisons.push_back(Poison::nan);
  CaseRun::Gathering all = runs.run(c, {}, poisons, true);

  Verdict verdict;
  std::optional<Judgement> judgement;  // on process 0, unless the passes failed
  if (all.fault) {
    verdict = verdict_of(*all.fault);
  } else if (world.is_root()) {
    judgement = runs.judge_outputs(c, all, wants_discrimination(c));
    if (judgement->finding) verdict = *judgement->finding;
    verdict.digest = judgement->digest;
    verdict.own_bits = judgement->own_bits;
    verdict.score = judgement->score;
    verdict.timing = timing_of(all.times, all.stages);
  }
  if (const std::int64_t number = c.options.at("law"); number > 0) {
    // Process 0 decides whether there is anything left to find, and all follow.
    if (world.broadcast(verdict.finding() ? "stop" : "go") == "stop") return verdict;
    const LawRun& law = spec.laws[std::size_t(number - 1)];
    const auto [varied, variation] = law.vary(c);
    CaseRun::Gathering other = runs.run(varied, variation, {Poison::large}, false);
    if (!world.is_root()) return verdict;
    if (other.fault) return verdict_of(*other.fault);
    if (auto broken = broken_law(law, c, varied, variation, *judgement,
                                 runs.judge_outputs(varied, other, false))) {
      verdict.outcome = Outcome::LawBroken;
      verdict.detail = *broken;
    }
  }
  if (verdict.outcome == Outcome::Pass && judgement && judgement->blind_to) {
    verdict.outcome = Outcome::Mistrusted;
    verdict.detail = "these data could not have shown " + *judgement->blind_to;
  }
  return verdict;
}

// A key that is 0, or in `percent` of the cases that are drawn 1.
Key on_off_key(std::string name, std::string help, int percent) {
  return {.name = std::move(name),
          .help = std::move(help),
          .min = 0,
          .max = 1,
          .words = {"0", "1"},
          .weights = {100 - percent, percent}};
}

}  // namespace

std::optional<std::string> too_large(std::int64_t rows, std::int64_t cols) {
  constexpr std::int64_t kMax = std::int64_t{1} << 26;
  if (rows <= kMax / cols) return std::nullopt;
  return fmt::format("{} rows of {} columns are more than the {} elements a case may have", rows,
                     cols, kMax);
}

std::int64_t widest_qkv(const Case& c) {
  return std::int64_t{c.model.num_heads + 2 * std::max(c.model.num_kv_heads, c.tp_size)} *
         std::max(c.model.head_dim, c.model.value_head_dim());
}

Key pad_key(const std::string& of_what) {
  return {.name = "pad",
          .help = "elements between the rows of " + of_what,
          .min = 0,
          .max = 64,
          .grain = 8};
}

Operator make_operator(OperatorSpec spec) {
  Operator op{.name = spec.name,
              .what = spec.what,
              .keys = spec.keys,
              .mutants = spec.mutants,
              .refuse =
                  [refuse = spec.refuse, laws = spec.laws](const Case& c) {
                    auto reason = refuse(c);
                    const std::int64_t law = c.options.at("law");
                    if (reason || law == 0 || !laws[std::size_t(law - 1)].refuse) return reason;
                    return laws[std::size_t(law - 1)].refuse(c);
                  },
              .work = spec.work,
              .adopt = spec.adopt,
              .checkpoint_cases = spec.checkpoint_cases,
              .adapter_cases = spec.adapter_cases,
              .check_checkpoint = spec.check_checkpoint};
  Key law{.name = "law",
          .help = "a metamorphic law that is checked, too",
          .words = {"none"},
          .weights = {70}};
  for (const LawRun& l : spec.laws) {
    op.laws.push_back(l.law);
    law.words.push_back(l.law.name);
    law.weights.push_back(30 / int(spec.laws.size()));
  }
  law.max = std::int64_t(law.words.size()) - 1;
  op.keys.push_back(law);
  op.keys.push_back(
      {.name = "poison",
       .help = "what memory holds before a run: two finite patterns, or NaN as a third",
       .min = 0,
       .max = 1,
       .words = {"finite", "nan"},
       .weights = {80, 20}});
  op.keys.push_back(on_off_key("graph",
                               "1: the kernels are recorded over other data, then launched again "
                               "over these (CUDA graphs)",
                               15));
  op.keys.push_back(on_off_key(
      "delays", "1: seeded delays before kernels, so that a missing event or barrier shows", 15));
  const std::vector<Stage> stages = spec.stages(op.blank(), sharding_rules(), {});
  if (std::any_of(stages.begin(), stages.end(), [](const Stage& s) { return bool(s.blind_to); })) {
    op.keys.push_back(on_off_key(
        "discriminate", "1: mistrust data that could not have shown the known mistakes", 20));
  }
  op.run = [spec = std::move(spec)](World& world, const Case& c, const RunOptions& options) {
    const auto start = Clock::now();
    CaseRun runs(world, spec, options);
    Verdict verdict;
    try {
      verdict = run_oracles(world, runs, spec, c);
    } catch (const std::exception& e) {
      // Others may be waiting for this process by now: a broken harness ends the job.
      die(__FILE__, __LINE__, e.what());
    } catch (const Fault& e) {
      die(__FILE__, __LINE__, e.what);
    }
    verdict.threads = runs.threads();
    if (options.times != nullptr) {
      options.times->data += runs.times().data;
      options.times->kernels += runs.times().kernels;
      options.times->reference += runs.times().reference;
      options.times->comparison += runs.times().comparison;
    }
    verdict.seconds = seconds_since(start);
    return verdict_from_line(world.broadcast(to_line(verdict)));
  };
  return op;
}

}  // namespace tp
