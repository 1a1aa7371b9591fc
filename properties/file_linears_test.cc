#include "properties/file_linears.h"

#include <gtest/gtest.h>

#include "harness/base/safetensors.h"
#include "harness/base/temp_folder_testing.h"

namespace tp {
namespace {

// A checkpoint of tensors that are called this, all of whose bytes are zero.
class FileLinears : public testing::Test {
 protected:
  void add(const std::string& name, std::int64_t rows = 8, std::int64_t cols = 8) {
    tensors_.push_back({.name = name,
                        .dtype = "U8",
                        .shape = {rows, cols},
                        .data = zeros_.data(),
                        .bytes = std::size_t(rows * cols)});
  }
  std::map<int, FileLinear> found(LinearKind kind) const {
    const std::string path = folder_.at("a.safetensors");
    write_safetensors(path, tensors_);
    return linears_of(Checkpoint(path), kind, 8);
  }
  using Modules = std::vector<std::string>;

  std::vector<std::byte> zeros_ = std::vector<std::byte>(4096);
  std::vector<StoredTensor> tensors_;
  const TempFolder folder_;
};

TEST_F(FileLinears, AreNamedAsTheirLayersHaveThem) {
  for (const char* part : {"q_proj", "k_proj", "v_proj", "o_proj"})
    add(std::string("model.layers.10.self_attn.") + part + ".weight");
  add("model.layers.9.self_attn.qkv_proj.weight");
  add("model.layers.9.self_attn.o_proj.weight_packed");
  const auto qkv = found(LinearKind::qkv);
  ASSERT_EQ(qkv.size(), 2u);
  EXPECT_EQ(qkv.at(9).modules, Modules{"model.layers.9.self_attn.qkv_proj"});
  EXPECT_EQ(qkv.at(10).modules,
            (Modules{"model.layers.10.self_attn.q_proj", "model.layers.10.self_attn.k_proj",
                     "model.layers.10.self_attn.v_proj"}));
  EXPECT_EQ(found(LinearKind::attention_out).size(), 2u);
  EXPECT_TRUE(found(LinearKind::gate_up).empty());
}

TEST_F(FileLinears, WhatALayerLacksIsMissedUnderItsName) {
  for (const char* layer : {"0", "1"}) {
    add(std::string("transformer.h.") + layer + ".attention.query_key_value.weight");
  }
  add("transformer.h.0.attention.dense.weight");
  EXPECT_TRUE(found(LinearKind::qkv).at(1).is_striped);
  EXPECT_EQ(found(LinearKind::attention_out).at(1).modules,
            Modules{"transformer.h.1.attention.dense"});
}

TEST_F(FileLinears, OfAnotherSortOfAttentionThereAreNone) {
  for (const char* part : {"q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"})
    add(std::string("model.layers.0.self_attn.") + part + ".weight");
  add("model.layers.1.linear_attn.out_proj.weight");
  EXPECT_TRUE(found(LinearKind::qkv).empty());
  const auto out = found(LinearKind::attention_out);
  ASSERT_EQ(out.size(), 1u);
  EXPECT_EQ(out.at(0).modules, Modules{"model.layers.0.self_attn.o_proj"});
}

TEST_F(FileLinears, TheDecoderIsAsWideAsTheResidualStream) {
  for (const char* layer : {"0", "1", "2"})
    add(std::string("a.vision.layers.") + layer + ".mlp.down_proj.weight", 16, 16);
  add("model.language_model.layers.0.mlp.down_proj.weight", 8, 16);
  const auto down = found(LinearKind::mlp_out);
  ASSERT_EQ(down.size(), 1u);
  EXPECT_EQ(down.at(0).modules, Modules{"model.language_model.layers.0.mlp.down_proj"});
}

TEST_F(FileLinears, OfExpertsItIsTheFirstAndDenseComesBefore) {
  for (const char* expert : {"10", "2"}) {
    for (const char* part : {"w1", "w2", "w3"}) {
      add(std::string("model.layers.0.block_sparse_moe.experts.") + expert + "." + part +
          ".weight");
    }
  }
  for (const char* of : {"mlp.experts.0", "mlp.shared_experts"}) {
    for (const char* part : {"gate_proj", "up_proj", "down_proj"})
      add(std::string("model.layers.1.") + of + "." + part + ".weight");
  }
  const auto up = found(LinearKind::gate_up);
  EXPECT_EQ(up.at(0).modules, (Modules{"model.layers.0.block_sparse_moe.experts.2.w1",
                                       "model.layers.0.block_sparse_moe.experts.2.w3"}));
  EXPECT_EQ(up.at(1).modules, (Modules{"model.layers.1.mlp.shared_experts.gate_proj",
                                       "model.layers.1.mlp.shared_experts.up_proj"}));
}

}  // namespace
}  // namespace tp
