#include "harness/base/quantization_config.h"

#include <gtest/gtest.h>

#include "harness/base/check.h"
#include "harness/base/json.h"
#include "harness/base/model_config.h"

namespace tp {
namespace {

constexpr const char* kHeads =
    R"("hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3)";

// Of a config.json with this member.
Quantization read(const std::string& member, const std::optional<std::string>& beside = {}) {
  const std::string comma = member.empty() ? "" : ", ";
  return model_from_config("{" + std::string(kHeads) + comma + member + "}", "config.json", beside)
      .quantization;
}
Quantization read_quant(const std::string& inner) {
  return read("\"quantization_config\": {" + inner + "}");
}

// One config group of compressed-tensors.
std::string compressed(const std::string& format, const std::string& weights,
                       const std::string& activations, const std::string& ignore = "[]") {
  return R"("quant_method": "compressed-tensors", "format": ")" + format +
         R"(", "quantization_status": "compressed", "ignore": )" + ignore +
         R"(, "config_groups": {"group_0": {"targets": ["Linear"], "output_activations": null,)" +
         R"( "weights": )" + weights + R"(, "input_activations": )" + activations + "}}";
}

constexpr const char* kQ = "model.layers.0.self_attn.q_proj";

TEST(QuantizationConfig, NothingIsQuantised) {
  for (const char* member : {"", R"("quantization_config": null)"}) {
    const Quantization q = read(member);
    EXPECT_EQ(q.format, QuantFormat{});
    EXPECT_FALSE(q.applies_to(kQ));
    EXPECT_EQ(q.format_of(kQ), QuantFormat{});
    EXPECT_EQ(q.refusal, "");
    EXPECT_EQ(to_text(q), "not quantised");
  }
}

// As they are in the wild; the names of the models are where they were seen.
TEST(QuantizationConfig, TheDialects) {
  using enum Scheme;
  using enum Dialect;
  using enum Activations;
  const std::string fp8 =
      R"({"num_bits": 8, "type": "float", "symmetric": true, "dynamic": false,)";
  const struct {
    const char* what;
    std::string config;
    QuantFormat expected;
  } table[] = {
      {"MiniMax-M2.5",
       R"("quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic",
          "weight_block_size": [128, 128])",
       {fp8_block, native, token_groups, 128, 128}},
      {"another block",
       R"("quant_method": "fp8", "activation_scheme": "dynamic",
          "weight_block_size": [1, 64])",
       {fp8_block, native, token_groups, 1, 64}},
      {"AutoFP8, static",
       R"("quant_method": "fp8", "activation_scheme": "static",
          "ignored_layers": ["lm_head"])",
       {fp8_tensor, native, fixed}},
      {"AutoFP8, dynamic",
       R"("quant_method": "fp8", "activation_scheme": "dynamic")",
       {fp8_tensor, native, tensor}},
      {"RedHatAI FP8",
       compressed("float-quantized", fp8 + R"("strategy": "tensor"})",
                  R"({"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": false})",
                  R"(["lm_head"])"),
       {fp8_tensor, compressed_tensors, fixed}},
      {"RedHatAI FP8-dynamic",
       compressed("float-quantized", fp8 + R"("strategy": "channel", "group_size": null})",
                  R"({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": true})"),
       {fp8_channel, compressed_tensors, token}},
      {"the strategy of dynamic ones that say none",
       compressed("naive-quantized", fp8 + R"("strategy": "channel"})",
                  R"({"num_bits": 8, "type": "float", "dynamic": true})"),
       {fp8_channel, compressed_tensors, token}},
      {"FP8, weights only",
       compressed("float-quantized", fp8 + R"("strategy": "channel"})", "null"),
       {fp8_channel, compressed_tensors, plain}},
      {"FP8_BLOCK",
       compressed("float-quantized", fp8 + R"("strategy": "block", "block_structure": [128, 128]})",
                  R"({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128,
                      "dynamic": true})"),
       {fp8_block, compressed_tensors, token_groups, 128, 128}},
      {"NVFP4",
       compressed("nvfp4-pack-quantized",
                  R"({"num_bits": 4, "type": "float", "strategy": "tensor_group",
                      "group_size": 16, "dynamic": false})",
                  R"({"num_bits": 4, "type": "float", "strategy": "tensor_group",
                      "group_size": 16, "dynamic": "local"})"),
       {nvfp4, compressed_tensors, token_groups, 128, 16}},
      {"NVFP4A16",
       compressed("nvfp4-pack-quantized",
                  R"({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 16})",
                  "null"),
       {nvfp4, compressed_tensors, plain, 128, 16}},
      {"Qwen3-32B-FP8-Static-PerTensor",
       R"("quant_algo": "FP8", "kv_cache_scheme": "FP8",
          "config_groups": {"group_0": {"weights": {"num_bits": 8}}})",
       {fp8_tensor, modelopt, fixed}},
      {"ModelOpt, a scale a channel",
       R"("quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN")",
       {fp8_channel, modelopt, token}},
      {"Gemma-4-31B-IT-NVFP4",
       R"("quant_method": "modelopt", "quant_algo": "NVFP4")",
       {nvfp4, modelopt, token_groups, 128, 16}},
      {"Llama-2-7B-Chat-GPTQ",
       R"("bits": 4, "group_size": 128, "damp_percent": 0.01,
          "desc_act": true, "sym": true, "true_sequential": true, "model_name_or_path": null,
          "quant_method": "gptq")",
       {gptq, native, plain, 128, 128}},
      {"a group of another size",
       R"("bits": 4, "group_size": 32, "desc_act": false, "sym": false,
          "checkpoint_format": "gptq", "quant_method": "gptq")",
       {gptq, native, plain, 128, 32}},
  };
  for (const auto& row : table) {
    const Quantization q = read_quant(row.config);
    EXPECT_EQ(q.refusal, "") << row.what;
    EXPECT_EQ(q.format, row.expected) << row.what << ": " << to_text(q);
    EXPECT_TRUE(q.applies_to(kQ)) << row.what;
    EXPECT_EQ(q.format_of(kQ), row.expected) << row.what;
  }
}

