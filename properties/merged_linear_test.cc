// The mistakes of merged_linear: each planted at the smallest shape where it can show, found in the
// stage that makes it; and the data, laws and checks that find them, seen to fail.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <sstream>
#include <string>
#include <vector>

#include "harness/base/check.h"
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

constexpr const char* kOut = "stage silu_and_mul, tp_rank 0, out[0, 0]";

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

// The gates of a rank's first token, as far as the trace shows them.
std::vector<double> traced_gates(const Case& c) {
  std::vector<double> gates;
  const auto take = [&](const std::string& line) {
    if (line.find("  gate_up  out  gate_up ") == std::string::npos) return;
    std::istringstream values(line.substr(line.find("row 0:") + 6));
    const std::int64_t shown = c.options.at("intermediate_per_rank");
    double gate;
    for (std::int64_t i = 0; i < shown && values >> gate; ++i) gates.push_back(gate);
  };
  find_operator(c.op).run(test_world(), c, {.deadline = std::chrono::seconds(60), .trace = take});
  return gates;
}

// Dense gates lie where silu bends, on both sides of zero, whatever hidden_size is; some are so
// large that they are open or closed, and some that exp(-gate) leaves fp32.
TEST(GatedData, HaveGatesOfEveryKind) {
  std::vector<double> gates;
  for (const int hidden : {1, 10, 100, 1000, 4000}) {
    for (int seed = 0; seed < 24; ++seed) {
      const std::string line =
          "v1 merged_linear intermediate_per_rank=8 tp_size=4 num_tokens=1 dtype=bf16 fill=dense "
          "hidden_size=" +
          std::to_string(hidden) + " seed=" + std::to_string(seed);
      const std::vector<double> of_case = traced_gates(case_from_line(line));
      gates.insert(gates.end(), of_case.begin(), of_case.end());
    }
  }
  if (test_world().process() != 0) return;  // only process 0 traces
  const double all = double(gates.size());
  ASSERT_EQ(all, 5 * 24 * 32);
  const auto percent = [&](double from, double to) {
    return 100 / all * double(std::count_if(gates.begin(), gates.end(), [&](double g) {
             return from <= g && g < to;
           }));
  };
  EXPECT_GT(percent(-6, 0), 25);
  EXPECT_GT(percent(0, 6), 25);
  EXPECT_GT(percent(18, HUGE_VAL), 5);
  EXPECT_GT(percent(-88, -18), 5);
  EXPECT_GT(percent(-HUGE_VAL, -88.8), 0.5);
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
