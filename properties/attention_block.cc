// attention_block: hidden states through the projections, the q/k norm, the rotation, attention,
// the output gate and o_proj, on whole ranks. Each stage is another operator's own, reads what the
// stage before it left in the ranks' memory, and is judged with just that: the first bad stage is
// the one that is named. The weights of qkv_linear and of o_proj may come from a checkpoint, and
// adapters may be over both.

#include "kernels/attention_block.h"

#include <algorithm>

#include "harness/base/models.h"
#include "harness/device/matmul.h"
#include "properties/attention_call.h"
#include "properties/linear.h"
#include "properties/lora_option.h"
#include "properties/norm.h"
#include "properties/run/stage.h"
#include "properties/stages.h"
#include "properties/stored_linear.h"
#include "properties/stored_linear_mutants.h"
#include "reference/attention_block.h"
#include "reference/qkv_linear.h"

namespace tp {

namespace {

// Words of the key `qk_norm`.
enum class QkNorm : std::int64_t { none, full_width, per_head, per_head_1p, weightless };
// Words of the key `stage`, from 1. A linear is one of them with all that it has: its loading, too.
constexpr const char* kStages[] = {"qkv_linear",  "qk_norm",     "rope",  "attention",
                                   "gate_linear", "output_gate", "o_proj"};
// Whether the case runs it: all of them, or it alone.
bool runs(const Case& c, std::string_view stage) {
  const std::int64_t only = c.options.at("stage");
  return only == 0 || kStages[only - 1] == stage;
}

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

// ---- The two linears.

// Keys of stored_linear that say how the weights of both are stored, and those of adapters.
constexpr const char* kStoredKeys[] = {"weights",     "quant",     "dialect",
                                       "activations", "act_order", "block"};
constexpr const char* kAdapterKeys[] = {"lora", "lora_rank"};

Case as_linear(const Case& c, const char* op, std::map<std::string, std::int64_t> options) {
  for (const char* key : {"bias", "pad"}) options[key] = c.options.at(key);
  for (const char* key : kAdapterKeys) options[key] = c.options.at(key);
  for (const char* key : kStoredKeys) options.try_emplace(key, c.options.at(key));
  return as_case(c, op, std::move(options));
}
Case as_qkv_linear(const Case& c) { return as_linear(c, "qkv_linear", {}); }
Case as_row_linear(const Case& c) {
  const std::int64_t width = partition(c.model, c.tp_size, 0).heads.size * c.model.value_head_dim();
  // One matrix is fused with no other, whatever the checkpoint does with q, k and v.
  const bool is_loaded = stored_linear::is_loaded(c);
  return as_linear(c, "row_linear",
                   {{"in_per_rank", width}, {"module", 1}, {"weights", is_loaded ? 1 : 0}});
}

// A linear's stages among those of others: what makes its output is called `name`, the stages
// before it, the buffers, and the tensors that every linear calls the same, have `prefix` in front,
// unless `names` has something else for them.
std::vector<Stage> of_layer(std::vector<Stage> stages, const std::string& name,
                            const std::string& prefix, Names names) {
  for (const char* tensor : {"slots", "input_slots", "groups", "weight_scale", "input_scale",
                             "x_codes", "x_scale", "lora_ranks", "lora_scales", "lora_h"})
    names.tensors.try_emplace(tensor, prefix + tensor);
  for (const Stage& stage : stages) {
    for (const LocalBuffer& buffer : stage.buffers(0))
      names.buffers.try_emplace(buffer.name, BufferAlias{prefix + buffer.name});
  }
  for (Stage& stage : stages) {
    const bool is_last = &stage == &stages.back();
    const std::string called = is_last ? name : prefix + stage.name;
    stage = renamed(std::move(stage), called, names);
  }
  return stages;
}

constexpr const char *kOfQkv = "qkv_", *kOfOut = "o_";

std::vector<Stage> qkv_stages(const Case& c, const ShardingRules& rules, const Variation& v) {
  std::vector<Stage> stages = qkv_linear_stages(as_qkv_linear(c), rules, v);
  // Findings among several stages say whose column is wrong.
  for (TensorSpec& t : stages.back().outputs)
    t.entity_cols = t.name.front() == 'v' ? c.model.value_head_dim() : c.model.head_dim;
  Names names{.tensors = {{"x", "hidden"}}, .buffers = {{"x", {"hidden"}}, {"qkv", {"qkv"}}}};
  if (lora::has_adapters(c)) {  // q, k and v are what becomes of them
    for (const std::string part : {"q", "k", "v"}) {
      names.tensors[part] = part + "_base";
      names.tensors[part + "_lora"] = part;
    }
    names.buffers["qkv"] = {"qkv_base"};
    names.buffers["qkv_lora"] = {"qkv"};
  }
  return of_layer(std::move(stages), "qkv_linear", kOfQkv, names);
}

std::vector<Stage> o_proj_stages(const Case& c, const ShardingRules& rules, const Variation& v) {
  const std::string input = has_gate(c) ? "gated" : "attn";
  std::vector<Stage> stages = row_linear_stages(as_row_linear(c), rules, v);
  for (TensorSpec& t : stages.back().outputs) t.entity_cols = t.cols;  // of no head
  return of_layer(std::move(stages), "o_proj", kOfOut,
                  {.tensors = {{"x", input}, {"weight", "o_proj"}, {"bias", "o_bias"}},
                   .buffers = {{"x", {input}}, {"out", {"out"}}}});
}

// ---- What lies between them.

// Columns of the fused row of a rank, its padding included. The same on all ranks.
std::int64_t fused_width(const Case& c) {
  const RankShape rank = partition(c.model, c.tp_size, 0);
  return rank.heads.size * c.model.head_dim +
         rank.kv_heads.size * (c.model.head_dim + c.model.value_head_dim()) + c.options.at("pad");
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
      .own_bits = stored_linear::product_has_own_bits(c, hidden, false),
      .bits_by_size = stored_linear::product_has_own_bits(c, hidden, false),
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

std::vector<Stage> stages(const Case& c, const ShardingRules& rules, const Variation& v) {
  std::vector<Stage> all;
  if (runs(c, "qkv_linear")) all = qkv_stages(c, rules, v);
  if (runs(c, "qk_norm") && norm_of(c) == QkNorm::full_width)
    all.push_back(norm_stage(c, rules, v));
  if (runs(c, "rope")) all.push_back(rotation_stage(c, rules, v));
  if (runs(c, "attention")) all.push_back(attention_of_block(c, rules, v));
  if (runs(c, "gate_linear") && has_gate(c)) all.push_back(gate_linear_stage(c, rules));
  if (runs(c, "output_gate") && has_gate(c)) all.push_back(output_gate_stage(c));
  if (runs(c, "o_proj")) {
    for (Stage& stage : o_proj_stages(c, rules, v)) all.push_back(std::move(stage));
  }
  return all;
}

Mutant mutant(std::string id, std::string what, std::string upstream,
              void (*change)(ShardingRules&), std::function<bool(const Case&)> decides) {
  Mutant m{std::move(id), std::move(what), std::move(upstream), sharding_rules(),
           std::move(decides)};
  change(m.rules);
  return m;
}

// Of the linears' loading, preparing and quantising.
bool differs(const Case& c, const ShardingRules& rules) {
  const DataRegime regime = norm::regime(c, {});
  const auto in = [&](const Case& linear, const stored_linear::Layer& layer, const char* x) {
    return stored_linear::differs(
        linear, layer,
        linear::tensor(c, x, c.num_tokens, layer.in_features, Role::activation, linear::kLargestX),
        regime, rules);
  };
  const Case qkv = as_qkv_linear(c), out = as_row_linear(c);
  return (runs(c, "qkv_linear") && in(qkv, qkv_linear_layer(qkv), "hidden")) ||
         (runs(c, "o_proj") && in(out, row_linear_layer(out), "attn"));
}

std::vector<Mutant> mutants() {
  const auto replicated = [](const Case& c) {
    return has_gate(c) && partition(c.model, c.tp_size, 0).num_kv_head_replicas > 1;
  };
  std::vector<Mutant> all = {
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
  for (const auto& of_linears :
       {stored_linear::fused_mutants(differs), stored_linear::column_mutants(differs)}) {
    for (const Mutant& m : of_linears) {
      // Every rank has all tokens here: nothing that was quantised is gathered.
      if (m.rules.quant.gathered_scale != GatheredScale::of_all) continue;
      const bool is_known =
          std::any_of(all.begin(), all.end(), [&](const Mutant& k) { return k.id == m.id; });
      if (!is_known) all.push_back(m);
    }
  }
  return all;
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
  const Case qkv = as_qkv_linear(c), out = as_row_linear(c);
  if (auto reason = stored_linear::refuse(qkv, qkv_linear_layer(qkv))) return reason;
  if (auto reason = stored_linear::refuse(out, row_linear_layer(out))) return reason;
  if (lora::has_adapters(c)) {
    if (auto reason = find_operator(qkv.op).refuse(qkv)) return reason;
    if (auto reason = find_operator(out.op).refuse(out)) return reason;
  }
  const std::int64_t heads =
      std::int64_t{c.model.num_heads} + 2 * std::max(c.model.num_kv_heads, c.tp_size);
  const std::int64_t width = heads * std::max(c.model.head_dim, c.model.value_head_dim());
  if (auto reason = too_large(c.model.hidden_size, width)) return reason;
  return too_large(c.num_tokens, std::max<std::int64_t>(width, c.model.hidden_size * c.tp_size));
}

double work_of_adapters(Case linear) {
  if (!lora::has_adapters(linear)) return 0;
  const Operator& op = find_operator(linear.op);
  const double with = op.work(linear);
  linear.options.at("lora") = 0;
  return with - op.work(linear);
}

// The projections outweigh everything else.
double work(const Case& c) {
  const double kv_heads = std::max(c.model.num_kv_heads, c.tp_size),
               v_dim = c.model.value_head_dim();
  const double heads = c.model.num_heads * v_dim,
               qkv = (c.model.num_heads + kv_heads) * c.model.head_dim + kv_heads * v_dim;
  const double activations = c.num_tokens * (double(c.tp_size) * c.model.hidden_size + heads);
  return stored_linear::work(c, qkv + heads * (has_gate(c) ? 2 : 1), c.model.hidden_size,
                             activations) +
         work_of_adapters(as_qkv_linear(c)) + work_of_adapters(as_row_linear(c)) +
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
  law.refuse = [](const Case& c) -> std::optional<std::string> {
    if (!lora::has_adapters(c)) return std::nullopt;
    return "law=tp1: ranks round what they shrink of o_proj's input, each for itself";
  };
  return law;
}

// They come before the other options: where the shape does not allow what was drawn of them, it is
// they who give way.
std::vector<Key> keys_of_linears() {
  std::vector<Key> all;
  for (Key& key : stored_linear::keys(true)) {
    if (std::none_of(std::begin(kStoredKeys), std::end(kStoredKeys),
                     [&](const char* name) { return key.name == name; }))
      continue;
    // What goes on between the linears knows nothing of their weights.
    if (key.name == "weights") key.weights = {60, 12, 14, 14};
    all.push_back(std::move(key));
  }
  for (Key& key : lora::option_keys()) all.push_back(std::move(key));
  return all;
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
                          shared_key("seed")};
  for (Key& key : keys_of_linears()) all.push_back(std::move(key));
  const std::vector<Key> of_block = {
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
  all.insert(all.end(), of_block.begin(), of_block.end());
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
      .laws = {stored_linear::without_local_scales(law_one_rank(), kOfOut, "out")},
      .mutants = mutants(),
      .refuse = refuse,
      .work = work,
      .adopt = adopt,
      .regime = norm::regime,
      .stages = stages,
  });
}

}  // namespace tp
