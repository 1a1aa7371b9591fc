#include <fmt/format.h>

#include <set>

#include "properties/stored_checkpoint.h"
#include "properties/stored_linear.h"
#include "properties/stored_tensors.h"

namespace tp::stored_linear {

bool is_loaded(const Case& c) { return weights_of(c) != Weights::given; }
bool is_quantised(const Case& c) { return format_of(c).scheme != Scheme::none; }
bool is_gathered(const Case& c) {
  const auto key = c.options.find("gather");
  return key != c.options.end() && key->second == 1;
}

QuantFormat format_of(const Case& c) {
  const auto option = [&](const char* name) { return c.options.at(name); };
  QuantFormat f{.scheme = Scheme(option("quant")),
                .dialect = Dialect(option("dialect")),
                .activations = Activations(option("activations"))};
  f.block_rows = f.block_cols = 16 << option("block");
  if (f.scheme == Scheme::nvfp4) f.block_cols = kNvfp4Group;
  return f;
}

namespace {

std::vector<std::string> words(const std::string_view* first, std::size_t count) {
  return {first, first + count};
}

// What is drawn beside the keys before: else the rarer formats would hardly ever be.
bool quant_fits(const Case& c, std::int64_t scheme) {
  const bool is_packed = Scheme(scheme) == Scheme::nvfp4 || Scheme(scheme) == Scheme::gptq;
  return scheme == 0 || (is_loaded(c) && !(is_packed && c.dtype == DType::f32));
}
QuantFormat drawn_format(const Case& c, Dialect dialect, Activations activations) {
  const auto scheme = Scheme(c.options.at("quant"));
  return {.scheme = scheme,
          .dialect = dialect,
          .activations = activations,
          .block_cols = scheme == Scheme::nvfp4 ? kNvfp4Group : 128};
}
bool dialect_fits(const Case& c, std::int64_t dialect) {
  if (c.options.at("quant") == 0) return dialect == 0;
  return !illegal(drawn_format(c, Dialect(dialect), Activations::plain));
}
bool activations_fit(const Case& c, std::int64_t activations) {
  const QuantFormat f = drawn_format(c, Dialect(c.options.at("dialect")), Activations(activations));
  const bool is_plain = f.activations == Activations::plain;
  if (f.scheme == Scheme::none || f.scheme == Scheme::nvfp4) return is_plain;
  return !illegal(f) && !(is_plain && c.dtype == DType::f32);
}
bool act_order_fits(const Case& c, std::int64_t on) {
  return on == 0 || Scheme(c.options.at("quant")) == Scheme::gptq;
}
bool gather_fits(const Case& c, std::int64_t on) {
  const auto a = Activations(c.options.at("activations"));
  return on == 0 ||
         ((a == Activations::tensor || a == Activations::token) && c.num_tokens % c.tp_size == 0);
}

}  // namespace

std::vector<Key> keys(bool can_be_fused) {
  Key weights{.name = "weights",
              .help =
                  "where weights come from: they are there, or a checkpoint has them matrix by "
                  "matrix",
              .min = 0,
              .max = 1,
              .words = {"given", "split"},
              .weights = {20, 80}};
  if (can_be_fused) {
    weights.help += ", fused one below the other, or fused in stripes";
    weights.max = 3;
    weights.words = {"given", "split", "fused", "striped"};
    weights.weights = {20, 25, 30, 25};
  }
  std::vector<Key> all = {
      weights,
      {.name = "quant",
       .help = "how the weights are quantised",
       .min = 0,
       .max = 5,
       .words = words(kSchemeWords, std::size(kSchemeWords)),
       .weights = {15, 22, 14, 19, 17, 13},
       .fits = quant_fits},
      {.name = "dialect",
       .help = "whose names, shapes and senses the quantised tensors have",
       .min = 0,
       .max = 2,
       .words = words(kDialectWords, std::size(kDialectWords)),
       .fits = dialect_fits},
      {.name = "activations",
       .help = "what is multiplied with quantised weights: activations as they are, or codes and a "
               "scale that is known, or made of the call, of each token, of each block of it",
       .min = 0,
       .max = 4,
       .words = words(kActivationsWords, std::size(kActivationsWords)),
       .weights = {20, 20, 25, 15, 20},
       .fits = activations_fit},
      {.name = "act_order",
       .help = "1: gptq's groups of columns are in any order",
       .min = 0,
       .max = 1,
       .words = {"0", "1"},
       .fits = act_order_fits},
      {.name = "block",
       .help = "rows and columns of a block of fp8_block, columns of a group of gptq",
       .min = 0,
       .max = 3,
       .fallback = 3,
       .words = {"16", "32", "64", "128"},
       .shrink = Shrink::to_fallback},
      {.name = "files",
       .help = "files that a checkpoint is spread over",
       .min = 1,
       .max = 4,
       .fallback = 1},
      {.name = "layer",
       .help =
           "0: tensors made from the seed; k: those of layer k-1 of the checkpoint that the run "
           "was given (--model DIR)",
       .min = 0,
       .max = 1 << 16,
       .is_drawn = false}};
  // Row-parallel layers have all tokens on each rank.
  if (can_be_fused) {
    all.push_back({.name = "gather",
                   .help = "1: ranks have a share of the tokens each, and gather the codes of them",
                   .min = 0,
                   .max = 1,
                   .words = {"0", "1"},
                   .weights = {40, 60},
                   .fits = gather_fits});
  }
  return all;
}

void mark_keys_of_checkpoint(std::vector<Key>& keys) {
  static const std::set<std::string> names = {"hidden_size",
                                              "num_heads",
                                              "num_kv_heads",
                                              "head_dim",
                                              "v_head_dim",
                                              "in_per_rank",
                                              "intermediate_per_rank",
                                              "dtype",
                                              "bias",
                                              "dialect",
                                              "activations",
                                              "act_order",
                                              "block",
                                              "files",
                                              "layer",
                                              "module",
                                              "quant",
                                              "weights",
                                              "output_gate"};
  for (Key& key : keys) key.of_checkpoint = names.contains(key.name);
}

std::optional<std::string> refuse(const Case& c, const Layer& layer) {
  const QuantFormat f = format_of(c);
  if (auto why = illegal(f)) return why;
  if (auto why = refuse_file(c, layer)) return why;
  if (is_gathered(c)) {
    if (f.activations != Activations::tensor && f.activations != Activations::token)
      return fmt::format("gather=1 is about activations scaled by the call or by the token, not {}",
                         kActivationsWords[int(f.activations)]);
    if (c.num_tokens % c.tp_size != 0)
      return fmt::format("{} tokens are not shared out evenly to {} ranks, as gather=1 wants them",
                         c.num_tokens, c.tp_size);
  }
  if (c.options.at("act_order") == 1 && f.scheme != Scheme::gptq)
    return "act_order=1 is gptq's, and the weights are not";
  if (f.scheme == Scheme::none) return std::nullopt;
  if (!is_loaded(c)) return "quantised weights come from a checkpoint: weights=given has none";
  const std::int64_t in = layer.in_features, width = layer.cuts_columns() ? in / c.tp_size : in;
  if (f.scheme == Scheme::nvfp4) {
    if (f.activations != Activations::plain)
      return "nvfp4 weights are dequantised here: their activations stay plain";
    if (width % 2 != 0)
      return fmt::format("nvfp4 has two columns a byte, and a rank {} of them", width);
  }
  if (f.scheme == Scheme::gptq && width % kWord != 0)
    return fmt::format("gptq has {} columns a word, and a rank {} of them", kWord, width);
  if (f.activations == Activations::plain && c.dtype == DType::f32)
    return "dequantised weights are multiplied by tensor cores, which take f16 or bf16, not f32";
  return std::nullopt;
}

}  // namespace tp::stored_linear
