// row_linear: a row-parallel linear layer and the one sum over the ranks that belongs to it, by the
// layer (as an all-reduce, or as a reduce-scatter of the tokens) or by its caller. Here live the
// bias that is added once per rank and the sum that is made twice or not at all.

#include "kernels/row_linear.h"

#include <fmt/format.h>

#include <cmath>
#include <numeric>

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
#include "reference/checkpoint.h"
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

// Those of the partial sums, and of what is done with them.
const std::vector<Mutant>& product_mutants() {
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
  };
  return all;
}

const std::vector<Mutant>& sum_mutants() {
  static const std::vector<Mutant> all = {
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

const std::vector<Mutant>& mutants() {
  static const std::vector<Mutant> all = [] {
    std::vector<Mutant> both = product_mutants();
    both.insert(both.end(), sum_mutants().begin(), sum_mutants().end());
    return both;
  }();
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

// A token's partial sums, a row for each rank, before any rounding.
using PartialSums = std::function<Matrix(std::int64_t token)>;

// As these rules make them.
PartialSums sums_under(const Case& c, const ShardingRules& rules, const WholeInputs& in) {
  return [&](std::int64_t token) {
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
  };
}

// Of a tensor that has them, the tokens of one rank after those of another.
PartialSums sums_in(const Case& c, const Matrix& partial) {
  return [&c, &partial](std::int64_t token) {
    std::vector<std::int64_t> rows;
    for (int rank = 0; rank < c.tp_size; ++rank)
      rows.push_back(std::int64_t{rank} * c.num_tokens + token);
    return reference::taken_rows(partial, rows);
  };
}

// What these rules make of a token's partial sums on the ranks that store it, a row for each,
// before any rounding.
Matrix stored(const Case& c, const ShardingRules& rules, const PartialSums& partial_sums,
              std::int64_t token) {
  const bool scatters = reduce_of(c) == Reduce::reduce_scatter,
             reduces = reduce_of(c) != Reduce::external;
  const auto total = [&](std::int64_t of_token) {
    const Matrix sums = partial_sums(of_token);
    Matrix all(1, sums.cols);
    for (std::int64_t rank = 0; rank < sums.rows; ++rank) {
      for (std::int64_t j = 0; j < sums.cols; ++j) all.values[std::size_t(j)] += sums.row(rank)[j];
    }
    return all;
  };
  int reductions = rules.linear.row_caller_reductions(reduces);
  if (!scatters) reductions += rules.linear.row_reductions(reduces, c.num_tokens, c.tp_size);
  if (reductions == 0) return scatters ? total(token) : partial_sums(token);
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

// Whether a row of a budget, of type t, rejects any of these values.
bool rejects(const Budget& budget, std::int64_t row, DType t, const double* altered) {
  const std::size_t first = std::size_t(row * budget.cols);
  for (std::size_t j = 0; j < std::size_t(budget.cols); ++j) {
    if (!accepts(t, altered[j], budget.r[first + j], budget.rho[first + j])) return true;
  }
  return false;
}

bool shows_in_partial_sums(const Case& c, const PartialSums& altered, const Budget& right) {
  for (std::int64_t token = 0; token < c.num_tokens; ++token) {
    const Matrix rows = altered(token);
    for (std::int64_t rank = 0; rank < rows.rows; ++rank) {
      if (rejects(right, rank * c.num_tokens + token, sums_dtype(c), rows.row(rank))) return true;
    }
  }
  return false;
}

bool shows_in_output(const Case& c, const ShardingRules& rules, const PartialSums& partial_sums,
                     const Budget& right) {
  for (std::int64_t token = 0; token < right.rows; ++token) {
    const Matrix rows = stored(c, rules, partial_sums, token);
    for (std::int64_t rank = 0; rank < rows.rows; ++rank) {
      if (rejects(right, token, c.dtype, rows.row(rank))) return true;
    }
  }
  return false;
}

// Asks of every mistake that decides differently in this case: would these data have shown it?
template <typename Shows>
std::optional<std::string> blind_to(const std::vector<Mutant>& among, const Case& c,
                                    const Shows& shows) {
  for (const Mutant& m : among) {
    if (m.shows(c) && !shows(m.rules)) return m.id;
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

// The tokens that a rank has in the end.
Shard own_tokens(const Case& c, int tp_rank) {
  if (reduce_of(c) != Reduce::reduce_scatter) return {0, c.num_tokens};
  const std::int64_t share = share_of(c),
                     first = std::min<std::int64_t>(c.num_tokens, tp_rank * share);
  return {first, std::min(share, c.num_tokens - first)};
}

std::vector<TensorSpec> biases_of(const Case& c) {
  if (!linear::has_bias(c)) return {};
  return {linear::tensor(c, "bias", 1, c.model.hidden_size, Role::weight, linear::kLargestBias)};
}

// The product of weights of whatever kind.
struct Product {
  Product(const Case& c, const ShardingRules& rules)
      : c(c),
        rules(rules),
        layer(layer_of(c)),
        weight_name(stored_linear::is_loaded(c) ? layer.parts[0] : "weight") {}

  std::vector<TensorSpec> inputs(const Variation& variation) const;
  std::vector<LocalBuffer> buffers(int tp_rank) const;
  // sums [tokens, hidden]: of this rank.
  template <typename T, typename R>
  void run(RankRun& run, View<R> sums) const;
  // Of one rank's. `is_last`: see reference::product.
  Budget reference(const WholeInputs& whole, int tp_rank, bool is_last) const;
  Cost cost(int tp_rank) const;  // but for writing the sums

  const Case c;
  const ShardingRules rules;
  const stored_linear::Layer layer;
  const std::string weight_name;
};

std::vector<TensorSpec> Product::inputs(const Variation& variation) const {
  const TensorSpec x = x_of(c, ranks_of_data(c, variation));
  std::vector<TensorSpec> all =
      stored_linear::is_quantised(c)
          ? stored_linear::product_inputs(c, layer, x)
          : std::vector{x, linear::tensor(c, weight_name, c.model.hidden_size, in_features(c),
                                          Role::weight, linear::kLargestWeight)};
  for (TensorSpec& bias : biases_of(c)) all.push_back(std::move(bias));
  return all;
}

std::vector<LocalBuffer> Product::buffers(int tp_rank) const {
  const std::int64_t hidden = c.model.hidden_size, width = in_per_rank(c);
  const bool is_loaded = stored_linear::is_loaded(c);
  // What was loaded is what the rank has room for.
  const ShardingRules& loading = is_loaded ? sharding_rules() : rules;
  const Shard loaded = loading.linear.row_weight_columns(in_features(c), c.tp_size, tp_rank);
  std::vector<LocalBuffer> all;
  if (stored_linear::is_quantised(c)) {
    all = stored_linear::product_buffers(c, layer, tp_rank);
  } else {
    all.push_back({"x",
                   Use::input,
                   c.dtype,
                   c.num_tokens,
                   width + c.options.at("pad"),
                   {{"x", {tp_rank * width, width}}}});
    LocalBuffer weight{"weight", Use::input, c.dtype, hidden, loaded.size};
    weight.pieces.push_back(
        {weight_name, loaded, 0, is_loaded ? std::optional(Shard{0, hidden}) : std::nullopt});
    all.push_back(weight);
  }
  if (linear::has_bias(c))
    all.push_back({"bias", Use::input, c.dtype, 1, hidden, {{"bias", {0, hidden}}}});
  return all;
}

template <typename T, typename R>
void Product::run(RankRun& run, View<R> sums) const {
  const bool bias = linear::has_bias(c);
  const View<T> b = bias ? run.view<T>("bias") : View<T>{};
  if (stored_linear::is_quantised(c)) {
    const bool adds_bias = bias && rules.linear.row_adds_bias(run.group.tp_rank());
    stored_linear::product<T, R>(run, c, layer, adds_bias ? b : View<T>{}, sums, rules);
  } else {
    partial_sums<T, R>(run.view<T>("x").columns(0, in_per_rank(c)), run.view<T>("weight"), b, sums,
                       rules, run.group, run.stream);
  }
}

Budget Product::reference(const WholeInputs& whole, int tp_rank, bool is_last) const {
  const Matrix* b = linear::has_bias(c) && tp_rank == 0 ? &whole["bias"] : nullptr;
  if (stored_linear::is_quantised(c))
    return stored_linear::product_reference(c, layer, whole, 0, tp_rank, b, is_last);
  const std::int64_t width = in_per_rank(c);
  return reference::product(whole["x"], whole[weight_name], {tp_rank * width, width}, b,
                            matmul_accumulation(c.dtype, width), is_last);
}

Cost Product::cost(int tp_rank) const {
  const double tokens = double(c.num_tokens), width = double(in_per_rank(c)),
               hidden = double(c.model.hidden_size);
  const double products = tokens * width * hidden;
  if (!stored_linear::is_quantised(c))
    return linear::cost(c, tokens * width + hidden * width, products);
  return {
      .bytes = tokens * width * size_of(c.dtype) + stored_linear::weight_bytes(c, layer, tp_rank),
      .matrix_flops = 2 * products};
}

// The sum over the ranks: the partial sums' place, of `sums` rows at least `num_tokens`, and the
// output's.
std::vector<LocalBuffer> sum_buffers(const Case& c, int tp_rank) {
  const std::int64_t hidden = c.model.hidden_size, share = share_of(c);
  const bool scatters = reduce_of(c) == Reduce::reduce_scatter;
  const Shard mine = own_tokens(c, tp_rank);
  LocalBuffer out{"out", Use::output, c.dtype, std::max<std::int64_t>(1, mine.size),
                  hidden + c.options.at("pad")};
  if (mine.size > 0) out.pieces.push_back({"out", {0, hidden}, 0, mine});
  std::vector<LocalBuffer> all = {
      {"sums", Use::workspace, sums_dtype(c), scatters ? share * c.tp_size : c.num_tokens, hidden},
      out};
  if (scatters) all.push_back({"mine", Use::workspace, sums_dtype(c), share, hidden});
  return all;
}

// The partial sums of all tokens, in their place.
template <typename R>
View<R> sums_of_tokens(const Case& c, RankRun& run) {
  View<R> sums = run.view<R>("sums");
  sums.rows = c.num_tokens;
  return sums;
}

// Adds up what lies there, over the ranks, and stores this rank's tokens.
template <typename T, typename R>
void run_sum(RankRun& run, const Case& c, const ShardingRules& rules) {
  View<R> sums = sums_of_tokens<R>(c, run);
  const bool reduces = reduce_of(c) != Reduce::external;
  if (reduce_of(c) == Reduce::reduce_scatter) {
    const View<R> mine = run.view<R>("mine");
    scatter_results(run.view<R>("sums"), c.num_tokens, mine, run.group, run.stream);
    sums = mine;
  } else {
    reduce_results(sums, reduces, rules, run.group, run.stream);
  }
  reduce_row_linear<R>(sums, reduces, rules, run.group, run.stream);
  View<T> out = run.view<T>("out").columns(0, c.model.hidden_size);
  out.rows = own_tokens(c, run.group.tp_rank()).size;
  if (out.rows > 0) store_sums<T, R>(sums, out, run.stream);
}

double output_bytes(const Case& c, int tp_rank) {
  return double(own_tokens(c, tp_rank).size) * double(c.model.hidden_size) * size_of(c.dtype);
}

reference::RowLinearTypes types_of(const Case& c) {
  return {.partial = sums_dtype(c), .out = c.dtype};
}

// f(T{}, R{}): the types of the case, and of its sums.
template <typename F>
void with_types(const Case& c, const F& f) {
  dispatch(c.dtype, [&]<typename T>(T) {
    if (sums_dtype(c) == c.dtype) {
      f(T{}, T{});
    } else {
      f(T{}, float{});
    }
  });
}

// The product, of weights of whatever kind, and the sum over the ranks.
Stage product_stage(const Case& c, const ShardingRules& rules, const Variation& variation) {
  const Product product(c, rules);
  Stage stage{.name = "row_linear", .inputs = product.inputs(variation)};
  stage.own_bits = stage.bits_by_size =
      stored_linear::product_has_own_bits(c, in_per_rank(c), false);
  stage.outputs = {{"out", c.dtype, c.num_tokens, c.model.hidden_size}};
  stage.buffers = [=](int tp_rank) {
    std::vector<LocalBuffer> all = sum_buffers(c, tp_rank);
    for (LocalBuffer& b : product.buffers(tp_rank)) all.push_back(std::move(b));
    return all;
  };
  stage.run = [=](RankRun& run) {
    with_types(c, [&]<typename T, typename R>(T, R) {
      product.run<T, R>(run, sums_of_tokens<R>(c, run));
      run_sum<T, R>(run, c, rules);
    });
  };
  stage.cost = [=](int tp_rank) {
    Cost cost = product.cost(tp_rank);
    cost.bytes += output_bytes(c, tp_rank);
    return cost;
  };
  stage.reference = [=](const WholeInputs& whole) -> std::vector<Budget> {
    const bool is_last = reference::run_is_last(std::size_t(c.tp_size), types_of(c));
    std::vector<Budget> runs;
    for (int rank = 0; rank < c.tp_size; ++rank)
      runs.push_back(product.reference(whole, rank, is_last));
    return {reference::sum_of_runs(runs, types_of(c))};
  };
  // Weights that were loaded are compared themselves.
  if (stored_linear::is_loaded(c)) return stage;
  stage.blind_to = [=](const WholeInputs& whole, const std::vector<Budget>& budgets) {
    return blind_to(mutants(), c, [&](const ShardingRules& r) {
      return shows_in_output(c, r, sums_under(c, r, whole), budgets.front());
    });
  };
  return stage;
}

// The rows of the tensor `partial` that are a rank's.
Shard partial_rows(const Case& c, int tp_rank) {
  return {std::int64_t{tp_rank} * c.num_tokens, c.num_tokens};
}

LocalBuffer partial_buffer(const Case& c, const std::string& name, Use use, int tp_rank) {
  return {name,
          use,
          sums_dtype(c),
          c.num_tokens,
          c.model.hidden_size,
          {{name, {0, c.model.hidden_size}, 0, partial_rows(c, tp_rank)}}};
}

TensorSpec partial_tensor(const Case& c, const std::string& name) {
  return {name, sums_dtype(c), std::int64_t{c.tp_size} * c.num_tokens, c.model.hidden_size};
}

double partial_bytes(const Case& c) {
  return double(c.num_tokens) * double(c.model.hidden_size) * size_of(sums_dtype(c));
}

// Whether adapters' deltas join the ranks' partial sums, not the base's output.
bool joins_partial_sums(const Case& c) {
  return lora::has_adapters(c) && c.options.at("lora_joins") == 0;
}

Case as_lora(const Case& c) {
  return lora::as_lora(
      c, lora::Base::down_proj,
      {{"intermediate_per_rank", in_per_rank(c)}, {"joins", c.options.at("lora_joins")}});
}

// The layer as adapters see it.
lora::Layer adapted_layer(const Case& c) {
  lora::Layer layer = lora::layer_of(as_lora(c));
  layer.prefix = layer_of(c).prefix;
  layer.parts = layer_of(c).parts;
  return layer;
}

std::vector<Stage> stages(const Case& c, const ShardingRules& rules, const Variation& variation) {
  const TensorSpec x = x_of(c, ranks_of_data(c, variation));
  const bool partial = joins_partial_sums(c);
  std::vector<Stage> all = stored_linear::stages(c, layer_of(c), x, biases_of(c), rules, variation);
  all.push_back(partial ? row_partial_stage(c, rules, variation)
                        : product_stage(c, rules, variation));
  if (!lora::has_adapters(c)) return all;
  all = lora::followed_by(std::move(all),
                          lora::stages(as_lora(c), adapted_layer(c), x,
                                       partial ? sums_dtype(c) : c.dtype, rules, variation));
  if (partial) all.push_back(row_reduce_stage(c, rules, "partial_lora"));
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
  law.refuse = [](const Case& c) -> std::optional<std::string> {
    if (!joins_partial_sums(c)) return std::nullopt;
    return "law=tp1: ranks round what they shrink, each for itself, and one rank all of it";
  };
  return law;
}

// Who adds up over the ranks is nothing to the sum: a rank's share of it is what all would have.
LawRun law_other_reduce() {
  return {
      .law = {"reduce", "shared out over the ranks or given to all, the sums have the same bits"},
      .vary =
          [](const Case& c) {
            Case other = c;
            other.options["reduce"] =
                std::int64_t(reduce_of(c) == Reduce::reduce_scatter ? Reduce::all_reduce
                                                                    : Reduce::reduce_scatter);
            return std::pair{other, Variation{.law = "reduce", .argument = c.tp_size}};
          },
      .keeps_sizes = true,
      .refuse = [](const Case& c) -> std::optional<std::string> {
        if (!lora::has_adapters(c) || joins_partial_sums(c)) return std::nullopt;
        return "law=reduce shares the tokens out, and lora_joins=whole needs them all";
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
      linear::per_rank_key("in_per_rank",
                           "columns of the input, and of the weight, that each rank has", 1024, 8),
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
  for (auto& more : {stored_linear::keys(false), lora::option_keys()})
    all.insert(all.end(), more.begin(), more.end());
  all.push_back({.name = "lora_joins",
                 .help = "what adapters' deltas are added to: the ranks' parts of the sum (vLLM), "
                         "or the sum (SGLang)",
                 .min = 0,
                 .max = 1,
                 .words = {"partial", "whole"},
                 .fits = [](const Case& c, std::int64_t joins) {
                   return joins == 0 ||
                          (lora::has_adapters(c) && reduce_of(c) != Reduce::reduce_scatter);
                 }});
  stored_linear::mark_keys_of_checkpoint(all);
  return all;
}

}  // namespace

std::vector<Stage> row_linear_stages(const Case& c, const ShardingRules& rules,
                                     const Variation& variation) {
  return stages(c, rules, variation);
}

stored_linear::Layer row_linear_layer(const Case& c) { return layer_of(c); }

Stage row_partial_stage(const Case& c, const ShardingRules& rules, const Variation& variation) {
  const Product product(c, rules);
  Stage stage{.name = "row_partial", .inputs = product.inputs(variation)};
  stage.own_bits = stage.bits_by_size =
      stored_linear::product_has_own_bits(c, in_per_rank(c), false);
  stage.outputs = {partial_tensor(c, "partial")};
  stage.buffers = [=](int tp_rank) {
    std::vector<LocalBuffer> all = product.buffers(tp_rank);
    all.push_back(partial_buffer(c, "partial", Use::output, tp_rank));
    return all;
  };
  stage.run = [=](RankRun& run) {
    with_types(
        c, [&]<typename T, typename R>(T, R) { product.run<T, R>(run, run.view<R>("partial")); });
  };
  stage.cost = [=](int tp_rank) {
    Cost cost = product.cost(tp_rank);
    cost.bytes += partial_bytes(c);
    return cost;
  };
  stage.reference = [=](const WholeInputs& whole) -> std::vector<Budget> {
    Budget all(0, c.model.hidden_size);
    for (int rank = 0; rank < c.tp_size; ++rank) {
      const Budget mine = product.reference(whole, rank, sums_dtype(c) == DType::f32);
      all.rows += mine.rows;
      all.r.insert(all.r.end(), mine.r.begin(), mine.r.end());
      all.rho.insert(all.rho.end(), mine.rho.begin(), mine.rho.end());
    }
    return {all};
  };
  if (stored_linear::is_loaded(c)) return stage;
  stage.blind_to = [=](const WholeInputs& whole, const std::vector<Budget>& budgets) {
    return blind_to(product_mutants(), c, [&](const ShardingRules& r) {
      return shows_in_partial_sums(c, sums_under(c, r, whole), budgets.front());
    });
  };
  return stage;
}

Stage row_reduce_stage(const Case& c, const ShardingRules& rules, const std::string& partial) {
  Stage stage{.name = "row_reduce", .inputs = {partial_tensor(c, partial)}};
  stage.outputs = {{"out", c.dtype, c.num_tokens, c.model.hidden_size}};
  stage.buffers = [=](int tp_rank) {
    std::vector<LocalBuffer> all = sum_buffers(c, tp_rank);
    all.push_back(partial_buffer(c, partial, Use::input, tp_rank));
    return all;
  };
  stage.run = [=](RankRun& run) {
    with_types(c, [&]<typename T, typename R>(T, R) {
      // They are added up where they lie, and what is read stays as it is.
      store_sums<R, R>(run.view<R>(partial), sums_of_tokens<R>(c, run), run.stream);
      run_sum<T, R>(run, c, rules);
    });
  };
  stage.cost = [=](int tp_rank) -> Cost {
    return {.bytes = partial_bytes(c) + output_bytes(c, tp_rank)};
  };
  stage.reference = [=](const WholeInputs& whole) -> std::vector<Budget> {
    std::vector<Budget> runs;
    for (int rank = 0; rank < c.tp_size; ++rank) {
      const Shard rows = partial_rows(c, rank);
      std::vector<std::int64_t> mine(static_cast<std::size_t>(rows.size));
      std::iota(mine.begin(), mine.end(), rows.offset);
      runs.push_back(reference::exactly(reference::taken_rows(whole[partial], mine)));
    }
    return {reference::sum_of_runs(runs, types_of(c))};
  };
  stage.blind_to = [=](const WholeInputs& whole, const std::vector<Budget>& budgets) {
    return blind_to(sum_mutants(), c, [&](const ShardingRules& r) {
      return shows_in_output(c, r, sums_in(c, whole[partial]), budgets.front());
    });
  };
  return stage;
}

Operator make_row_linear() {
  return make_operator({
      .name = "row_linear",
      .what = "row-parallel linear layer, and the sum over the ranks that it needs",
      .keys = keys(),
      .laws = {lora::with_adapters(stored_linear::without_local_scales(law_one_rank(), "", "out")),
               lora::with_adapters(stored_linear::law_tokens()), law_other_reduce(),
               stored_linear::law_files(), lora::law_zero_b(lora::has_adapters)},
      .mutants = all_mutants(),
      .refuse = [](const Case& c) -> std::optional<std::string> {
        const std::int64_t in = in_features(c), hidden = c.model.hidden_size;
        if (auto reason = stored_linear::refuse(c, layer_of(c))) return reason;
        if (lora::has_adapters(c)) {
          if (!joins_partial_sums(c) && reduce_of(c) == Reduce::reduce_scatter)
            return "reduce=reduce_scatter shares the tokens out, and lora_joins=whole needs them "
                   "all";
          if (auto reason = lora::refuse_option(c, as_lora(c))) return reason;
        } else if (c.options.at("lora_joins") != 0) {
          return "lora_joins is about adapters, and lora=0 has none";
        }
        if (auto reason = too_large(in, hidden)) return reason;
        return too_large(c.num_tokens, std::max(in, hidden * c.tp_size));
      },
      .work =
          [](const Case& c) {
            return linear::work(c, double(c.tp_size) * c.model.hidden_size, in_per_rank(c)) +
                   (lora::has_adapters(c) ? lora::work(as_lora(c)) : 0);
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
