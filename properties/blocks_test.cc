// Attention blocks of real models at every tp_size that their heads allow, stage by stage. Here
// with the models' own heads, norms, rotations, gates, biases and sinks, and with a few columns in
// place of thousands: what goes wrong among ranks is decided by heads. properties/blocks.cases has
// the same at full width, for `tpcheck replay` (minutes in the emulator).

#include <gtest/gtest.h>

#include <fstream>
#include <vector>

#include "harness/fuzz/domain.h"
#include "properties/planted_testing.h"

namespace tp {
namespace {

// A full-width norm with fewer KV heads than ranks, a gate with rotation in part, norms of heads,
// biases and sinks without a norm, norms that multiply with 1 + w.
const std::vector<std::string> kModels = {"MiniMaxAI/MiniMax-M2.5", "Qwen/Qwen3.5-35B-A3B",
                                          "bharatgenai/Param2-17B-A2.4B-Thinking",
                                          "openai/gpt-oss-20b", "google/gemma-3-12b-it"};

// One case for each model and legal tp_size, as wide as the model, with dense data.
std::vector<Case> blocks_of_models() {
  std::vector<int> tp_sizes;
  for (int t = 1; t <= 16; ++t) tp_sizes.push_back(t);
  std::vector<Case> cases;
  for (const std::string& model : kModels) {
    for (Case c : each_pair(make_domain({"attention_block"}, tp_sizes, {model}, "")).cases) {
      c.num_tokens = 2;
      c.dtype = DType::bf16;
      c.fill = Fill::dense;
      c.seed = cases.size() + 1;
      cases.push_back(c);
    }
  }
  return cases;
}

// Each stage that the model has, alone: bitwise, and the same on one rank.
std::vector<Case> stages_of(Case c) {
  c.fill = Fill::exact;
  const Operator& op = find_operator(c.op);
  c.options["law"] = op.key("law")->parse("tp1");
  std::vector<Case> cases;
  for (std::int64_t stage = 1; stage <= op.key("stage")->max; ++stage) {
    c.options["stage"] = stage;
    if (!op.refuse(c)) cases.push_back(c);
  }
  return cases;
}

// Heads of 24 columns, of which 24, 12 or 6 rotate.
Case narrow(Case c) {
  c.model.hidden_size = 72;
  c.model.head_dim = 24;
  c.num_tokens = 3;
  return c;
}

TEST(Blocks, OfModelsPassStageByStage) {
  std::size_t blocks = 0, stages = 0;
  for (const Case& full : blocks_of_models()) {
    const Case c = narrow(full);
    const Verdict v = run(to_line(c));
    EXPECT_EQ(name_of(v.outcome), "Pass") << to_line(c) << "\n  " << to_line(v);
    ++blocks;
    for (const Case& one : stages_of(c)) {
      const Verdict alone = run(to_line(one));
      EXPECT_EQ(name_of(alone.outcome), "Pass") << to_line(one) << "\n  " << to_line(alone);
      ++stages;
    }
  }
  EXPECT_EQ(blocks, 25u);  // 1, 2, 4, 8 and 16 ranks of each
  EXPECT_GE(stages, 25u * 4);
}

// The file says what this test would make of the models: at the largest tp_size also each stage.
TEST(Blocks, OfModelsAreWrittenDownAtFullWidth) {
  std::vector<std::string> wanted, written;
  for (const Case& c : blocks_of_models()) {
    wanted.push_back(to_line(c));
    if (c.tp_size != 16) continue;
    for (const Case& one : stages_of(c)) wanted.push_back(to_line(one));
  }
  std::ifstream in(TP_BLOCKS);
  for (std::string line; std::getline(in, line);) {
    if (!line.empty() && line[0] != '#') written.push_back(line);
  }
  std::string all;
  for (const std::string& line : wanted) all += line + '\n';
  EXPECT_EQ(written, wanted) << "properties/blocks.cases should have\n" << all;
}

}  // namespace
}  // namespace tp
