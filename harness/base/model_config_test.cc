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
