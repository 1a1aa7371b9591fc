// The mistakes of LoRA over sharded bases: each planted at the smallest shape where it can show, in
// the operator of its own and in linear layers that have adapters, found in the stage that makes
// it; each changes nothing where it decides nothing; and the laws, seen to fail.

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "harness/base/check.h"
#include "harness/base/models.h"
#include "harness/fuzz/draw.h"
#include "harness/group/mpi_testing.h"
#include "kernels/lora_slots.h"
#include "properties/lora_call.h"
#include "properties/lora_layers.h"
#include "properties/planted_testing.h"

namespace tp {
namespace {

struct Planted {
  const char* id;
  const char* shape;
  Outcome outcome;
  const char* where;  // what the verdict begins with
};

constexpr auto kWrong = Outcome::WrongValue;

// One column of x and one token where that is enough.
constexpr const char* kSmallest = "v1 lora seed=3 ";

const Planted kPlanted[] = {
    {"lora-qkv-kv-replica-sizing:as-shipped",
     "module=qkv num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 stored=fused max_rank=1 "
     "hidden_size=1 num_tokens=1",
     Outcome::Uninitialised, "tp_rank 0, lora_b.v_proj[0, 0]"},
    {"lora-qkv-kv-replica-sizing:as-shipped",
     "module=qkv num_heads=4 num_kv_heads=1 head_dim=1 tp_size=4 stored=fused max_rank=1 "
     "hidden_size=1 num_tokens=1",
     Outcome::BadLaunch, "is loaded as [2, 1] into a slot of [1, 1]"},
    {"lora-qkv-kv-replica-sizing:as-shipped",
     "module=qkv num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 max_rank=1 hidden_size=1 "
     "num_tokens=1",
     Outcome::BadLaunch, "is loaded as [3, 1] into a slot of [2, 1]"},
    {"lora-qkv-kv-replica-sizing:even-slots",
     "module=qkv num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 max_rank=1 hidden_size=1 "
     "num_tokens=1",
     Outcome::BadLaunch, "is loaded as [3, 1] into a slot of [2, 1]"},
    {"lora-qkv-kv-replica-sizing:even-slots",
     "module=qkv num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 stored=fused max_rank=1 "
     "hidden_size=1 num_tokens=1",
     Outcome::BadLaunch, "is loaded as [3, 1] into a slot of [2, 1]"},
    {"lora-qkv-kv-replica-sizing:v-clamped",
     "module=qkv num_heads=4 num_kv_heads=2 head_dim=1 tp_size=4 stored=fused max_rank=1 "
     "hidden_size=1 num_tokens=1",
     kWrong, "stage lora_load, tp_rank 0, lora_b.v_proj[0, 0]"},
    {"lora-qkv-kv-replica-sizing:kv-of-rank",
     "module=qkv num_heads=4 num_kv_heads=2 head_dim=1 tp_size=4 max_rank=1 hidden_size=1 "
     "num_tokens=1",
     kWrong, "stage lora_load, tp_rank 1, lora_b.k_proj[0, 0]"},
    {"lora-qkv-kv-replica-sizing:kv-of-rank",
     "module=qkv num_heads=4 num_kv_heads=2 head_dim=1 tp_size=4 stored=fused max_rank=1 "
     "hidden_size=1 num_tokens=1",
     kWrong, "stage lora_load, tp_rank 1, lora_b.k_proj[0, 0]"},
    {"lora-qkv-kv-replica-sizing:kv-modulo",
     "module=qkv num_heads=4 num_kv_heads=2 head_dim=1 tp_size=4 max_rank=1 hidden_size=1 "
     "num_tokens=1",
     kWrong, "stage lora_load, tp_rank 2, lora_b.k_proj[1, 0]"},
    {"lora-qkv-kv-replica-sizing:kv-modulo",
     "module=qkv num_heads=4 num_kv_heads=2 head_dim=1 tp_size=4 stored=fused merged_scale=1 "
     "max_rank=1 hidden_size=1 num_tokens=1",
     kWrong, "stage lora_load, tp_rank 2, lora_b.k_proj[1, 0]"},
    {"lora-qkv-kv-replica-sizing:k-v-swapped",
     "module=qkv num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 stored=fused max_rank=1 "
     "hidden_size=1 num_tokens=1",
     kWrong, "stage lora_load, tp_rank 0, lora_b.k_proj[0, 0]"},
    {"lora-fused-adapter-contiguous-split:b",
     "module=gate_up num_heads=2 num_kv_heads=1 tp_size=2 intermediate_per_rank=1 stored=fused "
     "max_rank=1 hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 1, lora_b.gate_proj[1, 0]"},
    {"lora-fused-adapter-contiguous-split:b",
     "module=qkv num_heads=2 num_kv_heads=2 head_dim=1 tp_size=2 stored=fused max_rank=1 "
     "hidden_size=1 num_tokens=1",
     kWrong, "stage lora_load, tp_rank 1, lora_b.q_proj[1, 0]"},
    {"lora-slice-stride-assumption:packed",
     "module=gate_up num_heads=1 num_kv_heads=1 tp_size=1 intermediate_per_rank=1 max_rank=2 "
     "layout=ranks hidden_size=1 num_tokens=1 head_dim=1",
     Outcome::Uninitialised, "tp_rank 0, up_lora[0, 0]"},
    {"lora-slice-stride-assumption:packed",
     "module=gate_up num_heads=1 num_kv_heads=1 tp_size=1 intermediate_per_rank=1 num_tokens=2 "
     "layout=tokens max_rank=1 hidden_size=1 head_dim=1",
     Outcome::Uninitialised, "tp_rank 0, up_lora[1, 0]"},
    {"lora-slice-stride-assumption:packed",
     "module=qkv num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=2 layout=tokens "
     "max_rank=1 hidden_size=1",
     Outcome::Uninitialised, "tp_rank 0, v_lora[1, 0]"},
    {"lora-gather-when-replicated:gather",
     "module=gate_up num_heads=2 num_kv_heads=1 tp_size=2 intermediate_per_rank=1 max_rank=1 "
     "hidden_size=1 num_tokens=1 head_dim=1",
     Outcome::BadLaunch,
     "lora_shrink: 2 times 1 LoRA ranks are not the 1 that B is multiplied with"},
    {"lora-gather-when-replicated:sum",
     "module=gate_up num_heads=2 num_kv_heads=1 tp_size=2 intermediate_per_rank=1 max_rank=1 "
     "hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_shrink, tp_rank 0, lora_h[0, 0]"},
    {"lora-gather-when-replicated:gather-for-sum",
     "module=down_proj num_heads=2 num_kv_heads=1 tp_size=2 intermediate_per_rank=1 joins=whole "
     "max_rank=1 hidden_size=1 num_tokens=1 head_dim=1",
     Outcome::BadLaunch,
     "lora_shrink: 2 times 1 LoRA ranks are not the 1 that B is multiplied with"},
    {"lora-gather-when-replicated:gather-for-sum",
     "module=down_proj num_heads=2 num_kv_heads=1 hidden_size=2 tp_size=2 intermediate_per_rank=1 "
     "shared_out=1 max_rank=1 num_tokens=1 head_dim=1",
     Outcome::BadLaunch,
     "lora_shrink: 2 times 1 LoRA ranks are not the 1 that B is multiplied with"},
    {"rslora-scale:not-rs",
     "module=gate_up num_heads=1 num_kv_heads=1 tp_size=1 intermediate_per_rank=1 max_rank=2 "
     "rslora=1 hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 0, lora_scales[0, 0]"},
    {"rslora-scale:not-rs",
     "module=gate_up num_heads=1 num_kv_heads=1 tp_size=1 intermediate_per_rank=1 max_rank=2 "
     "rslora=1 merged_scale=1 hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 0, lora_b.gate_proj[0, 0]"},
    {"rslora-scale:always-rs",
     "module=gate_up num_heads=1 num_kv_heads=1 tp_size=1 intermediate_per_rank=1 max_rank=2 "
     "hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 0, lora_scales[0, 0]"},
    {"rslora-scale:max-rank",
     "module=gate_up num_heads=2 num_kv_heads=1 tp_size=2 intermediate_per_rank=1 ranks=lower "
     "shared_out=1 max_rank=1 hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 0, lora_scales[0, 0]"},
    {"rslora-scale:max-rank",
     "module=gate_up num_heads=1 num_kv_heads=1 tp_size=1 intermediate_per_rank=1 max_rank=2 "
     "ranks=lower hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 0, lora_scales[0, 0]"},
    {"rslora-scale:alpha",
     "module=gate_up num_heads=1 num_kv_heads=1 tp_size=1 intermediate_per_rank=1 max_rank=2 "
     "hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 0, lora_scales[0, 0]"},
    {"rslora-scale:twice",
     "module=gate_up num_heads=1 num_kv_heads=1 tp_size=1 intermediate_per_rank=1 max_rank=1 "
     "hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 0, lora_b.gate_proj[0, 0]"},
    {"rslora-scale:twice",
     "module=gate_up num_heads=1 num_kv_heads=1 tp_size=1 intermediate_per_rank=1 merged_scale=1 "
     "max_rank=1 hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 0, lora_scales[0, 0]"},
    {"lora-delta-wrong-parallel-state:whole-on-partial",
     "module=down_proj num_heads=2 num_kv_heads=1 tp_size=2 intermediate_per_rank=1 max_rank=1 "
     "hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_shrink, tp_rank 0, lora_h[0, 0]"},
    {"lora-delta-wrong-parallel-state:whole-on-partial",
     "module=o_proj num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 reduce=external max_rank=1 "
     "hidden_size=1 num_tokens=1",
     kWrong, "stage lora_shrink, tp_rank 0, lora_h[0, 0]"},
    {"lora-delta-wrong-parallel-state:partial-on-whole",
     "module=down_proj num_heads=2 num_kv_heads=1 tp_size=2 intermediate_per_rank=1 joins=whole "
     "max_rank=1 hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_shrink, tp_rank 0, lora_h[0, 0]"},
    {"lora-delta-wrong-parallel-state:partial-on-whole",
     "module=o_proj hidden_size=2 num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 shared_out=1 "
     "max_rank=1 num_tokens=1",
     kWrong, "stage lora_shrink, tp_rank 0, lora_h[0, 0]"},
    {"own:lora-slot-of-former",
     "module=gate_up num_heads=1 num_kv_heads=1 tp_size=1 intermediate_per_rank=1 some_modules=1 "
     "reload=1 max_rank=1 hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 0, lora_a.up_proj[0, 0]"},
    {"own:lora-slot-of-former",
     "module=down_proj num_heads=1 num_kv_heads=1 tp_size=1 intermediate_per_rank=1 max_rank=2 "
     "ranks=lower reload=1 hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 0, lora_a.down_proj[1, 0]"},
    {"own:lora-slot-of-former",
     "module=down_proj num_heads=1 num_kv_heads=1 tp_size=1 intermediate_per_rank=1 max_rank=2 "
     "ranks=lower hidden_size=1 num_tokens=1 head_dim=1",
     Outcome::Uninitialised, "tp_rank 0, lora_a.down_proj[1, 0]"},
    {"own:lora-b-of-next-rank",
     "module=gate_up num_heads=2 num_kv_heads=1 tp_size=2 intermediate_per_rank=1 max_rank=1 "
     "hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 0, lora_b.gate_proj[0, 0]"},
    {"own:lora-b-of-next-rank",
     "module=qkv num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 stored=fused max_rank=1 "
     "hidden_size=1 num_tokens=1",
     kWrong, "stage lora_load, tp_rank 0, lora_b.q_proj[0, 0]"},
    {"own:lora-a-columns-of-next-rank",
     "module=down_proj num_heads=2 num_kv_heads=1 tp_size=2 intermediate_per_rank=1 max_rank=1 "
     "hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 0, lora_a.down_proj[0, 0]"},
    {"own:lora-a-rows-of-rank-0",
     "module=gate_up num_heads=2 num_kv_heads=1 tp_size=2 intermediate_per_rank=1 shared_out=1 "
     "max_rank=1 hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_load, tp_rank 1, lora_a.gate_proj[1, 0]"},
    {"own:lora-bias-on-every-rank",
     "module=down_proj num_heads=2 num_kv_heads=1 tp_size=2 intermediate_per_rank=1 lora_bias=1 "
     "hidden_size=1 num_tokens=1 head_dim=1 max_rank=1",
     kWrong, "stage lora_expand, tp_rank 1, partial_lora[1, 0]"},
    {"own:lora-next-slot",
     "module=down_proj num_heads=1 num_kv_heads=1 tp_size=1 intermediate_per_rank=1 adapters=2 "
     "max_rank=1 hidden_size=1 num_tokens=1 head_dim=1",
     kWrong, "stage lora_shrink, tp_rank 0, lora_h[0, 0]"},
    {"own:lora-next-slot",
     "module=qkv num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 adapters=2 max_rank=1 "
     "hidden_size=1 num_tokens=1",
     kWrong, "stage lora_shrink, tp_rank 0, lora_h[0, 0]"},
};

const bool kAreKnown = [] {
  for (const Planted& p : kPlanted) planted_mutants().insert(p.id);
  return true;
}();

class LoraMutants : public testing::TestWithParam<Planted> {};

TEST_P(LoraMutants, AreFoundWhereTheyCanShow) {
  const auto& [id, shape, outcome, where] = GetParam();
  for (const char* fill : {"exact", "dense"}) {
    for (const char* dtype : {"f32", "f16", "bf16"}) {
      const std::string line = std::string(kSmallest) + shape + " dtype=" + dtype + " fill=" + fill;
      const Verdict v = run(line, id);
      EXPECT_EQ(name_of(v.outcome), name_of(outcome))
          << line << " with " << id << "\n  " << to_line(v);
      EXPECT_NE(v.detail.find(where), std::string::npos) << line << "\n  " << to_line(v);
      EXPECT_TRUE(find_mutant(id).front().mutant->shows(case_from_line(line))) << line;
      EXPECT_EQ(name_of(run(line).outcome), "Pass") << line;
    }
  }
}

// The heads of a model are nothing to its MLP, and need not be shared out.
TEST(LoraOfMlp, IsLegalWhateverTheHeadsAre) {
  for (const std::string module : {"gate_up", "down_proj"}) {
    const std::string line =
        "v1 lora hidden_size=8 num_heads=3 num_kv_heads=3 head_dim=4 tp_size=2 num_tokens=2 "
        "dtype=bf16 seed=1 max_rank=2 module=" +
        module;
    EXPECT_EQ(name_of(run(line).outcome), "Pass") << to_line(run(line));
  }
}

INSTANTIATE_TEST_SUITE_P(Zoo, LoraMutants, testing::ValuesIn(kPlanted), [](const auto& info) {
  return test_name(std::to_string(info.index) + "_" + info.param.id);
});

// ---- Decisions.

// `decides` says where a mistake is one: elsewhere it changes nothing, and where it says so, data
// with significands of their own show it, and small integers nearly always.
TEST(LoraDecisions, AreThoseThatTheMutantsSay) {
  if (test_world().processes() > 1) GTEST_SKIP() << "how many processes there are decides nothing";
  constexpr int kCases = 240, kOneIn = 3;  // mutants of a case
  constexpr double kMostWork = 2e5;        // a case of few milliseconds
  const Operator& op = find_operator("lora");
  Draw draw(make_domain({op.name}, {1, 2, 3, 4, 8}, {}, ""), 7);
  struct Count {
    int idle = 0, telling = 0, found = 0;
  };
  std::map<std::string, Count> counts;
  for (int i = 0; i < kCases; ++i) {
    Case c = draw.next();
    while (op.work(c) > kMostWork) c = draw.next();
    for (const char* key : {"law", "graph", "delays", "poison"}) c.options[key] = 0;
    c.fill = i % 4 == 0 ? Fill::exact : Fill::dense;
    const std::string line = to_line(c);
    RunOptions options{.deadline = std::chrono::seconds(60), .poison = false};
    const Verdict right = op.run(test_world(), c, options);
    EXPECT_EQ(name_of(right.outcome), "Pass") << line << "\n  " << to_line(right);
    for (std::size_t m = std::size_t(i) % kOneIn; m < op.mutants.size(); m += kOneIn) {
      const Mutant& mutant = op.mutants[m];
      const bool shows = mutant.shows(c);
      options.mutant = &mutant;
      options.poison = shows;  // what is not written shows where memory was
      const Verdict v = op.run(test_world(), c, options);
      Count& count = counts[mutant.id];
      if (shows) {
        ++count.telling;
        count.found += v.finding();
        EXPECT_TRUE(v.finding() || c.fill == Fill::exact) << line << " with " << mutant.id;
      } else {
        ++count.idle;
        EXPECT_EQ(name_of(v.outcome), "Pass")
            << line << " with " << mutant.id << "\n  " << to_line(v);
        EXPECT_EQ(v.digest, right.digest) << line << " with " << mutant.id;
      }
    }
  }
  int found = 0, telling = 0;
  for (const auto& [id, count] : counts) {
    found += count.found;
    telling += count.telling;
    std::printf("%-50s %3d changed nothing, %3d of %3d were found\n", id.c_str(), count.idle,
                count.found, count.telling);
  }
  EXPECT_EQ(counts.size(), op.mutants.size());
  EXPECT_GE(found, telling * 9 / 10);
}

// Where it depends on what was drawn for the adapters: a factor of one may be taken twice, the only
// adapter may have no second matrix, and its rank may be all of the slot's.
TEST(LoraDecisions, KnowTheAdaptersOfTheCase) {
  const std::string start =
      "v1 lora module=gate_up num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 hidden_size=3 "
      "intermediate_per_rank=3 num_tokens=1 dtype=bf16 ";
  const std::pair<const char*, const char*> mistakes[] = {
      {"rslora-scale:twice", "max_rank=4 rslora=1"},
      {"rslora-scale:twice", "max_rank=4 rslora=1 merged_scale=1"},
      {"lora-slice-stride-assumption:packed", "max_rank=2 layout=ranks some_modules=1"},
      {"own:lora-slot-of-former", "max_rank=2 ranks=lower"},
      {"own:lora-slot-of-former", "max_rank=2 ranks=lower adapters=2 reload=1"},
      {"own:lora-slot-of-former", "max_rank=2 ranks=lower adapters=2"},
  };
  for (const auto& [id, options] : mistakes) {
    int idle = 0, telling = 0;
    for (int seed = 1; seed <= 16; ++seed) {
      const std::string line = start + options + " seed=" + std::to_string(seed);
      const Verdict v = run(line, id);
      if (find_mutant(id).front().mutant->shows(case_from_line(line))) {
        ++telling;
        EXPECT_TRUE(v.finding()) << line << " with " << id;
      } else {
        ++idle;
        EXPECT_EQ(name_of(v.outcome), "Pass") << line << " with " << id << "\n  " << to_line(v);
        EXPECT_EQ(v.digest, run(line).digest) << line << " with " << id;
      }
    }
    EXPECT_GT(idle, 0) << id << " " << options;
    EXPECT_GT(telling, 0) << id << " " << options;
  }
}

// ---- The golden case: Qwen3.5-35B-A3B with an adapter of qkv_proj, whose B has 9216 rows.

std::string golden_line(int tp_size, const std::string& options = "stored=fused") {
  const ModelShape m = find_model("Qwen3.5-35B-A3B").shape;
  return "v1 lora hidden_size=16 num_heads=" + std::to_string(m.num_heads) +
         " num_kv_heads=" + std::to_string(m.num_kv_heads) +
         " head_dim=" + std::to_string(m.head_dim) +
         " output_gate=" + std::to_string(m.attn_output_gate) +
         " tp_size=" + std::to_string(tp_size) +
         " num_tokens=2 dtype=bf16 fill=dense seed=1 module=qkv max_rank=2 " + options;
}

const ShardingRules& rules_of(const std::string& id) {
  return find_mutant(id).front().mutant->rules;
}

// Rows of B that a rank's slot has room for, and those that a fused adapter fills it with.
struct SlotRows {
  std::int64_t room, loaded;
  bool operator==(const SlotRows&) const = default;
};
SlotRows rows_of_rank(const std::string& line, int tp_rank, const ShardingRules& rules) {
  const Case c = case_from_line(line);
  const LoraLayer layer = lora::lora_layer(c, lora::layer_of(c), tp_rank);
  const std::vector<std::int64_t> parts = lora_b_parts(layer, rules, /*is_fused=*/true);
  return {lora_b_rows(layer, rules), std::accumulate(parts.begin(), parts.end(), std::int64_t{0})};
}
std::ostream& operator<<(std::ostream& out, const SlotRows& rows) {
  return out << rows.loaded << " rows into a slot of " << rows.room;
}

constexpr const char* kAsShipped = "lora-qkv-kv-replica-sizing:as-shipped";

TEST(GoldenLora, SlotsOfFourRanksHave2560RowsAndOfEightRanks1536) {
  const auto layer = lora::layer_of(case_from_line(golden_line(4)));
  EXPECT_EQ(std::accumulate(layer.rows.begin(), layer.rows.end(), std::int64_t{0}), 9216);
  for (int rank = 0; rank < 4; ++rank)
    EXPECT_EQ(rows_of_rank(golden_line(4), rank, sharding_rules()), (SlotRows{2560, 2560})) << rank;
  for (int rank = 0; rank < 8; ++rank)
    EXPECT_EQ(rows_of_rank(golden_line(8), rank, sharding_rules()), (SlotRows{1536, 1536})) << rank;
}

TEST(GoldenLora, IsServedRight) {
  for (const int tp_size : {4, 8}) {
    for (const std::string stored : {"stored=fused", "stored=split"}) {
      const Verdict v = run(golden_line(tp_size, stored));
      EXPECT_EQ(name_of(v.outcome), "Pass") << golden_line(tp_size, stored) << "\n  " << to_line(v);
    }
  }
}

// Sizes agree, and V is nowhere.
TEST(GoldenLora, OfFourRanksIsServedWithoutItsVPartAndFound) {
  for (int rank = 0; rank < 4; ++rank) {
    EXPECT_EQ(rows_of_rank(golden_line(4), rank, rules_of(kAsShipped)), (SlotRows{2304, 2304}));
    const Case c = case_from_line(golden_line(4));
    const LoraLayer layer = lora::lora_layer(c, lora::layer_of(c), rank);
    EXPECT_EQ(lora_b_parts(layer, rules_of(kAsShipped), true),
              (std::vector<std::int64_t>{2048, 256, 0}));
  }
  const Verdict v = run(golden_line(4), kAsShipped);
  EXPECT_EQ(name_of(v.outcome), "Uninitialised") << to_line(v);
  EXPECT_NE(v.detail.find("lora_b"), std::string::npos) << v.detail;
}

TEST(GoldenLora, OfEightRanksDoesNotFitAndSaysBothSizes) {
  for (int rank = 0; rank < 8; ++rank)
    EXPECT_EQ(rows_of_rank(golden_line(8), rank, rules_of(kAsShipped)), (SlotRows{1152, 1280}));
  const Verdict v = run(golden_line(8), kAsShipped);
  EXPECT_EQ(name_of(v.outcome), "BadLaunch") << to_line(v);
  EXPECT_NE(v.detail.find("is loaded as [1280, 2] into a slot of [1152, 2]"), std::string::npos)
      << v.detail;
}

TEST(GoldenLora, HalvesOfTheMistakeAreFoundToo) {
  for (const int tp_size : {4, 8}) {
    const Verdict even = run(golden_line(tp_size), "lora-qkv-kv-replica-sizing:even-slots");
    EXPECT_EQ(name_of(even.outcome), "BadLaunch") << to_line(even);
    const Verdict clamped = run(golden_line(tp_size), "lora-qkv-kv-replica-sizing:v-clamped");
    EXPECT_EQ(name_of(clamped.outcome), "WrongValue") << to_line(clamped);
    EXPECT_EQ(clamped.detail.find("stage lora_load, tp_rank 0, lora_b.v_proj[0, 0]: got "), 0u)
        << clamped.detail;
  }
}

// Slots are right, bit by bit: what is made of them is not.
TEST(GoldenLora, IsFoundBehindTheSlotsWhereTheyAreRight) {
  const Verdict shrink = run(golden_line(4), "lora-gather-when-replicated:sum");
  EXPECT_EQ(shrink.detail.find("stage lora_shrink, tp_rank 0, lora_h[0, 0]: got "), 0u)
      << to_line(shrink);
  const Verdict expand =
      run(golden_line(4, "stored=fused layout=tokens"), "lora-slice-stride-assumption:packed");
  EXPECT_EQ(name_of(expand.outcome), "Uninitialised") << to_line(expand);
  EXPECT_NE(expand.detail.find("v_lora"), std::string::npos) << expand.detail;
}

// ---- Laws: each of a rule that is right in the case itself.

Verdict run_with(const std::string& line, void (*change)(ShardingRules&)) {
  const Case c = case_from_line(line);
  Mutant local{"own:local", "", "", sharding_rules()};
  change(local.rules);
  return find_operator(c.op).run(test_world(), c,
                                 {.mutant = &local, .deadline = std::chrono::seconds(60)});
}

// Calls of a rule in one run of a case without a law; of a case with one the second run begins
// there.
long asked, of_first_run;
// A plan that is made for the first batch and used for the next one.
std::vector<std::int32_t> first_plan;
std::int32_t of_first_plan(std::int32_t slot, std::int32_t) {
  const long call = asked++;
  if (call < of_first_run) {
    first_plan.push_back(slot);
    return slot;
  }
  const auto at = std::size_t(call - of_first_run);
  return at < first_plan.size() ? first_plan[at] : slot;  // a process without ranks has no plan
}
// Adapters in use, in the order in which tokens come with them: where they are taken for slots.
std::vector<std::int32_t> in_use;
std::int32_t number_in_use(std::int32_t slot, std::int32_t) {
  if (asked++ == of_first_run) in_use.clear();
  const auto at = std::find(in_use.begin(), in_use.end(), slot);
  if (at != in_use.end()) return std::int32_t(at - in_use.begin());
  in_use.push_back(slot);
  return std::int32_t(in_use.size()) - 1;
}
std::int32_t slot_0_later(std::int32_t slot, std::int32_t) {
  return asked++ < of_first_run ? slot : 0;
}

void expect_only_law_shows(const std::string& line, const std::string& law,
                           const std::string& where, void (*change)(ShardingRules&)) {
  const std::string with_law = line + " law=" + law;
  EXPECT_EQ(name_of(run(with_law).outcome), "Pass") << with_law << "\n  " << to_line(run(with_law));
  const auto verdict = [&](const std::string& text, long calls) {
    asked = 0;
    of_first_run = calls;
    first_plan.clear();
    in_use.clear();
    return run_with(text, change);
  };
  const Verdict without = verdict(line, 1L << 40);
  EXPECT_EQ(name_of(without.outcome), "Pass") << line << "\n  " << to_line(without);
  const Verdict v = verdict(with_law, asked);
  EXPECT_EQ(name_of(v.outcome), "LawBroken") << with_law << "\n  " << to_line(v);
  EXPECT_EQ(v.detail.find("law " + law + ": " + where), 0u) << with_law << "\n  " << to_line(v);
}

struct LawSeenToFail {
  const char* law;
  const char* line;  // without the law
  const char* where;
  void (*change)(ShardingRules&);
  std::vector<const char*> data = {"dtype=bf16 fill=exact", "dtype=bf16 fill=dense"};
};

const LawSeenToFail kLaws[] = {
    // One rank has all KV heads, and a fused adapter's are swapped.
    {"tp1",
     "lora seed=1 hidden_size=8 num_heads=2 num_kv_heads=2 head_dim=4 tp_size=2 num_tokens=2 "
     "module=qkv "
     "max_rank=2 stored=fused",
     "stage lora_load, tp_rank 0, lora_b.k_proj[0, 0]",
     [](ShardingRules& r) {
       r.lora.b_rows = [](const LoraBase& base, int part, bool is_fused) {
         const int other = base.tp_size == 1 && part > 0 ? 3 - part : part;
         return sharding_rules().lora.b_rows(base, other, is_fused);
       };
     }},
    {"tokens",
     "lora seed=1 hidden_size=8 num_heads=1 num_kv_heads=1 head_dim=4 tp_size=1 num_tokens=5 "
     "module=qkv "
     "max_rank=2 adapters=2 segments=mixed",
     "stage lora_shrink, tp_rank 0, lora_h[",
     [](ShardingRules& r) { r.lora.slot_of_token = of_first_plan; }},
    // alpha is -16 (exact) or -24.
    {"alpha",
     "lora seed=2 hidden_size=8 num_heads=1 num_kv_heads=1 head_dim=4 tp_size=1 num_tokens=1 "
     "module=qkv "
     "max_rank=4",
     "stage lora_load, tp_rank 0, lora_scales[0, 0]",
     [](ShardingRules& r) {
       r.lora.scale = [](double alpha, std::int64_t rank, std::int64_t room, bool use_rslora) {
         return sharding_rules().lora.scale(std::clamp(alpha, -24.0, 24.0), rank, room, use_rslora);
       };
     }},
    {"slots",
     "lora seed=1 hidden_size=8 num_heads=1 num_kv_heads=1 head_dim=4 tp_size=1 num_tokens=2 "
     "module=qkv "
     "max_rank=2 adapters=2",
     "stage lora_shrink, tp_rank 0, lora_h[0, 0]",
     [](ShardingRules& r) {
       r.lora.slot_of_token = [](std::int32_t slot, std::int32_t) { return slot == 1 ? 0 : slot; };
     }},
    {"alone",
     "lora seed=7 hidden_size=8 num_heads=1 num_kv_heads=1 head_dim=4 tp_size=1 num_tokens=5 "
     "module=qkv "
     "max_rank=2 adapters=2 segments=mixed",
     "stage lora_shrink, tp_rank 0, lora_h[",
     [](ShardingRules& r) { r.lora.slot_of_token = number_in_use; }},
    {"zero_b",
     "qkv_linear seed=1 hidden_size=8 num_heads=1 num_kv_heads=1 head_dim=4 tp_size=1 num_tokens=5 "
     "lora=2 lora_rank=2",
     "stage lora_shrink, tp_rank 0, lora_h[",
     [](ShardingRules& r) { r.lora.slot_of_token = slot_0_later; }},
    // Weights that the adapter was merged into, and of them other K heads than before.
    {"merged",
     "qkv_linear seed=1 hidden_size=8 num_heads=2 num_kv_heads=2 head_dim=4 tp_size=2 num_tokens=3 "
     "lora=1",
     "stage qkv_linear, tp_rank 0, k[0, 0]",
     [](ShardingRules& r) {
       r.linear.qkv_weight_rows = [](const ModelShape& m, int tp_size, int tp_rank) {
         const bool is_later = asked++ >= of_first_run;
         QkvRows rows = sharding_rules().linear.qkv_weight_rows(m, tp_size, tp_rank);
         if (is_later) rows.k = {m.num_kv_heads * m.head_dim - rows.k.end(), rows.k.size};
         return rows;
       };
     },
     {"dtype=f32 fill=exact"}},
    // Sums within the budget, of other bits: the base's bias is added by another rank.
    {"tokens",
     "row_linear seed=1 hidden_size=24 in_per_rank=8 tp_size=4 num_tokens=6 bias=yes lora=2 "
     "lora_joins=whole",
     "out[",
     [](ShardingRules& r) {
       r.linear.row_adds_bias = [](int tp_rank) {
         return tp_rank == (asked++ < of_first_run ? 0 : 3);
       };
     },
     {"dtype=f32 fill=dense"}},
};

class LoraLaws : public testing::TestWithParam<LawSeenToFail> {};

TEST_P(LoraLaws, ShowWhatTheCaseHides) {
  const LawSeenToFail& p = GetParam();
  for (const char* data : p.data)
    expect_only_law_shows(std::string("v1 ") + p.line + " " + data, p.law, p.where, p.change);
}

INSTANTIATE_TEST_SUITE_P(Laws, LoraLaws, testing::ValuesIn(kLaws), [](const auto& info) {
  return test_name(std::to_string(info.index) + "_" + info.param.law);
});

// ---- Adapters as an option of linear layers.

const Planted kOnLinears[] = {
    {"lora-qkv-kv-replica-sizing:kv-of-rank",
     "qkv_linear hidden_size=4 num_heads=4 num_kv_heads=2 head_dim=2 tp_size=4 num_tokens=1 lora=1 "
     "lora_rank=2",
     kWrong, "stage lora_load, tp_rank 1, lora_b.k_proj["},
    {"lora-gather-when-replicated:sum",
     "qkv_linear hidden_size=16 num_heads=2 num_kv_heads=1 head_dim=8 tp_size=2 num_tokens=2 "
     "weights=fused quant=fp8_block block=16 lora=2 lora_rank=4",
     kWrong, "stage lora_shrink, tp_rank 0, lora_h["},
    {"own:lora-next-slot",
     "qkv_linear hidden_size=16 num_heads=2 num_kv_heads=2 head_dim=8 tp_size=2 num_tokens=3 "
     "weights=split quant=fp8_channel activations=token lora=3",
     kWrong, "stage lora_shrink, tp_rank 0, lora_h["},
    {"own:lora-b-of-next-rank",
     "merged_linear hidden_size=8 intermediate_per_rank=2 tp_size=2 num_tokens=1 lora=1", kWrong,
     "stage lora_load, tp_rank 0, lora_b.gate_proj[0, 0]"},
    {"rslora-scale:alpha",
     "merged_linear hidden_size=16 intermediate_per_rank=8 tp_size=2 num_tokens=2 weights=fused "
     "quant=fp8_block block=16 lora=2 lora_rank=9",
     kWrong, "stage lora_load, tp_rank 0, lora_scales["},
    {"lora-gather-when-replicated:gather",
     "merged_linear hidden_size=8 intermediate_per_rank=4 tp_size=2 num_tokens=2 weights=striped "
     "quant=fp8_tensor activations=token lora=3",
     Outcome::BadLaunch, "tp_rank 0, lora_shrink: 2 times 8 LoRA ranks are not the 8"},
    {"lora-delta-wrong-parallel-state:whole-on-partial",
     "row_linear hidden_size=8 in_per_rank=4 tp_size=2 num_tokens=1 lora=1", kWrong,
     "stage lora_shrink, tp_rank 0, lora_h[0, 0]"},
    {"lora-delta-wrong-parallel-state:whole-on-partial",
     "row_linear hidden_size=8 in_per_rank=16 tp_size=2 num_tokens=2 weights=split quant=fp8_block "
     "block=16 reduce=reduce_scatter lora=2",
     kWrong, "stage lora_shrink, tp_rank 0, lora_h["},
    {"lora-delta-wrong-parallel-state:partial-on-whole",
     "row_linear hidden_size=8 in_per_rank=4 tp_size=2 num_tokens=1 lora=1 lora_joins=whole",
     kWrong, "stage lora_shrink, tp_rank 0, lora_h["},
    {"lora-delta-wrong-parallel-state:partial-on-whole",
     "row_linear hidden_size=8 in_per_rank=16 tp_size=2 num_tokens=3 weights=split "
     "quant=fp8_tensor "
     "lora=3 lora_joins=whole module=o_proj",
     kWrong, "stage lora_shrink, tp_rank 0, lora_h["},
    {"own:lora-a-columns-of-next-rank",
     "row_linear hidden_size=8 in_per_rank=16 tp_size=2 num_tokens=2 weights=split quant=fp8_block "
     "block=16 reduce_dtype=f32 lora=1",
     kWrong, "stage lora_load, tp_rank 0, lora_a.down_proj[0, 0]"},
};

class LoraOnLinears : public testing::TestWithParam<Planted> {};

TEST_P(LoraOnLinears, IsFoundInItsStages) {
  const auto& [id, shape, outcome, where] = GetParam();
  for (const char* fill : {"exact", "dense"}) {
    const std::string line = std::string("v1 ") + shape + " dtype=bf16 seed=1 fill=" + fill;
    const Verdict v = run(line, id);
    EXPECT_EQ(name_of(v.outcome), name_of(outcome))
        << line << " with " << id << "\n  " << to_line(v);
    EXPECT_EQ(v.detail.find(where), 0u) << line << "\n  " << to_line(v);
    EXPECT_EQ(name_of(run(line).outcome), "Pass") << line << "\n  " << to_line(run(line));
  }
}

INSTANTIATE_TEST_SUITE_P(Zoo, LoraOnLinears, testing::ValuesIn(kOnLinears), [](const auto& info) {
  return test_name(std::to_string(info.index) + "_" + info.param.id);
});

// One rank has other scales of its columns, other sums within their budget, and adapters add to
// those exactly.
TEST(LoraOnQuantisedLinears, OneRankAddsTheDeltaToAnotherSum) {
  const Verdict v =
      run("v1 row_linear hidden_size=1 in_per_rank=1 tp_size=2 num_tokens=1 dtype=f32 seed=330491 "
          "weights=split quant=fp8_tensor activations=tensor lora=2 lora_rank=1 lora_joins=whole "
          "law=tp1");
  EXPECT_EQ(name_of(v.outcome), "Pass") << to_line(v);
}

// ---- Refusals.

std::string refusal(const std::string& line) {
  try {
    case_from_line("v1 " + line + " num_tokens=2 dtype=bf16 seed=1");
  } catch (const BadInput& e) {
    return e.what();
  }
  return "accepted";
}

TEST(LoraRefusals, SayWhyInOneSentence) {
  const std::string lora =
      "lora hidden_size=6 num_heads=4 num_kv_heads=2 head_dim=2 tp_size=4 max_rank=2 module=";
  EXPECT_EQ(refusal(lora + "qkv"), "accepted");
  EXPECT_EQ(refusal(lora + "o_proj"), "accepted");
  EXPECT_EQ(refusal(lora + "qkv joins=whole"),
            "a column-parallel layer has no sum for a delta to join: joins=partial");
  EXPECT_EQ(refusal(lora + "gate_up joins=whole"),
            "a column-parallel layer has no sum for a delta to join: joins=partial");
  EXPECT_EQ(refusal(lora + "o_proj stored=fused"),
            "an adapter of one matrix is not stored as one of several: stored=split");
  EXPECT_EQ(refusal(lora + "down_proj stored=some_of_each"),
            "an adapter of one matrix is not stored as one of several: stored=split");
  EXPECT_EQ(refusal(lora + "o_proj shared_out=1 joins=whole"),
            "shared_out=1 gives a rank a share of the delta's columns, and joins=whole needs all");
  EXPECT_EQ(refusal(lora + "o_proj shared_out=1"),
            "shared_out=1: 6 rows of B are not 4 equal shares");
  EXPECT_EQ(refusal(lora + "qkv shared_out=1"), "accepted");
  EXPECT_EQ(refusal(lora + "qkv reduce=external"),
            "reduce and reduce_dtype are about ranks' parts, which only a row-parallel layer with "
            "joins=partial leaves");
  EXPECT_EQ(refusal(lora + "o_proj joins=whole reduce_dtype=f32"),
            "reduce and reduce_dtype are about ranks' parts, which only a row-parallel layer with "
            "joins=partial leaves");
  EXPECT_EQ(refusal(lora + "o_proj law=tp1"),
            "law=tp1: ranks whose parts are rounded add up to something else than one rank has");
  EXPECT_EQ(refusal(lora + "o_proj joins=whole law=tp1"), "accepted");
  EXPECT_EQ(refusal("lora hidden_size=6 num_heads=4 num_kv_heads=3 head_dim=2 tp_size=2 max_rank=2 "
                    "module=qkv"),
            "num_heads=4 is not a multiple of num_kv_heads=3");
}

TEST(LoraRefusals, OfLinearsSayWhyInOneSentence) {
  const std::string qkv =
      "qkv_linear hidden_size=16 num_heads=4 num_kv_heads=2 head_dim=2 "
      "tp_size=2 ";
  EXPECT_EQ(refusal(qkv + "weights=split quant=fp8_tensor activations=tensor gather=1"),
            "accepted");
  EXPECT_EQ(refusal(qkv + "weights=split quant=fp8_tensor activations=tensor gather=1 lora=1"),
            "adapters take activations as they are, and gather=1 gives ranks the codes of most");
  const std::string merged = "merged_linear hidden_size=16 intermediate_per_rank=8 tp_size=2 ";
  EXPECT_EQ(refusal(merged + "tile=16 lora=1"),
            "adapters are for rows without padding, not of tiles of 16");
  EXPECT_EQ(refusal(merged + "weights=split quant=fp8_tensor activations=tensor gather=1 lora=1"),
            "adapters take activations as they are, and gather=1 gives ranks the codes of most");
  EXPECT_EQ(refusal(merged + "lora=1 law=tile"),
            "law=tile pads gate and up, and adapters are for rows without padding");
  const std::string row = "row_linear hidden_size=16 in_per_rank=8 tp_size=2 ";
  EXPECT_EQ(refusal(row + "reduce=reduce_scatter lora=1"), "accepted");
  EXPECT_EQ(refusal(row + "reduce=reduce_scatter lora=1 lora_joins=whole"),
            "reduce=reduce_scatter shares the tokens out, and lora_joins=whole needs them all");
  EXPECT_EQ(refusal(row + "lora_joins=whole"), "lora_joins is about adapters, and lora=0 has none");
  EXPECT_EQ(refusal(row + "lora=1 law=tp1"),
            "law=tp1: ranks round what they shrink, each for itself, and one rank all of it");
  EXPECT_EQ(refusal(row + "lora=1 lora_joins=whole law=reduce"),
            "law=reduce shares the tokens out, and lora_joins=whole needs them all");
  EXPECT_EQ(refusal(qkv + "lora=2 law=merged"),
            "law=merged needs lora=1, dtype=f32, fill=exact and weights=given: one adapter, and "
            "sums that are not rounded");
}

}  // namespace
}  // namespace tp
