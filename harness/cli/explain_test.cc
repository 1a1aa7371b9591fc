#include "harness/cli/explain.h"

#include <gtest/gtest.h>

#include "harness/base/check.h"
#include "harness/base/json.h"
#include "harness/cli/shard_map.h"

namespace tp {
namespace {

std::string json(const std::string& model, int tp_size) {
  return explain_json({.model = find_model(model), .tp_size = tp_size});
}

// Written by hand from design.md section 8.
constexpr const char* kMiniMaxTp16[] = {
    R"({"tp_rank":0,"heads":{"offset":0,"size":3},"kv_heads":{"offset":0,"size":1},"num_kv_head_replicas":2,)"
    R"("rows":{"q_proj":[[0,384]],"k_proj":[[0,128]],"v_proj":[[0,128]],)"
    R"("qkv_proj":[[0,384],[6144,6272],[7168,7296]],"o_proj_columns":[[0,384]],)"
    R"("q_norm":[[0,384]],"k_norm":[[0,128]],"lora_qkv_b":[[0,384],[6144,6272],[7168,7296]]}})",
    R"({"tp_rank":1,"heads":{"offset":3,"size":3},"kv_heads":{"offset":0,"size":1},"num_kv_head_replicas":2,)"
    R"("rows":{"q_proj":[[384,768]],"k_proj":[[0,128]],"v_proj":[[0,128]],)"
    R"("qkv_proj":[[384,768],[6144,6272],[7168,7296]],"o_proj_columns":[[384,768]],)"
    R"("q_norm":[[384,768]],"k_norm":[[0,128]],"lora_qkv_b":[[384,768],[6144,6272],[7168,7296]]}})",
    R"({"tp_rank":2,"heads":{"offset":6,"size":3},"kv_heads":{"offset":1,"size":1},"num_kv_head_replicas":2,)"
    R"("rows":{"q_proj":[[768,1152]],"k_proj":[[128,256]],"v_proj":[[128,256]],)"
    R"("qkv_proj":[[768,1152],[6272,6400],[7296,7424]],"o_proj_columns":[[768,1152]],)"
    R"("q_norm":[[768,1152]],"k_norm":[[128,256]],"lora_qkv_b":[[768,1152],[6272,6400],[7296,7424]]}})",
};

TEST(Explain, JsonOfMiniMaxOn16) {
  const std::string text = json("MiniMax-M2.5", 16);
  const std::string head =
      R"({"model":{"id":"MiniMaxAI/MiniMax-M2.5","hidden_size":3072,"num_heads":48,"num_kv_heads":8,"head_dim":128,)";
  EXPECT_TRUE(text.starts_with(head)) << text;
  const std::string ranks = std::string(R"(,"tp_size":16,"valid":true,"reason":null,"ranks":[)") +
                            kMiniMaxTp16[0] + "," + kMiniMaxTp16[1] + "," + kMiniMaxTp16[2] + ",";
  EXPECT_NE(text.find(ranks), text.npos) << text;
  EXPECT_EQ(parse_json(text).find("ranks")->as<Json::Array>()->size(), 16u);

  const std::string one =
      explain_json({.model = find_model("MiniMax-M2.5"), .tp_size = 16, .tp_rank = 2});
  EXPECT_TRUE(one.ends_with(std::string(R"("ranks":[)") + kMiniMaxTp16[2] + "]}")) << one;
}

TEST(Explain, JsonOfAnIllegalPair) {
  const std::string text = json("MiniMax-M2.5", 12);
  EXPECT_TRUE(text.ends_with(
      R"(,"tp_size":12,"valid":false,"reason":"tp_size=12 is neither a divisor nor a multiple of num_kv_heads=8","ranks":[]})"))
      << text;
}

TEST(Explain, JsonOfAShape) {
  const Model shape{.id = "",
                    .shape = {.num_heads = 2, .num_kv_heads = 1, .head_dim = 4},
                    .qk_norm = "",
                    .source = ""};
  EXPECT_EQ(
      explain_json({.model = shape, .tp_size = 3}),
      R"({"model":{"id":null,"hidden_size":null,"num_heads":2,"num_kv_heads":1,"head_dim":4,"v_head_dim":4,)"
      R"("attn_output_gate":false,"mla":false,"qk_norm":null,"eps":null,"source":null},"tp_size":3,)"
      R"("valid":false,"reason":"num_heads=2 cannot be divided by tp_size=3","ranks":[]})");
}

// All presets, all legal sizes: valid JSON, and the rows of every tensor are held as often as they
// should.
TEST(Explain, RowsHaveTheirOwners) {
  for (const Model& model : models()) {
    for (int tp_size = 1; tp_size <= 64; ++tp_size) {
      if (partitionable(model.shape, tp_size)) continue;
      ASSERT_NO_THROW(parse_json(explain_json({.model = model, .tp_size = tp_size}))) << model.id;
      const ProjectionRows whole = projection_rows(model.shape);
      std::int64_t q = 0, k = 0, v = 0, qkv = 0;
      const int copies = shard_map(model.shape, tp_size, 0).rank.num_kv_head_replicas;
      for (int rank = 0; rank < tp_size; ++rank) {
        const ShardMap map = shard_map(model.shape, tp_size, rank);
        ASSERT_EQ(map.q_proj.offset, q) << model.id;
        q += map.q_proj.size;
        k += map.k_proj.size;
        v += map.v_proj.size;
        for (const Shard& s : map.qkv_proj) qkv += s.size;
        ASSERT_LE(map.qkv_proj[2].end(), whole.qkv());
      }
      ASSERT_EQ(q, whole.q) << model.id;
      ASSERT_EQ(k, whole.k * copies) << model.id;
      ASSERT_EQ(v, whole.v * copies) << model.id;
      ASSERT_EQ(qkv, q + k + v) << model.id;
    }
  }
}

TEST(Explain, NarrowValuesAndGates) {
  // MiMo-V2-Flash: 64 heads of 192, values of 128. o_proj reads values.
  const ShardMap mimo = shard_map(find_model("MiMo-V2-Flash").shape, 8, 1);
  EXPECT_EQ(mimo.k_proj, (Shard{0, 192}));
  EXPECT_EQ(mimo.v_proj, (Shard{0, 128}));
  EXPECT_EQ(mimo.o_proj_columns, (Shard{8 * 128, 8 * 128}));
  EXPECT_EQ(mimo.qkv_proj[2], (Shard{64 * 192 + 4 * 192, 128}));
  // Qwen3.5-27B: 24 heads of 256, each with as many gate rows; the norm and o_proj know nothing of
  // the gate.
  const ShardMap qwen = shard_map(find_model("Qwen3.5-27B").shape, 8, 1);
  EXPECT_EQ(qwen.q_proj, (Shard{3 * 512, 3 * 512}));
  EXPECT_EQ(qwen.q_norm, (Shard{3 * 256, 3 * 256}));
  EXPECT_EQ(qwen.o_proj_columns, (Shard{3 * 256, 3 * 256}));
  EXPECT_EQ(qwen.qkv_proj[1], (Shard{24 * 512, 256}));
}

TEST(Explain, Table) {
  const std::string text =
      explain_table({.model = find_model("MiniMax-M2.5"), .tp_size = 16, .lora_rank = 8});
  for (const char* line : {
           "H=48 K=8 D=128 hidden=3072\n",
           "TP 16: 3 query heads a rank; each KV head on 2 ranks",
           "   3  9-11     1152-1535    1 (2/2)   128-255      128-255      1152-1535    1152-1535 "
           " 128-255\n",
           "8192 rows (q 0-6143, k 6144-7167, v 7168-8191); rank 15 takes 5760-6143, 7040-7167, "
           "8064-8191\n",
           "B [640, 8] a rank (an even split of 8192 would be 512)\n",
           "divide by 16*128, not 8*128\n",
           "1 2 4 8 | replicated 16 24 48 | refused 3 6 12: tp_size=12 is neither",
       }) {
    EXPECT_NE(text.find(line), text.npos) << line << "\nin\n" << text;
  }
  // Only norms over all heads have a weight that is cut.
  EXPECT_EQ(explain_table({.model = find_model("Qwen3-8B"), .tp_size = 16}).find("q_norm"),
            std::string::npos);
  // MLA has no k_proj and v_proj.
  EXPECT_EQ(explain_table({.model = find_model("DeepSeek-V3"), .tp_size = 8}).find("k_proj"),
            std::string::npos);
}

TEST(Explain, TableOfAnIllegalPair) {
  try {
    explain_table({.model = find_model("MiniMax-M2.5"), .tp_size = 12});
    FAIL() << "12 ranks cannot hold 8 KV heads evenly";
  } catch (const BadInput& e) {
    EXPECT_STREQ(
        e.what(),
        "MiniMaxAI/MiniMax-M2.5: tp_size=12 is neither a divisor nor a multiple of num_kv_heads=8 "
        "(valid are 1 2 4 8 16 24 48)");
  }
}

}  // namespace
}  // namespace tp