TEST(QuantizationConfig, WhereItMayBe) {
  const std::string fp8 =
      R"({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["o_proj"]})";
  const std::string nvfp4 =
      R"({"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization":
          {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
           "exclude_modules": ["lm_head", "model.layers.0.self_attn*"]}})";
  EXPECT_EQ(read("\"compression_config\": " + fp8).format.scheme, Scheme::fp8_tensor);
  EXPECT_EQ(read("\"compression_config\": {\"quantization_config\": " + fp8 + "}").format.scheme,
            Scheme::fp8_tensor);
  const Model nested = model_from_config(
      "{\"text_config\": {" + std::string(kHeads) + ", \"quantization_config\": " + fp8 + "}}",
      "config.json");
  EXPECT_EQ(nested.quantization.format.scheme, Scheme::fp8_tensor);

  const Quantization beside = read("", nvfp4);
  EXPECT_EQ(beside.format.scheme, Scheme::nvfp4);
  EXPECT_FALSE(beside.applies_to(kQ));
  EXPECT_TRUE(beside.applies_to("model.layers.1.self_attn.q_proj"));
  // The config.json itself comes first.
  EXPECT_EQ(read("\"quantization_config\": " + fp8, nvfp4).format.scheme, Scheme::fp8_tensor);
  // ModelOpt's file of a model that it left alone.
  EXPECT_EQ(to_text(read("", R"({"quantization": {"quant_algo": null}})")), "not quantised");
  for (const char* broken : {"{", ""}) EXPECT_THROW(read("", broken), BadInput);
}

