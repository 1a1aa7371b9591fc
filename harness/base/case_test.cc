#include "harness/base/case.h"

#include <gtest/gtest.h>

#include "harness/base/check.h"
#include "harness/base/operator.h"

namespace tp {
namespace {

// An operator with every kind of key; only what case.cc needs of it.
class CaseLine : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    Operator op{.name = "line_test", .what = "for this test"};
    for (const char* k : {"num_heads", "num_kv_heads", "head_dim", "v_head_dim", "tp_size",
                          "num_tokens", "dtype", "fill", "seed"}) {
      op.keys.push_back(shared_key(k));
    }
    op.keys.push_back(
        {.name = "mode", .help = "", .min = 0, .max = 2, .fallback = 1, .words = {"a", "b", "c"}});
    op.keys.push_back({.name = "pad", .help = "", .min = 0, .max = 64});
    op.refuse = [](const Case& c) { return partitionable(c.model, c.tp_size); };
    add_operator(op);
  }

  static std::string error_of(const std::string& line) {
    try {
      case_from_line(line);
    } catch (const BadInput& e) {
      return e.what();
    }
    return "accepted";
  }

  const std::string shape_ =
      "v1 line_test num_heads=48 num_kv_heads=8 head_dim=128 tp_size=16 num_tokens=4 dtype=bf16";
};

TEST_F(CaseLine, PrintsBackWhatItParsed) {
  const std::string line = shape_ + " fill=dense seed=7 mode=c pad=3";
  EXPECT_EQ(to_line(case_from_line(line)), line);
}

TEST_F(CaseLine, LeavesDefaultsOutButNeverTheShape) {
  const Case c = case_from_line(shape_ + " fill=exact seed=7 mode=b pad=0 v_head_dim=0");
  EXPECT_EQ(to_line(c), shape_ + " seed=7");
  EXPECT_EQ(c.options.at("mode"), 1);
}

TEST_F(CaseLine, KeysComeInAnyOrderAndSpacesInAnyNumber) {
  const Case c = case_from_line(
      "v1  line_test seed=7 dtype=f16 num_tokens=1 tp_size=2 head_dim=8 num_kv_heads=1  "
      "num_heads=2 ");
  EXPECT_EQ(
      to_line(c),
      "v1 line_test num_heads=2 num_kv_heads=1 head_dim=8 tp_size=2 num_tokens=1 dtype=f16 seed=7");
}

TEST_F(CaseLine, RefusesWithTheKeysName) {
  EXPECT_EQ(error_of(shape_ + " seed=7 colour=red").substr(0, 35),
            "line_test has no key 'colour' (it h");
  EXPECT_EQ(error_of(shape_ + " seed=7 seed=8"), "key 'seed' is given twice");
  EXPECT_EQ(error_of(shape_), "key 'seed' is missing");
  EXPECT_EQ(error_of(shape_ + " seed=7 mode=d"), "mode='d' is none of a, b, c");
  EXPECT_EQ(error_of(shape_ + " seed=7 pad=65"), "pad='65' is outside 0 .. 64");
  EXPECT_EQ(error_of(shape_ + " seed=7 pad=-1"), "pad='-1' is outside 0 .. 64");
  EXPECT_EQ(error_of(shape_ + " seed=7 pad=99999999999999999999"),
            "pad='99999999999999999999' is outside 0 .. 64");
  EXPECT_EQ(error_of(shape_ + " seed=7 pad=1x"), "pad='1x' is not a whole number");
  EXPECT_EQ(error_of(shape_ + " seed=7 pad="), "pad='' is not a whole number");
  EXPECT_EQ(error_of(shape_ + " seed=7 pad"), "'pad' is not KEY=VALUE");
}

TEST_F(CaseLine, RefusesWhatIsNoCase) {
  EXPECT_EQ(error_of(""), "'' is not a case line ('v1 OPERATOR KEY=VALUE ...')");
  EXPECT_EQ(error_of("v2 line_test seed=1"), "a case line starts with 'v1', not with 'v2'");
  EXPECT_EQ(error_of("v1 nonsense seed=1").substr(0, 28), "unknown operator 'nonsense' ");
  EXPECT_EQ(error_of("v1 line_test \x01\x02=3").substr(0, 26), "line_test has no key '?\x3f' ");
}

TEST_F(CaseLine, RefusesAnIllegalShapeWithItsNumbers) {
  EXPECT_EQ(error_of("v1 line_test num_heads=48 num_kv_heads=8 head_dim=128 tp_size=12 "
                     "num_tokens=1 dtype=bf16 seed=1"),
            "tp_size=12 is neither a divisor nor a multiple of num_kv_heads=8");
}

TEST(VerdictLine, PrintsBackWhatItParsed) {
  const Verdict v{.outcome = Outcome::WrongValue,
                  .detail = "tp_rank 0, k[0, 3]: got 1 | accepted 2",
                  .digest = 0xabcdef,
                  .score = 12.5,
                  .threads = 99,
                  .seconds = 0.25};
  const Verdict back = verdict_from_line(to_line(v));
  EXPECT_EQ(to_line(back), to_line(v));
  EXPECT_EQ(back.detail, v.detail);
  EXPECT_EQ(back.digest, v.digest);
  EXPECT_THROW(verdict_from_line("Pass"), BadInput);
  EXPECT_THROW(verdict_from_line("Nonsense digest=0 score=0 threads=0 seconds=0 | "), BadInput);
}

}  // namespace
}  // namespace tp
