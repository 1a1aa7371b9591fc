#include "harness/base/user_checkpoint.h"

#include <gtest/gtest.h>

#include <array>
#include <filesystem>
#include <fstream>
#include <functional>

#include "harness/base/check.h"
#include "harness/base/safetensors.h"
#include "harness/base/temp_folder_testing.h"
#include "harness/base/text.h"

namespace tp {
namespace {

namespace fs = std::filesystem;

constexpr const char* kConfig = R"({"hidden_size": 64, "num_attention_heads": 4,
    "quantization_config": {"quant_method": "fp8", "activation_scheme": "static"}})";

class UserCheckpointTest : public testing::Test {
 protected:
  void TearDown() override { set_user_checkpoint(""); }
  void write(const char* name, const std::string& text) const {
    std::ofstream(folder_.at(name)) << text;
  }
  void write_tensors(const char* name, const std::vector<std::string>& tensors) const {
    static constexpr std::array<float, 2> kData = {1, 2};
    std::vector<StoredTensor> stored;
    for (const std::string& tensor : tensors) {
      stored.push_back({.name = tensor,
                        .dtype = "F32",
                        .shape = {2},
                        .data = reinterpret_cast<const std::byte*>(kData.data()),
                        .bytes = sizeof(kData)});
    }
    write_safetensors(folder_.at(name), stored);
  }
  static std::string refusal(const std::function<void()>& f) {
    try {
      f();
      return "";
    } catch (const BadInput& e) {
      return e.what();
    }
  }

  const TempFolder folder_;
};

TEST_F(UserCheckpointTest, NoneUntilOneIsSet) {
  EXPECT_EQ(user_checkpoint(), nullptr);
  EXPECT_EQ(user_model(), nullptr);
}

TEST_F(UserCheckpointTest, OpenedOnceWithItsModel) {
  write("config.json", kConfig);
  write_tensors("a.safetensors", {"q.weight", "k.weight"});
  write_tensors("b.safetensors", {"v.weight"});
  set_user_checkpoint(folder_.path().string());
  const Checkpoint* checkpoint = user_checkpoint();
  ASSERT_NE(checkpoint, nullptr);
  EXPECT_NE(checkpoint->find("v.weight"), nullptr);
  EXPECT_EQ(checkpoint->find("o.weight"), nullptr);
  EXPECT_EQ(user_checkpoint(), checkpoint);
  ASSERT_NE(user_model(), nullptr);
  EXPECT_EQ(user_model()->shape.num_heads, 4);
  EXPECT_EQ(user_model()->quantization.format.scheme, Scheme::fp8_tensor);
  EXPECT_EQ(
      user_checkpoint_text(),
      folder_.path().string() + ": 2 files, 3 tensors, fp8_tensor (native, activations fixed)");
  set_user_checkpoint("");
  EXPECT_EQ(user_checkpoint(), nullptr);
}

TEST_F(UserCheckpointTest, WhatCannotBeOpenedIsRefusedEveryTime) {
  const auto said = [&](const std::string& directory) {
    set_user_checkpoint(directory);
    const std::string first = refusal([] { user_checkpoint(); });
    EXPECT_EQ(refusal([] { user_model(); }), first);
    return first;
  };
  EXPECT_NE(said(folder_.at("nowhere")).find("is no directory"), std::string::npos);
  EXPECT_NE(said("MiniMax-M2.5").find("is no directory"), std::string::npos);
  EXPECT_NE(said(folder_.path().string()).find("config.json"), std::string::npos);
  write("config.json", kConfig);
  EXPECT_NE(said(folder_.path().string()).find("has no safetensors"), std::string::npos);
  write("a.safetensors", "not at all");
  EXPECT_NE(said(folder_.path().string()).find("a.safetensors"), std::string::npos);
  write_tensors("a.safetensors", {"q.weight"});
  EXPECT_EQ(said(folder_.path().string()), "");
  write("config.json", R"({"hidden_size": 64, "num_attention_heads": 4,
                           "quantization_config": {"quant_method": "awq", "bits": 4}})");
  EXPECT_NE(said(folder_.path().string()).find("quant_method=\"awq\""), std::string::npos);
}

TEST(Text, ShellQuoted) {
  EXPECT_EQ(shell_quoted("models/Qwen3-0.6B"), "models/Qwen3-0.6B");
  EXPECT_EQ(shell_quoted("my models"), "'my models'");
  EXPECT_EQ(shell_quoted("it's"), "'it'\\''s'");
  EXPECT_EQ(shell_quoted("$HOME"), "'$HOME'");
  EXPECT_EQ(shell_quoted("~"), "'~'");
  EXPECT_EQ(shell_quoted(""), "''");
}

}  // namespace
}  // namespace tp