TEST(QuantizationConfig, PatternsOfModules) {
  const struct {
    const char* pattern;
    const char* module;
    bool matches;
  } table[] = {
      {"lm_head", "lm_head", true},
      {"lm_head", "model.lm_head", true},
      {"lm_head", "lm_head_2", false},
      {"model.layers.1", "model.layers.1.mlp.down_proj", true},
      {"model.layers.1", "model.layers.10.mlp.down_proj", false},
      {"gate", "model.layers.0.mlp.gate", true},
      {"gate", "model.layers.0.mlp.gate_proj", false},
      {"gate", "a.gate_proj.gate", true},  // the second place counts as well
      {"", "lm_head", false},
      // GPT-OSS: the module, and what is in it.
      {"model.layers.*.self_attn", "model.layers.17.self_attn.q_proj", true},
      {"model.layers.*.self_attn", "model.layers.17.self_attn", true},
      {"model.layers.*.self_attn", "model.layers.17.self_attention.q_proj", false},
      {"model.layers.*.mlp.router", "model.layers.17.self_attn.q_proj", false},
      // ModelOpt
      {"model.layers.0.self_attn*", "model.layers.0.self_attn.q_proj", true},
      {"model.layers.0.self_attn*", "model.layers.1.self_attn.q_proj", false},
      {"*self_attn*", "model.layers.1.self_attn.q_proj", true},
      {"*.q_pro?", "model.layers.1.self_attn.q_proj", true},
      {"*.q_pro?", "model.layers.1.self_attn.q_pro", false},
      {"*ab*ab", "abxababab", true},
      {"*", "anything", true},
      // compressed-tensors: a beginning of the name
      {"re:.*lm_head", "model.lm_head", true},
      {"re:lm_head", "model.lm_head", false},
      {"re:model\\.layers\\.(0|2)\\..+", "model.layers.2.mlp.up_proj", true},
      {"re:model\\.layers\\.(0|2)\\..+", "model.layers.1.mlp.up_proj", false},
      {"re:.*self_attn", "model.layers.1.self_attn.q_proj", true},
      {"re:(?!.*self_attn).*", "model.layers.1.mlp.up_proj", true},
      {"re:(?!.*self_attn).*", "model.layers.1.self_attn.q_proj", false},
      {"re:.*experts\\.\\d+\\.up_proj", "model.layers.1.mlp.experts.17.up_proj", true},
      {"re:(", "(", false},
      {"re:(x)\\1", "xx", false},
      {"re:(?=.*(?=.*(?=.*x)))x", "x", false},  // steps to the power of their depth
      {"re:(x)\\77777777777777777777", "xx", false},
  };
  for (const auto& row : table)
    EXPECT_EQ(matches_module(row.pattern, row.module), row.matches)
        << row.pattern << " " << row.module;
  // Neither the longest name costs the stack, nor the worst pattern the day.
  EXPECT_FALSE(matches_module("re:(.*)*(.*)*(.*)*(.*)*(.*)*!", std::string(60, 'x')));
  EXPECT_FALSE(matches_module("re:((x{99}){99}){99}", std::string(60, 'x')));
  EXPECT_FALSE(matches_module("re:(.|x)*y", std::string(1 << 20, 'x')));
}

TEST(QuantizationConfig, WhoIsLeftAlone) {
  const std::string fp8 = R"("quant_method": "fp8", "activation_scheme": "dynamic", )";
  for (const char* key :
       {"modules_to_not_convert", "ignore", "exclude_modules", "ignored_layers"}) {
    const Quantization q =
        read_quant(fp8 + "\"" + key + R"(": ["lm_head", "model.layers.1.self_attn"])");
    EXPECT_FALSE(q.applies_to("lm_head")) << key;
    EXPECT_FALSE(q.applies_to("model.layers.1.self_attn.k_proj")) << key;
    EXPECT_TRUE(q.applies_to("model.layers.2.self_attn.k_proj")) << key;
    EXPECT_EQ(q.format_of("lm_head"), QuantFormat{}) << key;
    EXPECT_EQ(q.ignored.size(), 2u) << key;
  }
  EXPECT_TRUE(read_quant(fp8 + R"("ignore": null)").applies_to("lm_head"));
  // GPTQ leaves lm_head alone unless it says so; GPTQModel's rules are regular expressions.
  const std::string gptq = R"("quant_method": "gptq", "bits": 4, "group_size": 128)";
  EXPECT_FALSE(read_quant(gptq).applies_to("lm_head"));
  EXPECT_TRUE(read_quant(gptq + R"(, "lm_head": true)").applies_to("lm_head"));
  const Quantization rules = read_quant(gptq + R"(, "dynamic": {"-:.*layers\\.1\\..*": {}})");
  EXPECT_TRUE(rules.applies_to(kQ));
  EXPECT_FALSE(rules.applies_to("model.layers.1.self_attn.q_proj"));
}

// Whom it concerns is told, and nobody else.
TEST(QuantizationConfig, UnknownFormatsAreRefusedWhereTheyAreRun) {
  // GPT-OSS: experts in MXFP4, attention as it was.
  const Quantization gpt_oss = read_quant(R"("modules_to_not_convert": ["model.layers.*.self_attn",
      "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"], "quant_method": "mxfp4")");
  EXPECT_EQ(gpt_oss.refusal, "");
  EXPECT_EQ(gpt_oss.format_of("model.layers.3.self_attn.o_proj"), QuantFormat{});
  try {
    gpt_oss.format_of("model.layers.3.mlp.experts.gate_up_proj");
    FAIL() << "MXFP4 passes for something";
  } catch (const BadInput& e) {
    EXPECT_NE(std::string(e.what()).find("quant_method=\"mxfp4\""), std::string::npos) << e.what();
  }
  // The same with only some layers left alone.
  const Quantization first_only = read_quant(
      R"("modules_to_not_convert": ["model.layers.0.self_attn"], "quant_method": "mxfp4")");
  EXPECT_NE(first_only.refusal.find("mxfp4"), std::string::npos);

  // Kimi-K2.5: int4 everywhere but in the attention, under a nested model's names.
  const std::string int4 =
      R"({"actorder": null, "block_structure": null, "dynamic": false, "group_size": 32,
          "num_bits": 4, "strategy": "group", "symmetric": true, "type": "int"})";
  EXPECT_EQ(read_quant(compressed("pack-quantized", int4, "null",
                                  R"(["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"])"))
                .refusal,
            "");
  EXPECT_EQ(read_quant(compressed("pack-quantized", int4, "null",
                                  R"(["re:language_model.model.layers.*.self_attn.*"])"))
                .refusal,
            "");
  EXPECT_NE(read_quant(compressed("pack-quantized", int4, "null")).refusal, "");
}

