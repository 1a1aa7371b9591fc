// attention_block: hidden states through the projections, the q/k norm, the rotation, attention,
// the output gate and o_proj, on whole ranks. Each stage is another operator's own, reads what the
// stage before it left in the ranks' memory, and is judged with just that: the first bad stage is
// the one that is named.

#include "kernels/attention_block.h"

#include <algorithm>

#include "harness/base/models.h"
#include "harness/device/matmul.h"
#include "properties/attention_call.h"
#include "properties/linear.h"
#include "properties/norm.h"
#include "properties/run/stage.h"
#include "properties/stages.h"
#include "reference/attention_block.h"
#include "reference/qkv_linear.h"

namespace tp {

namespace {

// Words of the key `qk_norm`.
enum class QkNorm : std::int64_t { none, full_width, per_head, per_head_1p, weightless };
// Words of the key `stage`, from 1.
constexpr const char* kStages[] = {"qkv_linear",  "qk_norm",     "rope",  "attention",
                                   "gate_linear", "output_gate", "o_proj"};

bool has_gate(const Case& c) { return c.options.at("gate") == 1; }
QkNorm norm_of(const Case& c) { return QkNorm(c.options.at("qk_norm")); }

// The same case as one of another operator, whose keys have the defaults unless they are given.
Case as_case(const Case& c, const char* op, std::map<std::string, std::int64_t> options) {
  Case other = c;
  other.op = op;
  other.options = find_operator(op).blank().options;
  for (const auto& [key, value] : options) other.options.at(key) = value;
  return other;
}

// Columns of the fused row of a rank, its padding included. The same on all ranks.
std::int64_t fused_width(const Case& c) {
  const RankShape rank = partition(c.model, c.tp_size, 0);
  return rank.heads.size * c.model.head_dim +
         rank.kv_heads.size * (c.model.head_dim + c.model.value_head_dim()) + c.options.at("pad");
}

Stage qkv_stage(const Case& c, const ShardingRules& rules, const Variation& v) {
  Stage stage = qkv_linear_stage(
      as_case(c, "qkv_linear", {{"bias", c.options.at("bias")}, {"pad", c.options.at("pad")}}),
      rules, v);
  // Findings among several stages say whose column is wrong.
  for (TensorSpec& t : stage.outputs)
    t.entity_cols = t.name == "v" ? c.model.value_head_dim() : c.model.head_dim;
  return renamed(
      std::move(stage), "qkv_linear",
      {.tensors = {{"x", "hidden"}},
       .buffers = {{"x", {"hidden"}}, {"weight", {"qkv_weight"}}, {"bias", {"qkv_bias"}}}});
}

// Over all heads: q and k side by side again, as the rotation reads them.
Stage norm_stage(const Case& c, const ShardingRules& rules, const Variation& v) {
  const RankShape rank = partition(c.model, c.tp_size, 0);
  const std::int64_t width = fused_width(c);
  return renamed(
      qk_norm_stage(
          as_case(c, "qk_norm", {{"eps", c.options.at("eps")}, {"pad", c.options.at("pad")}}),
          rules, v),
      "qk_norm",
      {.tensors = {},
       .buffers = {{"sums", {"norm_sums"}},
                   {"q_norm", {"qk_norm", 0, width}},
                   {"k_norm", {"qk_norm", rank.heads.size * c.model.head_dim, width}}}});
}

// With the norm of each head, if the model has one.
Stage rotation_stage(const Case& c, const ShardingRules& rules, const Variation& v) {
  const QkNorm norm = norm_of(c);
  const bool after_norm = norm == QkNorm::full_width;
  const std::int64_t of_head = norm == QkNorm::none || after_norm
                                   ? 0
                                   : std::int64_t(norm) - std::int64_t(QkNorm::per_head) + 1;
  Names names{.tensors = {{"q_weight", "q_head_weight"}, {"k_weight", "k_head_weight"}},
              .buffers = {{"q_weight", {"q_head_weight"}}, {"k_weight", {"k_head_weight"}}}};
  if (after_norm) {
    names.tensors.insert({{"q", "q_norm"}, {"k", "k_norm"}, {"v", ""}});
    names.buffers.insert({"qkv", {"qk_norm"}});
  }
  return renamed(rope_stage(as_case(c, "rope",
                                    {{"eps", c.options.at("eps")},
                                     {"pad", c.options.at("pad")},
                                     {"norm", of_head},
                                     {"rotary", c.options.at("rotary")},
                                     {"style", c.options.at("rope")}}),
                            rules, v),
                 "rope", names);
}

Stage attention_of_block(const Case& c, const ShardingRules& rules, const Variation& v) {
  const std::int64_t dim = c.model.head_dim, pad = c.options.at("pad");
  const AttentionSources sources{
      .q = {"q_rope", [=](const RankShape& rank) { return rank.heads.size * dim + pad; },
            [](const RankShape&) { return std::int64_t{0}; }},
      .k = {"k_rope", [=](const RankShape& rank) { return rank.kv_heads.size * dim + pad; },
            [](const RankShape&) { return std::int64_t{0}; }},
      .v = {"qkv", [width = fused_width(c)](const RankShape&) { return width; },
            [=](const RankShape& rank) { return (rank.heads.size + rank.kv_heads.size) * dim; }}};
  std::map<std::string, std::int64_t> options = {{"pad", pad}};
  for (const char* key :
       {"num_seqs", "splits", "mask", "window", "scale", "softcap", "sinks", "alibi"})
    options[key] = c.options.at(key);
  Case attention = as_case(c, "attention", options);
  // Exact data of its own: softmax makes nothing exact of whole numbers.
  const std::int64_t only = c.options.at("stage");
  if (only > 0 && std::string(kStages[only - 1]) == "attention" && c.fill == Fill::exact)
    attention.fill = Fill::one_hot;
  return renamed(attention_stage(attention, rules, v, sources), "attention",
                 {.tensors = {{"q", "q_rope"}, {"k", "k_rope"}, {"out", "attn"}},
                  .buffers = {{"out", {"attn"}}}});
}

// The gate's projection, by query head; its rows follow the heads like those of q_proj
// (radixark/miles#972).
Stage gate_linear_stage(const Case& c, const ShardingRules& rules) {
  const ModelShape& m = c.model;
  const std::int64_t hidden = m.hidden_size, tokens = c.num_tokens, v_dim = m.value_head_dim(),
                     pad = c.options.at("pad"), rows = m.num_heads * v_dim;
  return {
      .name = "gate_linear",
      .inputs = {linear::tensor(c, "hidden", tokens, hidden, Role::activation, linear::kLargestX),
                 linear::tensor(c, "gate_proj", rows, hidden, Role::weight,
                                linear::kLargestWeight)},
      .outputs = {{"gate", c.dtype, tokens, rows, Role::activation, v_dim}},
      .buffers = [=](int tp_rank) -> std::vector<LocalBuffer> {
        const Shard own = partition(m, c.tp_size, tp_rank).heads.times(v_dim),
                    loaded = rules.attention.gate_heads(m, c.tp_size, tp_rank).times(v_dim);
        return {{"hidden", Use::input, c.dtype, tokens, hidden + pad, {{"hidden", {0, hidden}}}},
                {"gate_weight",
                 Use::input,
                 c.dtype,
                 loaded.size,
                 hidden,
                 {{"gate_proj", {0, hidden}, 0, loaded}}},
                {"gate", Use::output, c.dtype, tokens, own.size + pad, {{"gate", own}}}};
      },
      .run =
          [=](RankRun& run) {
            const Shard own = partition(m, c.tp_size, run.group.tp_rank()).heads.times(v_dim);
            dispatch(c.dtype, [&]<typename T>(T) {
              matmul<T>(run.view<T>("hidden").columns(0, hidden), run.view<T>("gate_weight"),
                        nullptr, run.view<T>("gate").columns(0, own.size), run.stream);
            });
          },
      .cost = [=](int tp_rank) -> Cost {
        const double width = double(partition(m, c.tp_size, tp_rank).heads.size * v_dim);
        return linear::cost(c, double(tokens) * (double(hidden) + width) + width * double(hidden),
                            double(tokens * hidden) * width);
      },
      .reference = [=](const WholeInputs& in) -> std::vector<Budget> {
        return {reference::projection(in["hidden"], in["gate_proj"], nullptr,
                                      matmul_accumulation(c.dtype, hidden), c.dtype)};
      },
      .blind_to = {},
  };
}

Stage output_gate_stage(const Case& c) {
  const ModelShape& m = c.model;
  const std::int64_t tokens = c.num_tokens, v_dim = m.value_head_dim(), pad = c.options.at("pad");
  const auto tensor = [&](const char* name) {
    return TensorSpec{name, c.dtype, tokens, m.num_heads * v_dim, Role::activation, v_dim};
  };
  return {
      .name = "output_gate",
      .inputs = {tensor("attn"), tensor("gate")},
      .outputs = {tensor("gated")},
      .buffers = [=](int tp_rank) -> std::vector<LocalBuffer> {
        const Shard own = partition(m, c.tp_size, tp_rank).heads.times(v_dim);
        return {{"attn", Use::input, c.dtype, tokens, own.size + pad, {{"attn", own}}},
                {"gate", Use::input, c.dtype, tokens, own.size + pad, {{"gate", own}}},
                {"gated", Use::output, c.dtype, tokens, own.size + pad, {{"gated", own}}}};
      },
      .run =
          [=](RankRun& run) {
            const std::int64_t cols =
                partition(m, c.tp_size, run.group.tp_rank()).heads.size * v_dim;
            dispatch(c.dtype, [&]<typename T>(T) {
              output_gate<T>(run.view<T>("attn").columns(0, cols),
                             run.view<T>("gate").columns(0, cols),
                             run.view<T>("gated").columns(0, cols), run.stream);
            });
          },
      .cost = [=](int tp_rank) -> Cost {
        const double elements =
            double(tokens * partition(m, c.tp_size, tp_rank).heads.size * v_dim);
        return {.bytes = 3 * elements * size_of(c.dtype), .flops = 4 * elements};
      },
      .own_bits = true,
      .reference = [=](const WholeInputs& in) -> std::vector<Budget> {
        return {reference::output_gate(in["attn"], in["gate"])};
      },
      .blind_to = {},
  };
}

Stage o_proj_stage(const Case& c, const ShardingRules& rules, const Variation& v) {
  const std::int64_t width = partition(c.model, c.tp_size, 0).heads.size * c.model.value_head_dim();
  const std::string input = has_gate(c) ? "gated" : "attn";
  Stage stage = row_linear_stage(
      as_case(
          c, "row_linear",
          {{"in_per_rank", width}, {"bias", c.options.at("bias")}, {"pad", c.options.at("pad")}}),
      rules, v);
  for (TensorSpec& t : stage.outputs) t.entity_cols = t.cols;  // of no head
  return renamed(
      std::move(stage), "o_proj",
      {.tensors = {{"x", input}, {"weight", "o_proj"}, {"bias", "o_bias"}},
       .buffers = {
           {"x", {input}}, {"weight", {"o_weight"}}, {"sums", {"o_sums"}}, {"bias", {"o_bias"}}}});
}

std::vector<Stage> stages(const Case& c, const ShardingRules& rules, const Variation& v) {
  std::vector<Stage> all;
  all.push_back(qkv_stage(c, rules, v));
  if (norm_of(c) == QkNorm::full_width) all.push_back(norm_stage(c, rules, v));
  all.push_back(rotation_stage(c, rules, v));
  all.push_back(attention_of_block(c, rules, v));
  if (has_gate(c)) {
    all.push_back(gate_linear_stage(c, rules));
    all.push_back(output_gate_stage(c));
  }
  all.push_back(o_proj_stage(c, rules, v));
  if (const std::int64_t only = c.options.at("stage"); only > 0)
    std::erase_if(all, [&](const Stage& s) { return s.name != kStages[only - 1]; });
  return all;
}

Mutant mutant(std::string id, std::string what, std::string upstream,
              void (*change)(ShardingRules&), std::function<bool(const Case&)> decides) {
  Mutant m{std::move(id), std::move(what), std::move(upstream), sharding_rules(),
           std::move(decides)};
  change(m.rules);
  return m;
}

std::vector<Mutant> mutants() {
  const auto replicated = [](const Case& c) {
    return has_gate(c) && partition(c.model, c.tp_size, 0).num_kv_head_replicas > 1;
  };
  return {
      mutant(
          "output-gate-not-sliced:group-start",
          "the gate of the first query heads of the KV head, on every rank that shares it",
          "radixark/miles#972",
          [](ShardingRules& r) {
            r.attention.gate_heads = [](const ModelShape& m, int tp, int tp_rank) {
              const RankShape rank = partition(m, tp, tp_rank);
              return Shard{rank.kv_heads.offset * (m.num_heads / m.num_kv_heads), rank.heads.size};
            };
          },
          replicated),
      mutant(
          "output-gate-not-sliced:uncut", "the gate of all query heads of the rank's KV heads",
          "radixark/miles#972",
          [](ShardingRules& r) {
            r.attention.gate_heads = [](const ModelShape& m, int tp, int tp_rank) {
              return partition(m, tp, tp_rank).kv_heads.times(m.num_heads / m.num_kv_heads);
            };
          },
          replicated),
  };
}

// Stages that a case does not have cannot be asked for alone.
std::optional<std::string> refuse(const Case& c) {
  if (auto reason = partitionable(c.model, c.tp_size)) return reason;
  if (const std::int64_t only = c.options.at("stage"); only > 0) {
    const std::string name = kStages[only - 1];
    if (name == "qk_norm" && norm_of(c) != QkNorm::full_width)
      return "stage=qk_norm needs qk_norm=full_width";
    if ((name == "gate_linear" || name == "output_gate") && !has_gate(c))
      return "stage=" + name + " needs gate=1";
  }
  const std::int64_t heads =
      std::int64_t{c.model.num_heads} + 2 * std::max(c.model.num_kv_heads, c.tp_size);
  const std::int64_t width = heads * std::max(c.model.head_dim, c.model.value_head_dim());
  if (auto reason = too_large(c.model.hidden_size, width)) return reason;
  return too_large(c.num_tokens, std::max<std::int64_t>(width, c.model.hidden_size * c.tp_size));
}

// The projections outweigh everything else.
double work(const Case& c) {
  const double kv_heads = std::max(c.model.num_kv_heads, c.tp_size),
               v_dim = c.model.value_head_dim();
  const double heads = c.model.num_heads * v_dim * (has_gate(c) ? 2 : 1),
               qkv = (c.model.num_heads + kv_heads) * c.model.head_dim + kv_heads * v_dim;
  return linear::work(c, qkv + heads, c.model.hidden_size) +
         double(c.num_tokens) * c.num_tokens * c.model.num_heads *
             (c.model.head_dim + c.model.value_head_dim());
}

void adopt(Case& c, const Model& model) {
  const auto option = [&](const char* key, std::int64_t value) { c.options.at(key) = value; };
  const int rotary = model.rotary_dim == 0 ? model.shape.head_dim : model.rotary_dim;
  option("bias", model.attention_bias);
  option("qk_norm", std::int64_t(model.qk_norm == "full_width" ? QkNorm::full_width
                                 : model.qk_norm != "per_head" ? QkNorm::none
                                 : model.qk_norm_one_plus      ? QkNorm::per_head_1p
                                                               : QkNorm::per_head));
  option("eps", model.eps == 1e-5);
  option("rotary", 2 * rotary > model.shape.head_dim   ? 0
                   : 4 * rotary > model.shape.head_dim ? 1
                                                       : 2);
  option("gate", model.shape.attn_output_gate);
  option("window", model.window);
  option("sinks", model.sinks);
}

LawRun law_one_rank() {
  LawRun law = law_tp1();
  law.vary = [](const Case& c) {
    Case one = c;
    one.tp_size = 1;
    // The data of the sums that o_proj makes on so many ranks.
    return std::pair{one, Variation{.law = "tp1", .argument = c.tp_size}};
  };
  return law;
}

std::vector<Key> keys() {
  Key head_dim = linear::width_key("head_dim"), v_head_dim = linear::width_key("v_head_dim");
  head_dim.min = 2;
  head_dim.max = v_head_dim.max = kMaxAttentionHeadDim;
  Key fill = shared_key("fill");
  // The others meet every stage on their own.
  fill.max = fill.min + 2;
  fill.words.resize(3);
  fill.weights = {30, 60, 10};
  Key bias = linear::bias_key(), eps = norm::eps_key();
  bias.of_model = eps.of_model = true;
  std::vector<Key> all = {linear::width_key("hidden_size"),
                          shared_key("num_heads"),
                          shared_key("num_kv_heads"),
                          head_dim,
                          v_head_dim,
                          shared_key("tp_size"),
                          shared_key("num_tokens"),
                          shared_key("dtype"),
                          fill,
                          shared_key("seed"),
                          bias,
                          eps,
                          {.name = "qk_norm",
                           .help = "the norm of q and k before they rotate",
                           .min = 0,
                           .max = 4,
                           .words = {"none", "full_width", "per_head", "per_head_1p", "weightless"},
                           .of_model = true},
                          {.name = "rotary",
                           .help = "the columns of a head that rotate",
                           .min = 0,
                           .max = 2,
                           .words = {"full", "half", "quarter"},
                           .of_model = true},
                          {.name = "rope",
                           .help = "which columns are a pair",
                           .min = 0,
                           .max = 1,
                           .words = {"neox", "interleaved"}},
                          {.name = "gate",
                           .help = "whether attention's output is multiplied with the sigmoid of a "
                                   "gate, a projection by head",
                           .min = 0,
                           .max = 1,
                           .words = {"0", "1"},
                           .weights = {60, 40},
                           .of_model = true},
                          {.name = "num_seqs",
                           .help = "sequences in the call",
                           .min = 1,
                           .max = 1024,
                           .fallback = 1,
                           .draw_max = 4},
                          {.name = "splits",
                           .help = "parts that the keys of a query are split into",
                           .min = 1,
                           .max = 64,
                           .fallback = 1,
                           .draw_max = 3}};
  for (const Key& key : attention_model_keys()) all.push_back(key);
  all.push_back(pad_key("every tensor"));
  Key stage{.name = "stage",
            .help = "all of them, or one alone with data of its own",
            .words = {"all"},
            .weights = {70}};
  for (const char* name : kStages) {
    stage.words.push_back(name);
    stage.weights.push_back(5);
  }
  stage.max = std::int64_t(stage.words.size()) - 1;
  all.push_back(stage);
  return all;
}

}  // namespace

Operator make_attention_block() {
  return make_operator({
      .name = "attention_block",
      .what = "an attention layer from hidden states to hidden states, judged stage by stage",
      .keys = keys(),
      .laws = {law_one_rank()},
      .mutants = mutants(),
      .refuse = refuse,
      .work = work,
      .adopt = adopt,
      .regime = norm::regime,
      .stages = stages,
  });
}

}  // namespace tp
