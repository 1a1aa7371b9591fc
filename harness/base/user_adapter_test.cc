#include "harness/base/user_adapter.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <filesystem>
#include <fstream>
#include <functional>

#include "harness/base/check.h"
#include "harness/base/safetensors.h"
#include "harness/base/temp_folder_testing.h"

namespace tp {
namespace {

namespace fs = std::filesystem;

constexpr const char* kBase = R"({"hidden_size": 64, "num_attention_heads": 4})";

class UserAdapterTest : public testing::Test {
 protected:
  void SetUp() override {
    fs::create_directory(base_);
    fs::create_directory(adapter_);
    write(base_ + "/config.json", kBase);
  }
  void TearDown() override { set_user_adapter("", ""); }
  static void write(const std::string& path, const std::string& text) {
    std::ofstream(path) << text;
  }
  // Modules of these names and ranks.
  void write_adapter(const std::vector<std::pair<std::string, int>>& modules,
                     const std::string& more = "") const {
    static constexpr std::array<float, 64> kData = {};
    std::vector<StoredTensor> stored;
    std::string ranks, names;
    for (const auto& [name, rank] : modules) {
      const std::string begin = "base_model.model." + name + ".lora_";
      for (const bool a : {true, false}) {
        stored.push_back({.name = begin + (a ? "A.weight" : "B.weight"),
                          .dtype = "F32",
                          .shape = {a ? rank : 2, a ? 2 : rank},
                          .data = reinterpret_cast<const std::byte*>(kData.data()),
                          .bytes = std::size_t(rank) * 2 * 4});
      }
      const char* comma = names.empty() ? "" : ", ";
      names += fmt::format("{}\"{}\"", comma, name);
      ranks += fmt::format("{}\"{}\": {}", comma, name, rank);
    }
    write_safetensors(adapter_ + "/adapter_model.safetensors", stored);
    write(
        adapter_ + "/adapter_config.json",
        fmt::format(R"({{"peft_type": "LORA", "target_modules": [{}], "rank_pattern": {{{}}}{}}})",
                    names, ranks, more));
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
  const std::string base_ = folder_.at("base"), adapter_ = folder_.at("adapter");
};

TEST_F(UserAdapterTest, NoneUntilOneIsSet) {
  EXPECT_EQ(user_adapter(), nullptr);
  EXPECT_EQ(user_adapter_base(), nullptr);
}

TEST_F(UserAdapterTest, OpenedOnceWithItsBase) {
  write_adapter({{"model.layers.0.q_proj", 4}});
  const std::uint64_t before = user_adapter_version();
  set_user_adapter(adapter_, base_);
  EXPECT_NE(user_adapter_version(), before);
  const PeftAdapter* adapter = user_adapter();
  ASSERT_NE(adapter, nullptr);
  EXPECT_NE(adapter->find("model.layers.0.q_proj"), nullptr);
  EXPECT_EQ(user_adapter(), adapter);
  ASSERT_NE(user_adapter_base(), nullptr);
  EXPECT_EQ(user_adapter_base()->shape.num_heads, 4);
  EXPECT_EQ(user_adapter_base()->checkpoint, "");
  write(base_ + "/model.safetensors", "not looked at here");
  set_user_adapter(adapter_, base_);
  EXPECT_EQ(user_adapter_base()->checkpoint, base_);
  set_user_adapter("", "");
  EXPECT_EQ(user_adapter(), nullptr);
}

TEST_F(UserAdapterTest, SaysWhatItIs) {
  const auto text = [&] {
    set_user_adapter(adapter_, base_);
    return user_adapter_text();
  };
  write_adapter({{"model.layers.0.q_proj", 4}});
  EXPECT_EQ(text(), adapter_ + ": 1 module (q_proj), rank 4");
  write_adapter({{"0.v_proj", 2}, {"0.q_proj", 8}, {"1.q_proj", 4}}, R"(, "use_rslora": true)");
  EXPECT_EQ(text(), adapter_ + ": 3 modules (q_proj, v_proj), ranks 2 .. 8, rsLoRA");
  write_adapter({{"a", 1},
                 {"b", 1},
                 {"c", 1},
                 {"d", 1},
                 {"e", 1},
                 {"f", 1},
                 {"g", 1},
                 {"h", 1},
                 {"i", 1},
                 {"j", 1}});
  EXPECT_EQ(text(), adapter_ + ": 10 modules (a, b, c, d, e, f, g, h, 2 more), rank 1");
}

TEST_F(UserAdapterTest, WhatCannotBeOpenedIsRefusedEveryTime) {
  const auto said = [&](const std::string& adapter, const std::string& base) {
    set_user_adapter(adapter, base);
    const std::string first = refusal([] { user_adapter(); });
    EXPECT_EQ(refusal([] { user_adapter_base(); }), first);
    return first;
  };
  EXPECT_EQ(said(adapter_, base_), adapter_ + ": there is no adapter_config.json");
  write_adapter({{"q_proj", 4}});
  EXPECT_EQ(said(adapter_, "MiniMax-M2.5"),
            "MiniMax-M2.5 is no directory with the config.json of the adapter's base");
  EXPECT_NE(said(adapter_, adapter_).find("has no config.json"), std::string::npos);
  EXPECT_EQ(said(adapter_, base_), "");
  write(base_ + "/config.json", R"({"hidden_size": 64, "num_attention_heads": 4,
                                    "quantization_config": {"quant_method": "awq", "bits": 4}})");
  EXPECT_NE(said(adapter_, base_).find("quant_method=\"awq\""), std::string::npos);
}

}  // namespace
}  // namespace tp
