#include "harness/base/model_config.h"

#include <gtest/gtest.h>

#include "harness/base/check.h"
#include "harness/base/json.h"

namespace tp {
namespace {

Model read(const std::string& text) { return model_from_config(text, "config.json"); }

std::string repeated(const std::string& text, int times) {
  std::string out;
  for (int i = 0; i < times; ++i) out += text;
  return out;
}

TEST(ModelConfig, AsTheyAreInTheWild) {
  // Everything given, as in MiniMax-M2.5.
  Model m = read(
      R"({"hidden_size": 3072, "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
                     "use_qk_norm": true, "qk_norm_type": "per_layer", "rms_norm_eps": 1e-06, "vocab_size": 200064})");
  EXPECT_EQ(m.shape, (ModelShape{3072, 48, 8, 128, 0, false}));
  EXPECT_EQ(m.qk_norm, "full_width");
  EXPECT_EQ(m.eps, 1e-6);
  EXPECT_EQ(m.id, "config.json");

  // head_dim is its own number: not hidden_size / num_attention_heads where it is given
  // (Qwen3-0.6B).
  EXPECT_EQ(
      read(R"({"hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128})").shape.head_dim,
      128);
  // null is the same as left out (Mixtral), and KV heads default to the query heads.
  m = read(
      R"({"hidden_size": 4096, "num_attention_heads": 32, "head_dim": null, "num_key_value_heads": null})");
  EXPECT_EQ(m.shape, (ModelShape{4096, 32, 32, 128, 0, false}));

  // Nested text_config; one without heads is not the language model's.
  m = read(R"({"hidden_size": 7, "text_config": {"hidden_size": 5120, "num_attention_heads": 24,
               "num_key_value_heads": 4, "head_dim": 256, "attn_output_gate": true}})");
  EXPECT_EQ(m.shape, (ModelShape{5120, 24, 4, 256, 0, true}));
  m = read(
      R"({"hidden_size": 64, "num_attention_heads": 4, "text_config": {"hidden_size": 5120}})");
  EXPECT_EQ(m.shape.hidden_size, 64);

  // Values narrower than keys (MiMo-V2-Flash), another spelling of eps, another spelling of the
  // gate.
  m = read(
      R"({"hidden_size": 4096, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 192,
               "v_head_dim": 128, "layernorm_epsilon": 1e-05, "attention_output_gate": true})");
  EXPECT_EQ(m.shape, (ModelShape{4096, 64, 4, 192, 128, true}));
  EXPECT_EQ(m.eps, 1e-5);

  // MLA: a head is its two parts, whatever head_dim says (GLM-5).
  m = read(
      R"({"hidden_size": 6144, "num_attention_heads": 64, "num_key_value_heads": 64, "head_dim": 64,
               "kv_lora_rank": 512, "qk_nope_head_dim": 192, "qk_rope_head_dim": 64, "v_head_dim": 256})");
  EXPECT_EQ(m.shape, (ModelShape{6144, 64, 64, 256, 0, false}));
  EXPECT_TRUE(m.mla);

  // What Python writes and JSON does not know (Nemotron-H), a byte order mark, text that looks like
  // it.
  m = read(
      "\xEF\xBB\xBF"
      R"({"time_step_limit": [0.0, Infinity, -Infinity, NaN], "name": "Infinity \" NaN",
               "hidden_size": 64, "num_attention_heads": 4})");
  EXPECT_EQ(m.shape.head_dim, 16);
}

// The keys of each family, as their config.json files have them.
TEST(ModelConfig, Nesting) {
  const std::string inner = R"({"model_type": "qwen3_vl_text", "hidden_size": 64,
      "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 160})";
  for (const std::string& text :
       {R"({"model_type": "qwen3_vl", "vision_config": {"hidden_size": 9}, "text_config": )" +
            inner + "}",
        R"({"llm_config": )" + inner + "}",
        R"({"thinker_config": {"audio_config": {}, "text_config": )" + inner + "}}"}) {
    const Model m = read(text);
    EXPECT_EQ(m.shape, (ModelShape{64, 4, 2, 16, 0, false})) << text;
    EXPECT_EQ(m.qk_norm, "per_head") << text;
    EXPECT_EQ(m.intermediate_size, 160) << text;
  }
  // The type may stand outside, and so may the dtype.
  const Model outside = read(R"({"model_type": "gemma3", "torch_dtype": "bfloat16",
      "text_config": {"hidden_size": 64, "num_attention_heads": 4}})");
  EXPECT_EQ(outside.qk_norm, "per_head");
  EXPECT_EQ(outside.dtype, DType::bf16);
}