TEST(QuantizationConfig, GroupsOfTheirOwn) {
  const std::string group =
      R"({"format": "float-quantized", "targets": ["re:.*self_attn.*"],
          "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
          "input_activations": {"num_bits": 8, "type": "float", "strategy": "token",
                                "dynamic": true}})";
  const std::string others =
      R"({"format": "nvfp4-pack-quantized", "targets": ["Linear"],
          "weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group",
                      "group_size": 16}, "input_activations": null})";
  const std::string head = R"("quant_method": "compressed-tensors", "format": "mixed-precision",)";
  for (const bool attention_first : {true, false}) {
    const Quantization q =
        read_quant(head + R"("config_groups": {"group_0": )" + (attention_first ? group : others) +
                   R"(, "group_1": )" + (attention_first ? others : group) + "}");
    EXPECT_EQ(q.refusal, "");
    EXPECT_EQ(q.format.scheme, Scheme::fp8_channel);
    EXPECT_EQ(q.format_of(kQ).scheme, Scheme::fp8_channel);
    EXPECT_EQ(q.format_of("model.layers.0.mlp.down_proj").scheme, Scheme::nvfp4);
  }
  // No target means the attention: it is as it was.
  const Quantization experts =
      read_quant(head + R"("config_groups": {"group_0": {"format": "float-quantized",
        "targets": ["re:.*experts.*"], "weights": {"num_bits": 8, "type": "float"}}})");
  EXPECT_FALSE(experts.applies_to(kQ));
  EXPECT_EQ(experts.format_of(kQ), QuantFormat{});
  EXPECT_TRUE(experts.applies_to("model.layers.0.mlp.experts.7.up_proj"));
  // Two formats in one attention.
  const std::string v_only = R"({"format": "float-quantized", "targets": ["re:.*v_proj"],
        "weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}})";
  // Of those that match, the first has it.
  EXPECT_EQ(
      read_quant(head + R"("config_groups": {"a": )" + group + R"(, "b": )" + v_only + "}").refusal,
      "");
  const Quantization two =
      read_quant(head + R"("config_groups": {"b": )" + v_only + R"(, "a": )" + group + "}");
  EXPECT_NE(two.refusal.find("fp8_channel (token) and fp8_tensor (plain)"), std::string::npos)
      << two.refusal;
}

