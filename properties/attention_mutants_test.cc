// The mistakes of attention and of the blocks around it: each planted at the smallest shape where
// it can show, with the data that show it; and each changes nothing where it decides nothing.

#include <gtest/gtest.h>

#include <cstdio>
#include <map>

#include "harness/fuzz/draw.h"
#include "properties/planted_testing.h"

namespace tp {
namespace {

struct Planted {
  const char* id;
  const char* line;  // after the version
  Outcome outcome;
};

const Planted kPlanted[] = {
    {"param2moe-global-heads:counts",
     "attention num_heads=2 num_kv_heads=2 head_dim=1 tp_size=2 num_tokens=1 dtype=bf16 seed=3 "
     "fill=dense",
     Outcome::BadLaunch},
    // Rows enough to be read as half as many of twice the width: then nothing tells but the values.
    {"param2moe-global-heads:counts",
     "attention num_heads=2 num_kv_heads=2 head_dim=8 tp_size=2 num_tokens=2 dtype=bf16 seed=3 "
     "fill=ties",
     Outcome::WrongValue},
    {"param2moe-global-heads:counts",
     "attention num_heads=2 num_kv_heads=2 head_dim=8 tp_size=2 num_tokens=2 dtype=f32 seed=3 "
     "fill=dense",
     Outcome::WrongValue},
    {"param2moe-global-heads:ratio",
     "attention num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 num_tokens=1 dtype=bf16 seed=3 "
     "fill=dense",
     Outcome::BadLaunch},
    {"param2moe-global-heads:contiguous",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=2 dtype=bf16 seed=3 "
     "fill=dense",
     Outcome::WrongValue},
    {"param2moe-global-heads:contiguous",
     "attention num_heads=1 num_kv_heads=1 head_dim=64 tp_size=1 num_tokens=4 dtype=f16 seed=3 "
     "fill=one_hot",
     Outcome::WrongValue},
    {"param2moe-global-heads:contiguous",
     "attention num_heads=1 num_kv_heads=1 head_dim=8 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties context=1 pad=1",
     Outcome::Uninitialised},
    {"per-head-param-from-zero:zero",
     "attention num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties sinks=1",
     Outcome::WrongValue},
    // A slope shows where there is a distance.
    {"per-head-param-from-zero:zero",
     "attention num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 num_tokens=2 dtype=bf16 seed=3 "
     "fill=ties alibi=1",
     Outcome::WrongValue},
    {"per-head-param-from-zero:kv",
     "attention num_heads=4 num_kv_heads=2 head_dim=1 tp_size=2 num_tokens=1 dtype=bf16 seed=3 "
     "fill=dense sinks=1",
     Outcome::WrongValue},
    {"per-head-param-from-zero:kv",
     "attention num_heads=4 num_kv_heads=2 head_dim=1 tp_size=2 num_tokens=2 dtype=f32 seed=3 "
     "fill=ties alibi=1",
     Outcome::WrongValue},
    {"per-head-param-from-zero:local-formula",
     "attention num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 num_tokens=2 dtype=bf16 seed=3 "
     "fill=ties alibi=1",
     Outcome::WrongValue},
    {"kv-mirrored-q-split:ratio",
     "attention num_heads=4 num_kv_heads=2 head_dim=1 tp_size=2 num_tokens=1 dtype=bf16 seed=3 "
     "fill=dense placement=whole",
     Outcome::WrongValue},
    {"kv-mirrored-q-split:ratio",
     "attention num_heads=4 num_kv_heads=2 head_dim=8 tp_size=2 num_tokens=1 dtype=f16 seed=3 "
     "fill=ties placement=whole",
     Outcome::WrongValue},
    {"kv-mirrored-q-split:from-zero",
     "attention num_heads=2 num_kv_heads=2 head_dim=1 tp_size=2 num_tokens=1 dtype=bf16 seed=3 "
     "fill=dense placement=whole",
     Outcome::WrongValue},
    {"kv-mirrored-q-split:from-zero",
     "attention num_heads=2 num_kv_heads=2 head_dim=64 tp_size=2 num_tokens=1 dtype=bf16 seed=3 "
     "fill=one_hot placement=whole",
     Outcome::WrongValue},
    {"merge-both-empty:nan",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=dense missing=1 splits=2",
     Outcome::NotFinite},
    // Unsplit, a row without keys is in a tile only if another row has some.
    {"merge-both-empty:nan",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=2 dtype=bf16 seed=3 "
     "fill=ties missing=1",
     Outcome::NotFinite},
    {"lse-base-mismatch:base2",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=dense",
     Outcome::WrongValue},
    {"lse-base-mismatch:base2",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties context=17 splits=2",
     Outcome::WrongValue},
    {"lse-base-mismatch:twice",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=dense",
     Outcome::WrongValue},
    {"lse-base-mismatch:twice",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=2 dtype=bf16 seed=3 "
     "fill=ties",
     Outcome::WrongValue},
    {"finite-mask-sentinel:5e4",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=2 dtype=bf16 seed=3 "
     "fill=ties missing=1",
     Outcome::WrongValue},
    {"finite-mask-sentinel:1e4",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=2 dtype=bf16 seed=3 "
     "fill=ties missing=1",
     Outcome::WrongValue},
    {"finite-mask-sentinel:1e4",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=2 dtype=f32 seed=3 "
     "fill=dense missing=1",
     Outcome::WrongValue},
    {"swa-partition-undercount:aligned",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties context=16 window=2",
     Outcome::WrongValue},
    {"swa-partition-undercount:aligned",
     "attention num_heads=1 num_kv_heads=1 head_dim=64 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=tripwire context=48 window=18",
     Outcome::WrongValue},
    {"swa-window-inclusive:one-more",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=2 dtype=bf16 seed=3 "
     "fill=ties window=1",
     Outcome::WrongValue},
    {"swa-window-inclusive:one-more",
     "attention num_heads=1 num_kv_heads=1 head_dim=16 tp_size=1 num_tokens=2 dtype=bf16 seed=3 "
     "fill=tripwire window=1",
     Outcome::WrongValue},
    {"swa-window-inclusive:one-less",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=2 dtype=bf16 seed=3 "
     "fill=ties window=2",
     Outcome::WrongValue},
    {"swa-window-inclusive:one-less",
     "attention num_heads=1 num_kv_heads=1 head_dim=16 tp_size=1 num_tokens=2 dtype=bf16 seed=3 "
     "fill=tripwire window=2",
     Outcome::WrongValue},
    {"swa-window-inclusive:decode",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties context=1 window=2",
     Outcome::WrongValue},
    {"swa-window-inclusive:decode",
     "attention num_heads=1 num_kv_heads=1 head_dim=32 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=tripwire context=1 window=2",
     Outcome::WrongValue},
    // Pages of 65536 elements: the second one of the pool begins at 0 again.
    {"page-offset-int32:16-bit",
     "attention num_heads=4 num_kv_heads=4 head_dim=256 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties context=64 page_size=64",
     Outcome::WrongValue},
    {"page-offset-int32:16-bit",
     "attention num_heads=4 num_kv_heads=4 head_dim=256 tp_size=1 num_tokens=1 dtype=f16 seed=3 "
     "fill=dense context=64 page_size=64",
     Outcome::WrongValue},
    {"own:mask-sees-next",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=2 dtype=bf16 seed=3 "
     "fill=ties",
     Outcome::WrongValue},
    {"own:mask-sees-next",
     "attention num_heads=1 num_kv_heads=1 head_dim=16 tp_size=1 num_tokens=2 dtype=bf16 seed=3 "
     "fill=tripwire",
     Outcome::WrongValue},
    {"own:mask-misses-last",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties",
     Outcome::WrongValue},
    {"own:mask-misses-last",
     "attention num_heads=1 num_kv_heads=1 head_dim=16 tp_size=1 num_tokens=2 dtype=f16 seed=3 "
     "fill=tripwire",
     Outcome::WrongValue},
    // Three tiles of keys: two splits take one each.
    {"own:split-drops-tail",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=f32 seed=3 "
     "fill=ties context=64 splits=2",
     Outcome::WrongValue},
    {"own:split-drops-tail",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties context=128 splits=2",
     Outcome::WrongValue},
    {"own:split-drops-tail",
     "attention num_heads=1 num_kv_heads=1 head_dim=256 tp_size=1 num_tokens=1 dtype=f16 seed=3 "
     "fill=tripwire context=64 splits=2",
     Outcome::WrongValue},
    {"own:table-stride",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=4 dtype=bf16 seed=3 "
     "fill=ties num_seqs=2 page_size=1",
     Outcome::WrongValue},
    {"own:table-stride",
     "attention num_heads=1 num_kv_heads=1 head_dim=16 tp_size=1 num_tokens=5 dtype=bf16 seed=3 "
     "fill=one_hot num_seqs=2 page_size=1",
     Outcome::WrongValue},
    {"swa-window-inclusive:right",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=2 dtype=bf16 seed=3 "
     "fill=ties mask=full window=1",
     Outcome::WrongValue},
    {"own:mask-top-left",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties context=1",
     Outcome::WrongValue},
    {"own:stale-page",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties context=1 page_size=1",
     Outcome::WrongValue},
    {"own:stale-page",
     "attention num_heads=1 num_kv_heads=1 head_dim=64 tp_size=1 num_tokens=1 dtype=f16 seed=3 "
     "fill=tripwire context=20 page_size=16",
     Outcome::WrongValue},
    {"own:length-of-whole-pages",
     "attention num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties page_size=2 mask=full",
     Outcome::WrongValue},
    {"own:scale-of-value-heads",
     "attention num_heads=1 num_kv_heads=1 head_dim=8 v_head_dim=2 tp_size=1 num_tokens=2 "
     "dtype=f32 seed=3 fill=dense",
     Outcome::WrongValue},
    {"own:value-stride",
     "attention num_heads=2 num_kv_heads=2 head_dim=1 tp_size=1 num_tokens=1 v_head_dim=2 "
     "dtype=bf16 seed=3 fill=ties",
     Outcome::WrongValue},
    // Beyond the last value head lies padding.
    {"own:value-stride",
     "attention num_heads=2 num_kv_heads=2 head_dim=2 tp_size=1 num_tokens=1 v_head_dim=1 "
     "dtype=bf16 seed=3 fill=dense",
     Outcome::Uninitialised},
    // In the kernels for the chip's limit: prefill, then decode.
    {"own:mask-sees-next",
     "attention num_heads=6 num_kv_heads=1 head_dim=32 tp_size=1 num_tokens=6 dtype=bf16 seed=3 "
     "fill=tripwire context=40",
     Outcome::WrongValue},
    {"swa-partition-undercount:aligned",
     "attention num_heads=6 num_kv_heads=1 head_dim=32 tp_size=1 num_tokens=6 dtype=bf16 seed=3 "
     "fill=ties context=100 window=40",
     Outcome::WrongValue},
    {"finite-mask-sentinel:1e4",
     "attention num_heads=1 num_kv_heads=1 head_dim=32 tp_size=1 num_tokens=40 dtype=f16 seed=3 "
     "fill=ties missing=3",
     Outcome::WrongValue},
    {"merge-both-empty:nan",
     "attention num_heads=1 num_kv_heads=1 head_dim=32 tp_size=1 num_tokens=40 dtype=f16 seed=3 "
     "fill=dense missing=3",
     Outcome::NotFinite},
    {"own:stale-page",
     "attention num_heads=2 num_kv_heads=1 head_dim=32 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties context=100 page_size=16",
     Outcome::WrongValue},
    {"page-offset-int32:16-bit",
     "attention num_heads=2 num_kv_heads=1 head_dim=32 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=one_hot context=2500 page_size=16",
     Outcome::WrongValue},
    {"own:split-drops-tail",
     "attention num_heads=2 num_kv_heads=1 head_dim=32 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties context=200 split_by=kernel",
     Outcome::WrongValue},
    {"lse-base-mismatch:twice",
     "attention num_heads=2 num_kv_heads=1 head_dim=32 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties context=100 splits=2",
     Outcome::WrongValue},
    {"swa-window-inclusive:decode",
     "attention num_heads=2 num_kv_heads=1 head_dim=32 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties context=100 window=70",
     Outcome::WrongValue},
    {"merge-both-empty:nan",
     "attention num_heads=2 num_kv_heads=1 head_dim=32 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "fill=ties context=100 window=70 splits=6",
     Outcome::NotFinite},
    {"output-gate-not-sliced:group-start",
     "attention_block hidden_size=1 num_heads=2 num_kv_heads=1 head_dim=2 tp_size=2 num_tokens=1 "
     "dtype=bf16 seed=3 fill=dense gate=1",
     Outcome::WrongValue},
    {"output-gate-not-sliced:group-start",
     "attention_block hidden_size=16 num_heads=4 num_kv_heads=2 head_dim=8 tp_size=4 num_tokens=2 "
     "dtype=bf16 seed=3 gate=1 stage=gate_linear",
     Outcome::WrongValue},
    {"output-gate-not-sliced:uncut",
     "attention_block hidden_size=1 num_heads=2 num_kv_heads=1 head_dim=2 tp_size=2 num_tokens=1 "
     "dtype=bf16 seed=3 gate=1",
     Outcome::BadLaunch},
};

const bool kAreKnown = [] {
  for (const Planted& p : kPlanted) planted_mutants().insert(p.id);
  return true;
}();

class AttentionMutants : public testing::TestWithParam<Planted> {};

TEST_P(AttentionMutants, AreFoundWhereTheyCanShow) {
  const auto& [id, shape, outcome] = GetParam();
  const std::string line = std::string("v1 ") + shape;
  const Verdict v = run(line, id);
  EXPECT_EQ(name_of(v.outcome), name_of(outcome)) << line << " with " << id << "\n  " << to_line(v);
  EXPECT_TRUE(find_mutant(id).front().mutant->shows(case_from_line(line))) << line;
  EXPECT_EQ(name_of(run(line).outcome), "Pass") << line;
}

INSTANTIATE_TEST_SUITE_P(Zoo, AttentionMutants, testing::ValuesIn(kPlanted), [](const auto& info) {
  return test_name(std::to_string(info.index) + "_" + info.param.id);
});

// `decides` says where a mistake is one: elsewhere it changes nothing. Where it says so, the data
// that are drawn show most of them; those of tails and edges wait for a lucky length.
class AttentionDecisions : public testing::TestWithParam<std::string> {};

TEST_P(AttentionDecisions, AreThoseThatTheMutantsSay) {
  if (test_world().processes() > 1) GTEST_SKIP() << "how many processes there are decides nothing";
  constexpr int kCases = 100, kTelling = 10;  // of a mutant, at most
  constexpr double kMostWork = 4e5;           // a case of few milliseconds
  const Operator& op = find_operator(GetParam());
  Draw draw(make_domain({op.name}, {1, 2, 3, 4, 8}, {}, ""), 7);
  // One run: poison and guards are other tests' matter.
  const RunOptions plain{.deadline = std::chrono::seconds(60), .poison = false};
  struct Count {
    int cases = 0, idle = 0, telling = 0, found = 0;
  };
  std::map<std::string, Count> counts;
  const std::size_t one_in = (op.mutants.size() + 7) / 8;  // mutants of a case
  for (std::size_t i = 0; i < one_in * kCases; ++i) {
    Case c = draw.next();
    while (op.work(c) > kMostWork) c = draw.next();
    for (const char* key : {"law", "graph", "delays", "discriminate", "poison"}) c.options[key] = 0;
    const std::string line = to_line(c);
    const Verdict right = op.run(test_world(), c, plain);
    EXPECT_EQ(name_of(right.outcome), "Pass") << line << "\n  " << to_line(right);
    for (std::size_t m = i % one_in; m < op.mutants.size(); m += one_in) {
      const Mutant& mutant = op.mutants[m];
      Count& count = counts[mutant.id];
      ++count.cases;
      const bool shows = mutant.shows(c);
      if (shows && count.telling == kTelling) continue;
      RunOptions options = plain;
      options.mutant = &mutant;
      const Verdict v = op.run(test_world(), c, options);
      if (shows) {
        ++count.telling;
        count.found += v.outcome != Outcome::Pass;
      } else {
        ++count.idle;
        EXPECT_EQ(v.outcome, Outcome::Pass)
            << line << " with " << mutant.id << "\n  " << to_line(v);
        EXPECT_EQ(v.digest, right.digest) << line << " with " << mutant.id;
      }
    }
  }
  int found = 0, telling = 0;
  for (const auto& [id, count] : counts) {
    EXPECT_EQ(count.cases, kCases) << id;
    found += count.found;
    telling += count.telling;
    std::printf("%-40s %3d changed nothing, %2d of %2d were found\n", id.c_str(), count.idle,
                count.found, count.telling);
  }
  EXPECT_GE(found, telling / 3);
}

INSTANTIATE_TEST_SUITE_P(Operators, AttentionDecisions,
                         testing::Values("attention", "attention_block"),
                         [](const auto& info) { return info.param; });

// A stage is judged with what its kernels really read: what comes after the bad one is right.
TEST(Blocks, NameTheFirstBadStage) {
  const std::string line =
      "v1 attention_block hidden_size=16 num_heads=8 num_kv_heads=2 head_dim=8 tp_size=4 "
      "num_tokens=3 dtype=bf16 fill=dense seed=3 gate=1";
  const Verdict v = run(line, "output-gate-not-sliced:group-start");
  EXPECT_EQ(name_of(v.outcome), "WrongValue");
  // Ranks 1 and 3 have the second half of their KV head's four query heads.
  EXPECT_EQ(v.detail.find("stage gate_linear, tp_rank 1, gate[0, 16] (token 0, head 2): got "), 0u)
      << v.detail;
  for (const char* later : {"output_gate", "o_proj"})
    EXPECT_EQ(v.detail.find(later), std::string::npos) << v.detail;
  EXPECT_EQ(name_of(run(line).outcome), "Pass");
}

// Alone it is the case's only stage, which the line names already.
TEST(Blocks, AnOnlyStageIsNotNamed) {
  const Verdict v =
      run("v1 attention_block hidden_size=16 num_heads=8 num_kv_heads=2 head_dim=8 tp_size=4 "
          "num_tokens=3 dtype=bf16 fill=dense seed=3 gate=1 stage=gate_linear",
          "output-gate-not-sliced:group-start");
  EXPECT_EQ(v.detail.find("tp_rank 1, gate[0, 16]: got "), 0u) << v.detail;
}

}  // namespace
}  // namespace tp