TEST(ModelConfig, KvHeads) {
  const struct {
    const char* text;
    ModelShape shape;
  } table[] = {
      // GPT-2; StarCoder's first (gpt_bigcode) has one KV head.
      {R"({"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_inner": null})",
       {768, 12, 12, 64, 0, false}},
      {R"({"model_type": "gpt_bigcode", "n_embd": 6144, "n_head": 48, "multi_query": true})",
       {6144, 48, 1, 128, 0, false}},
      // Falcon 7B, 40B, RW-1B, and the 40B as it was called at first
      {R"({"model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71,
           "num_kv_heads": 71, "multi_query": true, "new_decoder_architecture": false})",
       {4544, 71, 1, 64, 0, false}},
      {R"({"model_type": "falcon", "hidden_size": 8192, "num_attention_heads": 128,
           "num_kv_heads": 8, "multi_query": true, "new_decoder_architecture": true})",
       {8192, 128, 8, 64, 0, false}},
      {R"({"model_type": "falcon", "hidden_size": 2048, "num_attention_heads": 32,
           "multi_query": false, "new_decoder_architecture": false})",
       {2048, 32, 32, 64, 0, false}},
      {R"({"model_type": "RefinedWeb", "hidden_size": 8192, "n_head": 128, "n_head_kv": 8})",
       {8192, 128, 8, 64, 0, false}},
      // MPT, DBRX
      {R"({"model_type": "mpt", "d_model": 4096, "n_heads": 32, "attn_config": {"alibi": true}})",
       {4096, 32, 32, 128, 0, false}},
      {R"({"model_type": "dbrx", "d_model": 6144, "n_heads": 48, "attn_config":
           {"kv_n_heads": 8, "clip_qkv": 8}, "ffn_config": {"ffn_hidden_size": 10752}})",
       {6144, 48, 8, 128, 0, false}},
      // ChatGLM3, with its flag and without
      {R"({"model_type": "chatglm", "hidden_size": 4096, "num_attention_heads": 32,
           "multi_query_attention": true, "multi_query_group_num": 2})",
       {4096, 32, 2, 128, 0, false}},
      {R"({"model_type": "chatglm", "hidden_size": 4096, "num_attention_heads": 32,
           "multi_query_attention": false, "multi_query_group_num": 2})",
       {4096, 32, 32, 128, 0, false}},
      // The order of vLLM's converter
      {R"({"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8,
           "num_kv_heads": 4, "n_head_kv": 2, "multi_query_group_num": 1})",
       {64, 8, 2, 8, 0, false}},
      {R"({"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8,
           "num_kv_heads": 4})",
       {64, 8, 4, 8, 0, false}},
      // PLaMo
      {R"({"hidden_size": 4096, "num_attention_heads": 40, "hidden_size_per_head": 128,
           "num_key_value_heads": 5})",
       {4096, 40, 5, 128, 0, false}},
  };
  for (const auto& row : table) EXPECT_EQ(read(row.text).shape, row.shape) << row.text;
}

// Llama-3_3-Nemotron-Super-49B: its layers differ, or have no attention at all.
TEST(ModelConfig, NemotronNas) {
  const auto text = [](const std::string& blocks) {
    return R"({"model_type": "nemotron-nas", "hidden_size": 8192, "num_attention_heads": 64,
               "num_key_value_heads": null, "block_configs": [)" +
           blocks + "]}";
  };
  const std::string none = R"({"attention": {"n_heads_in_group": null, "no_op": true}})";
  const std::string linear = R"({"attention": {"n_heads_in_group": null, "no_op": false,
      "replace_with_linear": true}})";
  const std::string eight = R"({"attention": {"n_heads_in_group": 8, "no_op": false,
      "replace_with_linear": false}, "ffn": {"ffn_mult": 2.625}})";
  const std::string four = R"({"attention": {"n_heads_in_group": 16, "no_op": false}})";
  const Model same = read(text(none + "," + linear + "," + eight + "," + eight));
  EXPECT_EQ(same.shape.num_kv_heads, 8);
  EXPECT_EQ(same.note, "");
  const Model other = read(text(none + "," + eight + "," + four + "," + four));
  EXPECT_EQ(other.shape.num_kv_heads, 8);
  EXPECT_EQ(other.note, "its layers differ: 8 KV heads as in the first, 2 of them have 4");
  const struct {
    std::string blocks;
    const char* why;
  } wrong[] = {
      {none, "no layer with attention"},
      {R"({"attention": {"no_op": false}})", "n_heads_in_group is missing"},
      {R"({"attention": {"n_heads_in_group": 7}})", "n_heads_in_group=7"},
  };
  for (const auto& row : wrong) {
    try {
      read(text(row.blocks));
      FAIL() << row.blocks;
    } catch (const BadInput& e) {
      EXPECT_NE(std::string(e.what()).find(row.why), std::string::npos) << e.what();
    }
  }
}