TEST(QuantizationConfig, WhatIsNotKnownIsNamed) {
  const std::string fp8 = R"({"num_bits": 8, "type": "float", "strategy": "tensor"})";
  const std::string nvfp4 =
      R"({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16})";
  const struct {
    std::string config;
    const char* expected;
  } table[] = {
      {R"("quant_method": "awq", "bits": 4)", "quant_method=\"awq\" is not known"},
      {R"("quant_method": 4)", "quant_method is 4"},
      {R"("bits": 4)", "quant_method=null"},
      {"", "quant_method=null"},
      {R"("quant_method": "fp8")", "activation_scheme=null"},
      {R"("quant_method": "fp8", "activation_scheme": "lazy")", "activation_scheme=\"lazy\""},
      {R"("quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e5m2")", "fmt=\"e5m2\""},
      {R"("quant_method": "fp8", "activation_scheme": "dynamic", "scale_fmt": "ue8m0",
          "weight_block_size": [128, 128])",
       "scale_fmt=\"ue8m0\""},
      {R"("quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128])",
       "weight_block_size=an array"},
      {R"("quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [0, 128])",
       "weight_block_size"},
      {R"("quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128])",
       "fp8_block weights go with activations scaled in token_groups"},
      {R"("quant_method": "fp8", "activation_scheme": "dynamic", "ignore": "lm_head")",
       "ignore is \"lm_head\", not a list"},
      {R"("quant_method": "fp8", "activation_scheme": "dynamic", "ignore": ["re:(?<!x)y"])",
       "re:(?<!x)y is not understood"},
      {R"("quant_method": "gptq", "bits": 8, "group_size": 128)", "bits=8"},
      {R"("quant_method": "gptq", "bits": 4)", "group_size=null"},
      {R"("quant_method": "gptq", "bits": 4, "group_size": -1)", "group_size=-1"},
      {R"("quant_method": "gptq", "bits": 4, "group_size": 20)", "20 columns"},
      {R"("quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "gptq_v2")",
       "checkpoint_format=\"gptq_v2\""},
      {R"("quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": "yes")",
       "desc_act is \"yes\""},
      {R"("quant_method": "gptq", "bits": 4, "group_size": 128,
          "modules_in_block_to_quantize": [["self_attn.q_proj"]])",
       "modules_in_block_to_quantize"},
      {R"("quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:.*": {"bits": 8}})",
       "+:.*"},
      {R"("quant_method": "modelopt", "quant_algo": "MIXED_PRECISION")",
       "quant_algo=\"MIXED_PRECISION\""},
      {R"("quant_method": "modelopt", "quant_algo": "NVFP4_AWQ")", "quant_algo=\"NVFP4_AWQ\""},
      {R"("quant_method": "modelopt", "quant_algo": "NVFP4", "group_size": 32)", "not for 32"},
      {R"("quant_method": "modelopt")", "quant_algo=null"},
      {R"("quant_method": "compressed-tensors", "format": "float-quantized")",
       "config_groups=null"},
      {R"("quant_method": "compressed-tensors", "quantization_status": "frozen",
          "config_groups": {})",
       "quantization_status=\"frozen\""},
      {compressed("int-quantized", R"({"num_bits": 8, "type": "int", "strategy": "channel"})",
                  "null"),
       "config_groups.group_0.weights.type=\"int\""},
      {compressed("pack-quantized", fp8, "null"), "format=\"pack-quantized\""},
      {compressed("mxfp4-pack-quantized", nvfp4, "null"), "format=\"mxfp4-pack-quantized\""},
      {compressed("float-quantized",
                  R"({"num_bits": 8, "type": "float", "strategy": "group", "group_size": 64})",
                  "null"),
       "weights.strategy=\"group\""},
      {compressed("float-quantized", R"({"num_bits": 6, "type": "float"})", "null"), "num_bits=6"},
      {compressed("float-quantized", R"({"num_bits": 8, "type": "float", "actorder": "weight"})",
                  "null"),
       "actorder=\"weight\""},
      {compressed("float-quantized", R"({"num_bits": 8, "type": "float", "symmetric": false})",
                  "null"),
       "symmetric=false"},
      {compressed("float-quantized", fp8, R"({"num_bits": 8, "type": "int"})"),
       "input_activations.type=\"int\""},
      {compressed("float-quantized", fp8, R"({"num_bits": 4, "type": "float"})"),
       "input_activations.num_bits=4"},
      {compressed("float-quantized", fp8,
                  R"({"num_bits": 8, "type": "float", "dynamic": "local"})"),
       "dynamic=\"local\""},
      {compressed("float-quantized", fp8,
                  R"({"num_bits": 8, "type": "float", "strategy": "token", "dynamic": false})"),
       "strategy=\"token\""},
      {compressed("nvfp4-pack-quantized", nvfp4,
                  R"({"num_bits": 4, "type": "float", "strategy": "tensor_group",
                      "group_size": 32, "dynamic": "local"})"),
       "group_size=32"},
      {compressed("float-quantized", fp8, "null") + R"(, "transform_config": {"a": 1})",
       "transform_config"},
      {compressed("float-quantized", fp8, "null") +
           R"(, "sparsity_config": {"format": "sparse-24-bitmask"})",
       "sparse-24-bitmask"},
  };
  for (const auto& row : table) {
    const Quantization q = read_quant(row.config);
    EXPECT_NE(q.refusal.find(row.expected), std::string::npos)
        << row.config << "\nsaid: " << q.refusal;
    EXPECT_TRUE(q.refusal.starts_with("quantization_config")) << q.refusal;
    EXPECT_EQ(q.refusal.find('\n'), std::string::npos) << q.refusal;
    EXPECT_LT(q.refusal.size(), 250u) << q.refusal;
    // Never taken for weights as they are.
    EXPECT_TRUE(q.applies_to(kQ)) << row.config;
    EXPECT_THROW(q.format_of(kQ), BadInput) << row.config;
    EXPECT_EQ(to_text(q), "quantised in a format that is not known");
  }
  // Empty ones, which say nothing.
  EXPECT_EQ(read_quant(compressed("float-quantized", fp8, "null") +
                       R"(, "transform_config": {}, "sparsity_config": {})")
                .refusal,
            "");
}

}  // namespace
}  // namespace tp
