// The adapters that peft wrote (harness/base/corpus/adapters), run on a base of their shape, as
// --model DIR --adapter DIR does.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <string>
#include <vector>

#include "harness/base/check.h"
#include "harness/base/user_adapter.h"
#include "properties/planted_testing.h"

namespace tp {
namespace {

const std::string kFolder = TP_CORPUS;

std::vector<std::string> fixtures() {
  std::vector<std::string> all;
  for (const auto& entry : std::filesystem::directory_iterator(kFolder + "/adapters"))
    if (entry.is_directory()) all.push_back(entry.path().filename());
  std::sort(all.begin(), all.end());
  return all;
}

class UserAdapters : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    set_user_adapter(kFolder + "/adapters/" + GetParam(), kFolder + "/adapter_base");
  }
  void TearDown() override { set_user_adapter("", ""); }

  // At each tp_size the cases that the adapter's modules give, with some of the other keys.
  std::vector<Case> cases() const {
    std::vector<Case> all;
    for (const int tp_size : {1, 2, 4}) {
      const CheckpointCases made = find_operator("lora").adapter_cases(tp_size);
      EXPECT_EQ(made.left_out, "") << tp_size;
      EXPECT_FALSE(made.cases.empty()) << tp_size;
      for (Case c : made.cases) {
        c.num_tokens = 3;
        c.fill = Fill::dense;
        all.push_back(c);
        c.options.at("adapters") = 2;
        c.options.at("segments") = 2;
        c.options.at("merged_scale") = c.options.at("reload") = 1;
        all.push_back(c);
      }
    }
    return all;
  }
};

TEST_P(UserAdapters, AreLoadedAndApplied) {
  for (const Case& c : cases()) {
    const Verdict v = run(to_line(c));
    EXPECT_EQ(name_of(v.outcome), "Pass") << to_line(c) << "\n  " << to_line(v);
  }
}

TEST_P(UserAdapters, ShowTheMistakesOfTheirCases) {
  if (test_world().processes() > 1) GTEST_SKIP() << "how many processes there are decides nothing";
  int shown = 0;
  for (const Case& c : cases()) {
    for (const Mutant& m : find_operator("lora").mutants) {
      if (!m.shows(c)) continue;
      ++shown;
      const Verdict v = run(to_line(c), m.id);
      EXPECT_TRUE(v.finding()) << to_line(c) << " with " << m.id << "\n  " << to_line(v);
    }
  }
  EXPECT_GT(shown, 10);
}

INSTANTIATE_TEST_SUITE_P(Peft, UserAdapters, testing::ValuesIn(fixtures()),
                         [](const auto& info) { return info.param; });

TEST(UserAdapterCases, AreRefusedWhereThereIsNoAdapterOrNoSuchLayer) {
  const std::string line =
      "v1 lora hidden_size=8 num_heads=4 num_kv_heads=2 head_dim=2 tp_size=2 num_tokens=1 "
      "dtype=bf16 seed=1 max_rank=4 ";
  const auto refusal = [&](const std::string& rest) -> std::string {
    try {
      case_from_line(line + rest);
    } catch (const BadInput& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(refusal("module=qkv layer=1"),
            "layer=1 is of an adapter, and the run was given none (--adapter DIR)");
  set_user_adapter(kFolder + "/adapters/split_qkv", kFolder + "/adapter_base");
  EXPECT_EQ(refusal("module=qkv layer=1"), "");
  EXPECT_EQ(refusal("module=qkv layer=3"),
            "the adapter has no module of such a base layer in layer 2 (layer=3)");
  EXPECT_EQ(refusal("module=o_proj layer=1"),
            "the adapter has no module of such a base layer in layer 0 (layer=1)");
  EXPECT_EQ(refusal("module=qkv layer=1 lora_bias=1"),
            "lora_bias is the adapter's own: 1 if its B has a bias, else 0");
  set_user_adapter("", "");
}

TEST(UserAdapterCases, OfAnotherBaseAreRefusedWithTheNumbers) {
  const std::string line =
      "v1 lora hidden_size=16 num_heads=4 num_kv_heads=2 head_dim=2 tp_size=2 num_tokens=1 "
      "dtype=bf16 seed=1 max_rank=4 module=qkv layer=1";
  set_user_adapter(kFolder + "/adapters/fused_qkv", kFolder + "/adapter_base");
  try {
    case_from_line(line);
    ADD_FAILURE();
  } catch (const BadInput& e) {
    const std::string sentence = e.what();
    EXPECT_NE(sentence.find("qkv_proj.lora_A.weight is [4, 8]"), sentence.npos) << sentence;
    EXPECT_NE(sentence.find("qkv_proj.lora_B.weight is [16, 4]"), sentence.npos) << sentence;
    EXPECT_NE(sentence.find("the base layer has 16 columns and 16 rows"), sentence.npos)
        << sentence;
  }
  set_user_adapter("", "");
}

}  // namespace
}  // namespace tp