TEST(ModelConfig, BiasGateAndSinks) {
  const auto with = [](const std::string& member) {
    return read(R"({"hidden_size": 64, "num_attention_heads": 4, )" + member + "}");
  };
  EXPECT_FALSE(with(R"("attention_bias": false)").attention_bias);
  for (const char* key : {"attention_bias", "qkv_bias", "use_qkv_bias", "add_qkv_bias", "use_bias"})
    EXPECT_TRUE(with("\"" + std::string(key) + "\": true").attention_bias) << key;
  EXPECT_TRUE(with(R"("model_type": "qwen2")").attention_bias);  // has no key for it
  EXPECT_FALSE(with(R"("model_type": "qwen3", "attention_bias": false)").attention_bias);
  EXPECT_TRUE(with(R"("model_type": "qwen3_next")").shape.attn_output_gate);
  EXPECT_FALSE(
      with(R"("model_type": "qwen3_next", "attn_output_gate": false)").shape.attn_output_gate);
  EXPECT_FALSE(with(R"("attention_output_gate": false)").shape.attn_output_gate);
  EXPECT_TRUE(with(R"("model_type": "gpt_oss", "attention_bias": true)").sinks);
  EXPECT_FALSE(with(R"("model_type": "llama")").sinks);
}

// What norms q and k: keys first, the model's type where there are none.
TEST(ModelConfig, QkNorm) {
  const struct {
    const char* members;
    const char* style;
    bool one_plus;
  } table[] = {
      {R"("model_type": "qwen3")", "per_head", false},
      {R"("model_type": "qwen3_moe", "use_qk_norm": true)", "per_head", false},  // Qwen3-Coder
      {R"("model_type": "qwen3_5")", "per_head", true},
      {R"("model_type": "qwen3_next")", "per_head", true},
      {R"("model_type": "gemma3_text")", "per_head", true},
      {R"("model_type": "gemma3")", "per_head", true},
      {R"("model_type": "gemma2")", "none", false},
      {R"("model_type": "gemma4_text")", "per_head", false},
      {R"("model_type": "olmo2")", "full_width", false},
      {R"("model_type": "minimax_m2", "use_qk_norm": true, "qk_norm_type": "per_layer")",
       "full_width", false},
      {R"("model_type": "minimax_m3", "use_qk_norm": true, "qk_norm_type": "per_head",
           "use_gemma_norm": true)",
       "per_head", true},
      {R"("model_type": "minimax_m3", "use_qk_norm": false, "use_gemma_norm": true)", "none",
       false},
      {R"("model_type": "glm4_moe", "use_qk_norm": true)", "per_head", false},  // GLM-4.5
      {R"("model_type": "glm4_moe", "use_qk_norm": false)", "none", false},     // GLM-4.5-Air
      {R"("model_type": "glm4_moe")", "none", false},
      {R"("model_type": "llama4_text", "use_qk_norm": true)", "weightless_after_rope", false},
      {R"("model_type": "llama4_text", "use_qk_norm": false)", "none", false},
      {R"("model_type": "llama4_text")", "weightless_after_rope", false},
      {R"("model_type": "param2moe")", "per_head", false},
      {R"("model_type": "llama")", "none", false},
      {R"("model_type": "llama", "use_qk_norm": true)", "", false},
      {R"("model_type": "cohere", "use_qk_norm": false)", "none", false},  // Aya
      {R"("model_type": "cohere", "use_qk_norm": true)", "", false},       // LayerNorms: not ours
      {R"("model_type": "of_tomorrow")", "", false},
      {R"("use_qk_norm": true, "qk_norm_type": "of_tomorrow")", "", false},
      {R"("model_type": "deepseek_v3", "kv_lora_rank": 512)", "mla_latent", false},
  };
  for (const auto& row : table) {
    const Model m =
        read(R"({"hidden_size": 64, "num_attention_heads": 4, )" + std::string(row.members) + "}");
    EXPECT_EQ(m.qk_norm, row.style) << row.members;
    EXPECT_EQ(m.qk_norm_one_plus, row.one_plus) << row.members;
  }
}

