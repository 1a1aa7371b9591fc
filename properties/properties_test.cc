// The operators as they ship, on as many processes as this test was started with: process 0 draws
// and prints, every failure comes with its case line.

#include <gtest/gtest.h>

#include <atomic>
#include <set>

#include "harness/base/check.h"
#include "harness/fuzz/draw.h"
#include "harness/group/mpi_testing.h"
#include "harness/group/tp_group.h"
#include "properties/operators.h"
#include "properties/planted_testing.h"

namespace tp {
namespace {

const bool kRegistered = (register_operators(), true);

class EveryOperator : public testing::TestWithParam<std::string> {};

TEST_P(EveryOperator, PassesWhatTheFuzzerDraws) {
  std::vector<int> tp_sizes;
  for (int t = 1; t <= 16; ++t) tp_sizes.push_back(t);
  Draw draw(make_domain({GetParam()}, tp_sizes, {}, ""), 20261121);
  int passed = 0;
  for (int i = 0; i < 60; ++i) {
    const std::string line = to_line(draw.next());
    const Verdict v = run(line);
    EXPECT_TRUE(v.outcome == Outcome::Pass || v.outcome == Outcome::Mistrusted)
        << line << "\n  " << to_line(v);
    EXPECT_LE(v.score, 1.0) << line;
    passed += v.outcome == Outcome::Pass;
  }
  EXPECT_GE(passed, 50);
}

std::vector<std::string> names_of_operators() {
  std::vector<std::string> names;
  for (const Operator& op : operators()) names.push_back(op.name);
  return names;
}

INSTANTIATE_TEST_SUITE_P(Operators, EveryOperator, testing::ValuesIn(names_of_operators()),
                         [](const auto& info) { return info.param; });

// The digest of a case line is the same with any number of processes, under every sanitizer, and on
// a GPU.
TEST(Digest, IsTheSameEverywhere) {
  const std::pair<const char*, std::uint64_t> golden[] = {
      {"v1 qk_norm num_heads=48 num_kv_heads=8 head_dim=128 tp_size=16 num_tokens=4 dtype=bf16 "
       "fill=dense seed=7",
       0x56f4b314b00e5f17},
      {"v1 qk_norm num_heads=6 num_kv_heads=2 head_dim=80 tp_size=6 num_tokens=5 dtype=f16 "
       "fill=wide seed=3 pad=9",
       0x9bb9b67d1dfc79dc},
      {"v1 qk_norm num_heads=12 num_kv_heads=12 head_dim=33 tp_size=4 num_tokens=3 dtype=f32 "
       "fill=small_rows seed=1",
       0x00fda05e2bc586a8},
      {"v1 rms_norm hidden_size=3072 tp_size=3 num_tokens=2 dtype=bf16 fill=dense seed=5",
       0x636e7410f4a30ba9},
      {"v1 rms_norm hidden_size=100 tp_size=2 num_tokens=7 dtype=f32 fill=equal seed=6 pad=1",
       0xfe464fa642bcf539},
      {"v1 qkv_linear hidden_size=100 num_heads=8 num_kv_heads=2 head_dim=12 v_head_dim=7 "
       "tp_size=4 "
       "num_tokens=5 dtype=bf16 fill=dense seed=2 bias=yes pad=3",
       0xdb4f8faa9b4474f3},
      {"v1 qkv_linear hidden_size=64 num_heads=4 num_kv_heads=4 head_dim=16 tp_size=2 num_tokens=2 "
       "dtype=f32 fill=wide seed=4",
       0x2134409053e3a159},
      {"v1 row_linear hidden_size=40 in_per_rank=33 tp_size=5 num_tokens=7 dtype=f16 fill=dense "
       "seed=8 bias=yes reduce=reduce_scatter",
       0x9bcfeb64b76b321b},
      {"v1 row_linear hidden_size=24 in_per_rank=64 tp_size=3 num_tokens=3 dtype=bf16 fill=dense "
       "seed=9 reduce=external reduce_dtype=f32",
       0xc4228391ec56991f},
      // Of attention only one_hot with wide heads: all weights but one vanish beside 1, so that no
      // exponential and no logarithm of anything but 1 is in the outputs, the fp32 one included.
      {"v1 attention num_heads=4 num_kv_heads=2 head_dim=64 tp_size=4 num_tokens=3 dtype=f32 "
       "fill=one_hot seed=1 context=20 missing=1 page_size=4 splits=2 pad=3",
       0x7da7043e52f414db},
      {"v1 attention num_heads=6 num_kv_heads=3 head_dim=80 v_head_dim=48 tp_size=3 num_tokens=5 "
       "dtype=f16 fill=one_hot seed=2 num_seqs=2 context=40 window=7 placement=whole",
       0x964cccfe9a75a84e},
      {"v1 attention num_heads=8 num_kv_heads=2 head_dim=128 tp_size=2 num_tokens=6 dtype=bf16 "
       "fill=one_hot seed=3 mask=full splits=3 context=150 page_size=16",
       0xf0dacdeae3e4800a},
  };
  for (const auto& [line, digest] : golden) {
    const Verdict v = run(line);
    EXPECT_EQ(v.outcome, Outcome::Pass) << to_line(v);
    EXPECT_EQ(v.digest, digest) << std::hex << "0x" << v.digest << "\n  " << line;
  }
}

// Each mistake at the smallest shape where it can show, and the same case without the mistake.
struct Planted {
  const char* id;
  const char* shape;
  Outcome outcome;
  const char* start = "v1 qk_norm head_dim=8 num_tokens=1 ";
};

class Mutants : public testing::TestWithParam<Planted> {};

TEST_P(Mutants, AreFoundWhereTheyCanShow) {
  const auto& [id, shape, outcome, start] = GetParam();
  for (const char* fill : {"exact", "dense"}) {
    const std::string line = std::string(start) + shape + " dtype=bf16 seed=3 fill=" + fill;
    const Verdict v = run(line, id);
    EXPECT_EQ(name_of(v.outcome), name_of(outcome))
        << line << " with " << id << "\n  " << to_line(v);
    EXPECT_EQ(run(line).outcome, Outcome::Pass) << line;
  }
}

constexpr const char *kQkvLinear = "v1 qkv_linear hidden_size=16 head_dim=8 num_tokens=1 ",
                     *kRowLinear = "v1 row_linear hidden_size=8 in_per_rank=8 tp_size=2 ";

const Planted kPlanted[] = {
    Planted{"minimax-knorm-shard-by-tp:cut", "num_heads=2 num_kv_heads=1 tp_size=2",
            Outcome::BadLaunch},
    Planted{"minimax-knorm-shard-by-tp:modulo", "num_heads=4 num_kv_heads=2 tp_size=4",
            Outcome::WrongValue},
    Planted{"minimax-knorm-shard-by-tp:rank", "num_heads=2 num_kv_heads=1 tp_size=2",
            Outcome::OutOfBounds},
    Planted{"minimax-knorm-shard-by-tp:clamped", "num_heads=4 num_kv_heads=2 tp_size=4",
            Outcome::WrongValue},
    Planted{"minimax-norm-replica-aware:replicas", "num_heads=2 num_kv_heads=2 tp_size=2",
            Outcome::WrongValue},
    Planted{"minimax-norm-replica-aware:kv-heads", "num_heads=2 num_kv_heads=1 tp_size=2",
            Outcome::WrongValue},
    Planted{"minimax-norm-replica-aware:one", "num_heads=2 num_kv_heads=1 tp_size=2",
            Outcome::WrongValue},
    Planted{"minimax-norm-replica-aware:unique", "num_heads=2 num_kv_heads=1 tp_size=2",
            Outcome::WrongValue},

    // Linear layers.
    Planted{"packed-concat-contiguous-colwise:fused", "num_heads=2 num_kv_heads=2 tp_size=2",
            Outcome::WrongValue, kQkvLinear},
    Planted{"own:qkv-kv-head-of-rank", "num_heads=2 num_kv_heads=1 tp_size=2", Outcome::OutOfBounds,
            kQkvLinear},
    Planted{"own:qkv-kv-head-modulo", "num_heads=4 num_kv_heads=2 tp_size=4", Outcome::WrongValue,
            kQkvLinear},
    Planted{"own:qkv-v-rows-by-head-dim", "num_heads=2 num_kv_heads=2 tp_size=2 v_head_dim=12",
            Outcome::WrongValue, kQkvLinear},
    Planted{"own:qkv-v-rows-of-head-dim", "num_heads=2 num_kv_heads=2 tp_size=2 v_head_dim=12",
            Outcome::BadLaunch, kQkvLinear},
    Planted{"own:qkv-v-rows-of-head-dim", "num_heads=2 num_kv_heads=2 tp_size=2 v_head_dim=4",
            Outcome::BadLaunch, kQkvLinear},
    Planted{"output-gate-not-sliced:offset", "num_heads=2 num_kv_heads=1 tp_size=2 output_gate=1",
            Outcome::WrongValue, kQkvLinear},
    Planted{"own:qkv-bias-of-rank-0", "num_heads=2 num_kv_heads=1 tp_size=2 bias=yes",
            Outcome::WrongValue, kQkvLinear},
    Planted{"own:qkv-bias-kv-head-modulo", "num_heads=4 num_kv_heads=2 tp_size=4 bias=yes",
            Outcome::WrongValue, kQkvLinear},
    Planted{"own:row-bias-on-every-rank", "num_tokens=1 bias=yes", Outcome::WrongValue, kRowLinear},
    Planted{"own:row-columns-of-next-rank", "num_tokens=1", Outcome::WrongValue, kRowLinear},
    Planted{"own:row-reduce-whole-batches-only", "num_tokens=3", Outcome::WrongValue, kRowLinear},
    Planted{"shared-expert-double-reduce:twice", "num_tokens=3 reduce=reduce_scatter",
            Outcome::WrongValue, kRowLinear},
    Planted{"shared-expert-double-reduce:not-at-all", "num_tokens=1 reduce=external",
            Outcome::WrongValue, kRowLinear}};

INSTANTIATE_TEST_SUITE_P(Zoo, Mutants, testing::ValuesIn(kPlanted), [](const auto& info) {
  return test_name(std::to_string(info.index) + "_" + info.param.id);
});

// The other ranks have zeros to add to an only token, whose sum is right already.
TEST(Mutants, AnOnlyTokenThatIsScatteredMayBeAddedUpTwice) {
  const std::string id = "shared-expert-double-reduce:twice";
  const Mutant& twice = *find_mutant(id).front().mutant;
  for (const char* fill : {"exact", "dense"}) {
    const std::string line = std::string(kRowLinear) +
                             "dtype=f32 seed=3 reduce=reduce_scatter fill=" + fill + " num_tokens=";
    EXPECT_FALSE(twice.shows(case_from_line(line + "1")));
    EXPECT_EQ(run(line + "1", id).digest, run(line + "1").digest);
    EXPECT_TRUE(twice.shows(case_from_line(line + "2")));
    EXPECT_EQ(run(line + "2", id).outcome, Outcome::WrongValue);
  }
}

TEST(Mutants, AreAllPlanted) {
  std::set<std::string> declared, planted = planted_mutants();
  for (const Operator& op : operators()) {
    for (const Mutant& m : op.mutants) declared.insert(m.id);
  }
  for (const Planted& p : kPlanted) planted.insert(p.id);
  EXPECT_EQ(declared, planted);
}

// Discrimination is right about what it mistrusts: with heads one element wide, some seeds give
// both heads the same weight, and there the mistake slips through; everywhere else it is found.
TEST(Discrimination, MistrustsExactlyTheDataThatLetAMistakePass) {
  int mistrusted = 0;
  for (int seed = 0; seed < 1500; ++seed) {
    const std::string line =
        "v1 qk_norm num_heads=4 num_kv_heads=2 head_dim=1 tp_size=4 num_tokens=1 dtype=bf16 seed=" +
        std::to_string(seed) + " discriminate=1";
    const Verdict v = run(line);
    const bool slipped =
        run(line, "minimax-knorm-shard-by-tp:modulo").outcome != Outcome::WrongValue;
    EXPECT_EQ(v.outcome == Outcome::Mistrusted, slipped) << line << "\n  " << to_line(v);
    mistrusted += v.outcome == Outcome::Mistrusted;
  }
  EXPECT_GT(mistrusted, 0);
}

// The same of the rows of the projections, where a bias adds to what is confused.
TEST(Discrimination, MistrustsRowsThatAreLikeOthers) {
  int mistrusted = 0;
  for (const std::string bias : {"none", "yes"}) {
    for (int seed = 0; seed < 300; ++seed) {
      const std::string line =
          "v1 qkv_linear hidden_size=1 num_heads=4 num_kv_heads=2 head_dim=1 tp_size=4 "
          "num_tokens=1 dtype=bf16 seed=" +
          std::to_string(seed) + " discriminate=1 bias=" + bias;
      const Verdict v = run(line);
      bool slipped = false;
      for (const Mutant& m : find_operator("qkv_linear").mutants) {
        if (m.shows(case_from_line(line))) slipped |= !run(line, m.id).finding();
      }
      EXPECT_EQ(v.outcome == Outcome::Mistrusted, slipped) << line << "\n  " << to_line(v);
      mistrusted += v.outcome == Outcome::Mistrusted;
    }
  }
  EXPECT_GT(mistrusted, 0);
}

// And of the columns of a row-parallel layer, whose partial sums may be added up or not.
TEST(Discrimination, MistrustsSumsThatAreLikeOthers) {
  int mistrusted = 0;
  for (const std::string options :
       {"num_tokens=1", "num_tokens=1 bias=yes", "num_tokens=1 bias=yes reduce=reduce_scatter",
        "num_tokens=1 reduce=external", "num_tokens=3 reduce=reduce_scatter"}) {
    for (int seed = 0; seed < 100; ++seed) {
      const std::string line =
          "v1 row_linear hidden_size=1 in_per_rank=1 tp_size=2 dtype=bf16 discriminate=1 seed=" +
          std::to_string(seed) + " " + options;
      const Verdict v = run(line);
      bool slipped = false;
      for (const Mutant& m : find_operator("row_linear").mutants) {
        if (m.shows(case_from_line(line))) slipped |= !run(line, m.id).finding();
      }
      EXPECT_EQ(v.outcome == Outcome::Mistrusted, slipped) << line << "\n  " << to_line(v);
      mistrusted += v.outcome == Outcome::Mistrusted;
    }
  }
  EXPECT_GT(mistrusted, 30);
}

// Sums within the budget whose bits depend on who adds them up: here, on where the bias comes in.
TEST(RowLinearLaws, ALayerThatScattersOtherBitsBreaksTheLaw) {
  static std::atomic<int> asked;
  static int in_first_run;
  const World& world = test_world();
  in_first_run = 2 * int(ranks_of_process(4, world.processes(), world.process()).size);
  Mutant other_bits{"own:other-bits", "", "", sharding_rules()};
  other_bits.rules.linear.row_adds_bias = [](int tp_rank) {
    return tp_rank == (asked++ < in_first_run ? 0 : 3);
  };
  const std::string line =
      "v1 row_linear hidden_size=24 in_per_rank=8 tp_size=4 num_tokens=6 dtype=f32 fill=dense "
      "seed=1 bias=yes";
  const auto verdict = [&](const std::string& text) {
    asked = 0;
    return find_operator("row_linear")
        .run(test_world(), case_from_line(text),
             {.mutant = &other_bits, .deadline = std::chrono::seconds(60)});
  };
  for (const std::string reduce : {"all_reduce", "reduce_scatter", "external"}) {
    const std::string with_law = line + " law=reduce reduce=" + reduce;
    EXPECT_EQ(run(with_law).outcome, Outcome::Pass) << to_line(run(with_law));
    const Verdict v = verdict(with_law);
    EXPECT_EQ(v.outcome, Outcome::LawBroken) << to_line(v);
    EXPECT_NE(v.detail.find("law reduce: out["), std::string::npos) << v.detail;
    EXPECT_EQ(verdict(line + " reduce=" + reduce).outcome, Outcome::Pass);
  }
}

TEST(Refusals, NameTheNumbers) {
  const auto refusal = [](const std::string& line) {
    try {
      case_from_line(line);
    } catch (const BadInput& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refusal("v1 qk_norm num_heads=48 num_kv_heads=8 head_dim=128 tp_size=12 num_tokens=1 "
                    "dtype=bf16 seed=0"),
            "tp_size=12 is neither a divisor nor a multiple of num_kv_heads=8");
  EXPECT_EQ(
      refusal("v1 rms_norm hidden_size=1048576 tp_size=1024 num_tokens=1048576 dtype=f32 seed=0"),
      "1048576 rows of 1073741824 columns are more than the 67108864 elements a case may have");
  EXPECT_NE(refusal("v1 qk_norm num_heads=4096 num_kv_heads=4096 head_dim=65536 tp_size=1 "
                    "num_tokens=1048576 dtype=f32 seed=0"),
            "accepted");
}

}  // namespace
}  // namespace tp
