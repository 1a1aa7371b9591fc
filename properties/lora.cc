// lora: adapters over a sharded linear layer, in slots, for a batch of tokens that use several of
// them or none. Which rows of B a rank holds where KV heads are replicated, what is gathered or
// added up between shrink and expand, and which sum the delta joins: that is where it is got wrong,
// and nothing else in a model shows it as long as B is zero.

#include "kernels/lora.h"

#include <algorithm>
#include <cmath>

#include "harness/base/models.h"
#include "properties/linear.h"
#include "properties/lora_laws.h"
#include "properties/lora_layers.h"
#include "properties/lora_mutants.h"
#include "properties/lora_stages.h"
#include "properties/lora_user.h"
#include "properties/stages.h"

namespace tp {

namespace {

using lora::is_partial;
using lora::layer_of;

DType base_dtype(const Case& c) {
  return is_partial(c) && c.options.at("reduce_dtype") == 1 ? DType::f32 : c.dtype;
}

bool only_partial(const Case& c, std::int64_t word) { return word == 0 || is_partial(c); }

// Exact activations thin enough for the shrunk ones to be integers that the type holds.
TensorSpec x_of(const Case& c) {
  const std::int64_t in = layer_of(c).in_features;
  const int p = std::min(format_of(c.dtype).p, 20);
  return linear::tensor(c, "x", c.num_tokens, in, Role::activation, linear::kLargestX,
                        std::min(1.0, std::ldexp(1.0, 2 * p - 2) / double(in)));
}

// The row-parallel layer that adds the parts up.
Case as_row_linear(const Case& c) {
  Case row = c;
  row.op = "row_linear";
  row.options = find_operator(row.op).blank().options;
  row.options.at("in_per_rank") = layer_of(c).in_features / c.tp_size;
  row.options.at("reduce") = c.options.at("reduce") == 0 ? 0 : 2;
  for (const char* key : {"reduce_dtype", "pad"}) row.options.at(key) = c.options.at(key);
  return row;
}

std::vector<Stage> stages(const Case& c, const ShardingRules& rules, const Variation& variation) {
  std::vector<Stage> all = lora::stages(c, layer_of(c), x_of(c), base_dtype(c), rules, variation);
  if (is_partial(c)) all.push_back(row_reduce_stage(as_row_linear(c), rules, "partial_lora"));
  return all;
}

std::vector<Key> keys() {
  Key intermediate = linear::per_rank_key(
      "intermediate_per_rank",
      "of gate_up and down_proj: columns of gate, and of up, that each rank has", 512, 8);
  intermediate.always = false;
  std::vector<Key> all = {linear::width_key("hidden_size"),
                          shared_key("num_heads"),
                          shared_key("num_kv_heads"),
                          linear::width_key("head_dim"),
                          linear::width_key("v_head_dim"),
                          intermediate,
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
                          linear::output_gate_key()};
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
  all.push_back(lora::layer_key());
  for (Key& key : all) {
    for (const char* name :
         {"hidden_size", "num_heads", "num_kv_heads", "head_dim", "v_head_dim",
          "intermediate_per_rank", "module", "output_gate", "max_rank", "lora_bias"})
      key.of_checkpoint |= key.name == name;
  }
  return all;
}

// One rank with all of a slot's room and all of the MLP's columns.
LawRun law_one_rank() {
  LawRun law = lora::law_tp1();
  law.vary = [](const Case& c) {
    Case one = c;
    one.tp_size = 1;
    one.options["max_rank"] = lora::max_rank(c, layer_of(c));
    one.options["intermediate_per_rank"] = lora::intermediate(c);
    return std::pair{one, Variation{.law = "tp1", .argument = c.tp_size}};
  };
  return law;
}

std::optional<std::string> refuse(const Case& c) {
  if (lora::has_heads(c)) {
    if (auto reason = partitionable(lora::shape_of(c), c.tp_size)) return reason;
  }
  if (lora::is_users(c)) {
    if (auto reason = lora::refuse_users(c)) return reason;
  }
  const lora::Layer layer = layer_of(c);
  if (auto reason = lora::refuse(c, layer)) return reason;
  if (!is_partial(c) && (c.options.at("reduce") != 0 || c.options.at("reduce_dtype") != 0))
    return "reduce and reduce_dtype are about ranks' parts, which only a row-parallel layer with "
           "joins=partial leaves";
  return std::nullopt;
}

}  // namespace

Operator make_lora() {
  return make_operator({
      .name = "lora",
      .what = "LoRA over a sharded linear layer: adapters in slots, shrink, expand",
      .keys = keys(),
      .laws = {law_one_rank(), lora::law_tokens(), lora::law_alpha(), lora::law_slots(),
               lora::law_alone()},
      .mutants = lora::mutants(layer_of),
      .refuse = refuse,
      .work = [](const Case& c) { return lora::work(c, layer_of(c)); },
      .adopt =
          [](Case& c, const Model& model) {
            c.options.at("output_gate") = model.shape.attn_output_gate;
            if (model.intermediate_size > 0 && model.intermediate_size % c.tp_size == 0)
              c.options.at("intermediate_per_rank") = model.intermediate_size / c.tp_size;
          },
      .adapter_cases = lora::adapter_cases,
      .regime = linear::regime,
      .stages = stages,
  });
}

}  // namespace tp