TEST(ModelConfig, RotaryAndWindow) {
  const auto with = [](const std::string& member) {
    return read(R"({"hidden_size": 4096, "num_attention_heads": 32, "head_dim": 192, )" + member +
                "}");
  };
  EXPECT_EQ(with(R"("partial_rotary_factor": 1.0)").rotary_dim, 0);
  EXPECT_EQ(with(R"("partial_rotary_factor": 1)").rotary_dim, 0);
  EXPECT_EQ(with(R"("partial_rotary_factor": 0.334)").rotary_dim, 64);  // MiMo-V2-Flash
  EXPECT_EQ(with(R"("rotary_dim": 64, "partial_rotary_factor": 0.5)").rotary_dim, 64);
  EXPECT_EQ(with(R"("rotary_dim": 192)").rotary_dim, 0);
  // As transformers 5 writes it (Qwen3.5).
  EXPECT_EQ(with(R"("rope_parameters": {"partial_rotary_factor": 0.25})").rotary_dim, 48);
  // DeepSeek: the part that rotates rotates whole.
  EXPECT_EQ(with(R"("kv_lora_rank": 512, "qk_rope_head_dim": 64, "rotary_dim": 64)").rotary_dim, 0);
  for (const char* wrong :
       {R"("rotary_dim": 193)", R"("rotary_dim": 0)", R"("partial_rotary_factor": 0)",
        R"("partial_rotary_factor": 1.5)", R"("partial_rotary_factor": "half")"})
    EXPECT_THROW(with(wrong), BadInput) << wrong;

  EXPECT_EQ(with(R"("sliding_window": null)").window, 0);
  EXPECT_EQ(with(R"("sliding_window": 128, "max_position_embeddings": 131072)").window, 128);
  EXPECT_EQ(with(R"("sliding_window": 128, "layer_types": ["full_attention", "sliding_attention"])")
                .window,
            128);
  EXPECT_EQ(with(R"("sliding_window": 128, "layer_types": ["full_attention"])").window, 0);
  EXPECT_EQ(with(R"("sliding_window": 131072, "use_sliding_window": false)").window, 0);  // Qwen2
  // Phi-3: a window that no text fills.
  EXPECT_EQ(with(R"("sliding_window": 262144, "max_position_embeddings": 131072)").window, 0);
  EXPECT_EQ(with(R"("sliding_window": -1)").window, 0);
  EXPECT_THROW(with(R"("sliding_window": 0.5)"), BadInput);
}

TEST(ModelConfig, IntermediateSizeAndType) {
  const auto with = [](const std::string& member) {
    return read(R"({"hidden_size": 64, "num_attention_heads": 4, )" + member + "}");
  };
  EXPECT_EQ(with(R"("intermediate_size": 9216, "moe_intermediate_size": 2048)").intermediate_size,
            9216);
  EXPECT_EQ(with(R"("moe_intermediate_size": 512)").intermediate_size, 512);  // Qwen3.5-35B-A3B
  EXPECT_EQ(with(R"("ffn_hidden_size": 13696)").intermediate_size, 13696);    // ChatGLM
  EXPECT_EQ(with(R"("intermediate_size": [8192, 8192])").intermediate_size, 8192);  // Gemma 3n
  EXPECT_EQ(with(R"("n_inner": null)").intermediate_size, 0);
  EXPECT_THROW(with(R"("intermediate_size": "wide")"), BadInput);

  EXPECT_EQ(with(R"("dtype": "bfloat16")").dtype, DType::bf16);
  EXPECT_EQ(with(R"("torch_dtype": "float16")").dtype, DType::f16);
  EXPECT_EQ(with(R"("dtype": "float32", "torch_dtype": "float16")").dtype, DType::f32);
  EXPECT_EQ(with(R"("dtype": "float64")").dtype, std::nullopt);
  EXPECT_EQ(with(R"("dtype": null)").dtype, std::nullopt);
  EXPECT_EQ(with(R"("model_type": "falcon", "layer_norm_epsilon": 1e-05)").eps, 1e-5);
}

