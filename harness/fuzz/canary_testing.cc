#include "harness/fuzz/canary_testing.h"

#include <fmt/format.h>

#include <algorithm>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <fstream>
#include <optional>
#include <stdexcept>
#include <utility>

#include "harness/base/operator.h"
#include "harness/base/philox.h"
#include "harness/base/user_adapter.h"
#include "harness/base/user_checkpoint.h"
#include "harness/device/scheduler.h"
#include "harness/fuzz/domain.h"
#include "harness/group/ledger.h"
#include "harness/group/place.h"
#include "harness/group/tp_group.h"
#include "harness/group/world.h"

namespace tp {

namespace {

const std::vector<std::string> kFaults = {"none",
                                          "wrong",
                                          "segv",
                                          "abort",
                                          "exit",
                                          "loop",
                                          "throw",
                                          "skip_collective",
                                          "once",
                                          "noise",
                                          "endless",
                                          "wrong_on_gpu",
                                          "wrong_in_emulator",
                                          "other_bits",
                                          "needs_poison",
                                          "gone",
                                          "loop_in_emulator",
                                          "wrong_more_on_gpu",
                                          "segv_serial",
                                          "segv_parallel",
                                          "wrong_in_file",
                                          "wrong_in_adapter"};

// The module that wrong_in_adapter is wrong with.
constexpr const char* kWrongModule = "model.layers.0.wrong";

int unique_shards(const ModelShape& model, int tp_size) {
  return std::min(model.num_kv_heads, tp_size);
}

Mutant unique_shards_mutant() {
  Mutant m{.id = "0:unique_shards",
           .what = "counts a replicated shard once",
           .upstream = "tpcheck/canary#1",
           .rules = sharding_rules()};
  m.rules.norm.k_shards = unique_shards;
  return m;
}

// What a fault that depends on where and how it runs comes down to, here.
std::string fault_here(const std::string& fault, const Case& c, const RunOptions& options) {
  const bool on_gpu = executor_name() == "gpu";
  if (fault == "segv_serial") return options.serial ? "segv" : "none";
  if (fault == "segv_parallel") return options.serial ? "none" : "segv";
  if (fault == "loop_in_emulator") return on_gpu ? "wrong_on_gpu" : "loop";
  if (fault == "wrong_more_on_gpu")
    return on_gpu && c.tp_size <= c.model.num_kv_heads ? "wrong_on_gpu" : "wrong";
  return fault;
}

void __attribute__((noinline)) do_fault(const std::string& fault) {
  if (fault == "segv")
    std::raise(SIGSEGV);  // a null store would be UBSan's finding before it is one
  if (fault == "abort") std::abort();
  if (fault == "exit") std::_Exit(3);
  if (fault == "throw") throw std::runtime_error("a canary threw this");
  for (volatile int forever = 1; fault == "loop" && forever;) {
  }
  if (fault == "noise" || fault == "endless") std::fputs("debug ", stdout);
  std::fflush(stdout);
  while (fault == "endless") std::fputs("x", stdout);
  if (fault == "gone" && executor_name() == "gpu") {
    // What the next worker finds (place_testing.cc).
    if (const char* path = std::getenv("TPCHECK_TEST_CANNOT"))
      std::ofstream(path) << "no GPU 0: it was there a moment ago\n";
    std::_Exit(3);
  }
}

// One rank: two barriers, and between them what is asked for.
void run_rank(TpGroup& group, Stream& stream, const std::string& fault, bool here) {
  group.barrier(stream);
  stream.synchronize();
  if (here) do_fault(fault);
  if (!here || fault != "skip_collective") group.barrier(stream);
  stream.synchronize();
}

// What went wrong on this process's ranks, as a line; empty if nothing did.
std::string run_ranks(World& world, const Case& c, const RunOptions& options,
                      const std::string& fault, int fault_rank) {
  std::optional<GroupSession::Clock::time_point> deadline;
  if (options.deadline.count() > 0) deadline = GroupSession::Clock::now() + options.deadline;
  GroupSession session(world, c.tp_size, deadline, options.trace);
  Scheduler scheduler(
      {.seed = c.seed, .deadline = deadline, .running = &ledger_page(world.process()).running});
  std::deque<TpGroup> groups;
  for (std::int64_t rank = session.local_ranks().offset; rank < session.local_ranks().end();
       ++rank) {
    TpGroup& group = groups.emplace_back(session.group(int(rank)));
    scheduler.add_rank(int(rank),
                       [&group, &session, &fault, rank, here = rank == fault_rank](Stream& stream) {
                         run_rank(group, stream, fault, here);
                         session.end_rank(int(rank), stream);
                       });
  }
  std::optional<Fault> wrong = scheduler.run([&] { return session.progress(); }).fault;
  if (const auto in_group = session.finish(wrong)) wrong = in_group;
  if (session.broken()) world.retire();
  return wrong ? to_line(Verdict{wrong->outcome, wrong->what, 0, 0, 0, 0}) : "";
}

Verdict run(World& world, const Case& c, const RunOptions& options) {
  const int fault_rank = int(c.options.at("fault_rank")) % c.tp_size;
  const std::string fault = fault_here(kFaults[std::size_t(c.options.at("fault"))], c, options);
  const std::string mine = run_ranks(world, c, options, fault, fault_rank);
  std::string wrong;
  for (const std::string& line : world.gather(mine)) {
    if (wrong.empty() || (wrong.starts_with("Pass") && !line.empty())) wrong = line;
  }
  wrong = world.broadcast(wrong);
  if (!wrong.empty()) return verdict_from_line(wrong);

  const int right = sharding_rules().norm.k_shards(c.model, c.tp_size);
  int shards = fault == "wrong" ? unique_shards(c.model, c.tp_size) : right;
  static bool failed_before = false;
  if (fault == "once" && !std::exchange(failed_before, true)) shards = 0;
  if (fault == "wrong_on_gpu" && executor_name() == "gpu") shards = 0;
  if (fault == "wrong_in_emulator" && executor_name() != "gpu" && c.tp_size > 1) shards = 0;
  if (fault == "wrong_in_file" && user_checkpoint() && user_checkpoint()->find("wrong")) shards = 0;
  if (fault == "wrong_in_adapter" && on_checkpoint(c) && user_adapter() &&
      user_adapter()->find(kWrongModule))
    shards = 0;
  if (options.mutant) shards = options.mutant->rules.norm.k_shards(c.model, c.tp_size);
  Verdict v;
  // As long as nothing is wrong, the same for every group size and executor.
  const bool others = fault == "other_bits" && executor_name() == "gpu" && c.tp_size > 1;
  v.digest = stream_of(fmt::format("{} {}{}", shards - right, c.seed, others ? " others" : ""));
  v.score = 0.5;
  v.threads = std::uint64_t(c.tp_size) * std::uint64_t(c.num_tokens);
  if (fault == "needs_poison" && options.poison) {
    v.outcome = Outcome::Uninitialised;
    v.detail = "two poisons give different bits";
  } else if (shards != right) {
    v.outcome = Outcome::WrongValue;
    v.detail = fmt::format("tp_rank {}: got {} shards, accepted {}", fault_rank, shards, right);
  }
  return v;
}

// One for each module of the adapter that is not called "unfit".
CheckpointCases cases_of_adapter(const Operator& op, int tp_size) {
  CheckpointCases all;
  Case c = op.blank();
  c.tp_size = tp_size;
  c.model.num_heads = user_adapter_base()->shape.num_heads;
  c.model.num_kv_heads = user_adapter_base()->shape.num_kv_heads;
  const auto refused = op.refuse(c);
  for (const PeftModule& module : user_adapter()->modules()) {
    ++c.options["layer"];
    if (refused) {
      all.left_out = *refused;
    } else if (module.name.ends_with("unfit")) {
      all.left_out = module.name + " does not fit";
    } else {
      all.cases.push_back(c);
    }
  }
  return all;
}

Operator make_canary(const std::string& name, std::vector<int> fault_weights) {
  Operator op{.name = name,
              .what = "fails as its case line says",
              .keys = {},
              .laws = {},
              .mutants = {},
              .refuse = {},
              .run = run};
  for (const char* key : {"num_heads", "num_kv_heads", "head_dim", "tp_size", "num_tokens", "dtype",
                          "fill", "seed"}) {
    op.keys.push_back(shared_key(key));
  }
  Key fault{.name = "fault", .help = "what goes wrong"};
  fault.max = std::int64_t(kFaults.size()) - 1;
  fault.words = kFaults;
  fault.shrink = Shrink::to_fallback;
  fault.weights = std::move(fault_weights);
  Key rank{.name = "fault_rank", .help = "where it goes wrong, modulo tp_size"};
  rank.max = 1023;
  rank.draw_max = 15;
  op.keys.push_back(fault);
  op.keys.push_back(rank);
  if (name == "canary_wrong_in_adapter") {
    Key layer{.name = "layer", .help = "module of the adapter, counted from 1; 0: none"};
    layer.max = 1000;
    layer.shrink = Shrink::never;
    layer.of_checkpoint = true;
    layer.is_drawn = false;
    op.keys.push_back(layer);
    op.adapter_cases = [name](int tp_size) {
      return cases_of_adapter(find_operator(name), tp_size);
    };
  }
  if (name == "canary" || name == "canary_wrong") op.mutants.push_back(unique_shards_mutant());
  op.refuse = [](const Case& c) { return partitionable(c.model, c.tp_size); };
  return op;
}

}  // namespace

void add_canaries() {
  std::vector<int> none(kFaults.size(), 0);
  none[0] = 1;
  add_operator(make_canary("canary", none));
  for (std::size_t i = 1; i < kFaults.size(); ++i) {
    std::vector<int> weights = none;
    weights[i] = 1;
    add_operator(make_canary("canary_" + kFaults[i], weights));
  }
}

}  // namespace tp
