// row_linear: a row-parallel linear layer and the one sum over the ranks that belongs to it, by the
// layer (as an all-reduce, or as a reduce-scatter of the tokens) or by its caller. Here live the
// bias that is added once per rank and the sum that is made twice or not at all.

#include "kernels/row_linear.h"

#include <fmt/format.h>

#include <cmath>

#include "harness/base/models.h"
#include "harness/device/matmul.h"
#include "properties/linear.h"
#include "properties/run/stage.h"
#include "properties/stages.h"
#include "properties/stored_linear.h"
#include "properties/stored_linear_mutants.h"
#include "reference/row_linear.h"

namespace tp {

namespace {

enum class Reduce : std::int64_t { all_reduce, reduce_scatter, external };

Reduce reduce_of(const Case& c) { return Reduce(c.options.at("reduce")); }
DType sums_dtype(const Case& c) { return c.options.at("reduce_dtype") == 1 ? DType::f32 : c.dtype; }
std::int64_t in_per_rank(const Case& c) { return c.options.at("in_per_rank"); }
std::int64_t in_features(const Case& c) { return in_per_rank(c) * c.tp_size; }

Mutant mutant(std::string id, std::string what, std::string upstream,
              void (*change)(ShardingRules&), bool (*decides)(const Case&)) {
  Mutant m{std::move(id), std::move(what), std::move(upstream), sharding_rules()};
  change(m.rules);
  m.decides = [decides](const Case& c) { return c.tp_size > 1 && decides(c); };
  return m;
}

const std::vector<Mutant>& mutants() {
  static const std::vector<Mutant> all = {
      mutant(
          "own:row-bias-on-every-rank", "every rank adds the bias to its partial sum", "-",
          [](ShardingRules& r) { r.linear.row_adds_bias = [](int) { return true; }; },
          linear::has_bias),
      mutant(
          "own:row-columns-of-next-rank", "the weight's columns are those of the next rank", "-",
          [](ShardingRules& r) {
            r.linear.row_weight_columns = [](std::int64_t in, int tp_size, int tp_rank) {
              const std::int64_t size = div_exact(in, tp_size);
              return Shard{(tp_rank + 1) % tp_size * size, size};
            };
          },
          [](const Case&) { return true; }),
      mutant(
          "own:row-reduce-whole-batches-only",
          "the partial sums are added up only where the tokens divide by tp_size", "-",
          [](ShardingRules& r) {
            r.linear.row_reductions = [](bool reduce_results, std::int64_t num_tokens,
                                         int tp_size) {
              return reduce_results && num_tokens % tp_size == 0 ? 1 : 0;
            };
          },
          [](const Case& c) {
            return reduce_of(c) == Reduce::all_reduce && c.num_tokens % c.tp_size != 0;
          }),
      mutant(
          "shared-expert-double-reduce:twice",
          "the caller adds up over the ranks what the layer has added up already",
          "vllm-project/vllm#49122",
          [](ShardingRules& r) { r.linear.row_caller_reductions = [](bool) { return 1; }; },
          [](const Case& c) {
            // Beside an only token the other ranks have zeros to add.
            return reduce_of(c) == Reduce::all_reduce ||
                   (reduce_of(c) == Reduce::reduce_scatter && c.num_tokens > 1);
          }),
      mutant(
          "shared-expert-double-reduce:not-at-all",
          "the layer leaves its partial sums to its caller, who does not add them up",
          "vllm-project/tpu-inference#3435",
          [](ShardingRules& r) { r.linear.row_caller_reductions = [](bool) { return 0; }; },
          [](const Case& c) { return reduce_of(c) == Reduce::external; }),
  };
  return all;
}

// How many of the exact inputs are not zero: as many as can be for the partial sums of `ranks`
// ranks, and whatever is made of them on the way, to be integers that the type of the sums holds.
// A product is 3.4 large (root mean square), so the partial sums of one sign add up to about
// 1.4 sqrt(in_features * ranks), and to no more than twice that.
double density(const Case& c, int ranks) {
  const int p = std::min(format_of(sums_dtype(c)).p, 20);
  const double room = std::ldexp(1.0, 2 * p - 2);
  return std::min(1.0, room / (double(in_features(c)) * ranks));
}

// Tokens of each rank, if they are shared out; the last ranks may have fewer, or none.
std::int64_t share_of(const Case& c) { return (c.num_tokens + c.tp_size - 1) / c.tp_size; }

// A token's partial sums, a row for each rank, under these rules and before any rounding.
Matrix partial_sums(const Case& c, const ShardingRules& rules, const WholeInputs& in,
                    std::int64_t token) {
  const Matrix &x = in["x"], &weight = in["weight"];
  const std::int64_t width = in_per_rank(c);
  Matrix sums(c.tp_size, weight.rows);
  for (int rank = 0; rank < c.tp_size; ++rank) {
    const double* mine = x.row(token) + rank * width;
    const Shard loaded = rules.linear.row_weight_columns(x.cols, c.tp_size, rank);
    for (std::int64_t j = 0; j < weight.rows; ++j) {
      const double* taken = weight.row(j) + loaded.offset;
      double& sum = sums.row(rank)[j];
      if (linear::has_bias(c) && rules.linear.row_adds_bias(rank)) sum = in["bias"].row(0)[j];
      for (std::int64_t k = 0; k < width; ++k) sum += mine[k] * taken[k];
    }
  }
  return sums;
}

// What these rules make of a token on the ranks that store it, a row for each, before any rounding.
Matrix stored(const Case& c, const ShardingRules& rules, const WholeInputs& in,
              std::int64_t token) {
  const bool scatters = reduce_of(c) == Reduce::reduce_scatter,
             reduces = reduce_of(c) != Reduce::external;
  const auto total = [&](std::int64_t of_token) {
    const Matrix sums = partial_sums(c, rules, in, of_token);
    Matrix all(1, sums.cols);
    for (std::int64_t rank = 0; rank < sums.rows; ++rank) {
      for (std::int64_t j = 0; j < sums.cols; ++j) all.values[std::size_t(j)] += sums.row(rank)[j];
    }
    return all;
  };
  int reductions = rules.linear.row_caller_reductions(reduces);
  if (!scatters) reductions += rules.linear.row_reductions(reduces, c.num_tokens, c.tp_size);
  if (reductions == 0) return scatters ? total(token) : partial_sums(c, rules, in, token);
  Matrix all = total(token);
  if (scatters) {  // a sum of other tokens, too: those that are as far into their ranks' shares
    for (std::int64_t other = token % share_of(c); other < c.num_tokens; other += share_of(c)) {
      if (other == token) continue;
      const Matrix more = total(other);
      for (std::size_t j = 0; j < more.values.size(); ++j) all.values[j] += more.values[j];
    }
  }
  // All ranks have the same by then, and each further sum is as many times that.
  for (double& v : all.values) v *= std::pow(double(c.tp_size), reductions - 1);
  return all;
}

// Asks of every mistake that decides differently in this case: would these data have shown it?
std::optional<std::string> blind_to(const Case& c, const WholeInputs& in, const Budget& right) {
  for (const Mutant& m : mutants()) {
    if (!m.shows(c)) continue;
    bool shown = false;
    for (std::int64_t token = 0; token < right.rows && !shown; ++token) {
      const Matrix altered = stored(c, m.rules, in, token);
      for (std::size_t at = 0; at < altered.values.size() && !shown; ++at) {
        const std::size_t of = std::size_t(token * right.cols) + at % std::size_t(right.cols);
        shown = !accepts(c.dtype, altered.values[at], right.r[of], right.rho[of]);
      }
    }
    if (!shown) return m.id;
  }
  return std::nullopt;
}

// Of the case that a law started from, whose data these are.
int ranks_of_data(const Case& c, const Variation& variation) {
  return variation.argument > 0 ? int(variation.argument) : c.tp_size;
}

// The input with the data of a case with so many ranks.
TensorSpec x_of(const Case& c, int ranks) {
  return linear::tensor(c, "x", c.num_tokens, in_features(c), Role::activation, linear::kLargestX,
                        density(c, ranks));
}

bool is_attention_out(const Case& c) { return c.options.at("module") == 1; }

stored_linear::Layer layer_of(const Case& c) {
  return {.prefix = is_attention_out(c) ? "model.layers.0.self_attn." : "model.layers.0.mlp.",
          .parts = {is_attention_out(c) ? "o_proj" : "down_proj"},
          .biases = {"bias"},
          .kind = is_attention_out(c) ? LinearKind::attention_out : LinearKind::mlp_out,
          .rows = {c.model.hidden_size},
          .in_features = in_features(c),
          .taken =
              [rows = c.model.hidden_size](const ShardingRules&, int) {
                return std::vector<Shard>{{0, rows}};
              },
          .columns =
              [in = in_features(c), tp_size = c.tp_size](const ShardingRules& rules, int tp_rank) {
                return rules.linear.row_weight_columns(in, tp_size, tp_rank);
              }};
}

// The product, of weights of whatever kind, and the sum over the ranks.
Stage product_stage(const Case& c, const ShardingRules& rules, const Variation& variation) {
  const std::int64_t tokens = c.num_tokens, hidden = c.model.hidden_size, in = in_features(c),
                     width = in_per_rank(c), pad = c.options.at("pad");
  const bool bias = linear::has_bias(c), scatters = reduce_of(c) == Reduce::reduce_scatter,
             quantised = stored_linear::is_quantised(c), is_loaded = stored_linear::is_loaded(c);
  const DType sums_type = sums_dtype(c);
  const stored_linear::Layer layer = layer_of(c);
  const std::string weight_name = is_loaded ? layer.parts[0] : "weight";
  // What was loaded is what the rank has room for.
  const ShardingRules& loading = is_loaded ? sharding_rules() : rules;
  const std::int64_t share = share_of(c);
  const auto own_tokens = [=](int tp_rank) {
    const std::int64_t first = std::min(tokens, tp_rank * share);
    return scatters ? Shard{first, std::min(share, tokens - first)} : Shard{0, tokens};
  };

  const TensorSpec x = x_of(c, ranks_of_data(c, variation));
  Stage stage{.name = "row_linear"};
  if (quantised) {
    stage.inputs = stored_linear::product_inputs(c, layer, x);
  } else {
    stage.inputs = {
        x, linear::tensor(c, weight_name, hidden, in, Role::weight, linear::kLargestWeight)};
  }
  if (bias) {
    stage.inputs.push_back(
        linear::tensor(c, "bias", 1, hidden, Role::weight, linear::kLargestBias));
  }
  stage.outputs = {{"out", c.dtype, tokens, hidden}};
  stage.buffers = [=](int tp_rank) -> std::vector<LocalBuffer> {
    const Shard own{tp_rank * width, width}, mine = own_tokens(tp_rank);
    const Shard loaded = loading.linear.row_weight_columns(in, c.tp_size, tp_rank);
    LocalBuffer out{"out", Use::output, c.dtype, std::max<std::int64_t>(1, mine.size),
                    hidden + pad};
    if (mine.size > 0) out.pieces.push_back({"out", {0, hidden}, 0, mine});
    std::vector<LocalBuffer> all = {
        {"sums", Use::workspace, sums_type, scatters ? share * c.tp_size : tokens, hidden}, out};
    if (quantised) {
      for (LocalBuffer& b : stored_linear::product_buffers(c, layer, tp_rank))
        all.push_back(std::move(b));
    } else {
      all.push_back({"x", Use::input, c.dtype, tokens, width + pad, {{"x", own}}});
      LocalBuffer weight{"weight", Use::input, c.dtype, hidden, loaded.size};
      weight.pieces.push_back(
          {weight_name, loaded, 0, is_loaded ? std::optional(Shard{0, hidden}) : std::nullopt});
      all.push_back(weight);
    }
    if (scatters) all.push_back({"mine", Use::workspace, sums_type, share, hidden});
    if (bias) all.push_back({"bias", Use::input, c.dtype, 1, hidden, {{"bias", {0, hidden}}}});
    return all;
  };
  stage.run = [=](RankRun& run) {
    const auto with = [&]<typename T, typename R>(T, R) {
      const View<T> b = bias ? run.view<T>("bias") : View<T>{};
      View<R> sums = run.view<R>("sums"), of_tokens = sums;
      of_tokens.rows = tokens;
      if (quantised) {
        const bool adds_bias = bias && rules.linear.row_adds_bias(run.group.tp_rank());
        stored_linear::product<T, R>(run, c, layer, adds_bias ? b : View<T>{}, of_tokens, rules);
      } else {
        partial_sums<T, R>(run.view<T>("x").columns(0, width), run.view<T>("weight"), b, of_tokens,
                           rules, run.group, run.stream);
      }
      if (scatters) {
        const View<R> mine = run.view<R>("mine");
        scatter_results(sums, tokens, mine, run.group, run.stream);
        sums = mine;
      } else {
        reduce_results(sums, reduce_of(c) != Reduce::external, rules, run.group, run.stream);
      }
      reduce_row_linear<R>(sums, reduce_of(c) != Reduce::external, rules, run.group, run.stream);
      View<T> out = run.view<T>("out").columns(0, hidden);
      out.rows = own_tokens(run.group.tp_rank()).size;
      if (out.rows > 0) store_sums<T, R>(sums, out, run.stream);
    };
    dispatch(c.dtype, [&]<typename T>(T) {
      if (sums_type == c.dtype) {
        with(T{}, T{});
      } else {
        with(T{}, float{});
      }
    });
  };
  stage.cost = [=](int tp_rank) -> Cost {
    const double activations =
        double(tokens) * double(width) + double(own_tokens(tp_rank).size) * double(hidden);
    const double products = double(tokens) * double(width) * double(hidden);
    if (!quantised) return linear::cost(c, activations + double(hidden) * double(width), products);
    return {
        .bytes = activations * size_of(c.dtype) + stored_linear::weight_bytes(c, layer, tp_rank),
        .matrix_flops = 2 * products};
  };
  stage.reference = [=](const WholeInputs& whole) -> std::vector<Budget> {
    const reference::RowLinearTypes types{.partial = sums_type, .out = c.dtype};
    const Matrix* b = bias ? &whole["bias"] : nullptr;
    if (quantised) {
      std::vector<Budget> runs;
      for (int rank = 0; rank < c.tp_size; ++rank) {
        runs.push_back(stored_linear::product_reference(
            c, layer, whole, 0, rank, rank == 0 ? b : nullptr,
            reference::run_is_last(std::size_t(c.tp_size), types)));
      }
      return {reference::sum_of_runs(runs, types)};
    }
    std::vector<Shard> runs;
    for (int rank = 0; rank < c.tp_size; ++rank) runs.push_back({rank * width, width});
    return {reference::row_linear(whole["x"], whole[weight_name], b, runs,
                                  matmul_accumulation(c.dtype, width), types)};
  };
  // Weights that were loaded are compared themselves.
  if (is_loaded) return stage;
  stage.blind_to = [=](const WholeInputs& whole, const std::vector<Budget>& budgets) {
    return blind_to(c, whole, budgets.front());
  };
  return stage;
}

std::vector<Stage> stages(const Case& c, const ShardingRules& rules, const Variation& variation) {
  const Stage product = product_stage(c, rules, variation);
  std::vector<TensorSpec> biases;
  if (linear::has_bias(c)) {
    biases.push_back(
        linear::tensor(c, "bias", 1, c.model.hidden_size, Role::weight, linear::kLargestBias));
  }
  std::vector<Stage> all = stored_linear::stages(
      c, layer_of(c), x_of(c, ranks_of_data(c, variation)), biases, rules, variation);
  all.push_back(product);
  return all;
}

stored_linear::OfCheckpoint of_checkpoint() {
  return {.op = "row_linear",
          .kinds = {LinearKind::mlp_out, LinearKind::attention_out},
          .layer = layer_of,
          .set_shape = [](Case& c, const ModelShape& model, LinearKind kind,
                          std::int64_t width) -> std::optional<std::string> {
            c.model.hidden_size = model.hidden_size;
            if (kind == LinearKind::attention_out) {
              if (auto why = partitionable(model, c.tp_size)) return why;
              width = std::int64_t{model.num_heads} * model.value_head_dim();
            }
            if (width % c.tp_size != 0)
              return fmt::format("{} columns of down_proj are not {} equal parts", width,
                                 c.tp_size);
            c.options.at("in_per_rank") = width / c.tp_size;
            return std::nullopt;
          }};
}

// The layer that a model has behind its attention.
void adopt(Case& c, const Model& model) {
  c.options.at("in_per_rank") =
      std::int64_t{model.shape.num_heads} * model.shape.value_head_dim() / c.tp_size;
}

// One rank with all the columns.
LawRun law_one_rank() {
  LawRun law = law_tp1();
  law.vary = [](const Case& c) {
    Case one = c;
    one.tp_size = 1;
    one.options["in_per_rank"] = in_features(c);
    return std::pair{one, Variation{.law = "tp1", .argument = c.tp_size}};
  };
  return law;
}

// Who adds up over the ranks is nothing to the sum: a rank's share of it is what all would have.
LawRun law_other_reduce() {
  return {
      .law = {"reduce", "shared out over the ranks or given to all, the sums have the same bits"},
      .vary = [](const Case& c) {
        Case other = c;
        other.options["reduce"] = std::int64_t(
            reduce_of(c) == Reduce::reduce_scatter ? Reduce::all_reduce : Reduce::reduce_scatter);
        return std::pair{other, Variation{.law = "reduce", .argument = c.tp_size}};
      }};
}

bool differs(const Case& c, const ShardingRules& rules) {
  return stored_linear::differs(c, layer_of(c), x_of(c, c.tp_size), linear::regime(c, {}), rules);
}

std::vector<Mutant> all_mutants() {
  std::vector<Mutant> all = mutants();
  for (Mutant& m : stored_linear::column_mutants(differs)) all.push_back(std::move(m));
  return all;
}

std::vector<Key> keys() {
  std::vector<Key> all = {
      linear::width_key("hidden_size"),
      {.name = "in_per_rank",
       .help = "columns of the input, and of the weight, that each rank has",
       .min = 1,
       .max = 1 << 16,
       .fallback = 8,
       .always = true,
       .draw_max = 1024,
       .grain = 8,
       .of_model = true,
       .is_size = true},
      shared_key("tp_size"),
      linear::tokens_key(),
      shared_key("dtype"),
      shared_key("fill"),
      shared_key("seed"),
      linear::bias_key(),
      {.name = "reduce",
       .help = "who adds up over the ranks: the layer, giving all tokens to all or its "
               "share to each, or the layer's caller",
       .min = 0,
       .max = 2,
       .words = {"all_reduce", "reduce_scatter", "external"}},
      {.name = "reduce_dtype",
       .help = "type of the partial sums and of their sum",
       .min = 0,
       .max = 1,
       .words = {"activation", "f32"}},
      pad_key("x and of out")};
  all.push_back({.name = "module",
                 .help = "which of a layer's row-parallel linears it is",
                 .min = 0,
                 .max = 1,
                 .words = {"down_proj", "o_proj"},
                 .is_drawn = false});
  for (Key& key : stored_linear::keys(false)) all.push_back(std::move(key));
  stored_linear::mark_keys_of_checkpoint(all);
  return all;
}

}  // namespace

std::vector<Stage> row_linear_stages(const Case& c, const ShardingRules& rules,
                                     const Variation& variation) {
  return stages(c, rules, variation);
}

stored_linear::Layer row_linear_layer(const Case& c) { return layer_of(c); }

Operator make_row_linear() {
  return make_operator({
      .name = "row_linear",
      .what = "row-parallel linear layer, and the sum over the ranks that it needs",
      .keys = keys(),
      .laws = {stored_linear::without_local_scales(law_one_rank(), "", "out"),
               stored_linear::law_tokens(), law_other_reduce(), stored_linear::law_files()},
      .mutants = all_mutants(),
      .refuse = [](const Case& c) -> std::optional<std::string> {
        const std::int64_t in = in_features(c), hidden = c.model.hidden_size;
        if (auto reason = stored_linear::refuse(c, layer_of(c))) return reason;
        if (auto reason = too_large(in, hidden)) return reason;
        return too_large(c.num_tokens, std::max(in, hidden * c.tp_size));
      },
      .work =
          [](const Case& c) {
            return linear::work(c, double(c.tp_size) * c.model.hidden_size, in_per_rank(c));
          },
      .adopt = adopt,
      .checkpoint_cases =
          [](int tp_size) { return stored_linear::checkpoint_cases(of_checkpoint(), tp_size); },
      .check_checkpoint = [] { stored_linear::check_checkpoint(of_checkpoint()); },
      .regime = linear::regime,
      .stages = stages,
  });
}

}  // namespace tp
