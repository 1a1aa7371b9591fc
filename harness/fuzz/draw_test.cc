// The generator: only legal cases, the mix that was promised, the same cases for the same seed; and
// how long what is drawn may take.

#include "harness/fuzz/draw.h"

#include <gtest/gtest.h>

#include <map>
#include <numeric>
#include <set>

#include "harness/fuzz/canary_testing.h"
#include "harness/fuzz/deadlines.h"

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

// An operator that says how much work it is: a projection of every head, and keys in front.
Operator layer() {
  Operator op;
  op.name = "layer";
  for (const char* key : {"hidden_size", "num_heads", "num_kv_heads", "head_dim", "tp_size",
                          "num_tokens", "dtype", "fill", "seed"}) {
    op.keys.push_back(shared_key(key));
    Key& last = op.keys.back();
    last.is_size = last.name == "hidden_size" || last.name == "head_dim";
    if (last.name == "num_tokens") last.draw_max = 160;
  }
  op.keys.push_back({.name = "width", .help = "", .min = 1, .max = 1 << 20, .of_model = true});
  op.keys.push_back({.name = "pad", .help = "", .min = 0, .max = 64, .grain = 8});
  op.refuse = [](const Case& c) { return partitionable(c.model, c.tp_size); };
  op.work = [](const Case& c) {
    const std::int64_t rows = (c.num_tokens + 15) / 16 * 16;
    return double(c.model.num_heads) * c.model.head_dim * c.model.hidden_size * double(rows + 8);
  };
  op.adopt = [](Case& c, const Model& model) {
    c.options.at("width") = model.shape.num_heads * model.shape.head_dim / c.tp_size;
  };
  return op;
}

// One that is long in large cases.
Operator cache() {
  Operator op = layer();
  op.name = "cache";
  op.adopt = {};
  for (Key& key : op.keys) {
    if (key.name == "head_dim") key.is_size = false;
  }
  op.keys.push_back({.name = "context",
                     .help = "",
                     .min = 0,
                     .max = 1 << 20,
                     .draw_max = 200,
                     .large_max = 800,
                     .is_size = true});
  op.work = [](const Case& c) {
    return double(c.model.num_heads) * c.model.head_dim *
           double(c.num_tokens + c.options.at("context")) * double(c.num_tokens);
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
    for (const auto make : {headless, layer, cache}) add_operator(make());
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
      ASSERT_LE(std::int64_t{c.num_tokens} * c.model.num_heads * c.model.head_dim, 1 << 18)
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

// Whatever the shape costs: what gives way is what is not the model's.
TEST_F(DrawTest, RestKeepsAShapeThatIsMuchWork) {
  Draw draw(make_domain({"layer"}, up_to(16), {"MiniMaxAI/MiniMax-M2.5"}, ""), 1);
  for (const Case& shape : each_pair(make_domain({"layer"}, {1, 16}, {"MiniMax-M2.5"}, "")).cases) {
    std::set<int> tokens;
    for (int i = 0; i < 100; ++i) {
      const Case c = draw.rest(shape);
      EXPECT_EQ(c.model, shape.model);
      EXPECT_EQ(c.model.hidden_size, 3072);
      EXPECT_EQ(c.options.at("width"), 48 * 128 / c.tp_size);
      EXPECT_LE(c.num_tokens, 32) << to_line(c);
      tokens.insert(c.num_tokens);
    }
    EXPECT_GT(tokens.size(), 5u);
  }
}

// Each size is a large one in its turn, and what costs much is rare enough for the mean to stay.
TEST_F(DrawTest, NoSizeStarves) {
  constexpr int kCases = 4000;
  Draw draw(make_domain({"layer"}, up_to(16), {}, ""), 3);
  const auto aligned = [](std::int64_t n) { return n % 8 == 0; };
  int deep = 0, deeper = 0, wide = 0, many = 0, full_rows = 0, deep_and_full = 0, deep_and_more = 0;
  int streamed_few = 0, streamed_more = 0;  // of 16-bit elements: harness/device/streamed_size.h
  double work = 0;
  for (int i = 0; i < kCases; ++i) {
    const Case c = draw.next();
    const std::int64_t hidden = c.model.hidden_size;
    const bool full = aligned(hidden) && aligned(hidden + c.options.at("pad"));
    const double of_case = find_operator("layer").work(c);
    ASSERT_LE(of_case, 30 << 20) << to_line(c);
    work += of_case;
    deep += hidden > 64;
    deeper += hidden > 256;
    wide += c.model.head_dim >= 64;
    many += c.num_tokens > 64;
    full_rows += full;
    deep_and_full += full && hidden > 256;
    if (full && hidden >= 256) ++(c.num_tokens <= 16 ? streamed_few : streamed_more);
    deep_and_more += hidden > 64 && c.num_tokens > 16;
  }
  EXPECT_LE(work / kCases, 1 << 20);
  EXPECT_GE(deep, kCases / 5);
  EXPECT_GE(deeper, kCases / 10);
  EXPECT_GE(wide, kCases / 10);
  EXPECT_GE(many, kCases * 3 / 100);
  EXPECT_GE(full_rows, kCases / 4);
  EXPECT_GE(deep_and_full, kCases * 3 / 100);
  EXPECT_GE(streamed_few, kCases * 2 / 100);
  EXPECT_GE(streamed_more, kCases / 200);
  EXPECT_GE(deep_and_more, kCases * 3 / 100);
}

TEST_F(DrawTest, AFewContextsAreLong) {
  constexpr int kCases = 4000;
  Draw draw(make_domain({"cache"}, up_to(16), {}, ""), 3);
  int is_long = 0;
  for (int i = 0; i < kCases; ++i) {
    const Case c = draw.next();
    if (c.options.at("context") <= 256) continue;
    ++is_long;
    EXPECT_LE(c.model.head_dim, 32) << to_line(c);
    EXPECT_LE(c.options.at("context"), 800) << to_line(c);
  }
  EXPECT_NEAR(double(is_long) / kCases, 0.035, 0.01);
}

TEST_F(DrawTest, ADeadlineGrowsWithTheWork) {
  using std::chrono::milliseconds;
  Case light = find_operator("layer").blank(), heavy = light;
  heavy.model = {.hidden_size = 4096, .num_heads = 64, .num_kv_heads = 8, .head_dim = 128};
  heavy.num_tokens = 8;
  constexpr double kOfWork = 80500;  // 64 * 128 * 4096 * 24 multiply-adds, in ms
  Deadlines deadlines(0);
  EXPECT_NEAR(double(deadlines.of(light).count()), 30000, 10);
  EXPECT_NEAR(double(deadlines.of(heavy).count()), 30000 + kOfWork, 100);
  deadlines.passed(heavy, 40);  // no slower than its work is
  EXPECT_NEAR(double(deadlines.of(light).count()), 2000, 10);
  EXPECT_NEAR(double(deadlines.of(heavy).count()), 2000 + kOfWork, 100);
  deadlines.passed(light, 1);
  EXPECT_NEAR(double(deadlines.of(light).count()), 20000, 150);
  deadlines.passed(find_operator("headless").blank(), 3);
  EXPECT_EQ(deadlines.of(find_operator("headless").blank()), milliseconds(60000));
  EXPECT_EQ(Deadlines(1.5).of(heavy), milliseconds(1500));
}

}  // namespace
}  // namespace tp