TEST(ModelConfig, BadOnesAreRefusedInOneSentence) {
  const std::string heads = R"("hidden_size": 64, "num_attention_heads": 4)";
  const struct {
    std::string text;
    const char* expected;
  } table[] = {
      {"", "ends in the middle"},
      {R"({"hidden_size": 64, "num_attention)", "line 1, column 35: "},
      {"{" + heads, "ends in the middle"},
      {"{" + heads + "}}", "line 1, column 46: "},
      {"{" + heads + "\n, }", "line 2, column 3: "},
      {"[1, 2]", "holds an array, not an object"},
      {"3", "holds 3, not an object"},
      {"{}", "hidden_size is missing"},
      {R"({"hidden_size": 64})", "num_attention_heads is missing"},
      {R"({"hidden_size": "64", "num_attention_heads": 4})",
       "hidden_size is \"64\", not a whole number"},
      {R"({"hidden_size": true, "num_attention_heads": 4})", "hidden_size is true"},
      {R"({"hidden_size": [64], "num_attention_heads": 4})", "hidden_size is an array"},
      {R"({"hidden_size": 64.5, "num_attention_heads": 4})", "hidden_size=64.5"},
      {R"({"hidden_size": 0, "num_attention_heads": 4})", "hidden_size=0"},
      {R"({"hidden_size": 64, "num_attention_heads": -4})", "num_attention_heads=-4"},
      {R"({"hidden_size": 64, "num_attention_heads": 4294967300})",
       "num_attention_heads=4294967300"},
      {R"({"hidden_size": 18446744073709551680, "num_attention_heads": 4})",
       "hidden_size=1.8446744073709552e+19"},
      {R"({"hidden_size": 1e999, "num_attention_heads": 4})", "number overflow"},
      {R"({"hidden_size": 64, "num_attention_heads": 6})",
       "hidden_size=64 is not a multiple of num_attention_heads=6"},
      {R"({"hidden_size": 1048576, "num_attention_heads": 1})", "above 65536"},
      {"{" + heads + R"(, "num_key_value_heads": 3})",
       "num_attention_heads=4 is not a multiple of num_key_value_heads=3"},
      {"{" + heads + R"(, "head_dim": 0})", "head_dim=0"},
      {"{" + heads + R"(, "v_head_dim": -1})", "v_head_dim=-1"},
      {"{" + heads + R"(, "rms_norm_eps": "small"})", "rms_norm_eps=\"small\""},
      {"{" + heads + R"(, "rms_norm_eps": -1e-6})", "rms_norm_eps=-1e-06"},
      {"{" + heads + R"(, "attn_output_gate": 1})", "attn_output_gate is 1"},
      {"{" + heads + R"(, "hidden_size": 64})", "the key \"hidden_size\" is given twice"},
      {"{" + heads + R"(, "a": {"b": 1, "b": 1}})", "the key \"b\" is given twice"},
      {"{" + heads + ", \"name\": \"\xff\xfe\"}", "ill-formed UTF-8"},
      {"{" + heads + R"(, "deep": )" + repeated("[", 100'000), "nested deeper than 64"},
      {"{" + heads + R"(, "deep": )" + repeated("{\"a\":", 100'000), "nested deeper than 64"},
      {"{" + heads + R"(, "wide": [)" + repeated("0,", 2'000'000) + "0]}",
       "more than 1048576 values"},
      {R"({")" + std::string(1 << 20, 'k') + R"(": 1, ")" + std::string(1 << 20, 'k') + R"(": 2})",
       "is given twice"},
  };
  for (const auto& row : table) {
    std::string said;
    try {
      read(row.text);
    } catch (const BadInput& e) {
      said = e.what();
    }
    const std::string shown = row.text.substr(0, 100);
    EXPECT_TRUE(said.starts_with("config.json: ")) << shown << "\nsaid: " << said;
    EXPECT_NE(said.find(row.expected), said.npos) << shown << "\nsaid: " << said;
    EXPECT_EQ(said.find('\n'), said.npos) << shown;
    EXPECT_LT(said.size(), 200u) << shown;
  }
}

// Every beginning of a good file is refused, or means the same as the whole.
TEST(ModelConfig, EveryTruncation) {
  const std::string text =
      R"({"hidden_size": 64, "text_config": {"hidden_size": 8, "num_attention_heads": 2}})";
  for (std::size_t n = 0; n < text.size(); ++n)
    EXPECT_THROW(read(text.substr(0, n)), BadInput) << n;
  EXPECT_EQ(read(text).shape.head_dim, 4);
}

TEST(Json, QuotesAnything) {
  EXPECT_EQ(json_quoted("a\"b\\c\n"), R"("a\"b\\c\n")");
  EXPECT_EQ(json_quoted("\xff"), "\"\xEF\xBF\xBD\"");
}

}  // namespace
}  // namespace tp
