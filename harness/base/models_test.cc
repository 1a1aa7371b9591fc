#include "harness/base/models.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <set>

#include "harness/base/check.h"
#include "harness/base/temp_folder_testing.h"
#include "harness/base/text.h"

namespace tp {
namespace {

// What find_model says no with; empty if it finds one.
std::string refusal(const std::string& name) {
  try {
    find_model(name);
    return "";
  } catch (const BadInput& e) {
    return e.what();
  }
}

TEST(Models, AllPairsUpTo64) {
  ASSERT_EQ(models().size(), 70u);
  int legal = 0, replicated = 0, refused = 0;
  for (const Model& m : models()) {
    for (int tp_size = 1; tp_size <= 64; ++tp_size) {
      if (m.shape.num_heads % tp_size != 0) continue;
      if (partitionable(m.shape, tp_size)) {
        ++refused;
        EXPECT_THROW(partition(m.shape, tp_size, 0), BadInput);
        continue;
      }
      ++legal;
      replicated += partition(m.shape, tp_size, 0).num_kv_head_replicas > 1;
    }
  }
  EXPECT_EQ(legal, 407);
  EXPECT_EQ(replicated, 144);
  EXPECT_EQ(refused, 50);
}

TEST(Models, EveryPresetIsWhole) {
  const std::set<std::string> styles = {
      "", "none", "per_head", "full_width", "weightless_after_rope", "mla_latent"};
  std::set<std::string> ids;
  for (const Model& m : models()) {
    EXPECT_TRUE(ids.insert(lower(m.id)).second) << m.id;
    EXPECT_EQ(m.id.find(' '), m.id.npos) << m.id;
    EXPECT_GT(m.shape.hidden_size, 0) << m.id;
    EXPECT_GT(m.shape.head_dim, 0) << m.id;
    EXPECT_NE(m.shape.v_head_dim, m.shape.head_dim) << m.id << ": the same is written as 0";
    EXPECT_TRUE(styles.count(m.qk_norm)) << m.id;
    EXPECT_TRUE(m.eps >= 0 && m.eps < 1e-3) << m.id;
    // Falcon's files leave it out.
    EXPECT_EQ(m.intermediate_size == 0, m.id.starts_with("tiiuae/falcon")) << m.id;
    EXPECT_FALSE(m.source.empty()) << m.id;
  }
}

TEST(Models, WhatTheUnusualOnesSay) {
  const Model minimax = find_model("MiniMax-M2.5");
  EXPECT_EQ(minimax.shape, (ModelShape{3072, 48, 8, 128, 0, false}));
  EXPECT_EQ(minimax.qk_norm, "full_width");
  EXPECT_EQ(minimax.eps, 1e-6);
  EXPECT_EQ(find_model("MiMo-V2-Flash").shape, (ModelShape{4096, 64, 4, 192, 128, false}));
  EXPECT_EQ(find_model("Qwen3.5-27B").shape, (ModelShape{5120, 24, 4, 256, 0, true}));
  EXPECT_EQ(find_model("Qwen3-32B").intermediate_size, 25600);
  EXPECT_EQ(find_model("Qwen3.5-35B-A3B").intermediate_size, 512);  // an expert's
  EXPECT_TRUE(find_model("MiniMax-M3").qk_norm_one_plus);
  const Model deepseek = find_model("DeepSeek-V3");
  EXPECT_EQ(deepseek.shape, (ModelShape{7168, 128, 128, 192, 128, false}));
  EXPECT_TRUE(deepseek.mla);
  for (const char* gemma : {"gemma-3-1b-it", "gemma-3-27b-it"})
    EXPECT_TRUE(find_model(gemma).qk_norm_one_plus) << gemma;
}

TEST(Models, FoundByName) {
  EXPECT_EQ(find_model("MiniMaxAI/MiniMax-M2.5").id, "MiniMaxAI/MiniMax-M2.5");
  EXPECT_EQ(find_model("minimax-m2.5").id, "MiniMaxAI/MiniMax-M2.5");
  // A whole name is meant even where it begins another one.
  EXPECT_EQ(find_model("MiniMax-M2").id, "MiniMaxAI/MiniMax-M2");
  EXPECT_EQ(find_model("phi-4").id, "microsoft/phi-4");
  EXPECT_EQ(find_model("gpt-oss-20").id, "openai/gpt-oss-20b");
}

TEST(Models, RefusedWithCandidates) {
  const std::string ambiguous = refusal("gpt-oss");
  EXPECT_NE(ambiguous.find("openai/gpt-oss-20b, openai/gpt-oss-120b"), ambiguous.npos) << ambiguous;
  EXPECT_NE(refusal("Llama-3.1-8B").find("meta-llama/Meta-Llama-3.1-8B"), std::string::npos);
  EXPECT_NE(refusal("minimax-m25").find("MiniMaxAI/MiniMax-M2.5"), std::string::npos);
  EXPECT_NE(refusal("no such model").find("unknown model 'no such model'"), std::string::npos);
  EXPECT_NE(refusal("").find("unknown model ''"), std::string::npos);
  // Nothing a user passes reaches the terminal unfiltered or in full length.
  const std::string wild = refusal("\x1b[31m\n" + std::string(100'000, 'x'));
  EXPECT_EQ(wild.find_first_of("\x1b\n"), wild.npos);
  EXPECT_LT(wild.size(), 200u);
}

TEST(Models, FoundByPath) {
  const TempFolder folder;
  const std::filesystem::path& dir = folder.path();
  std::filesystem::create_directories(dir / "empty");
  std::ofstream(dir / "config.json") << R"({"hidden_size": 64, "num_attention_heads": 4})";
  const ModelShape expected{64, 4, 4, 16, 0, false};
  EXPECT_EQ(find_model(dir.string()).shape, expected);
  EXPECT_EQ(find_model((dir / "config.json").string()).shape, expected);
  EXPECT_NE(refusal((dir / "missing.json").string()).find("No such file"), std::string::npos);
  EXPECT_NE(refusal((dir / "empty").string()).find("has no config.json"), std::string::npos);
  EXPECT_NE(refusal("/dev/zero").find("not a regular file"), std::string::npos);
  // Sparse: the size is what counts, and nothing of that size may be read.
  std::ofstream(dir / "large.json").close();
  std::filesystem::resize_file(dir / "large.json", std::uintmax_t{1} << 33);
  EXPECT_NE(refusal((dir / "large.json").string()).find("larger than 16 MiB"), std::string::npos);
}

TEST(Models, WithACheckpointBesideTheConfig) {
  const TempFolder folder;
  const std::filesystem::path& dir = folder.path();
  std::ofstream(dir / "config.json") << R"({"hidden_size": 64, "num_attention_heads": 4})";
  EXPECT_EQ(find_model(dir.string()).checkpoint, "");
  for (const char* name : {"model.safetensors.index.json", "model-00001-of-00002.safetensors"}) {
    std::ofstream(dir / name).close();
    EXPECT_EQ(find_model(dir.string()).checkpoint, dir.string()) << name;
    // Who names the config.json means the shape.
    EXPECT_EQ(find_model((dir / "config.json").string()).checkpoint, "") << name;
    std::filesystem::remove(dir / name);
  }
  // ModelOpt's file beside it, and what is wrong with it.
  std::ofstream(dir / "hf_quant_config.json") << R"({"quantization": {"quant_algo": "FP8"}})";
  EXPECT_EQ(find_model(dir.string()).quantization.format.scheme, Scheme::fp8_tensor);
  std::ofstream(dir / "hf_quant_config.json") << "{";
  EXPECT_NE(refusal(dir.string()).find("hf_quant_config.json: "), std::string::npos);
}

}  // namespace
}  // namespace tp
