// The generator: only legal cases, the mix that was promised, the same cases for the same seed.

#include "harness/fuzz/draw.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <set>

#include "harness/fuzz/canary_testing.h"

namespace tp {
namespace {

// An operator without heads: hidden_size alone, and an option that only some shapes allow.
Operator headless() {
  Operator op;
  op.name = "headless";
  for (const char* key : {"hidden_size", "tp_size", "num_tokens", "dtype", "fill", "seed"}) {
    op.keys.push_back(shared_key(key));
  }
  Key law{.name = "law", .help = "", .min = 0, .max = 3};
  law.words = {"none", "permute", "tokens", "tp1"};
  op.keys.push_back(law);
  op.refuse = [](const Case& c) -> std::optional<std::string> {
    if (c.options.at("law") == 1 && c.num_tokens == 1) return "one token cannot be permuted";
    return std::nullopt;
  };
  return op;
}

class DrawTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    if (operators().empty()) add_canaries();
    for (const Operator& op : operators()) {
      if (op.name == "headless") return;
    }
    add_operator(headless());
  }
  static Domain canary() { return make_domain({"canary"}, up_to(16), {}, ""); }
};

TEST_F(DrawTest, EveryCaseIsLegalAndItsLineComesBack) {
  for (const std::uint64_t seed : {1, 2, 3}) {
    Draw draw(make_domain({"canary", "headless"}, up_to(16), {}, ""), seed);
    for (int i = 0; i < 20000; ++i) {
      const Case c = draw.next();
      ASSERT_FALSE(find_operator(c.op).refuse(c)) << to_line(c);
      ASSERT_LE(c.tp_size, 16);
      ASSERT_TRUE(c.op != "canary" || is_legal(heads_of(c))) << to_line(c);
      ASSERT_LE(std::int64_t{c.num_tokens} * c.model.num_heads * c.model.head_dim, 1 << 19)
          << to_line(c);
      ASSERT_EQ(case_from_line(to_line(c)), c);
    }
  }
}

TEST_F(DrawTest, TheMixIsAsPromised) {
  constexpr int kCases = 20000;
  Draw draw(canary(), 7);
  std::map<Relation, int> relations;
  std::map<int, int> tp_sizes, tokens;
  std::map<Fill, int> fills;
  std::set<int> head_dims;
  int of_models = 0, most_heads = 0;
  std::set<std::tuple<int, int, int>> model_shapes;
  for (const Model& m : models())
    model_shapes.insert({m.shape.num_heads, m.shape.num_kv_heads, m.shape.head_dim});
  for (int i = 0; i < kCases; ++i) {
    const Case c = draw.next();
    ++relations[relation_of(heads_of(c))];
    ++tp_sizes[c.tp_size];
    ++tokens[c.num_tokens];
    ++fills[c.fill];
    head_dims.insert(c.model.head_dim);
    most_heads = std::max(most_heads, c.model.num_heads);
    of_models += model_shapes.contains({c.model.num_heads, c.model.num_kv_heads, c.model.head_dim});
  }
  EXPECT_GE(relations[Relation::below], kCases * 35 / 100);
  EXPECT_GE(relations[Relation::equal], kCases / 10);
  EXPECT_GE(relations[Relation::above], kCases / 5);
  EXPECT_GE(relations[Relation::single], kCases / 20);
  EXPECT_GE(of_models, kCases * 45 / 100);
  EXPECT_LE(of_models, kCases * 60 / 100);
  for (int tp = 1; tp <= 16; ++tp) EXPECT_GT(tp_sizes[tp], kCases / 1000) << "tp_size=" << tp;
  EXPECT_EQ(tokens.begin()->first, 1);
  EXPECT_EQ(tokens.rbegin()->first, 32);
  EXPECT_GT(tokens[1], tokens[2]);
  EXPECT_NEAR(double(fills[Fill::exact]) / kCases, 0.5, 0.02);
  EXPECT_NEAR(double(fills[Fill::dense]) / kCases, 0.4, 0.02);
  for (const int dim : {1, 3, 8, 80, 96, 128, 256}) EXPECT_TRUE(head_dims.contains(dim)) << dim;
  EXPECT_GE(most_heads, 128);
}

TEST_F(DrawTest, ALawIsDrawnOnlyWhereItChangesSomething) {
  Draw draw(make_domain({"headless"}, up_to(4), {}, ""), 1);
  std::map<std::int64_t, int> laws;
  for (int i = 0; i < 2000; ++i) {
    const Case c = draw.next();
    const std::int64_t law = c.options.at("law");
    ++laws[law];
    EXPECT_FALSE(law == 2 && c.num_tokens == 1) << to_line(c);
    EXPECT_FALSE(law == 3 && c.tp_size == 1) << to_line(c);
  }
  EXPECT_EQ(laws.size(), 4u);
}

TEST_F(DrawTest, TheSeedDecides) {
  const auto lines = [&](std::uint64_t seed) {
    Draw draw(canary(), seed);
    std::string all;
    for (int i = 0; i < 100; ++i) all += to_line(draw.next()) + "\n";
    return all;
  };
  EXPECT_EQ(lines(5), lines(5));
  EXPECT_NE(lines(5), lines(6));
}

TEST_F(DrawTest, TheDomainIsObeyed) {
  Draw one_model(make_domain({"canary"}, up_to(16), {"MiniMaxAI/MiniMax-M2.5"}, ""), 1);
  for (int i = 0; i < 500; ++i) {
    const Case c = one_model.next();
    EXPECT_EQ(heads_of(c), (HeadTriple{48, 8, c.tp_size}));
  }
  Draw large(make_domain({"canary"}, {24, 200}, {}, ""), 1);
  for (int i = 0; i < 500; ++i) {
    const Case c = large.next();
    EXPECT_TRUE(c.tp_size == 24 || c.tp_size == 200);
    EXPECT_TRUE(is_legal(heads_of(c))) << to_line(c);
  }
  Draw single(make_domain({"canary"}, {1}, {}, ""), 1);
  for (int i = 0; i < 500; ++i) EXPECT_EQ(single.next().tp_size, 1);
}

TEST_F(DrawTest, RestKeepsTheShape) {
  Draw draw(canary(), 1);
  Case shape = find_operator("canary").blank();
  set_heads(shape, {48, 8, 16});
  shape.model.head_dim = 128;
  std::set<int> tokens;
  for (int i = 0; i < 100; ++i) {
    const Case c = draw.rest(shape);
    EXPECT_EQ(c.model, shape.model);
    EXPECT_EQ(c.tp_size, 16);
    tokens.insert(c.num_tokens);
  }
  EXPECT_GT(tokens.size(), 5u);
}

}  // namespace
}  // namespace tp
