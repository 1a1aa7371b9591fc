#include "harness/base/checkpoint.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <filesystem>
#include <fstream>

#include "harness/base/check.h"
#include "harness/base/temp_folder_testing.h"

namespace tp {
namespace {

namespace fs = std::filesystem;

class CheckpointTest : public testing::Test {
 protected:
  std::string at(const std::string& name) const { return folder_.at(name); }

  // A file of bf16 tensors of shape [2, 2] with these names.
  std::string put(const std::string& file, const std::vector<std::string>& names) const {
    std::vector<StoredTensor> tensors;
    for (const std::string& name : names) {
      tensors.push_back(
          {.name = name, .dtype = "BF16", .shape = {2, 2}, .data = bytes_.data(), .bytes = 8});
    }
    write_safetensors(at(file), tensors);
    return at(file);
  }
  void put_index(const std::string& text) const {
    std::ofstream(at("model.safetensors.index.json")) << text;
  }
  template <typename... T>
  static std::string refusal(const T&... arguments) {
    try {
      const Checkpoint checkpoint(arguments...);
    } catch (const BadInput& e) {
      return e.what();
    }
    return "";
  }

  TempFolder folder_;
  std::array<std::byte, 8> bytes_ = {};
};

TEST_F(CheckpointTest, IsOneFile) {
  const std::string path = put("model.safetensors", {"a", "b"});
  const Checkpoint checkpoint(path);
  EXPECT_EQ(checkpoint.path(), path);
  EXPECT_EQ(checkpoint.files().size(), 1u);
  ASSERT_NE(checkpoint.find("b"), nullptr);
  EXPECT_EQ(checkpoint.find("b")->name, "b");
  EXPECT_EQ(checkpoint.find("c"), nullptr);
  EXPECT_EQ(checkpoint.path_of(checkpoint.at("a")), path);
}

TEST_F(CheckpointTest, IsEverySafetensorsFileOfAFolder) {
  put("b.safetensors", {"b"});
  put("a.safetensors", {"a"});
  put("c.safetensors.tmp", {"a"});
  std::ofstream(at("config.json")) << "{}";
  const Checkpoint checkpoint(folder_.path().string());
  ASSERT_EQ(checkpoint.files().size(), 2u);
  EXPECT_EQ(checkpoint.files()[0].path(), at("a.safetensors"));
  EXPECT_EQ(checkpoint.files()[1].path(), at("b.safetensors"));
  EXPECT_EQ(checkpoint.path_of(checkpoint.at("b")), at("b.safetensors"));
}

TEST_F(CheckpointTest, IsTheFilesOfAnIndexAndNoOthers) {
  put("model-00001-of-00002.safetensors", {"a", "a.unknown_to_the_index"});
  put("model-00002-of-00002.safetensors", {"b"});
  put("consolidated.safetensors", {"a", "b"});  // would be twice
  put_index(R"({"metadata": {"total_size": 16},
                "weight_map": {"b": "model-00002-of-00002.safetensors",
                               "a": "model-00001-of-00002.safetensors"}})");
  const Checkpoint checkpoint(folder_.path().string());
  EXPECT_EQ(checkpoint.files().size(), 2u);
  EXPECT_EQ(checkpoint.path_of(checkpoint.at("a")), at("model-00001-of-00002.safetensors"));
  EXPECT_EQ(checkpoint.path_of(checkpoint.at("b")), at("model-00002-of-00002.safetensors"));
  EXPECT_NE(checkpoint.find("a.unknown_to_the_index"), nullptr);
}

TEST_F(CheckpointTest, IsAListOfFiles) {
  const std::string a = put("a.safetensors", {"a"}), b = put("b", {"b"});
  const Checkpoint checkpoint(std::vector<std::string>{b, a});
  EXPECT_EQ(checkpoint.path(), b + " and 1 more");
  EXPECT_EQ(checkpoint.files()[0].path(), b);
  EXPECT_EQ(checkpoint.path_of(checkpoint.at("a")), a);
  EXPECT_EQ(Checkpoint(std::vector<std::string>{b}).path(), b);
}

TEST_F(CheckpointTest, WhatIsNoneIsRefused) {
  EXPECT_EQ(refusal(at("none")), at("none") + ": No such file or directory");
  EXPECT_EQ(refusal(folder_.path().string()),
            folder_.path().string() +
                ": there is neither model.safetensors.index.json nor any *.safetensors in it");
  EXPECT_EQ(refusal(std::vector<std::string>{}), "a checkpoint of no files");
  std::ofstream(at("half.safetensors")) << "{}";
  EXPECT_EQ(refusal(folder_.path().string()),
            at("half.safetensors") +
                ": it has 2 bytes, and a safetensors file begins with 8 of header length");
}

TEST_F(CheckpointTest, ATensorInTwoFilesIsRefused) {
  const std::string a = put("a.safetensors", {"w", "a"}), b = put("b.safetensors", {"b", "w"});
  const std::string sentence = fmt::format("tensor \"w\" is in two files, {} and {}", a, b);
  EXPECT_EQ(refusal(folder_.path().string()), sentence);
  EXPECT_EQ(refusal(std::vector<std::string>{a, b}), sentence);
  put_index(R"({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}})");
  EXPECT_EQ(refusal(folder_.path().string()), sentence);
}

TEST_F(CheckpointTest, AnIndexThatIsWrongIsRefused) {
  put("a.safetensors", {"a"});
  put("b.safetensors", {"b"});
  const std::string index = at("model.safetensors.index.json");
  const struct {
    std::string text;
    std::string sentence;
  } table[] = {
      {"", "line 1, column 1: the text ends in the middle of a value"},
      {"[]", "it has no weight_map"},
      {"{}", "it has no weight_map"},
      {R"({"weight_map": ["a"]})", "weight_map is an array, not an object"},
      {R"({"weight_map": {}})", "weight_map is empty"},
      {R"({"weight_map": {"a": 1}})",
       R"(weight_map has 1 for "a", not the name of a file beside it)"},
      {R"({"weight_map": {"a": ""}})",
       R"(weight_map has "" for "a", not the name of a file beside it)"},
      {R"({"weight_map": {"a": ".."}})",
       R"(weight_map has ".." for "a", not the name of a file beside it)"},
      {R"({"weight_map": {"a": "../a.safetensors"}})",
       R"(weight_map has "../a.safetensors" for "a", not the name of a file beside it)"},
      {R"({"weight_map": {"a": "a.safetensors\u0000"}})",
       R"(weight_map has "a.safetensors?" for "a", not the name of a file beside it)"},
      {R"({"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}})",
       R"(the key "a" is given twice)"},
      {R"({"weight_map": {"a": "c.safetensors"}})",
       "it names the file " + at("c.safetensors") + ", and there is none"},
      {R"({"weight_map": {"c": "a.safetensors"}})",
       R"(it says that tensor "c" is in a.safetensors, and no file has it)"},
      {R"({"weight_map": {"a": "b.safetensors", "b": "b.safetensors"}})",
       R"(it says that tensor "a" is in b.safetensors, and no file has it)"},
      {R"({"weight_map": {"a": "b.safetensors", "b": "a.safetensors"}})",
       R"(it says that tensor "a" is in b.safetensors, and a.safetensors has it)"},
  };
  for (const auto& row : table) {
    put_index(row.text);
    EXPECT_EQ(refusal(folder_.path().string()), index + ": " + row.sentence) << row.text;
  }
}

