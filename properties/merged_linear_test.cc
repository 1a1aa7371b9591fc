// The mistakes of merged_linear: each planted at the smallest shape where it can show, found in the
// stage that makes it; and the data, laws and checks that find them, seen to fail.

#include <gtest/gtest.h>

#include "harness/base/check.h"
#include "harness/fuzz/draw.h"
#include "harness/group/mpi_testing.h"
#include "properties/planted_testing.h"

namespace tp {
namespace {

struct Planted {
  const char* id;
  const char* shape;  // of 8 columns of x and one token
  Outcome outcome;
  const char* where;  // in the verdict
};

constexpr const char *kGate = "stage gate_up, tp_rank 0, gate[0, 0]",
                     *kOut = "stage silu_and_mul, tp_rank 0, out[0, 0]";

const Planted kPlanted[] = {
    {"packed-concat-contiguous-colwise:gate-up", "intermediate_per_rank=1 tp_size=2",
     Outcome::WrongValue, "stage gate_up, tp_rank 1, gate[0, 1]"},
    {"packed-concat-contiguous-colwise:gate-up",
     "intermediate_per_rank=5 tp_size=2 tile=16 bias=yes", Outcome::WrongValue,
     "stage gate_up, tp_rank 1, gate[0, 5]"},
    {"gated-end-padding:weight-end", "intermediate_per_rank=1 tp_size=1 tile=16",
     Outcome::WrongValue, kOut},
    // Not one element is in another tile.
    {"gated-end-padding:weight-end", "intermediate_per_rank=31 tp_size=1 tile=32",
     Outcome::WrongValue, kOut},
    {"gated-end-padding:gate-not-up", "intermediate_per_rank=2 tp_size=1 tile=16",
     Outcome::WrongValue, kOut},
    {"gated-end-padding:gate-not-up", "intermediate_per_rank=126 tp_size=1 tile=128",
     Outcome::WrongValue, kOut},
    {"gated-end-padding:gate-not-up", "intermediate_per_rank=1 tp_size=1 tile=16",
     Outcome::BadLaunch, "silu_and_mul: 17 columns have no halves"},
    // Nobody reads it, and the product is right.
    {"own:gated-padding-not-written", "intermediate_per_rank=15 tp_size=1 tile=16",
     Outcome::Uninitialised, "padding[0, 0]"},
    {"own:gated-padding-not-written", "intermediate_per_rank=15 tp_size=1 tile=16 poison=nan",
     Outcome::Uninitialised, "padding[0, 0]"},
    {"own:gated-halves-swapped", "intermediate_per_rank=1 tp_size=1", Outcome::WrongValue, kOut},
    {"own:gated-up-of-next-rank", "intermediate_per_rank=1 tp_size=2", Outcome::WrongValue,
     "stage gate_up, tp_rank 0, up[0, 0]"},
    {"own:gated-bias-of-rank-0", "intermediate_per_rank=1 tp_size=2 bias=yes", Outcome::WrongValue,
     "stage gate_up, tp_rank 1, gate[0, 1]"},
};

const bool kAreKnown = [] {
  for (const Planted& p : kPlanted) planted_mutants().insert(p.id);
  return true;
}();

class GatedMutants : public testing::TestWithParam<Planted> {};

TEST_P(GatedMutants, AreFoundWhereTheyCanShow) {
  const auto& [id, shape, outcome, where] = GetParam();
  for (const char* fill : {"exact", "dense"}) {
    for (const char* dtype : {"f32", "f16", "bf16"}) {
      const std::string line = std::string("v1 merged_linear hidden_size=8 num_tokens=1 seed=1 ") +
                               shape + " dtype=" + dtype + " fill=" + fill;
      const Verdict v = run(line, id);
      EXPECT_EQ(name_of(v.outcome), name_of(outcome))
          << line << " with " << id << "\n  " << to_line(v);
      EXPECT_NE(v.detail.find(where), std::string::npos) << line << "\n  " << to_line(v);
      EXPECT_EQ(run(line).outcome, Outcome::Pass) << line;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Zoo, GatedMutants, testing::ValuesIn(kPlanted), [](const auto& info) {
  return test_name(std::to_string(info.index) + "_" + info.param.id);
});

// What pads nothing has no place to go wrong.
TEST(GatedMutants, OfPaddingChangeNothingWhereTheTileFits) {
  for (const std::string id : {"gated-end-padding:weight-end", "gated-end-padding:gate-not-up",
                               "own:gated-padding-not-written"}) {
    for (const std::string shape :
         {"intermediate_per_rank=32 tile=32", "intermediate_per_rank=48 tile=16",
          "intermediate_per_rank=7"}) {
      const std::string line =
          "v1 merged_linear hidden_size=8 tp_size=2 num_tokens=2 dtype=bf16 fill=dense seed=1 " +
          shape;
      EXPECT_FALSE(find_mutant(id).front().mutant->shows(case_from_line(line))) << line;
      EXPECT_EQ(run(line, id).digest, run(line).digest) << line << " with " << id;
    }
  }
}

// Discrimination is right about what it mistrusts: with one column of x and one of gate and of up,
// some data give two of them the same value.
TEST(GatedDiscrimination, MistrustsExactlyTheDataThatLetAMistakePass) {
  int mistrusted = 0;
  for (const std::string shape :
       {"tp_size=2", "tp_size=2 bias=yes", "tp_size=1 tile=16", "tp_size=1 fill=dense"}) {
    for (int seed = 0; seed < 150; ++seed) {
      const std::string line =
          "v1 merged_linear hidden_size=1 intermediate_per_rank=1 num_tokens=1 dtype=bf16 "
          "discriminate=1 seed=" +
          std::to_string(seed) + " " + shape;
      const Verdict v = run(line);
      bool slipped = false;
      for (const Mutant& m : find_operator("merged_linear").mutants) {
        if (m.shows(case_from_line(line))) slipped |= !run(line, m.id).finding();
      }
      EXPECT_EQ(v.outcome == Outcome::Mistrusted, slipped) << line << "\n  " << to_line(v);
      mistrusted += v.outcome == Outcome::Mistrusted;
    }
  }
  EXPECT_GT(mistrusted, 30);
}

// A row without padding is right however padding is done; another tile shows it.
TEST(GatedLaws, AnotherTileShowsWhatThisOneHides) {
  const std::string line =
      "v1 merged_linear hidden_size=8 intermediate_per_rank=16 tp_size=2 num_tokens=2 dtype=bf16 "
      "seed=1 tile=16";
  for (const std::string fill : {" fill=exact", " fill=dense"}) {
    EXPECT_EQ(run(line + fill + " law=tile").outcome, Outcome::Pass);
    for (const std::string id : {"gated-end-padding:weight-end", "gated-end-padding:gate-not-up"}) {
      EXPECT_EQ(run(line + fill, id).outcome, Outcome::Pass);
      const Verdict v = run(line + fill + " law=tile", id);
      EXPECT_EQ(v.outcome, Outcome::LawBroken) << to_line(v);
      EXPECT_NE(v.detail.find("law tile: "), std::string::npos) << v.detail;
    }
  }
}

// Gates are of both signs where silu bends, and in some cases so large that they are open or
// closed; halves that change places change nearly every element.
TEST(GatedData, MakeSiluMatter) {
  Draw draw(make_domain({"merged_linear"}, {1, 2, 4, 8}, {}, ""), 11);
  int drawn = 0, shown = 0;
  for (int i = 0; i < 150; ++i) {
    Case c = draw.next();
    if (c.fill != Fill::dense) continue;
    c.options["law"] = c.options["graph"] = c.options["delays"] = 0;
    c.options["discriminate"] = 1;
    ++drawn;
    shown += run(to_line(c)).outcome == Outcome::Pass;
  }
  EXPECT_GE(drawn, 30);
  EXPECT_GE(shown, drawn - 1);
}

TEST(GatedRefusals, NameTheNumbers) {
  const auto refusal = [](const std::string& options) {
    try {
      case_from_line("v1 merged_linear num_tokens=1 dtype=f32 seed=0 " + options);
    } catch (const BadInput& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refusal("hidden_size=65536 intermediate_per_rank=513 tp_size=1"),
            "1026 rows of 65536 columns are more than the 67108864 elements a case may have");
  EXPECT_EQ(refusal("hidden_size=65536 intermediate_per_rank=500 tp_size=1"), "accepted");
  EXPECT_EQ(refusal("hidden_size=65536 intermediate_per_rank=500 tp_size=1 tile=128"), "accepted");
  EXPECT_EQ(refusal("hidden_size=131072 intermediate_per_rank=250 tp_size=1 tile=128"), "accepted");
}

}  // namespace
}  // namespace tp
