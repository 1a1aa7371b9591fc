#include "properties/lora_layers.h"

#include "properties/lora_user.h"

namespace tp::lora {

Base base_of(const Case& c) { return Base(c.options.at("module")); }

ModelShape shape_of(const Case& c) {
  ModelShape m = c.model;
  m.attn_output_gate = c.options.at("output_gate") == 1;
  return m;
}
std::int64_t intermediate(const Case& c) {
  return c.options.at("intermediate_per_rank") * c.tp_size;
}
bool has_heads(const Case& c) { return base_of(c) == Base::qkv || base_of(c) == Base::o_proj; }
bool is_partial(const Case& c) { return base_of(c) >= Base::o_proj && c.options.at("joins") == 0; }

namespace {

Layer drawn_layer_of(const Case& c) {
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

}  // namespace

Layer layer_of(const Case& c) {
  Layer layer = drawn_layer_of(c);
  if (!is_users(c)) return layer;
  layer.prefix = user_layer(c).prefix;
  if (!user_layer(c).fused.empty()) layer.fused = user_layer(c).fused;
  return layer;
}

}  // namespace tp::lora