TEST_F(CheckpointTest, ATensorThatIsNotThereIsRefusedWithWhatMayBeMeant) {
  const std::string path = put("f", {"model.layers.0.self_attn.q_proj.weight",
                                     "model.layers.0.self_attn.k_proj.weight", "lm_head.weight"});
  const Checkpoint checkpoint(path);
  const auto sentence = [&](const std::string& name) -> std::string {
    try {
      checkpoint.at(name);
    } catch (const BadInput& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(sentence("lm_heat.weight"),
            path + R"(: there is no tensor "lm_heat.weight" (did you mean "lm_head.weight"?))");
  EXPECT_EQ(sentence("q_proj.weight"), path +
                                           R"(: there is no tensor "q_proj.weight" (did you mean )"
                                           R"("model.layers.0.self_attn.q_proj.weight"?))");
  EXPECT_EQ(sentence("something else"),
            path + R"(: there is no tensor "something else" (it has 3 others))");
}

TEST_F(CheckpointTest, TypeAndShapeAreChecked) {
  const std::string path = put("f", {"w"});
  const Checkpoint checkpoint(path);
  EXPECT_EQ(&checkpoint.at("w", DType::bf16, {2, 2}), checkpoint.find("w"));
  const auto sentence = [&](DType type, const std::vector<std::int64_t>& shape) -> std::string {
    try {
      checkpoint.at("w", type, shape);
    } catch (const BadInput& e) {
      return e.what();
    }
    return "";
  };
  EXPECT_EQ(sentence(DType::f16, {2, 2}), path + R"(: tensor "w" is BF16 [2, 2], not F16 [2, 2])");
  EXPECT_EQ(sentence(DType::e4m3, {2, 2}),
            path + R"(: tensor "w" is BF16 [2, 2], not F8_E4M3 [2, 2])");
  EXPECT_EQ(sentence(DType::bf16, {4}), path + R"(: tensor "w" is BF16 [2, 2], not BF16 [4])");
  EXPECT_EQ(sentence(DType::bf16, {}), path + R"(: tensor "w" is BF16 [2, 2], not BF16 [])");
}

TEST_F(CheckpointTest, AScalarMayHaveOneOrTwoDimensions) {
  const auto scale = [&](const std::string& name, const std::vector<std::int64_t>& shape) {
    return StoredTensor{
        .name = name, .dtype = "F32", .shape = shape, .data = bytes_.data(), .bytes = 4};
  };
  write_safetensors(
      at("f"), {scale("s0", {}), scale("s1", {1}), scale("s2", {1, 1}), scale("s3", {1, 1, 1})});
  const Checkpoint checkpoint(at("f"));
  for (const char* name : {"s0", "s1", "s2"}) {
    for (const std::vector<std::int64_t>& shape :
         {std::vector<std::int64_t>{}, std::vector<std::int64_t>{1},
          std::vector<std::int64_t>{1, 1}}) {
      EXPECT_NO_THROW(checkpoint.at(name, DType::f32, shape)) << name;
      EXPECT_THROW(checkpoint.at("s3", DType::f32, shape), BadInput);
    }
  }
}

TEST_F(CheckpointTest, AFileThatChangesIsSeen) {
  put("a.safetensors", {"a"});
  const std::string path = put("b.safetensors", {"b"});
  const Checkpoint checkpoint(folder_.path().string());
  EXPECT_NO_THROW(checkpoint.check_unchanged());
  std::ofstream(path, std::ios::app) << "x";
  EXPECT_THROW(checkpoint.check_unchanged(), BadInput);
}

}  // namespace
}  // namespace tp
