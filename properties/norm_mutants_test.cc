// The mistakes of rms_norm, of the norms of heads and of rope: each planted at the smallest shape
// where it can show, with the data that show it; and each changes nothing where it decides nothing,
// nor does one of a linear layer.

#include <gtest/gtest.h>

#include <cstdio>

#include "harness/base/check.h"
#include "harness/fuzz/draw.h"
#include "harness/group/mpi_testing.h"
#include "properties/planted_testing.h"

namespace tp {
namespace {

struct Planted {
  const char* id;
  const char* line;  // after the version
  Outcome outcome;
};

const Planted kPlanted[] = {
    {"synthetic-residual-uninit:empty",
     "rms_norm hidden_size=1 tp_size=1 num_tokens=1 dtype=bf16 seed=1", Outcome::Uninitialised},
    {"synthetic-residual-uninit:empty",
     "rms_norm hidden_size=64 tp_size=2 num_tokens=2 dtype=f32 seed=1 fill=dense poison=nan",
     Outcome::Uninitialised},
    {"norm-weight-multiply-precision:sum-not-rounded",
     "rms_norm hidden_size=32 tp_size=1 num_tokens=1 dtype=bf16 seed=1 fill=dense residual=add",
     Outcome::WrongValue},
    {"norm-weight-multiply-precision:sum-not-rounded",
     "rms_norm hidden_size=32 tp_size=1 num_tokens=1 dtype=f16 seed=1 fill=dense residual=add",
     Outcome::WrongValue},
    {"norm-weight-multiply-precision:two-roundings",
     "rms_norm hidden_size=16 tp_size=1 num_tokens=1 dtype=bf16 seed=1 fill=dense",
     Outcome::WrongValue},
    {"norm-weight-multiply-precision:two-roundings",
     "rms_norm hidden_size=16 tp_size=1 num_tokens=1 dtype=f16 seed=1 fill=dense residual=add",
     Outcome::WrongValue},
    // Exact rows have one magnitude: only dense data show whose mean square it is.
    {"norm-stat-not-reduced:k-local",
     "qk_norm num_heads=2 num_kv_heads=2 head_dim=1 tp_size=2 num_tokens=1 dtype=bf16 seed=3 "
     "fill=dense",
     Outcome::WrongValue},
    {"norm-stat-not-reduced:all-local",
     "qk_norm num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 num_tokens=1 dtype=bf16 seed=3 "
     "fill=dense",
     Outcome::WrongValue},
    {"grouped-norm-global-group-count:heads",
     "qk_norm num_heads=2 num_kv_heads=2 head_dim=2 tp_size=2 num_tokens=1 dtype=bf16 seed=3 "
     "fill=dense style=per_head",
     Outcome::WrongValue},
    {"grouped-norm-global-group-count:heads",
     "qk_norm num_heads=2 num_kv_heads=2 head_dim=3 tp_size=2 num_tokens=1 dtype=bf16 seed=3 "
     "style=weightless fill=dense",
     Outcome::WrongValue},
    {"grouped-norm-global-group-count:heads",
     "qk_norm num_heads=2 num_kv_heads=2 head_dim=1 tp_size=2 num_tokens=1 dtype=bf16 seed=3 "
     "style=per_head_1p",
     Outcome::BadLaunch},
    {"norm-weight-multiply-precision:1p",
     "qk_norm num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "style=per_head_1p",
     Outcome::WrongValue},
    {"norm-weight-multiply-precision:1p",
     "rope num_heads=1 num_kv_heads=1 head_dim=2 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "norm=per_head_1p fill=dense",
     Outcome::WrongValue},
    {"qknorm-rope-partial-warp:swapped-weights",
     "qk_norm num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "style=per_head",
     Outcome::WrongValue},
    {"qknorm-rope-partial-warp:swapped-weights",
     "rope num_heads=1 num_kv_heads=1 head_dim=2 tp_size=1 num_tokens=1 dtype=f16 seed=3 "
     "norm=per_head_1p fill=dense",
     Outcome::WrongValue},
    {"qknorm-rope-partial-warp:full-rotary",
     "rope num_heads=1 num_kv_heads=1 head_dim=4 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "rotary=half",
     Outcome::Uninitialised},
    {"qknorm-rope-partial-warp:full-rotary",
     "rope num_heads=1 num_kv_heads=1 head_dim=8 tp_size=1 num_tokens=1 dtype=f32 seed=3 "
     "rotary=quarter style=interleaved norm=weightless fill=dense",
     Outcome::Uninitialised},
    // q's head and k's share a block.
    {"qknorm-rope-partial-warp:packed-head",
     "rope num_heads=1 num_kv_heads=1 head_dim=2 tp_size=1 num_tokens=1 dtype=bf16 seed=3 "
     "norm=weightless fill=dense",
     Outcome::WrongValue},
    {"qknorm-rope-partial-warp:packed-head",
     "rope num_heads=2 num_kv_heads=2 head_dim=2 tp_size=2 num_tokens=4 dtype=bf16 seed=3 "
     "norm=per_head",
     Outcome::WrongValue},
    {"qknorm-rope-partial-warp:style",
     "rope num_heads=1 num_kv_heads=1 head_dim=4 tp_size=1 num_tokens=1 dtype=bf16 seed=3",
     Outcome::WrongValue},
    {"qknorm-rope-partial-warp:style",
     "rope num_heads=1 num_kv_heads=1 head_dim=4 tp_size=1 num_tokens=1 dtype=f32 seed=3 "
     "style=interleaved norm=per_head fill=dense",
     Outcome::WrongValue},
    {"qknorm-rope-partial-warp:position",
     "rope num_heads=1 num_kv_heads=1 head_dim=2 tp_size=1 num_tokens=2 dtype=bf16 seed=3",
     Outcome::WrongValue},
    {"qknorm-rope-partial-warp:position",
     "rope num_heads=1 num_kv_heads=1 head_dim=2 tp_size=1 num_tokens=2 dtype=f16 seed=3 "
     "norm=weightless fill=dense",
     Outcome::WrongValue},
};

const bool kAreKnown = [] {
  for (const Planted& p : kPlanted) planted_mutants().insert(p.id);
  return true;
}();

class NormMutants : public testing::TestWithParam<Planted> {};

TEST_P(NormMutants, AreFoundWhereTheyCanShow) {
  const auto& [id, shape, outcome] = GetParam();
  const std::string line = std::string("v1 ") + shape;
  const Verdict v = run(line, id);
  EXPECT_EQ(name_of(v.outcome), name_of(outcome)) << line << " with " << id << "\n  " << to_line(v);
  EXPECT_EQ(run(line).outcome, Outcome::Pass) << line;
}

INSTANTIATE_TEST_SUITE_P(Zoo, NormMutants, testing::ValuesIn(kPlanted), [](const auto& info) {
  return test_name(std::to_string(info.index) + "_" + info.param.id);
});

// `decides` says where a mistake is one: elsewhere it changes nothing, and data with
// significands of their own show it nearly everywhere it says so.
class Decisions : public testing::TestWithParam<std::string> {};

TEST_P(Decisions, AreThoseThatTheMutantsSay) {
  Draw draw(make_domain({GetParam()}, {1, 2, 3, 4, 8}, {}, ""), 7);
  const Operator& op = find_operator(GetParam());
  int idle = 0, telling = 0, found = 0;
  for (int i = 0; i < 120; ++i) {
    Case c = draw.next();
    c.options["law"] = c.options["graph"] = c.options["delays"] = c.options["discriminate"] = 0;
    const std::string line = to_line(c);
    const Verdict right = run(line);
    for (std::size_t m = std::size_t(i) % 3; m < op.mutants.size(); m += 3) {
      const Mutant& mutant = op.mutants[m];
      const bool shows = mutant.shows(c);
      if (shows && c.fill != Fill::dense) continue;
      const Verdict v =
          op.run(test_world(), c, {.mutant = &mutant, .deadline = std::chrono::seconds(60)});
      if (shows) {
        ++telling;
        found += v.outcome != Outcome::Pass;
      } else {
        ++idle;
        EXPECT_EQ(v.outcome, Outcome::Pass)
            << line << " with " << mutant.id << "\n  " << to_line(v);
        // Replicas that all hold the one KV head agree on its mean square, summed up or not; but a
        // sum of eight equal numbers rounds, and a number does not.
        if (mutant.id == "norm-stat-not-reduced:k-local") continue;
        EXPECT_EQ(v.digest, right.digest) << line << " with " << mutant.id;
      }
    }
  }
  EXPECT_GE(idle, 20);
  EXPECT_GE(telling, 10);
  EXPECT_GE(found, telling * 9 / 10) << telling;
  std::printf("%d mistakes changed nothing, %d of %d were found\n", idle, found, telling);
}

INSTANTIATE_TEST_SUITE_P(Operators, Decisions,
                         testing::Values("rms_norm", "qk_norm", "rope", "qkv_linear", "row_linear",
                                         "merged_linear"),
                         [](const auto& info) { return info.param; });

// Discrimination knows which data hide the mistakes of rope: with heads two wide and few positions,
// some turn nothing that a type of 8 bits could tell.
TEST(RopeDiscrimination, MistrustsExactlyTheDataThatLetAMistakePass) {
  int mistrusted = 0;
  for (int seed = 0; seed < 400; ++seed) {
    const std::string line =
        "v1 rope num_heads=1 num_kv_heads=1 head_dim=4 tp_size=1 num_tokens=1 dtype=bf16 "
        "fill=dense max_position=8 discriminate=1 seed=" +
        std::to_string(seed);
    const Verdict v = run(line);
    const bool slipped = run(line, "qknorm-rope-partial-warp:style").outcome != Outcome::WrongValue;
    EXPECT_EQ(v.outcome == Outcome::Mistrusted, slipped) << line << "\n  " << to_line(v);
    mistrusted += v.outcome == Outcome::Mistrusted;
  }
  EXPECT_GT(mistrusted, 0);
  EXPECT_LT(mistrusted, 200);
}

// Exact heads have a statistic each, which may happen to be one.
TEST(RopeDiscrimination, MistrustsExactHeadsOfOneStatistic) {
  int mistrusted = 0;
  for (int seed = 0; seed < 200; ++seed) {
    const std::string line =
        "v1 rope num_heads=2 num_kv_heads=1 head_dim=2 tp_size=1 num_tokens=1 dtype=bf16 "
        "norm=weightless discriminate=1 seed=" +
        std::to_string(seed);
    const Verdict v = run(line);
    const bool slipped =
        run(line, "qknorm-rope-partial-warp:packed-head").outcome != Outcome::WrongValue;
    EXPECT_EQ(v.outcome == Outcome::Mistrusted, slipped) << line << "\n  " << to_line(v);
    mistrusted += v.outcome == Outcome::Mistrusted;
  }
  EXPECT_GT(mistrusted, 5);
  EXPECT_LT(mistrusted, 60);
}

// A law that is about norms is refused where there is none, and so is a head without a pair.
TEST(RopeRefusals, SayWhy) {
  const auto refusal = [](const std::string& options) {
    try {
      case_from_line("v1 rope num_heads=2 num_kv_heads=1 tp_size=1 num_tokens=1 dtype=f32 seed=1 " +
                     options);
    } catch (const BadInput& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refusal("head_dim=2 law=scale"), "law=scale is about norms, and norm=none");
  EXPECT_EQ(refusal("head_dim=2 law=scale norm=weightless"), "accepted");
  EXPECT_EQ(refusal("head_dim=1"), "head_dim='1' is outside 2 .. 65536");
}

}  // namespace
}  // namespace tp
