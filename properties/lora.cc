// lora: adapters over a sharded linear layer, in slots, for a batch of tokens that use several of
// them or none. Which rows of B a rank holds where KV heads are replicated, what is gathered or
// added up between shrink and expand, and which sum the delta joins: that is where it is got wrong,
// and nothing else in a model shows it as long as B is zero.

#include "kernels/lora.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "harness/base/models.h"
#include "kernels/row_linear.h"
#include "properties/linear.h"
#include "properties/lora_mutants.h"
#include "properties/lora_stages.h"
#include "reference/row_linear.h"

namespace tp {

namespace {

// Words of the key `module`.
enum class Base : std::int64_t { qkv, gate_up, o_proj, down_proj };

Base base_of(const Case& c) { return Base(c.options.at("module")); }
bool is_attention(const Case& c) { return base_of(c) == Base::qkv || base_of(c) == Base::o_proj; }

ModelShape shape_of(const Case& c) {
  ModelShape m = c.model;
  m.attn_output_gate = c.options.at("output_gate") == 1;
  return m;
}
std::int64_t intermediate(const Case& c) {
  return c.options.at("intermediate_per_rank") * c.tp_size;
}
bool is_partial(const Case& c) { return base_of(c) >= Base::o_proj && c.options.at("joins") == 0; }
DType base_dtype(const Case& c) {
  return is_partial(c) && c.options.at("reduce_dtype") == 1 ? DType::f32 : c.dtype;
}

bool only_partial(const Case& c, std::int64_t word) { return word == 0 || is_partial(c); }

lora::Layer layer_of(const Case& c) {
  const ModelShape m = shape_of(c);
  const int tp_size = c.tp_size;
  switch (base_of(c)) {
    case Base::qkv: {
      const int replicas = partition(m, tp_size, 0).num_kv_head_replicas;
      return {.prefix = "model.layers.0.self_attn.",
              .parts = {"q_proj", "k_proj", "v_proj"},
              .fused = "qkv_proj",
              .rows = {std::int64_t{m.num_heads} * m.query_dim(),
                       std::int64_t{m.num_kv_heads} * m.head_dim,
                       std::int64_t{m.num_kv_heads} * m.value_head_dim()},
              .in_features = m.hidden_size,
              .outputs = {"q", "k", "v"},
              .buffer = "qkv",
              .own =
                  [=](int tp_rank) {
                    const QkvRows rows = rows_of_own_heads(m, tp_size, tp_rank);
                    return std::vector<Shard>{rows.q, rows.k, rows.v};
                  },
              .replicas = {1, replicas, replicas}};
    }
    case Base::gate_up: {
      const std::int64_t size = c.options.at("intermediate_per_rank");
      return {.prefix = "model.layers.0.mlp.",
              .parts = {"gate_proj", "up_proj"},
              .fused = "gate_up_proj",
              .rows = {intermediate(c), intermediate(c)},
              .in_features = m.hidden_size,
              .outputs = {"gate", "up"},
              .buffer = "gate_up",
              .own =
                  [=](int tp_rank) {
                    return std::vector<Shard>(2, {tp_rank * size, size});
                  },
              .replicas = {1, 1}};
    }
    default:
      break;
  }
  const bool is_o = base_of(c) == Base::o_proj;
  return {.prefix = is_o ? "model.layers.0.self_attn." : "model.layers.0.mlp.",
          .parts = {is_o ? "o_proj" : "down_proj"},
          .rows = {m.hidden_size},
          .in_features = is_o ? std::int64_t{m.num_heads} * m.value_head_dim() : intermediate(c),
          .cuts_columns = true,
          .outputs = {is_partial(c) ? "partial" : "out"},
          .buffer = is_partial(c) ? "partial" : "out",
          .own =
              [rows = m.hidden_size](int) {
                return std::vector<Shard>{{0, rows}};
              },
          .replicas = {1}};
}

// Exact activations thin enough for the shrunk ones to be integers that the type holds.
TensorSpec x_of(const Case& c) {
  const std::int64_t in = layer_of(c).in_features;
  const int p = std::min(format_of(c.dtype).p, 20);
  return linear::tensor(c, "x", c.num_tokens, in, Role::activation, linear::kLargestX,
                        std::min(1.0, std::ldexp(1.0, 2 * p - 2) / double(in)));
}

// The parts of all ranks, base and delta, added up as the layer or its caller does it.
Stage reduce_stage(const Case& c, const ShardingRules& rules) {
  const std::int64_t tokens = c.num_tokens, hidden = c.model.hidden_size, pad = c.options.at("pad");
  const DType type = base_dtype(c);
  const bool reduces = c.options.at("reduce") == 0;
  Stage stage{.name = "reduce"};
  stage.inputs = {{"partial_lora", type, c.tp_size * tokens, hidden}};
  stage.outputs = {{"sum", c.dtype, tokens, hidden}};
  stage.buffers = [=](int tp_rank) -> std::vector<LocalBuffer> {
    return {{"partial_lora",
             Use::input,
             type,
             tokens,
             hidden,
             {{"partial_lora", {0, hidden}, 0, Shard{tp_rank * tokens, tokens}}}},
            {"sums", Use::workspace, type, tokens, hidden},
            {"sum", Use::output, c.dtype, tokens, hidden + pad, {{"sum", {0, hidden}}}}};
  };
  stage.run = [=](RankRun& run) {
    dispatch(c.dtype, [&]<typename T>(T) {
      const auto reduce = [&]<typename R>(R) {
        const View<R> sums = run.view<R>("sums");
        store_sums<R, R>(run.view<R>("partial_lora"), sums, run.stream);
        reduce_results(sums, reduces, rules, run.group, run.stream);
        reduce_row_linear(sums, reduces, rules, run.group, run.stream);
        store_sums<T, R>(sums, run.view<T>("sum").columns(0, hidden), run.stream);
      };
      if (type == c.dtype) {
        reduce(T{});
      } else {
        reduce(float{});
      }
    });
  };
  stage.cost = [=](int) { return linear::cost(c, 2 * double(tokens * hidden), 0); };
  stage.reference = [=](const WholeInputs& in) -> std::vector<Budget> {
    std::vector<Budget> parts;
    for (int rank = 0; rank < c.tp_size; ++rank) {
      Budget part(tokens, hidden);
      std::copy_n(in["partial_lora"].row(rank * tokens), tokens * hidden, part.r.begin());
      parts.push_back(std::move(part));
    }
    return {reference::sum_of_runs(parts, {.partial = type, .out = c.dtype})};
  };
  return stage;
}

std::vector<Stage> stages(const Case& c, const ShardingRules& rules, const Variation& variation) {
  std::vector<Stage> all = lora::stages(c, layer_of(c), x_of(c), base_dtype(c), rules, variation);
  if (is_partial(c)) all.push_back(reduce_stage(c, rules));
  return all;
}

std::vector<Key> keys() {
  std::vector<Key> all = {
      linear::width_key("hidden_size"),
      shared_key("num_heads"),
      shared_key("num_kv_heads"),
      linear::width_key("head_dim"),
      linear::width_key("v_head_dim"),
      {.name = "intermediate_per_rank",
       .help = "of gate_up and down_proj: columns of gate, and of up, that each rank has",
       .min = 1,
       .max = 1 << 16,
       .fallback = 8,
       .draw_max = 512,
       .grain = 8,
       .of_model = true,
       .is_size = true},
      shared_key("tp_size"),
      linear::tokens_key(),
      shared_key("dtype"),
      shared_key("fill"),
      shared_key("seed"),
      {.name = "module",
       .help = "the base layer",
       .min = 0,
       .max = 3,
       .words = {"qkv", "gate_up", "o_proj", "down_proj"},
       .always = true,
       .shrink = Shrink::never,
       .weights = {45, 20, 20, 15}},
      {.name = "output_gate",
       .help = "1: q_proj has a gate for each head, behind its query",
       .min = 0,
       .max = 1,
       .words = {"0", "1"},
       .weights = {75, 25},
       .of_model = true}};
  for (Key& key : lora::keys()) all.push_back(std::move(key));
  all.push_back({.name = "reduce",
                 .help = "who adds up over the ranks what joins the base's parts: the layer or its "
                         "caller",
                 .min = 0,
                 .max = 1,
                 .words = {"all_reduce", "external"},
                 .fits = only_partial});
  all.push_back({.name = "reduce_dtype",
                 .help = "type of the ranks' parts and of their sum",
                 .min = 0,
                 .max = 1,
                 .words = {"activation", "f32"},
                 .fits = only_partial});
  all.push_back(pad_key("x and of the base's outputs"));
  return all;
}

// One rank with all of a slot's room and all of the MLP's columns.
LawRun law_one_rank() {
  LawRun law = lora::law_tp1();
  law.vary = [](const Case& c) {
    Case one = c;
    one.tp_size = 1;
    one.options["max_rank"] = lora::max_rank(c, layer_of(c));
    one.options["intermediate_per_rank"] = intermediate(c);
    return std::pair{one, Variation{.law = "tp1"}};
  };
  return law;
}

std::optional<std::string> refuse(const Case& c) {
  if (is_attention(c)) {
    if (auto reason = partitionable(shape_of(c), c.tp_size)) return reason;
  }
  const lora::Layer layer = layer_of(c);
  if (auto reason = lora::refuse(c, layer)) return reason;
  if (!is_partial(c) && (c.options.at("reduce") != 0 || c.options.at("reduce_dtype") != 0))
    return "reduce and reduce_dtype are about ranks' parts, which only a row-parallel layer with "
           "joins=partial leaves";
  const std::int64_t rows = *std::max_element(layer.rows.begin(), layer.rows.end()),
                     room = lora::max_rank(c, layer) * lora::slots(c);
  if (auto reason = too_large(rows, room)) return reason;
  if (auto reason = too_large(layer.in_features, room)) return reason;
  return too_large(std::int64_t{c.num_tokens} * c.tp_size, std::max(rows, layer.in_features));
}

}  // namespace

Operator make_lora() {
  return make_operator({
      .name = "lora",
      .what = "LoRA over a sharded linear layer: adapters in slots, shrink, expand",
      .keys = keys(),
      .laws = {law_one_rank(), lora::law_tokens(), lora::law_alpha(), lora::law_slots(),
               lora::law_alone(), lora::law_zero_b()},
      .mutants = lora::mutants(layer_of),
      .refuse = refuse,
      .work = [](const Case& c) { return lora::work(c, layer_of(c)); },
      .adopt =
          [](Case& c, const Model& model) {
            c.options.at("output_gate") = model.shape.attn_output_gate;
            if (model.intermediate_size > 0 && model.intermediate_size % c.tp_size == 0)
              c.options.at("intermediate_per_rank") = model.intermediate_size / c.tp_size;
          },
      .regime = linear::regime,
      .stages = stages,
  });
}

}  // namespace tp
