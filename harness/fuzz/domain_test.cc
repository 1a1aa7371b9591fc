// What is legal, and which names are known.

#include "harness/fuzz/domain.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <numeric>

#include "harness/base/check.h"
#include "harness/base/temp_folder_testing.h"
#include "harness/fuzz/canary_testing.h"

namespace tp {
namespace {

class DomainTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (operators().empty()) add_canaries();
  }
};

TEST_F(DomainTest, RelationSaysHowKvHeadsMeetRanks) {
  EXPECT_EQ(relation_of({8, 2, 1}), Relation::single);
  EXPECT_EQ(relation_of({8, 2, 4}), Relation::below);
  EXPECT_EQ(relation_of({8, 4, 4}), Relation::equal);
  EXPECT_EQ(relation_of({8, 8, 4}), Relation::above);
}

TEST_F(DomainTest, NamesThatCannotBeMeantAreRefused) {
  EXPECT_THROW(make_domain({"no_such_op"}, {1}, {}, ""), BadInput);
  EXPECT_THROW(make_domain({}, {1}, {"no-such-model"}, ""), BadInput);
  EXPECT_THROW(make_domain({}, {1}, {}, "no:mutant"), BadInput);
  EXPECT_THROW(make_domain({}, {0, 1}, {}, ""), BadInput);
  EXPECT_THROW(make_domain({}, {1, 5000}, {}, ""), BadInput);
  EXPECT_NO_THROW(make_domain({"canary"}, {4, 2, 4}, {"all"}, "0:unique_shards"));
}

TEST_F(DomainTest, ModelThatFitsNoTpSizeIsRefusedWithTheNumbers) {
  try {
    make_domain({"canary"}, {12}, {"MiniMaxAI/MiniMax-M2.5"}, "");
    FAIL() << "48 heads over 8 KV heads were spread over 12 ranks";
  } catch (const BadInput& e) {
    EXPECT_NE(std::string(e.what()).find("tp_size=12"), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("num_kv_heads=8"), std::string::npos) << e.what();
  }
}

TEST_F(DomainTest, AllIsAllHoweverManyAreNamedBesides) {
  const auto count = [](const std::vector<std::string>& wanted) {
    return make_domain({"canary"}, {1, 2}, wanted, "").models.size();
  };
  EXPECT_EQ(count({"all", "MiniMaxAI/MiniMax-M2.5"}), models().size());
  EXPECT_EQ(count({"MiniMaxAI/MiniMax-M2.5", "all"}), models().size());
  EXPECT_EQ(count({"MiniMaxAI/MiniMax-M2.5"}), 1u);
}

TEST_F(DomainTest, ModelsOfTheUsersOwn) {
  const TempFolder temp;
  const std::filesystem::path& folder = temp.path();
  const auto model = [&](const std::string& name, const std::string& more) {
    std::filesystem::create_directories(folder / name);
    std::ofstream(folder / name / "config.json")
        << R"({"hidden_size": 64, "num_attention_heads": 4)" << more << "}";
    return (folder / name).string();
  };
  const auto with_tensors = [&](const std::string& name) {
    const std::string directory = model(name, "");
    std::ofstream(directory + "/model.safetensors").close();
    return directory;
  };
  const std::string a = with_tensors("a"), b = with_tensors("b"), shape = model("shape", "");
  const auto checkpoint_of = [](const std::vector<std::string>& wanted) {
    return make_domain({"canary"}, {1, 2}, wanted, "").checkpoint;
  };
  EXPECT_EQ(checkpoint_of({shape}), "");
  EXPECT_EQ(checkpoint_of({shape, a, "MiniMax-M2.5"}), a);
  EXPECT_EQ(checkpoint_of({a, a}), a);
  EXPECT_EQ(checkpoint_of({a + "/config.json"}), "");
  EXPECT_THROW(checkpoint_of({a, b}), BadInput);
  // A model that is quantised in a way that nobody knows is not run as if it were not.
  const std::string awq =
      model("awq", R"(, "quantization_config": {"quant_method": "awq", "bits": 4})");
  try {
    checkpoint_of({awq});
    FAIL() << "AWQ passes for something";
  } catch (const BadInput& e) {
    EXPECT_NE(std::string(e.what()).find("quant_method=\"awq\""), std::string::npos) << e.what();
    EXPECT_NE(std::string(e.what()).find("config.json"), std::string::npos) << e.what();
  }
}

TEST_F(DomainTest, AnAdapterIsForOneModelAndForOperatorsThatRunOne) {
  const std::string model = "MiniMaxAI/MiniMax-M2.5";
  const Domain domain = make_domain({}, {1, 2}, {model}, "", "adapter");
  ASSERT_EQ(domain.ops.size(), 1u);
  EXPECT_EQ(domain.ops[0]->name, "canary_wrong_in_adapter");
  EXPECT_EQ(domain.adapter, "adapter");
  EXPECT_THROW(make_domain({"canary", "canary_wrong_in_adapter"}, {1}, {model}, "", "adapter"),
               BadInput);
  EXPECT_THROW(make_domain({}, {1}, {}, "", "adapter"), BadInput);
  EXPECT_THROW(make_domain({}, {1}, {model, model}, "", "adapter"), BadInput);
  // None of those has the mutant.
  EXPECT_THROW(make_domain({}, {1}, {model}, "0:unique_shards", "adapter"), BadInput);
}

TEST_F(DomainTest, EachPairHasEveryLegalPairOfTheModels) {
  const EachPair each = each_pair(make_domain({"canary"}, up_to(64), {"all"}, ""));
  EXPECT_EQ(each.legal, 407);
  EXPECT_EQ(each.refused, 50);
  EXPECT_EQ(each.cases.size(), 407u);
  int replicated = 0;
  for (const Case& c : each.cases) {
    EXPECT_TRUE(is_legal(heads_of(c))) << to_line(c);
    replicated += relation_of(heads_of(c)) == Relation::below;
  }
  EXPECT_EQ(replicated, 144);
}

}  // namespace
}  // namespace tp
