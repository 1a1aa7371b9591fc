// qk_norm: the full-width q/k norm over the ranks of a group. Here live the first two founding
// bugs: vllm-project/vllm#38191 (whose rows of the weight) and sgl-project/sglang#20967 (divided by
// what). And the norms of single heads, for which no rank needs another one.

#include "kernels/qk_norm.h"

#include <fmt/format.h>

#include <algorithm>

#include "kernels/weight_loader.h"
#include "properties/norm.h"
#include "properties/run/stage.h"
#include "properties/stages.h"
#include "reference/checkpoint.h"
#include "reference/qk_norm.h"

namespace tp {

namespace {

constexpr std::int64_t kFullWidth = 0;  // of the key `style`

bool is_full_width(const Case& c) { return c.options.at("style") == kFullWidth; }

// Whether the k norm's decisions are others than the right ones at this shape.
bool decides_differently(const ShardingRules& rules, const ModelShape& model, int tp_size) {
  const ShardingRules& right = sharding_rules();
  if (rules.norm.k_shards(model, tp_size) != right.norm.k_shards(model, tp_size)) return true;
  for (int rank = 0; rank < tp_size; ++rank) {
    if (rules.norm.k_weight(model, tp_size, rank) != right.norm.k_weight(model, tp_size, rank))
      return true;
    if (rules.norm.k_counts(model, tp_size, rank) != right.norm.k_counts(model, tp_size, rank))
      return true;
  }
  return false;
}

Mutant mutant(std::string id, std::string what, std::string upstream,
              void (*change)(ShardingRules&)) {
  Mutant m{std::move(id), std::move(what), std::move(upstream), sharding_rules()};
  change(m.rules);
  m.decides = [rules = m.rules](const Case& c) {
    return is_full_width(c) && decides_differently(rules, c.model, c.tp_size);
  };
  return m;
}

Mutant mutant(std::string id, std::string what, std::string upstream,
              void (*change)(ShardingRules&), bool (*decides)(const Case&)) {
  Mutant m = mutant(std::move(id), std::move(what), std::move(upstream), change);
  m.decides = decides;
  return m;
}

int replicas(const ModelShape& m, int tp_size) {
  return partition(m, tp_size, 0).num_kv_head_replicas;
}
std::int64_t local_kv_heads(const ModelShape& m, int tp_size) {
  return partition(m, tp_size, 0).kv_heads.size;
}

// Whether the statistic of q (0), of k (1) stays a rank's own.
bool is_local(const ShardingRules& rules, int which) {
  const Shard reduced = rules.norm.stats_reduced(1);
  return which < reduced.offset || which >= reduced.end();
}

std::int64_t groups_of_all_heads(int head_dim, std::int64_t local_heads, int all_heads) {
  return local_heads * head_dim / all_heads;
}

// Whether a kernel refuses this width of groups, of q or of k, whatever the data are: it leaves a
// rest.
bool is_refused(const Case& c, std::int64_t (*width_of)(int, std::int64_t, int)) {
  const int dim = c.model.head_dim;
  const RankShape rank = partition(c.model, c.tp_size, 0);
  const auto leaves_a_rest = [&](Shard heads, int all_heads) {
    const std::int64_t width = width_of(dim, heads.size, all_heads);
    return width == 0 || heads.size * dim % width != 0;
  };
  return leaves_a_rest(rank.heads, c.model.num_heads) ||
         leaves_a_rest(rank.kv_heads, c.model.num_kv_heads);
}

// Of the mistakes with a mean over other columns: exact rows have one magnitude, so that a part of
// one has the mean square of the whole, and `decides` leaves them out.
std::vector<Mutant> all_mutants() {
  const std::string weight = "minimax-knorm-shard-by-tp:", divisor = "minimax-norm-replica-aware:";
  const std::string vllm = "vllm-project/vllm#38191", sglang = "sgl-project/sglang#20967";
  const std::string local = "norm-stat-not-reduced:", minicpm = "sgl-project/sglang#38230";
  std::vector<Mutant> all = {
      mutant(weight + "cut", "k_norm weight cut by tp_size where KV heads are replicated", vllm,
             [](ShardingRules& r) {
               r.norm.k_weight = [](const ModelShape& m, int tp_size, int tp_rank) {
                 const std::int64_t size = std::int64_t{m.num_kv_heads} * m.head_dim / tp_size;
                 return Shard{tp_rank * size, size};
               };
             }),
      mutant(weight + "modulo",
             "k_norm weight of KV head tp_rank % num_kv_heads, not tp_rank / replicas", vllm,
             [](ShardingRules& r) {
               r.norm.k_weight = [](const ModelShape& m, int tp_size, int tp_rank) {
                 const std::int64_t heads = local_kv_heads(m, tp_size);
                 return Shard{tp_rank % (m.num_kv_heads / heads) * heads, heads}.times(m.head_dim);
               };
             }),
      mutant(weight + "rank", "k_norm weight of KV head tp_rank, not tp_rank / replicas", vllm,
             [](ShardingRules& r) {
               r.norm.k_weight = [](const ModelShape& m, int tp_size, int tp_rank) {
                 const std::int64_t heads = local_kv_heads(m, tp_size);
                 return Shard{tp_rank * heads, heads}.times(m.head_dim);
               };
             }),
      mutant(weight + "clamped", "k_norm weight of KV head tp_rank, clamped to the last one", vllm,
             [](ShardingRules& r) {
               r.norm.k_weight = [](const ModelShape& m, int tp_size, int tp_rank) {
                 const std::int64_t heads = local_kv_heads(m, tp_size);
                 return Shard{std::min(tp_rank * heads, m.num_kv_heads - heads), heads}.times(
                     m.head_dim);
               };
             }),
      mutant(divisor + "replicas",
             "all-reduced k variance divided by the replica count, not by tp_size", sglang,
             [](ShardingRules& r) {
               r.norm.k_shards = [](const ModelShape& m, int tp_size) {
                 return replicas(m, tp_size);
               };
             }),
      mutant(divisor + "kv-heads",
             "all-reduced k variance divided by num_kv_heads, forgetting the replicas", sglang,
             [](ShardingRules& r) {
               r.norm.k_shards = [](const ModelShape& m, int tp_size) {
                 return std::min(m.num_kv_heads, tp_size);
               };
             }),
      mutant(divisor + "one", "all-reduced k variance not divided at all", sglang,
             [](ShardingRules& r) { r.norm.k_shards = [](const ModelShape&, int) { return 1; }; }),
      mutant(divisor + "unique", "only one replica of each KV head summed, but divided by tp_size",
             sglang,
             [](ShardingRules& r) {
               r.norm.k_counts = [](const ModelShape& m, int tp_size, int tp_rank) {
                 return tp_rank % replicas(m, tp_size) == 0;
               };
             }),
      mutant(
          local + "k-local", "the mean square of k is that of the rank's own KV heads", minicpm,
          [](ShardingRules& r) {
            r.norm.stats_reduced = [](std::int64_t num_tokens) { return Shard{0, num_tokens}; };
            r.norm.k_shards = [](const ModelShape&, int) { return 1; };
          },
          [](const Case& c) {
            return is_full_width(c) && c.fill != Fill::exact &&
                   local_kv_heads(c.model, c.tp_size) < c.model.num_kv_heads;
          }),
      mutant(
          local + "all-local", "the mean squares of q and of k are those of the rank's own heads",
          minicpm,
          [](ShardingRules& r) {
            r.norm.stats_reduced = [](std::int64_t) { return Shard{0, 0}; };
            r.norm.q_shards = r.norm.k_shards = [](const ModelShape&, int) { return 1; };
          },
          [](const Case& c) { return is_full_width(c) && c.fill != Fill::exact && c.tp_size > 1; }),
      mutant(
          "grouped-norm-global-group-count:heads",
          "a rank's columns divided by the heads of the model, not by its own: groups too small",
          "state-spaces/mamba#951",
          [](ShardingRules& r) { r.norm.head_width = groups_of_all_heads; },
          [](const Case& c) {
            return !is_full_width(c) && c.tp_size > 1 &&
                   (c.fill != Fill::exact || is_refused(c, groups_of_all_heads));
          }),
  };
  for (Mutant& m : norm::head_weight_mutants("style")) all.push_back(std::move(m));
  return all;
}

const std::vector<Mutant>& mutants() {
  static const std::vector<Mutant> all = all_mutants();
  return all;
}

// Whether a norm over the heads of a rank alone would show in the first token.
bool shows_local(DType t, const Matrix& x, const Matrix& weight, Shard cols, double eps,
                 const Profile& profile, const Budget& right) {
  Matrix part(1, cols.size), part_weight(1, cols.size);
  std::copy_n(x.row(0) + cols.offset, cols.size, part.row(0));
  std::copy_n(weight.row(0) + cols.offset, cols.size, part_weight.row(0));
  const Budget alone = reference::rms_norm(part, part_weight, eps, profile, double(cols.size));
  Budget altered(1, x.cols);
  std::copy_n(alone.r.begin(), cols.size, altered.r.begin() + cols.offset);
  return norm::tells_apart(t, right, altered, cols);
}

// Asks of every mutant that decides differently at this shape: would these data have shown it? The
// mistake is put into the inputs of the rank-free reference: rows of the weight swapped, another
// divisor, heads missing from the sum.
// One token is enough to tell: a mistake of the weight or of the divisor is the same in all of
// them.
std::optional<std::string> blind_to(const Case& c, double eps, const QkNormProfiles& profiles,
                                    const WholeInputs& in, const std::vector<Budget>& budgets) {
  const Matrix k = norm::first_row(in["k"]), &k_weight = in["k_weight"];
  const Profile& profile = profiles.k;
  const Budget& right = budgets[1];
  for (const Mutant& m : mutants()) {
    if (!m.shows(c)) continue;
    if (is_local(m.rules, 1)) {
      bool shown = false;
      for (int rank = 0; rank < c.tp_size && !shown; ++rank) {
        const RankShape part = partition(c.model, c.tp_size, rank);
        shown = shows_local(c.dtype, k, k_weight, part.kv_heads.times(c.model.head_dim), eps,
                            profile, right) ||
                (is_local(m.rules, 0) &&
                 shows_local(c.dtype, in["q"], in["q_weight"], part.heads.times(c.model.head_dim),
                             eps, profiles.q, budgets[0]));
      }
      if (!shown) return m.id;
      continue;
    }
    int counted = 0;
    for (int r = 0; r < c.tp_size; ++r) counted += m.rules.norm.k_counts(c.model, c.tp_size, r);
    // Every rank that counts adds its shard once; all shards are equally often among them.
    const double divisor = double(k.cols) * m.rules.norm.k_shards(c.model, c.tp_size) / counted;
    bool shown = false;
    for (int rank = 0; rank < c.tp_size && !shown; ++rank) {
      const Shard cols = partition(c.model, c.tp_size, rank).kv_heads.times(c.model.head_dim);
      const Shard taken = m.rules.norm.k_weight(c.model, c.tp_size, rank);
      if (taken == cols && divisor == double(k.cols)) continue;
      // A weight of the wrong length, or from beyond the tensor, is a finding whatever the data
      // are.
      shown = taken.size != cols.size || taken.end() > k_weight.cols;
      if (shown) break;
      Matrix weight = k_weight;
      std::copy_n(k_weight.row(0) + taken.offset, taken.size, weight.row(0) + cols.offset);
      shown = norm::tells_apart(c.dtype, right,
                                reference::rms_norm(k, weight, eps, profile, divisor), cols);
    }
    if (!shown) return m.id;
  }
  return std::nullopt;
}

// The norms of single heads; widths: the columns that a mean spans, of q and of k.
std::vector<Budget> head_norms(const Case& c, double eps, const norm::HeadWeights& weights,
                               const std::int64_t (&widths)[2], const Matrix& q, const Matrix& k,
                               const WholeInputs& in) {
  const std::int64_t style = c.options.at("style");
  std::vector<Budget> both;
  for (const int which : {0, 1}) {
    reference::HeadWeight weight;
    if (norm::has_head_weight(style)) weight.weight = &in[weights.of[which]];
    if (style == norm::kPerHead1p) weight.offset = weights.one_plus;
    both.push_back(reference::head_norm(which == 0 ? q : k, weight, c.model.head_dim, widths[which],
                                        eps, qk_head_norm_profile(c.model)));
  }
  return both;
}

// blind_to of the norms of single heads.
std::optional<std::string> blind_to_heads(const Case& c, double eps, const WholeInputs& in,
                                          const std::vector<Budget>& budgets) {
  const Matrix q = norm::first_row(in["q"]), k = norm::first_row(in["k"]);
  const std::int64_t dim = c.model.head_dim;
  const RankShape rank = partition(c.model, c.tp_size, 0);
  for (const Mutant& m : mutants()) {
    if (!m.shows(c) || is_refused(c, m.rules.norm.head_width)) continue;
    const std::int64_t widths[2] = {
        m.rules.norm.head_width(int(dim), rank.heads.size, c.model.num_heads),
        m.rules.norm.head_width(int(dim), rank.kv_heads.size, c.model.num_kv_heads)};
    const std::vector<Budget> altered =
        head_norms(c, eps, norm::head_weights(m.rules), widths, q, k, in);
    if (!norm::tells_apart(c.dtype, budgets[0], altered[0], {0, q.cols}) &&
        !norm::tells_apart(c.dtype, budgets[1], altered[1], {0, k.cols}))
      return m.id;
  }
  return std::nullopt;
}

// One weight of head_dim for all heads of q, one for all of k, or none.
Stage head_norm_stage(const Case& c, const ShardingRules& rules, double eps, Stage stage) {
  const ModelShape& m = c.model;
  const std::int64_t dim = m.head_dim, style = c.options.at("style");
  const bool has_weight = norm::has_head_weight(style);
  stage.inputs.resize(3);  // q, k, v
  for (const char* name : {"q_weight", "k_weight"}) {
    if (has_weight) stage.inputs.push_back({name, c.dtype, 1, dim, Role::weight, dim});
  }
  stage.buffers = [=, buffers = stage.buffers](int tp_rank) {
    std::vector<LocalBuffer> all;
    for (LocalBuffer& local : buffers(tp_rank)) {
      const bool is_weight = local.name == "q_weight" || local.name == "k_weight";
      if (local.name == "sums" || (is_weight && !has_weight)) continue;
      if (is_weight) {
        const int loaded = rules.norm.head_weight[local.name == "q_weight" ? 0 : 1];
        local.cols = dim;
        local.pieces = {{loaded == 0 ? "q_weight" : "k_weight", {0, dim}}};
      }
      all.push_back(std::move(local));
    }
    return all;
  };
  stage.run = [=](RankRun& run) {
    const RankShape rank = partition(m, c.tp_size, run.group.tp_rank());
    dispatch(c.dtype, [&]<typename T>(T) {
      QkNormWeights<T> weights;
      if (has_weight) weights = {run.view<T>("q_weight"), run.view<T>("k_weight")};
      qk_head_norm<T>(run.view<T>("qkv"), weights,
                      style == norm::kPerHead1p ? rules.norm.one_plus_weight : 0.0f,
                      run.view<T>("q_norm").columns(0, rank.heads.size * dim),
                      run.view<T>("k_norm").columns(0, rank.kv_heads.size * dim), m, rank, rules,
                      float(eps), run.stream);
    });
  };
  stage.cost = [=](int tp_rank) -> Cost {
    const RankShape rank = partition(m, c.tp_size, tp_rank);
    const double row = double(rank.heads.size + rank.kv_heads.size) * double(dim);
    return {.bytes = (2 * double(c.num_tokens) * row + (has_weight ? 2 : 0) * double(dim)) *
                     double(size_of(c.dtype)),
            .flops = 4 * double(c.num_tokens) * row};
  };
  stage.reference = [=](const WholeInputs& in) {
    return head_norms(c, eps, {}, {dim, dim}, in["q"], in["k"], in);
  };
  stage.blind_to = [=](const WholeInputs& in, const std::vector<Budget>& budgets) {
    return blind_to_heads(c, eps, in, budgets);
  };
  return stage;
}

Stage norm_stage(const Case& c, const ShardingRules& rules, const Variation& variation) {
  const ModelShape& m = c.model;
  const std::int64_t tokens = c.num_tokens, pad = c.options.at("pad"), dim = m.head_dim,
                     v_dim = m.value_head_dim();
  const double eps = norm::eps_of(c, variation);
  const QkNormPath path = c.options.at("path") == 0 ? QkNormPath::peer : QkNormPath::collective;
  const QkNormProfiles profiles = qk_norm_profiles(m, c.dtype, c.tp_size);
  const auto heads = [&](std::string name, std::int64_t rows, std::int64_t count,
                         std::int64_t width, Role role) {
    return TensorSpec{std::move(name), c.dtype, rows, count * width, role, width};
  };
  Stage stage{
      .name = "qk_norm",
      .inputs = {heads("q", tokens, m.num_heads, dim, Role::activation),
                 heads("k", tokens, m.num_kv_heads, dim, Role::activation),
                 heads("v", tokens, m.num_kv_heads, v_dim, Role::activation),
                 heads("q_weight", 1, m.num_heads, dim, Role::weight),
                 heads("k_weight", 1, m.num_kv_heads, dim, Role::weight)},
      .outputs = {heads("q_norm", tokens, m.num_heads, dim, Role::activation),
                  heads("k_norm", tokens, m.num_kv_heads, dim, Role::activation)},
      .buffers = [=](int tp_rank) -> std::vector<LocalBuffer> {
        const RankShape rank = partition(m, c.tp_size, tp_rank);
        const Shard q = rank.heads.times(dim), k = rank.kv_heads.times(dim),
                    v = rank.kv_heads.times(v_dim);
        const Shard k_weight = rules.norm.k_weight(m, c.tp_size, tp_rank);
        return {{"qkv",
                 Use::input,
                 c.dtype,
                 tokens,
                 q.size + k.size + v.size + pad,
                 {{"q", q, 0}, {"k", k, q.size}, {"v", v, q.size + k.size}}},
                {"q_weight", Use::input, c.dtype, 1, q.size, {{"q_weight", q, 0}}},
                {"k_weight", Use::input, c.dtype, 1, k_weight.size, {{"k_weight", k_weight, 0}}},
                {"sums", Use::workspace, DType::f32, 1, 2 * tokens},
                {"q_norm", Use::output, c.dtype, tokens, q.size + pad, {{"q_norm", q, 0}}},
                {"k_norm", Use::output, c.dtype, tokens, k.size + pad, {{"k_norm", k, 0}}}};
      },
      .run =
          [=](RankRun& run) {
            const RankShape rank = partition(m, c.tp_size, run.group.tp_rank());
            dispatch(c.dtype, [&]<typename T>(T) {
              qk_norm<T>(run.view<T>("qkv"), {run.view<T>("q_weight"), run.view<T>("k_weight")},
                         run.view<T>("q_norm").columns(0, rank.heads.size * dim),
                         run.view<T>("k_norm").columns(0, rank.kv_heads.size * dim),
                         run.view<float>("sums").data, m, rules, float(eps), run.group, run.stream,
                         path);
            });
          },
      .cost = [=](int tp_rank) -> Cost {
        const RankShape rank = partition(m, c.tp_size, tp_rank);
        const double row = double(rank.heads.size + rank.kv_heads.size) * dim;
        // q and k read and written, and the weights; a square, an addition, two products each.
        return {.bytes = (2 * double(tokens) + 1) * row * double(size_of(c.dtype)),
                .flops = 4 * double(tokens) * row};
      },
      .reference = [=](const WholeInputs& in) -> std::vector<Budget> {
        reference::QkNorm r = reference::qk_norm(in["q"], in["k"], in["q_weight"], in["k_weight"],
                                                 eps, profiles.q, profiles.k);
        return {std::move(r.q), std::move(r.k)};
      },
      .blind_to =
          [=](const WholeInputs& in, const std::vector<Budget>& budgets) {
            return blind_to(c, eps, profiles, in, budgets);
          },
  };
  if (!is_full_width(c)) stage = head_norm_stage(c, rules, eps, std::move(stage));
  return stage;
}

bool is_stored(const Case& c) { return c.options.at("weights") == 1; }

// What a checkpoint calls the weight of q, of k.
std::string stored_name(const std::string& weight) {
  return fmt::format("model.layers.0.self_attn.{}_norm.weight", weight[0]);
}

// Loads the weights that `norm` takes, from wherever its rules say, to where the right ones do.
Stage load_stage(const Case& c, const Stage& norm, const Stage& right) {
  const auto is_weight = [](const std::string& name) {
    return name == "q_weight" || name == "k_weight";
  };
  Stage stage{.name = "load"};
  for (const TensorSpec& t : right.inputs) {
    if (!is_weight(t.name)) continue;
    stage.outputs.push_back(t);
    stage.inputs.push_back(t);
    stage.inputs.back().name = stored_name(t.name);
    stage.stored.push_back({stored_name(t.name), {t.cols}});
  }
  stage.buffers = [=, buffers = right.buffers](int tp_rank) {
    std::vector<LocalBuffer> all = buffers(tp_rank);
    std::erase_if(all, [&](const LocalBuffer& b) { return !is_weight(b.name); });
    for (LocalBuffer& b : all) b.use = Use::output;
    return all;
  };
  stage.run = [=, buffers = norm.buffers](RankRun& run) {
    for (const LocalBuffer& b : buffers(run.group.tp_rank())) {
      if (!is_weight(b.name)) continue;
      const Piece& taken = b.pieces.front();
      dispatch(c.dtype, [&]<typename T>(T) {
        load_vector<T>(run.checkpoint(), stored_name(taken.tensor), taken.cols, run.view<T>(b.name),
                       run.stream);
      });
    }
  };
  stage.reference = [names = stage.stored](const WholeInputs& in) {
    std::vector<Budget> all;
    for (const StoredInput& t : names) all.push_back(reference::exactly(in[t.tensor]));
    return all;
  };
  return stage;
}

// Where kernels cannot meet both are the collective's.
LawRun law_path() {
  return {.law = {"path",
                  "one kernel that meets its peers' and two around a collective give the "
                  "same bits"},
          .vary = [](const Case& c) {
            Case other = c;
            other.options.at("path") = 1 - c.options.at("path");
            return std::pair{other, Variation{}};
          }};
}

std::vector<Stage> stages(const Case& c, const ShardingRules& rules, const Variation& variation) {
  Stage norm = norm_stage(c, rules, variation);
  if (!is_stored(c)) return {std::move(norm)};
  // What was loaded is what the rank has room for.
  const Stage right = norm_stage(c, sharding_rules(), variation);
  Stage load = load_stage(c, norm, right);
  norm.buffers = right.buffers;
  norm.blind_to = {};  // weights that were loaded are compared themselves
  return {std::move(load), std::move(norm)};
}

}  // namespace

Stage qk_norm_stage(const Case& c, const ShardingRules& rules, const Variation& variation) {
  return norm_stage(c, rules, variation);
}

Operator make_qk_norm() {
  return make_operator({
      .name = "qk_norm",
      .what = "RMSNorm over all q heads and over all KV heads of a token, or over each, sharded by "
              "head",
      .keys = {shared_key("num_heads"),
               shared_key("num_kv_heads"),
               shared_key("head_dim"),
               shared_key("v_head_dim"),
               shared_key("tp_size"),
               shared_key("num_tokens"),
               shared_key("dtype"),
               shared_key("fill"),
               shared_key("seed"),
               norm::eps_key(),
               pad_key("qkv and of the outputs"),
               norm::head_norm_key("style", "what a mean spans and what it is multiplied with",
                                   "full_width", 58),
               {.name = "weights",
                .help = "where the weights come from: they are there, or a checkpoint has them",
                .min = 0,
                .max = 1,
                .words = {"given", "stored"},
                .weights = {70, 30}},
               {.name = "path",
                .help =
                    "full_width: one kernel that meets its peers' where they can, or two around "
                    "a collective",
                .min = 0,
                .max = 1,
                .words = {"peer", "collective"},
                .weights = {75, 25}}},
      .laws = {law_tp1(), law_scale(), law_tokens(), law_path()},
      .mutants = mutants(),
      .refuse =
          [](const Case& c) {
            if (auto reason = partitionable(c.model, c.tp_size)) return reason;
            if (is_stored(c) && !is_full_width(c) && !norm::has_head_weight(c.options.at("style")))
              return std::optional<std::string>("weights=stored, but this norm has none");
            return too_large(c.num_tokens, widest_qkv(c));
          },
      .regime = norm::regime,
      .stages = stages,
  });
}

}  // namespace tp
