#include "harness/base/peft.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <fstream>

#include "harness/base/check.h"
#include "harness/base/peft_pattern.h"
#include "harness/base/temp_folder_testing.h"

namespace tp {
namespace {

constexpr const char* kQ = "model.layers.0.self_attn.q_proj";
constexpr const char* kUp = "model.layers.1.mlp.up_proj";

// An object with the members that every config has, and `more` of them.
std::string config_text(const std::string& more = "") {
  return R"({"peft_type": "LORA", "target_modules": ["q_proj"])" +
         (more.empty() ? "" : ", " + more) + "}";
}
PeftConfig config_of(const std::string& text) { return parse_peft_config(text, "f"); }

template <typename F>
std::string refusal(const F& f) {
  try {
    f();
  } catch (const BadInput& e) {
    return e.what();
  }
  return "";
}

// Configs ---------------------------------------------------------------------------------------

TEST(PeftConfig, EveryKeyIsRead) {
  const PeftConfig config = config_of(R"({
      "alpha_pattern": {"q_proj": 7.5, "^model.layers.0.mlp.up_proj": -1},
      "base_model_name_or_path": "org/base", "bias": "none", "exclude_modules": ["v_proj"],
      "fan_in_fan_out": false, "init_lora_weights": "pissa", "layer_replication": null,
      "layers_pattern": ["layers", "h"], "layers_to_transform": [0, 3], "lora_alpha": 16,
      "lora_bias": true, "lora_dropout": 0.1, "modules_to_save": null, "peft_type": "LORA", "r": 4,
      "rank_pattern": {"up_proj": 2, "model.layers.0.self_attn.q_proj": 64},
      "target_modules": ["q_proj", "mlp.up_proj"], "task_type": "CAUSAL_LM", "use_dora": false,
      "use_rslora": true})");
  EXPECT_EQ(config.rank, 4);
  EXPECT_EQ(config.alpha, 16);
  EXPECT_TRUE(config.use_rslora);
  EXPECT_EQ(config.target_modules, (std::vector<std::string>{"q_proj", "mlp.up_proj"}));
  EXPECT_EQ(config.target_pattern, "");
  EXPECT_EQ(config.exclude_modules, std::vector<std::string>{"v_proj"});
  const std::vector<std::pair<std::string, std::int64_t>> ranks = {
      {"up_proj", 2}, {"model.layers.0.self_attn.q_proj", 64}};
  EXPECT_EQ(config.rank_pattern, ranks);
  const std::vector<std::pair<std::string, double>> alphas = {{"q_proj", 7.5},
                                                              {"^model.layers.0.mlp.up_proj", -1}};
  EXPECT_EQ(config.alpha_pattern, alphas);
  EXPECT_EQ(config.layers_to_transform, (std::vector<std::int64_t>{0, 3}));
  EXPECT_EQ(config.layers_pattern, (std::vector<std::string>{"layers", "h"}));
  EXPECT_TRUE(config.lora_bias);
  EXPECT_EQ(config.base_model, "org/base");
}

TEST(PeftConfig, WhatIsLeftOutIsAsPeftHasIt) {
  const PeftConfig config = config_of(config_text());
  EXPECT_EQ(config.rank, 8);
  EXPECT_EQ(config.alpha, 8);
  EXPECT_FALSE(config.use_rslora);
  EXPECT_FALSE(config.lora_bias);
  EXPECT_TRUE(config.rank_pattern.empty());
  EXPECT_TRUE(config.layers_to_transform.empty());
  const PeftConfig nulls = config_of(config_text(
      R"("rank_pattern": null, "alpha_pattern": {}, "layers_to_transform": null,
         "layers_pattern": null, "exclude_modules": null, "base_model_name_or_path": null)"));
  EXPECT_TRUE(is_target(nulls, kQ));
}

TEST(PeftConfig, WhatIsWrongIsRefusedInOneSentence) {
  const struct {
    std::string text;
    std::string sentence;
  } table[] = {
      {"", "line 1, column 1: the text ends in the middle of a value"},
      {R"({"peft_type": "LORA", )", "line 1, column 23: the text ends in the middle of a value"},
      {"[]", "it holds an array, not an object"},
      {"{}", R"(peft_type is left out (known is "LORA"))"},
      {R"({"peft_type": "IA3"})", R"(peft_type="IA3" is not known (known is "LORA"))"},
      {R"({"peft_type": 1})", "peft_type is 1, not a text"},
      {R"({"peft_type": "LORA"})", "target_modules is left out or empty"},
      {R"({"peft_type": "LORA", "target_modules": []})", "target_modules is left out or empty"},
      {R"({"peft_type": "LORA", "target_modules": ""})", "target_modules is left out or empty"},
      {R"({"peft_type": "LORA", "target_modules": 3})",
       "target_modules is 3, neither a list of names nor a pattern"},
      {R"({"peft_type": "LORA", "target_modules": ["q", 3]})", "target_modules has 3, not a text"},
      {R"({"peft_type": "LORA", "target_modules": ["q", ""]})", "target_modules has an empty name"},
      {R"({"peft_type": "LORA", "target_modules": "(q"})",
       R"(target_modules: the pattern "(q" is no regular expression)"},
      {config_text(R"("exclude_modules": "[a")"),
       R"(exclude_modules: the pattern "[a" has brackets without an end)"},
      {config_text(R"("r": 0)"), "r=0 is not a rank in 1..65536"},
      {config_text(R"("r": -8)"), "r=-8 is not a rank in 1..65536"},
      {config_text(R"("r": 65537)"), "r=65537 is not a rank in 1..65536"},
      {config_text(R"("r": "8")"), R"(r is "8", not a whole number)"},
      {config_text(R"("r": 8.0)"), "r is 8.0, not a whole number"},
      {config_text(R"("r": null)"), "r is null, not a whole number"},
      {config_text(R"("lora_alpha": "16")"), R"(lora_alpha is "16", not a number)"},
      {config_text(R"("lora_alpha": NaN)"), "lora_alpha is null, NaN or Infinity, not a number"},
      {config_text(R"("lora_alpha": -Infinity)"),
       "lora_alpha is null, NaN or Infinity, not a number"},
      {config_text(R"("lora_alpha": true)"), "lora_alpha is true, not a number"},
      {config_text(R"("lora_alpha": 1e30)"), "lora_alpha=1e+30 is not within -1e+09 .. 1e+09"},
      {config_text(R"("use_rslora": 1)"), "use_rslora is 1, neither true nor false"},
      {config_text(R"("lora_bias": "none")"), R"(lora_bias is "none", neither true nor false)"},
      {config_text(R"("rank_pattern": [4])"), "rank_pattern is an array, not an object"},
      {config_text(R"("rank_pattern": {"q": 0})"),
       R"(rank_pattern: "q"=0 is not a rank in 1..65536)"},
      {config_text(R"("rank_pattern": {"q{9}": 1})"),
       R"(rank_pattern: the pattern "q{9}" has {}, which is not known here)"},
      {config_text(R"("alpha_pattern": {"q": NaN})"),
       R"(alpha_pattern: "q" is null, NaN or Infinity, not a number)"},
      {config_text(R"("alpha_pattern": {"*": 1})"),
       R"(alpha_pattern: the pattern "*" is no regular expression)"},
      {config_text(R"("layers_to_transform": "0")"),
       R"(layers_to_transform is "0", neither a number nor a list of them)"},
      {config_text(R"("layers_to_transform": [0, 1.5])"),
       "layers_to_transform has 1.5, not a layer's number"},
      {config_text(R"("layers_to_transform": -1)"),
       "layers_to_transform has -1, not a layer's number"},
      {config_text(R"("layers_pattern": "layers")"),
       "layers_pattern is of no use without layers_to_transform"},
      {config_text(R"("layers_to_transform": 0, "layers_pattern": ["a|b"])"),
       R"(layers_pattern has "a|b", which is not known (known are names of a list of layers))"},
      {config_text(R"("layers_to_transform": 0, "layers_pattern": 1)"),
       "layers_pattern is 1, not a list"},
      {R"({"peft_type": "LORA", "target_modules": "all-linear", "layers_to_transform": 0})",
       "layers_to_transform goes with a list of target_modules only, not with a pattern"},
      {config_text(R"("bias": "lora_only")"),
       R"(bias="lora_only" trains biases of the base, which is not known (known is "none"))"},
      {config_text(R"("use_dora": true)"), "use_dora=true asks for DoRA, which is not known"},
      {config_text(R"("modules_to_save": ["lm_head"])"),
       "modules_to_save=an array asks for modules that are trained whole, which is not known"},
      {config_text(R"("fan_in_fan_out": true)"),
       "fan_in_fan_out=true asks for weights stored as [in, out], which is not known"},
      {config_text(R"("layer_replication": [[0, 4], [2, 5]])"),
       "layer_replication=an array asks for layers that are there twice, which is not known"},
      {config_text(R"("target_parameters": ["experts.gate_up_proj"])"),
       "target_parameters=an array asks for LoRA of parameters that are no module, which is not "
       "known"},
      {config_text(R"("r": 4, "r": 8)"), R"(the key "r" is given twice)"},
  };
  for (const auto& row : table) {
    EXPECT_EQ(refusal([&] { config_of(row.text); }), "f: " + row.sentence) << row.text;
  }
}

// Which modules, and their numbers --------------------------------------------------------------

TEST(PeftTargets, AreNamesOrEndsOfNamesAfterADot) {
  const PeftConfig config =
      config_of(R"({"peft_type": "LORA", "target_modules": ["q_proj", "mlp.up_proj", "lm_head"]})");
  EXPECT_TRUE(is_target(config, kQ));
  EXPECT_TRUE(is_target(config, kUp));
  EXPECT_TRUE(is_target(config, "lm_head"));
  EXPECT_TRUE(is_target(config, "q_proj"));
  EXPECT_FALSE(is_target(config, "model.layers.0.self_attn.qq_proj"));
  EXPECT_FALSE(is_target(config, "model.layers.0.self_attn.q_proj.0"));
  EXPECT_FALSE(is_target(config, "model.layers.0.experts.up_proj"));
}

TEST(PeftTargets, MayBeOnePatternThatAllOfANameMatches) {
  const PeftConfig config =
      config_of(R"({"peft_type": "LORA", "target_modules": ".*\\.(q|up)_proj"})");
  EXPECT_TRUE(is_target(config, kQ));
  EXPECT_TRUE(is_target(config, kUp));
  EXPECT_FALSE(is_target(config, "q_proj"));
  EXPECT_FALSE(is_target(config, std::string(kQ) + ".x"));
  const PeftConfig ends = config_of(R"({"peft_type": "LORA", "target_modules": "q_proj"})");
  EXPECT_FALSE(is_target(ends, kQ));
  EXPECT_TRUE(is_target(ends, "q_proj"));
}

TEST(PeftTargets, MayBeAllLinears) {
  const PeftConfig config = config_of(
      R"({"peft_type": "LORA", "target_modules": "All-Linear", "exclude_modules": ["up_proj"]})");
  EXPECT_TRUE(is_target(config, kQ));
  EXPECT_FALSE(is_target(config, kUp));
}

TEST(PeftTargets, AreNotThoseExcluded) {
  const auto config = [](const std::string& excluded) {
    return config_of(R"({"peft_type": "LORA", "target_modules": ["q_proj", "up_proj"],
                         "exclude_modules": )" +
                     excluded + "}");
  };
  EXPECT_FALSE(is_target(config(R"(["q_proj"])"), kQ));
  EXPECT_TRUE(is_target(config(R"(["q_proj"])"), kUp));
  EXPECT_FALSE(is_target(config(R"(["model.layers.1.mlp.up_proj"])"), kUp));
  EXPECT_FALSE(is_target(config(R"(".*layers\\.1.*")"), kUp));
  EXPECT_TRUE(is_target(config(R"("layers\\.1")"), kUp));  // not all of it
}

TEST(PeftTargets, AreThoseOfSomeLayers) {
  const auto targets = [](const std::string& more, const std::string& module) {
    return is_target(config_of(config_text(more)), module);
  };
  EXPECT_TRUE(targets(R"("layers_to_transform": [0, 2])", kQ));
  EXPECT_FALSE(targets(R"("layers_to_transform": [1])", kQ));
  EXPECT_TRUE(targets(R"("layers_to_transform": 0)", kQ));
  EXPECT_TRUE(targets(R"("layers_to_transform": [])", "model.layers.9.q_proj"));
  EXPECT_TRUE(
      targets(R"("layers_to_transform": [], "layers_pattern": "h")", "model.layers.9.q_proj"));
  EXPECT_TRUE(targets(R"("layers_to_transform": [0], "layers_pattern": "")", kQ));
  // The first number is the layer's, and not an expert's.
  const std::string expert = "model.layers.7.experts.3.q_proj";
  EXPECT_TRUE(targets(R"("layers_to_transform": 7)", expert));
  EXPECT_FALSE(targets(R"("layers_to_transform": 3)", expert));
  EXPECT_TRUE(targets(R"("layers_to_transform": 3, "layers_pattern": "experts")", expert));
  EXPECT_TRUE(targets(R"("layers_to_transform": 7, "layers_pattern": ["h", "layers"])", expert));
  EXPECT_FALSE(targets(R"("layers_to_transform": 7, "layers_pattern": "ayers")", expert));
  EXPECT_TRUE(targets(R"("layers_to_transform": 7, "layers_pattern": "model.layers")", expert));
  // Only with a pattern may the list of layers be the first part of a name; there is no layer in
  // the others.
  EXPECT_FALSE(targets(R"("layers_to_transform": 0)", "layers.0.q_proj"));
  EXPECT_TRUE(
      targets(R"("layers_to_transform": 0, "layers_pattern": "layers")", "layers.0.q_proj"));
  EXPECT_FALSE(targets(R"("layers_to_transform": 0)", "model.head.q_proj"));
  EXPECT_FALSE(targets(R"("layers_to_transform": 0)", "model.layers.99999999999999999999.q_proj"));
  // A whole name counts in any layer.
  EXPECT_TRUE(is_target(config_of(R"({"peft_type": "LORA", "layers_to_transform": 5,
                                      "target_modules": ["model.layers.0.self_attn.q_proj"]})"),
                        kQ));
}

TEST(PeftScale, RankAndAlphaAreOfTheFirstPatternThatMatches) {
  const PeftConfig config = config_of(config_text(
      R"("r": 8, "lora_alpha": 16, "rank_pattern": {"layers.0.self_attn.q_proj": 4, "q_proj": 2},
         "alpha_pattern": {"^up_proj": 1, "layers\\.[1-9]\\.mlp\\.(up|down)_proj": 3})"));
  EXPECT_EQ(lora_scale(config, kQ).rank, 4);
  EXPECT_EQ(lora_scale(config, kQ).alpha, 16);
  EXPECT_EQ(lora_scale(config, "model.layers.1.self_attn.q_proj").rank, 2);
  EXPECT_EQ(lora_scale(config, "xmodel.layers.1.self_attn.qq_proj").rank, 8);
  EXPECT_EQ(lora_scale(config, kUp).rank, 8);
  EXPECT_EQ(lora_scale(config, kUp).alpha, 3);
  EXPECT_EQ(lora_scale(config, "up_proj").alpha, 1);
  EXPECT_EQ(lora_scale(config, "mlp.up_proj").alpha, 16);
}

TEST(PeftPattern, MatchesAsPythonDoes) {
  EXPECT_TRUE(matches_whole("model.layers.0", "model.layers.0"));
  EXPECT_TRUE(matches_whole("model.layers.0", "modelxlayersx0"));
  EXPECT_FALSE(matches_whole(R"(model\.layers)", "modelxlayers"));
  EXPECT_TRUE(matches_whole(R"(^model\.layers$)", "model.layers"));
  EXPECT_FALSE(matches_whole("model", "model.layers"));
  EXPECT_TRUE(matches_whole("a|a.b", "a.b"));
  EXPECT_FALSE(matches_whole("a|a.b", "a.c"));
  EXPECT_TRUE(matches_whole(R"(^model(?=\.)(?!.*visual).*\.(?:q|k)_proj$)", "model.text.q_proj"));
  EXPECT_FALSE(
      matches_whole(R"(^model(?=\.)(?!.*visual).*\.(?:q|k)_proj$)", "model.visual.q_proj"));
  EXPECT_TRUE(matches_end("q_proj|k_proj", "model.k_proj"));
  EXPECT_FALSE(matches_end("q_proj|k_proj", "model.qk_proj"));
  EXPECT_TRUE(matches_end(R"(layers\.\d+\.q)", "model.layers.12.q"));
  EXPECT_FALSE(matches_end("q_proj", "model.qq_proj"));
  EXPECT_TRUE(matches_end("q.proj", "model.q_proj"));
  EXPECT_TRUE(matches_end("^model.q", "model.q"));
  EXPECT_FALSE(matches_end("^q", "model.q"));
  EXPECT_FALSE(matches_end("longer.than.it", "it"));
  EXPECT_FALSE(matches_end(".*", std::string(kMaxModuleName + 1, 'a')));
}

TEST(PeftPattern, MoreThanAreKeptAreMatchedAllTheSame) {
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 5000; ++i) {
      const std::string name = fmt::format("model.layers.{}.q_proj", i);
      EXPECT_TRUE(matches_end(name, name));
      if (i >= 1200) continue;
      EXPECT_TRUE(matches_end(fmt::format("{}\\.(q|k)_proj", i), name));
    }
  }
}

TEST(PeftPattern, WhatPythonMeansOtherwiseOrTakesWithoutEndIsRefused) {
  for (const char* fine : {"q_proj", ".*", "", "a|b", R"(\.\d\w\s\b[a-z_.\]\\^-]+?)", "(a(?:b)*)?",
                           "(?=a)(?!b).*", "(?=.*a)(?!.*b).*", R"(.*a(?=\.b).*)", "[^0-9]"}) {
    EXPECT_EQ(not_understood(fine), std::nullopt) << fine;
  }
  const struct {
    std::string pattern;
    std::string why;
  } table[] = {
      {"(a", "is no regular expression"},
      {"a)", "is no regular expression"},
      {"(*a)", "is no regular expression"},
      {"[b-a]", "is no regular expression"},
      {"[a", "has brackets without an end"},
      {"a\\", "ends in a backslash"},
      {R"((a)\1)", "has a back reference, which is not known here"},
      {R"(\99999999999999999999)", "has a back reference, which is not known here"},
      {"a{1,999}", "has {}, which is not known here"},
      {R"(a\Z)", R"(has \Z, which is not known here)"},
      {R"([\b])", R"(has \b, which is not known here)"},
      {"(?P<idx>a)", "has a group that is neither (?:...), (?=...) nor (?!...)"},
      {"(?<!a)b", "has a group that is neither (?:...), (?=...) nor (?!...)"},
      {"(?i)a", "has a group that is neither (?:...), (?=...) nor (?!...)"},
      {"(?=a(?=b))", "has a look-ahead in another, which is not known here"},
      {"(?=[)](?=b))", "has a look-ahead in another, which is not known here"},
      {R"((?=\)(?:(?=b))))", "has a look-ahead in another, which is not known here"},
      {"a*(?=.*b)",
       "has a repetition in a look-ahead that is behind a repetition or in one, which is not known "
       "here"},
      {"(a(?=.*b))*",
       "has a repetition in a look-ahead that is behind a repetition or in one, which is not known "
       "here"},
      {"((a(?=b+)))?",
       "has a repetition in a look-ahead that is behind a repetition or in one, which is not known "
       "here"},
      {"(?!^a)", "has ^ in a look-ahead, which is not known here"},
      {"a*+", "has two repetitions in a row, which are not known here"},
      {"a**", "has two repetitions in a row, which are not known here"},
      {"[]a]", "has ] at the beginning of brackets, which is not known here"},
      {"[[:alpha:]]", "has brackets in brackets, which are not known here"},
      {std::string(1001, 'a'), "has 1001 characters, and 1000 are known here"},
      {std::string(500, '(') + std::string(500, ')'), ""},
  };
  for (const auto& row : table)
    EXPECT_EQ(not_understood(row.pattern).value_or(""), row.why) << row.pattern.substr(0, 80);
}

// Folders ---------------------------------------------------------------------------------------

class PeftAdapterTest : public testing::Test {
 protected:
  struct Tensor {
    std::string name;
    std::vector<std::int64_t> shape;
    std::string dtype = "F32";
  };

  void write_config(const std::string& text) const {
    std::ofstream(folder_.at("adapter_config.json")) << text;
  }
  void write_tensors(const std::vector<Tensor>& tensors) const {
    static const std::vector<float> kZeros(4096);
    std::vector<StoredTensor> stored;
    for (const Tensor& t : tensors) {
      StoredTensor s{.name = t.name,
                     .dtype = t.dtype,
                     .shape = t.shape,
                     .data = reinterpret_cast<const std::byte*>(kZeros.data())};
      s.bytes = std::size_t(s.elements()) * (t.dtype == "F32" ? 4 : t.dtype == "F8_E4M3" ? 1 : 2);
      stored.push_back(s);
    }
    write_safetensors(file(), stored);
  }
  static Tensor a(const std::string& module, std::int64_t rank, std::int64_t columns = 16) {
    return {"base_model.model." + module + ".lora_A.weight", {rank, columns}};
  }
  static Tensor b(const std::string& module, std::int64_t rank, std::int64_t rows = 32) {
    return {"base_model.model." + module + ".lora_B.weight", {rows, rank}};
  }
  static Tensor bias(const std::string& module, std::int64_t rows = 32) {
    return {"base_model.model." + module + ".lora_B.bias", {rows}};
  }
  std::string folder() const { return folder_.path().string(); }
  std::string file() const { return folder_.at("adapter_model.safetensors"); }
  std::string said() const {
    return refusal([&] { const PeftAdapter adapter(folder()); });
  }
  // What is said of these tensors, after the file's name.
  std::string said_of(const std::vector<Tensor>& tensors) const {
    write_tensors(tensors);
    const std::string all = said();
    return all.starts_with(file() + ": ") ? all.substr(file().size() + 2) : "of another: " + all;
  }

  const TempFolder folder_;
};

TEST_F(PeftAdapterTest, HasModulesByName) {
  write_config(R"({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"up_proj": 2},
                   "alpha_pattern": {"up_proj": 3}, "target_modules": ["q_proj", "up_proj"]})");
  Tensor half = b(kUp, 2);
  half.dtype = "BF16";
  write_tensors({half, a(kQ, 4), a(kUp, 2), b("model.layers.1.self_attn.q_proj", 4), b(kQ, 4, 64),
                 a("model.layers.1.self_attn.q_proj", 4)});
  const PeftAdapter adapter(folder());
  ASSERT_EQ(adapter.modules().size(), 3u);
  EXPECT_EQ(adapter.modules()[0].name, kQ);
  EXPECT_EQ(adapter.modules()[1].name, kUp);
  EXPECT_EQ(adapter.modules()[2].name, "model.layers.1.self_attn.q_proj");
  EXPECT_EQ(adapter.find("model.layers.2.self_attn.q_proj"), nullptr);
  EXPECT_EQ(adapter.find("z"), nullptr);
  const PeftModule* q = adapter.find(kQ);
  ASSERT_EQ(q, &adapter.modules()[0]);
  EXPECT_EQ(q->rank, 4);
  EXPECT_EQ(q->alpha, 8);
  EXPECT_EQ(q->a->name, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight");
  EXPECT_EQ(q->b->shape, (std::vector<std::int64_t>{64, 4}));
  EXPECT_EQ(q->bias, nullptr);
  EXPECT_EQ(adapter.find(kUp)->rank, 2);
  EXPECT_EQ(adapter.find(kUp)->alpha, 3);
  EXPECT_EQ(adapter.find(kUp)->b->type(), DType::bf16);
  EXPECT_EQ(adapter.max_rank(), 4);
  EXPECT_EQ(adapter.config().target_modules.size(), 2u);
  EXPECT_EQ(adapter.tensors().path(), file());
}

TEST_F(PeftAdapterTest, ACopyHasTheSameTensors) {
  write_config(config_text());
  write_tensors({a(kQ, 8), b(kQ, 8)});
  std::optional<PeftAdapter> first(folder());
  const PeftAdapter second = *first;
  const StoredTensor* tensor = first->find(kQ)->a;
  first.reset();
  EXPECT_EQ(second.find(kQ)->a, tensor);
  EXPECT_EQ(second.tensors().find(tensor->name), tensor);
}

TEST_F(PeftAdapterTest, IsAConfigAndAnOpenFile) {
  write_tensors({a(kQ, 8), b(kQ, 8)});
  const Checkpoint tensors(file());
  const PeftAdapter adapter(config_of(config_text()), tensors);
  EXPECT_EQ(&adapter.tensors(), &tensors);
  EXPECT_EQ(adapter.find(kQ)->b,
            tensors.find("base_model.model." + std::string(kQ) + ".lora_B.weight"));
}

TEST_F(PeftAdapterTest, MayHaveABiasOfB) {
  write_config(config_text(R"("lora_bias": true)"));
  write_tensors({a(kQ, 8), b(kQ, 8), bias(kQ)});
  EXPECT_EQ(PeftAdapter(folder()).find(kQ)->bias->shape, std::vector<std::int64_t>{32});
}

TEST_F(PeftAdapterTest, AFolderWithoutItsFilesIsRefused) {
  EXPECT_EQ(refusal([&] { PeftAdapter(folder_.at("none")); }),
            folder_.at("none") + " is no directory with an adapter");
  EXPECT_EQ(said(), folder() + ": there is no adapter_config.json");
  write_config(R"({"peft_type": "LORA", "r")");
  EXPECT_EQ(said(), folder_.at("adapter_config.json") +
                        ": line 1, column 26: the text ends in the middle of a value");
  write_config(config_text());
  EXPECT_EQ(said(), folder() + ": there is no adapter_model.safetensors");
  std::ofstream(folder_.at("adapter_model.bin")) << "PK";
  EXPECT_EQ(said(), folder() +
                        ": there is no adapter_model.safetensors, only adapter_model.bin, which is "
                        "not known (peft writes the other with safe_serialization=True)");
  std::ofstream(file()) << "{}";
  EXPECT_EQ(said(), file() +
                        ": it has 2 bytes, and a safetensors file begins with 8 of header "
                        "length");
}

TEST_F(PeftAdapterTest, TensorsThatAreNotALorasAreRefused) {
  write_config(config_text());
  EXPECT_EQ(said_of({}), "there is no tensor in it");
  EXPECT_EQ(said_of({{"base_model.model.lm_head.weight", {4, 4}}}),
            R"(tensor "base_model.model.lm_head.weight" is none of a LoRA's (known are )"
            "base_model.model.MODULE.lora_A.weight, .lora_B.weight and .lora_B.bias)");
  EXPECT_EQ(said_of({{"base_model.model.x.lora_embedding_A", {4, 4}}}),
            R"(tensor "base_model.model.x.lora_embedding_A" is of an embedding, which is not )"
            "known");
  EXPECT_EQ(said_of({{"base_model.model.x.lora_magnitude_vector", {4}}}),
            R"(tensor "base_model.model.x.lora_magnitude_vector" is of DoRA, which is not known)");
  EXPECT_EQ(said_of({{"base_model.model.q_proj.lora_A.default.weight", {8, 4}}}),
            R"(tensor "base_model.model.q_proj.lora_A.default.weight" has an adapter's name in it )"
            R"(("default"), which peft leaves out when it saves)");
  EXPECT_EQ(said_of({{"model.q_proj.lora_A.weight", {8, 4}}}),
            R"(tensor "model.q_proj.lora_A.weight" does not begin with base_model.model., and the )"
            "name of a module");
  EXPECT_EQ(said_of({{"base_model.model.lora_A.weight", {8, 4}}}),
            R"(tensor "base_model.model.lora_A.weight" does not begin with base_model.model., and )"
            "the name of a module");
  const Tensor longest = a(std::string(301, 'x') + ".q_proj", 8);
  EXPECT_NE(said_of({longest}).find("is of a module with a name of 308 characters, and 200 are "
                                    "known"),
            std::string::npos);
}

TEST_F(PeftAdapterTest, TypesAndDimensionsAreChecked) {
  write_config(config_text());
  const std::string name = R"(tensor "base_model.model.q_proj.lora_A.weight" is )";
  Tensor t = a("q_proj", 8, 4);
  t.dtype = "F8_E4M3";
  EXPECT_EQ(said_of({t, b("q_proj", 8)}), name + "F8_E4M3 [8, 4], and known are F32, F16 and BF16");
  t.dtype = "F16";
  t.shape = {8, 4, 1};
  EXPECT_EQ(said_of({t, b("q_proj", 8)}), name + "F16 [8, 4, 1], not [rank, columns]");
  t.shape = {0};
  EXPECT_EQ(said_of({t, b("q_proj", 8)}),
            name + "F16 [0], not [rank, columns] (a shard that was not gathered?)");
  t = b("q_proj", 8);
  t.shape = {32};
  EXPECT_EQ(said_of({a("q_proj", 8), t}),
            R"(tensor "base_model.model.q_proj.lora_B.weight" is F32 [32], not [rows, rank])");
}

TEST_F(PeftAdapterTest, HalfAModuleIsRefused) {
  write_config(config_text());
  EXPECT_EQ(said_of({a("q_proj", 8)}),
            R"(there is tensor "base_model.model.q_proj.lora_A.weight", but no )"
            R"("base_model.model.q_proj.lora_B.weight")");
  EXPECT_EQ(said_of({b("q_proj", 8)}),
            R"(there is tensor "base_model.model.q_proj.lora_B.weight", but no )"
            R"("base_model.model.q_proj.lora_A.weight")");
  EXPECT_EQ(said_of({bias("q_proj", 8)}),
            R"(there is tensor "base_model.model.q_proj.lora_B.bias", but no )"
            R"("base_model.model.q_proj.lora_A.weight")");
}

TEST_F(PeftAdapterTest, RanksThatDisagreeAreRefused) {
  write_config(config_text(R"("rank_pattern": {"1.q_proj": 4})"));
  const Tensor a1 = a("1.q_proj", 4), b1 = b("1.q_proj", 4);
  EXPECT_EQ(said_of({a("q_proj", 8), b("q_proj", 4), a1, b1}),
            R"(tensor "base_model.model.q_proj.lora_A.weight" is F32 [8, 16], rank 8, and )"
            R"("base_model.model.q_proj.lora_B.weight" is [32, 4], rank 4)");
  EXPECT_EQ(said_of({a("q_proj", 4), b("q_proj", 4), a1, b1}),
            R"(tensor "base_model.model.q_proj.lora_A.weight" is F32 [4, 16], rank 4, and )"
            "adapter_config.json says 8");
  EXPECT_EQ(said_of({a("q_proj", 8), b("q_proj", 8), a("1.q_proj", 8), b("1.q_proj", 8)}),
            R"(tensor "base_model.model.1.q_proj.lora_A.weight" is F32 [8, 16], rank 8, and )"
            R"(adapter_config.json says 4 (rank_pattern "1.q_proj"))");
  EXPECT_EQ(said_of({a("q_proj", 8), b("q_proj", 8), a1, b1}), "of another: ");
}

TEST_F(PeftAdapterTest, BiasesMustBeAsTheConfigSays) {
  write_config(config_text());
  EXPECT_EQ(said_of({a("q_proj", 8), b("q_proj", 8), bias("q_proj")}),
            R"(tensor "base_model.model.q_proj.lora_B.bias" is F32 [32], and adapter_config.json )"
            "does not say lora_bias");
  write_config(config_text(R"("lora_bias": true)"));
  EXPECT_EQ(said_of({a("q_proj", 8), b("q_proj", 8)}),
            R"(there is no tensor "base_model.model.q_proj.lora_B.bias", and adapter_config.json )"
            "says lora_bias");
  EXPECT_EQ(said_of({a("q_proj", 8), b("q_proj", 8), bias("q_proj", 31)}),
            R"(tensor "base_model.model.q_proj.lora_B.bias" is F32 [31], and )"
            R"("base_model.model.q_proj.lora_B.weight" is [32, 8])");
}

TEST_F(PeftAdapterTest, ModulesBeyondTheTargetsAreRefused) {
  write_config(config_text());
  EXPECT_EQ(said_of({a("q_proj", 8), b("q_proj", 8), a("k_proj", 8), b("k_proj", 8)}),
            R"(tensor "base_model.model.k_proj.lora_A.weight" is of a module that )"
            "adapter_config.json does not target");
}

TEST_F(PeftAdapterTest, TargetsAndPatternsThatMeanNothingAreRefused) {
  const std::vector<Tensor> q = {a(kQ, 8), b(kQ, 8)};
  write_config(R"({"peft_type": "LORA", "target_modules": ["q_proj", "k_proj"]})");
  EXPECT_EQ(said_of(q), R"(it has no module of adapter_config.json's target_modules "k_proj")");
  write_config(config_text(R"("rank_pattern": {"v_proj": 4})"));
  EXPECT_EQ(said_of(q), R"(it has no module of adapter_config.json's rank_pattern "v_proj")");
  write_config(config_text(R"("alpha_pattern": {"q_proj": 1, "v_proj": 4})"));
  EXPECT_EQ(said_of(q), R"(it has no module of adapter_config.json's alpha_pattern "v_proj")");
  write_config(R"({"peft_type": "LORA", "target_modules": ["q_proj", "model.layers.1.q_proj"],
                   "layers_to_transform": [0]})");
  EXPECT_EQ(said_of(q),
            "it has no module of adapter_config.json's target_modules "
            R"("model.layers.1.q_proj")");
}

}  // namespace
}  // namespace tp
