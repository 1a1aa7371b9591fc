// qkv_linear: the fused query, key and value projection, cut by head. Which rows of the three
// weights a rank loads is where KV heads that are replicated, blocks of a fused weight and value
// heads of a width of their own are got wrong; which scales come with them is where the others are.

#include "kernels/qkv_linear.h"

#include <algorithm>

#include "harness/base/models.h"
#include "harness/device/matmul.h"
#include "properties/linear.h"
#include "properties/lora_laws.h"
#include "properties/lora_option.h"
#include "properties/lora_stages.h"
#include "properties/run/stage.h"
#include "properties/stages.h"
#include "properties/stored_linear.h"
#include "properties/stored_linear_mutants.h"
#include "reference/qkv_linear.h"

namespace tp {

namespace {

using RowsRule = QkvRows (*)(const ModelShape&, int, int);

// The case's model, with the gate of its attention if the queries have one.
ModelShape shape_of(const Case& c) {
  ModelShape m = c.model;
  m.attn_output_gate = c.options.at("output_gate") == 1;
  return m;
}

// The mistake in the weight and in its bias, which one loader loads; in the bias alone.
Mutant mutant(std::string id, std::string what, std::string upstream, RowsRule weight,
              RowsRule bias) {
  Mutant m{std::move(id), std::move(what), std::move(upstream), sharding_rules()};
  if (weight != nullptr) m.rules.linear.qkv_weight_rows = weight;
  m.rules.linear.qkv_bias_rows = bias;
  m.decides = [rules = m.rules](const Case& c) {
    const ShardingRules& right = sharding_rules();
    for (int rank = 0; rank < c.tp_size; ++rank) {
      if (rules.linear.qkv_weight_rows(shape_of(c), c.tp_size, rank) !=
          right.linear.qkv_weight_rows(shape_of(c), c.tp_size, rank))
        return true;
      if (linear::has_bias(c) && rules.linear.qkv_bias_rows(shape_of(c), c.tp_size, rank) !=
                                     right.linear.qkv_bias_rows(shape_of(c), c.tp_size, rank))
        return true;
    }
    return false;
  };
  return m;
}

// The right q rows, and k and v rows of these KV heads.
QkvRows with_kv_heads(const ModelShape& m, int tp_size, int tp_rank, Shard kv_heads) {
  return {sharding_rules().linear.qkv_weight_rows(m, tp_size, tp_rank).q,
          kv_heads.times(m.head_dim), kv_heads.times(m.value_head_dim())};
}

QkvRows kv_heads_of_rank(const ModelShape& m, int tp_size, int tp_rank) {
  const std::int64_t heads = partition(m, tp_size, tp_rank).kv_heads.size;
  return with_kv_heads(m, tp_size, tp_rank, {tp_rank * heads, heads});
}

QkvRows kv_heads_modulo(const ModelShape& m, int tp_size, int tp_rank) {
  const std::int64_t heads = partition(m, tp_size, tp_rank).kv_heads.size;
  return with_kv_heads(m, tp_size, tp_rank, {tp_rank % (m.num_kv_heads / heads) * heads, heads});
}

// Rows [first, end) of q_proj, k_proj and v_proj, one below the other.
QkvRows contiguous_cut(const ModelShape& m, int tp_size, int tp_rank) {
  const std::int64_t q = std::int64_t{m.num_heads} * m.query_dim(),
                     k = std::int64_t{m.num_kv_heads} * m.head_dim,
                     v = std::int64_t{m.num_kv_heads} * m.value_head_dim();
  const std::int64_t size = (q + k + v) / tp_size, first = tp_rank * size;
  const auto of_block = [&](std::int64_t offset, std::int64_t rows) {
    const std::int64_t begin = std::clamp(first - offset, std::int64_t{0}, rows);
    return Shard{begin, std::clamp(first + size - offset, std::int64_t{0}, rows) - begin};
  };
  return {of_block(0, q), of_block(q, k), of_block(q + k, v)};
}

QkvRows values_by_head_dim(const ModelShape& m, int tp_size, int tp_rank) {
  QkvRows rows = sharding_rules().linear.qkv_weight_rows(m, tp_size, tp_rank);
  rows.v.offset = rows.k.offset;
  return rows;
}

QkvRows values_of_head_dim(const ModelShape& m, int tp_size, int tp_rank) {
  QkvRows rows = sharding_rules().linear.qkv_weight_rows(m, tp_size, tp_rank);
  rows.v = rows.k;
  return rows;
}

QkvRows queries_without_gate(const ModelShape& m, int tp_size, int tp_rank) {
  QkvRows rows = sharding_rules().linear.qkv_weight_rows(m, tp_size, tp_rank);
  rows.q.offset = partition(m, tp_size, tp_rank).heads.offset * m.head_dim;
  return rows;
}

QkvRows of_rank_0(const ModelShape& m, int tp_size, int) {
  return sharding_rules().linear.qkv_weight_rows(m, tp_size, 0);
}

const std::vector<Mutant>& mutants() {
  static const std::vector<Mutant> all = {
      mutant("packed-concat-contiguous-colwise:fused",
             "the fused weight [q; k; v] cut into equal runs of rows, not block by block",
             "NVIDIA-NeMo/Automodel#1324", contiguous_cut, contiguous_cut),
      mutant("own:qkv-kv-head-of-rank", "k and v rows of KV head tp_rank, not tp_rank / replicas",
             "-", kv_heads_of_rank, kv_heads_of_rank),
      mutant("own:qkv-kv-head-modulo",
             "k and v rows of KV head tp_rank % num_kv_heads, not tp_rank / replicas", "-",
             kv_heads_modulo, kv_heads_modulo),
      mutant("own:qkv-v-rows-by-head-dim",
             "the v rows begin where heads of head_dim would, though v_head_dim is another", "-",
             values_by_head_dim, values_by_head_dim),
      mutant("own:qkv-v-rows-of-head-dim",
             "the v rows of heads of head_dim, as many as k has, though v_head_dim is another", "-",
             values_of_head_dim, values_of_head_dim),
      mutant("output-gate-not-sliced:offset",
             "the q rows of a rank begin where those of heads without a gate would",
             "radixark/miles#972", queries_without_gate, queries_without_gate),
      mutant("own:qkv-bias-of-rank-0", "every rank adds the bias of rank 0's rows", "-", nullptr,
             of_rank_0),
      mutant("own:qkv-bias-kv-head-modulo",
             "the weight's rows are right, but those of the k and v bias are of KV head tp_rank % "
             "num_kv_heads",
             "-", nullptr, kv_heads_modulo),
  };
  return all;
}

// Whether the data would have shown a mistake: of each mutant that decides differently at this
// shape, some element of the output it makes is outside the budget of the element it stands for.
// The reference's own values say so: a row of the weight gives the column of the output that is
// known by it, wherever it was loaded to.
struct Projections {
  const Budget* outputs[3];      // q, k, v
  const Matrix* biases[3] = {};  // or nullptr
  DType dtype;
};

bool shows(const Projections& p, const QkvRows& right, const QkvRows& weight, const QkvRows& bias) {
  const Shard *rights[3] = {&right.q, &right.k, &right.v},
              *weights[3] = {&weight.q, &weight.k, &weight.v},
              *of_bias[3] = {&bias.q, &bias.k, &bias.v};
  for (int part = 0; part < 3; ++part) {
    const Budget& out = *p.outputs[part];
    // Rows of a wrong number, or from beyond the tensor, are a finding whatever the data are.
    for (const Shard* taken : {weights[part], of_bias[part]}) {
      if (taken->size != rights[part]->size || taken->end() > out.cols) return true;
    }
    for (std::int64_t j = 0; j < rights[part]->size; ++j) {
      const std::int64_t here = rights[part]->offset + j, taken = weights[part]->offset + j;
      double change = 0;
      if (const Matrix* b = p.biases[part]) {
        change = b->values[std::size_t(of_bias[part]->offset + j)] - b->values[std::size_t(taken)];
      }
      for (std::int64_t i = 0; i < out.rows; ++i) {
        const std::size_t at = std::size_t(i * out.cols + here);
        const double y = out.r[std::size_t(i * out.cols + taken)] + change;
        if (!accepts(p.dtype, y, out.r[at], out.rho[at])) return true;
      }
    }
  }
  return false;
}

std::optional<std::string> blind_to(const Case& c, const Projections& p) {
  for (const Mutant& m : mutants()) {
    if (!m.shows(c)) continue;
    bool shown = false;
    for (int rank = 0; rank < c.tp_size && !shown; ++rank) {
      const QkvRows weight = m.rules.linear.qkv_weight_rows(shape_of(c), c.tp_size, rank);
      shown =
          shows(p, sharding_rules().linear.qkv_weight_rows(shape_of(c), c.tp_size, rank), weight,
                linear::has_bias(c) ? m.rules.linear.qkv_bias_rows(shape_of(c), c.tp_size, rank)
                                    : weight);
    }
    if (!shown) return m.id;
  }
  return std::nullopt;
}

// Of q, k and v on all ranks together.
double output_columns(const Case& c) {
  const double kv_heads = std::max(c.model.num_kv_heads, c.tp_size);
  return c.model.num_heads * double(shape_of(c).query_dim()) +
         kv_heads * (c.model.head_dim + c.model.value_head_dim());
}

struct Part {
  const char *output, *weight, *bias;
  std::int64_t rows;
};
std::array<Part, 3> parts_of(const ModelShape& m) {
  return {{{"q", "q_proj", "q_bias", std::int64_t{m.num_heads} * m.query_dim()},
           {"k", "k_proj", "k_bias", std::int64_t{m.num_kv_heads} * m.head_dim},
           {"v", "v_proj", "v_bias", std::int64_t{m.num_kv_heads} * m.value_head_dim()}}};
}

std::array<Shard, 3> shards(const QkvRows& rows) { return {rows.q, rows.k, rows.v}; }

// Stripes on disk are those of KV heads: [q of its group | k | v].
stored_linear::Layer layer_of(const Case& c) {
  stored_linear::Layer layer{.prefix = "model.layers.0.self_attn.",
                             .fused = "qkv_proj",
                             .kind = LinearKind::qkv,
                             .stripes = c.model.num_kv_heads,
                             .in_features = c.model.hidden_size};
  for (const Part& p : parts_of(shape_of(c))) {
    layer.parts.push_back(p.weight);
    layer.biases.push_back(p.bias);
    layer.rows.push_back(p.rows);
  }
  layer.taken = [m = shape_of(c), tp_size = c.tp_size](const ShardingRules& rules, int tp_rank) {
    const auto rows = shards(rules.linear.qkv_weight_rows(m, tp_size, tp_rank));
    return std::vector(rows.begin(), rows.end());
  };
  layer.bias_taken = [m = shape_of(c), tp_size = c.tp_size](const ShardingRules& rules,
                                                            int tp_rank) {
    const auto rows = shards(rules.linear.qkv_bias_rows(m, tp_size, tp_rank));
    return std::vector(rows.begin(), rows.end());
  };
  return layer;
}

TensorSpec x_of(const Case& c) {
  return linear::tensor(c, "x", c.num_tokens, c.model.hidden_size, Role::activation,
                        linear::kLargestX);
}

std::vector<TensorSpec> biases_of(const Case& c) {
  std::vector<TensorSpec> all;
  for (const Part& p : parts_of(shape_of(c))) {
    if (linear::has_bias(c))
      all.push_back(linear::tensor(c, p.bias, 1, p.rows, Role::weight, linear::kLargestBias));
  }
  return all;
}

Case as_lora(const Case& c) {
  return lora::as_lora(c, lora::Base::qkv, {{"output_gate", c.options.at("output_gate")}});
}

// The product of weights that are not quantised: they are there, or were loaded.
Stage plain_product(const Case& c, const ShardingRules& rules, const Variation& variation) {
  const ModelShape m = shape_of(c);
  const std::int64_t tokens = c.num_tokens, hidden = m.hidden_size, pad = c.options.at("pad");
  const bool bias = linear::has_bias(c);
  const auto parts = parts_of(m);
  // What was loaded is what the rank has room for.
  const ShardingRules& loading = stored_linear::is_loaded(c) ? sharding_rules() : rules;
  Stage stage{.name = "qkv_linear"};
  stage.own_bits = stage.bits_by_size =
      stored_linear::product_has_own_bits(c, hidden, linear::has_bias(c));
  stage.inputs = biases_of(c);
  stage.inputs.push_back(x_of(c));
  for (std::size_t p = 0; p < parts.size(); ++p) {
    TensorSpec weight = linear::tensor(c, parts[p].weight, parts[p].rows, hidden, Role::weight,
                                       linear::kLargestWeight);
    if (variation.law == "merged") weight = lora::merged(std::move(weight), as_lora(c), p);
    stage.inputs.push_back(std::move(weight));
    stage.outputs.push_back({parts[p].output, c.dtype, tokens, parts[p].rows});
  }
  stage.buffers = [=](int tp_rank) -> std::vector<LocalBuffer> {
    LocalBuffer weight{"weight", Use::input, c.dtype, 0, hidden},
        biases{"bias", Use::input, c.dtype, 1, 0}, qkv{"qkv", Use::output, c.dtype, tokens, 0};
    const auto weight_rows = shards(loading.linear.qkv_weight_rows(m, c.tp_size, tp_rank)),
               bias_rows = shards(loading.linear.qkv_bias_rows(m, c.tp_size, tp_rank)),
               own = shards(sharding_rules().linear.qkv_weight_rows(m, c.tp_size, tp_rank));
    for (int i = 0; i < 3; ++i) {
      if (weight_rows[i].size > 0)
        weight.pieces.push_back({parts[i].weight, {0, hidden}, 0, weight_rows[i], weight.rows});
      weight.rows += weight_rows[i].size;
      if (bias_rows[i].size > 0)
        biases.pieces.push_back({parts[i].bias, bias_rows[i], biases.cols});
      biases.cols += bias_rows[i].size;
      qkv.pieces.push_back({parts[i].output, own[i], qkv.cols});
      qkv.cols += own[i].size;
    }
    qkv.cols += pad;
    std::vector<LocalBuffer> all = {
        {"x", Use::input, c.dtype, tokens, hidden + pad, {{"x", {0, hidden}}}}, weight, qkv};
    if (bias) all.push_back(biases);
    return all;
  };
  stage.run = [=](RankRun& run) {
    const RankShape rank = partition(m, c.tp_size, run.group.tp_rank());
    dispatch(c.dtype, [&]<typename T>(T) {
      qkv_linear<T>(run.view<T>("x").columns(0, hidden), run.view<T>("weight"),
                    bias ? run.view<T>("bias") : View<T>{},
                    run.view<T>("qkv").columns(0, qkv_width(m, rank)), m, rank, run.stream);
    });
  };
  stage.cost = [=](int tp_rank) -> Cost {
    const double width = double(qkv_width(m, partition(m, c.tp_size, tp_rank)));
    return linear::cost(c, double(tokens) * (double(hidden) + width) + width * double(hidden),
                        double(tokens) * double(hidden) * width);
  };
  stage.reference = [=](const WholeInputs& in) -> std::vector<Budget> {
    std::vector<Budget> budgets;
    for (const Part& p : parts) {
      budgets.push_back(reference::projection(in["x"], in[p.weight], bias ? &in[p.bias] : nullptr,
                                              matmul_accumulation(c.dtype, hidden), c.dtype));
    }
    return budgets;
  };
  // Weights that were loaded are compared themselves.
  if (stored_linear::is_loaded(c)) return stage;
  stage.blind_to = [=](const WholeInputs& in, const std::vector<Budget>& budgets) {
    Projections p{.outputs = {&budgets[0], &budgets[1], &budgets[2]}, .dtype = c.dtype};
    for (int i = 0; i < 3 && bias; ++i) p.biases[i] = &in[parts[i].bias];
    return blind_to(c, p);
  };
  return stage;
}

Stage quantised_product_stage(const Case& c, const ShardingRules& rules) {
  const ModelShape m = shape_of(c);
  const std::int64_t tokens = c.num_tokens, hidden = m.hidden_size, pad = c.options.at("pad");
  const bool bias = linear::has_bias(c);
  const auto parts = parts_of(m);
  const stored_linear::Layer layer = layer_of(c);
  Stage stage{.name = "qkv_linear"};
  stage.own_bits = stage.bits_by_size =
      stored_linear::product_has_own_bits(c, hidden, linear::has_bias(c));
  stage.inputs = stored_linear::product_inputs(c, layer, x_of(c));
  for (const TensorSpec& b : biases_of(c)) stage.inputs.push_back(b);
  for (const Part& p : parts) stage.outputs.push_back({p.output, c.dtype, tokens, p.rows});
  stage.buffers = [=](int tp_rank) {
    std::vector<LocalBuffer> all = stored_linear::product_buffers(c, layer, tp_rank);
    LocalBuffer biases{"bias", Use::input, c.dtype, 1, 0},
        qkv{"qkv", Use::output, c.dtype, tokens, 0};
    const auto own = shards(rows_of_own_heads(m, c.tp_size, tp_rank));
    for (int i = 0; i < 3; ++i) {
      biases.pieces.push_back({parts[i].bias, own[i], biases.cols});
      qkv.pieces.push_back({parts[i].output, own[i], qkv.cols});
      biases.cols = qkv.cols += own[i].size;
    }
    qkv.cols += pad;
    all.push_back(qkv);
    if (bias) all.push_back(biases);
    return all;
  };
  stage.run = [=](RankRun& run) {
    const std::int64_t width = qkv_width(m, partition(m, c.tp_size, run.group.tp_rank()));
    dispatch(c.dtype, [&]<typename T>(T) {
      stored_linear::product<T, T>(run, c, layer, bias ? run.view<T>("bias") : View<T>{},
                                   run.view<T>("qkv").columns(0, width), rules);
    });
  };
  stage.cost = [=](int tp_rank) -> Cost {
    const double width = double(qkv_width(m, partition(m, c.tp_size, tp_rank)));
    return {.bytes = stored_linear::weight_bytes(c, layer, tp_rank) +
                     double(tokens) * (double(hidden) + width) * size_of(c.dtype),
            .matrix_flops = 2 * double(tokens) * double(hidden) * width};
  };
  stage.reference = [=](const WholeInputs& in) {
    std::vector<Budget> budgets;
    for (std::size_t p = 0; p < parts.size(); ++p) {
      budgets.push_back(stored_linear::product_reference(
          c, layer, in, p, 0, bias ? &in[parts[p].bias] : nullptr, c.dtype == DType::f32));
    }
    return budgets;
  };
  return stage;
}

std::vector<Stage> stages(const Case& c, const ShardingRules& rules, const Variation& variation) {
  std::vector<Stage> all =
      stored_linear::stages(c, layer_of(c), x_of(c), biases_of(c), rules, variation);
  all.push_back(stored_linear::is_quantised(c) ? quantised_product_stage(c, rules)
                                               : plain_product(c, rules, variation));
  if (!lora::has_adapters(c)) return all;
  const Case of_lora = as_lora(c);
  return lora::followed_by(std::move(all), lora::stages(of_lora, lora::layer_of(of_lora), x_of(c),
                                                        c.dtype, rules, variation));
}

bool differs(const Case& c, const ShardingRules& rules) {
  return stored_linear::differs(c, layer_of(c), x_of(c), linear::regime(c, {}), rules);
}

std::vector<Mutant> all_mutants() {
  std::vector<Mutant> all = mutants();
  for (Mutant& m : stored_linear::fused_mutants(differs)) all.push_back(std::move(m));
  return all;
}

stored_linear::OfCheckpoint of_checkpoint() {
  return {.op = "qkv_linear",
          .kinds = {LinearKind::qkv},
          .layer = layer_of,
          .set_shape = [](Case& c, const ModelShape& model, LinearKind, std::int64_t) {
            c.model = model;
            c.model.attn_output_gate = false;  // a key of its own
            c.options.at("output_gate") = model.attn_output_gate;
            return partitionable(c.model, c.tp_size);
          }};
}

std::vector<Key> keys() {
  std::vector<Key> all = {linear::width_key("hidden_size"),
                          shared_key("num_heads"),
                          shared_key("num_kv_heads"),
                          linear::width_key("head_dim"),
                          linear::width_key("v_head_dim"),
                          shared_key("tp_size"),
                          linear::tokens_key(),
                          shared_key("dtype"),
                          shared_key("fill"),
                          shared_key("seed"),
                          linear::bias_key(),
                          linear::output_gate_key(),
                          pad_key("x and of the fused row")};
  for (auto& more : {stored_linear::keys(true), lora::option_keys(lora::fits_gather)})
    all.insert(all.end(), more.begin(), more.end());
  stored_linear::mark_keys_of_checkpoint(all);
  return all;
}

}  // namespace

std::vector<Stage> qkv_linear_stages(const Case& c, const ShardingRules& rules,
                                     const Variation& variation) {
  return stages(c, rules, variation);
}

stored_linear::Layer qkv_linear_layer(const Case& c) { return layer_of(c); }

Operator make_qkv_linear() {
  // A rank's product knows nothing of the others: one rank makes the same bits.
  LawRun tp1 = law_tp1();
  tp1.law.what = "one rank computes what tp_size ranks do, bit for bit";
  tp1.always_bitwise = true;
  return make_operator({
      .name = "qkv_linear",
      .what = "fused q, k, v projection, column-parallel, cut by head",
      .keys = keys(),
      .laws = {lora::with_adapters(stored_linear::without_local_scales(tp1)),
               lora::with_adapters(stored_linear::law_tokens()), stored_linear::law_files(),
               lora::law_merged(), lora::law_zero_b(lora::has_adapters)},
      .mutants = all_mutants(),
      .refuse =
          [](const Case& c) {
            if (auto reason = partitionable(c.model, c.tp_size)) return reason;
            if (auto reason = stored_linear::refuse(c, layer_of(c))) return reason;
            if (lora::has_adapters(c)) {
              if (auto reason = lora::refuse_option(c, as_lora(c))) return reason;
            }
            const std::int64_t width =
                widest_qkv(c) + std::int64_t{c.model.num_heads} * c.model.head_dim;
            if (auto reason = too_large(width, c.model.hidden_size)) return reason;
            return too_large(c.num_tokens, std::max<std::int64_t>(width, c.model.hidden_size));
          },
      .work =
          [](const Case& c) {
            return linear::work(c, output_columns(c), c.model.hidden_size) +
                   (lora::has_adapters(c) ? lora::work(as_lora(c)) : 0);
          },
      .adopt =
          [](Case& c, const Model& model) {
            c.options.at("output_gate") = model.shape.attn_output_gate;
          },
      .checkpoint_cases =
          [](int tp_size) { return stored_linear::checkpoint_cases(of_checkpoint(), tp_size); },
      .check_checkpoint = [] { stored_linear::check_checkpoint(of_checkpoint()); },
      .regime = linear::regime,
      .stages = stages,
  });
}

}  // namespace tp
