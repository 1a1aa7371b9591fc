// rope: the rotary embedding of the heads of q and k, after their norm where the model has one.
// Every rank turns its own heads by the positions of the batch; no rank needs another one.

#include "kernels/rope.h"

#include <algorithm>
#include <cmath>
#include <memory>

#include "harness/base/philox.h"
#include "properties/norm.h"
#include "properties/run/stage.h"
#include "properties/stages.h"
#include "reference/rope.h"

namespace tp {

namespace {

constexpr std::int64_t kNoNorm = 0;    // of the key `norm`
constexpr std::int64_t kScaleLaw = 2;  // of the key `law`: the place in the list of laws, from 1
const char* const kAtOrigin = "origin";
const char* const kOtherHeads = "heads";

std::int64_t norm_of(const Case& c) { return c.options.at("norm"); }
bool is_interleaved(const Case& c) { return c.options.at("style") == 1; }

// The columns of a head that rotate: all, half or a quarter of them, made even, and two at least.
std::int64_t rotary_dim(const Case& c) {
  const std::int64_t part = c.model.head_dim >> c.options.at("rotary");
  return std::max<std::int64_t>(2, part / 2 * 2);
}

// Positions of the tokens, below max_position; two tokens may have the same (of two sequences).
std::vector<std::int32_t> positions_of(const Case& c, const Variation& variation) {
  std::vector<std::int32_t> positions(std::size_t(c.num_tokens), 0);
  if (variation.law == kAtOrigin) return positions;
  const auto below = std::uint32_t(c.options.at("max_position"));
  for (std::int64_t i = 0; i < c.num_tokens; ++i) {
    const std::int64_t token = (i + variation.rotate_rows) % c.num_tokens;
    positions[std::size_t(i)] =
        std::int32_t(philox(c.seed, stream_of("positions"), std::uint64_t(token))[0] % below);
  }
  return positions;
}

// Whose position each token takes, as a rank prepares them.
std::vector<std::int32_t> prepared(const std::vector<std::int32_t>& positions,
                                   const ShardingRules& rules) {
  std::vector<std::int32_t> mine(positions.size());
  for (std::size_t i = 0; i < mine.size(); ++i)
    mine[i] = positions[std::size_t(rules.rope.position_of(std::int64_t(i)))];
  return mine;
}

Mutant mutant(std::string id, std::string what, std::string upstream,
              void (*change)(ShardingRules&), bool (*decides)(const Case&)) {
  Mutant m{std::move(id), std::move(what), std::move(upstream), sharding_rules(), decides};
  change(m.rules);
  return m;
}

std::vector<Mutant> all_mutants() {
  const std::string rope = "qknorm-rope-partial-warp:", vllm = "vllm-project/vllm#51049";
  std::vector<Mutant> all = {
      mutant(
          rope + "full-rotary", "rotary_dim is head_dim, whatever the table has",
          "vllm-project/vllm#43676",
          [](ShardingRules& r) {
            r.rope.rotary_dim = [](int head_dim, std::int64_t) { return std::int64_t{head_dim}; };
          },
          [](const Case& c) { return rotary_dim(c) / 2 != c.model.head_dim / 2; }),
      mutant(
          rope + "packed-head", "all heads of a block are normed with the statistic of its first",
          vllm, [](ShardingRules& r) { r.rope.heads_per_statistic = 4; },
          [](const Case& c) { return norm_of(c) != kNoNorm; }),
      mutant(
          rope + "style",
          "halves are rotated as pairs where neighbours are, and neighbours for halves", vllm,
          [](ShardingRules& r) {
            r.rope.interleaved = [](bool model_is_interleaved) { return !model_is_interleaved; };
          },
          [](const Case& c) { return rotary_dim(c) > 2; }),
      mutant(
          rope + "position", "a token takes the position of the one before it", vllm,
          [](ShardingRules& r) {
            r.rope.position_of = [](std::int64_t token) {
              return std::max<std::int64_t>(0, token - 1);
            };
          },
          [](const Case& c) {
            const std::vector<std::int32_t> positions = positions_of(c, {});
            return std::adjacent_find(positions.begin(), positions.end(), std::not_equal_to<>()) !=
                   positions.end();
          }),
  };
  for (Mutant& m : norm::head_weight_mutants("norm")) all.push_back(std::move(m));
  return all;
}

const std::vector<Mutant>& mutants() {
  static const std::vector<Mutant> all = all_mutants();
  return all;
}

// The table that engines keep: cosines, then sines, of position * theta^(-2 i / rotary_dim), in
// fp32. An input like any other, so that no libm enters a kernel or the reference; here it is
// libm's in double, rounded once. Exact data have exact tables: multiples of 2^-10, which no
// product with a whole number and no sum of two of them rounds; still turns by one angle a
// position, but for a little length.
TensorSpec table(const Case& c) {
  const std::int64_t rows = c.options.at("max_position"), cols = rotary_dim(c), pairs = cols / 2;
  const double theta = c.options.at("theta") == 0 ? 1e4 : 1e6;
  const bool exact = c.fill == Fill::exact;
  auto values = std::make_shared<std::vector<float>>(std::size_t(rows * cols));
  const auto stored = [exact](double v) {
    return float(exact ? std::nearbyint(v * 1024) / 1024 : v);
  };
  for (std::int64_t i = 0; i < pairs; ++i) {
    const double frequency = std::pow(theta, -2 * double(i) / double(cols));
    for (std::int64_t row = 0; row < rows; ++row) {
      (*values)[std::size_t(row * cols + i)] = stored(std::cos(double(row) * frequency));
      (*values)[std::size_t(row * cols + pairs + i)] = stored(std::sin(double(row) * frequency));
    }
  }
  return {"cos_sin",
          DType::f32,
          rows,
          cols,
          Role::weight,
          cols,
          [values, cols](const DataRegime&, std::int64_t row, std::int64_t col) {
            return double((*values)[std::size_t(row * cols + col)]);
          }};
}

// Heads of q, of k. Where heads are normed, exact ones are each of a power of two of their own, not
// all of a row of one: otherwise all of them had the same statistic.
TensorSpec heads(const Case& c, std::string name, std::int64_t count, std::int64_t width) {
  TensorSpec t{std::move(name), c.dtype, c.num_tokens, count * width, Role::activation, width};
  if (c.fill != Fill::exact || norm_of(c) == kNoNorm) return t;
  t.value = [rows = t.rows, cols = t.cols, width, stream = stream_of(t.name),
             size_stream = stream_of("size of " + t.name), of_head = LastPhilox()](
                const DataRegime& g, std::int64_t row, std::int64_t col) mutable {
    const std::int64_t at = (row + g.rotate_rows) % rows * cols + col;
    // 2^5 .. 2^7, as any exact row.
    const int size = 5 + int(of_head(g.seed, size_stream, std::uint64_t(at / width))[0] % 3);
    const double sign = philox(g.seed, stream, std::uint64_t(at))[0] >> 31 ? -1.0 : 1.0;
    return std::ldexp(sign, g.scale_log2 + size);
  };
  return t;
}

// What the reference takes from the case, and from a mistake to see whether it would show.
struct Taken {
  std::vector<std::int32_t> positions;
  bool interleaved;
  norm::HeadWeights weights = {};
};

// Both outputs, on one rank.
std::vector<Budget> rotated(const Case& c, double eps, const Taken& taken, const WholeInputs& in) {
  const reference::RopeShape shape{c.model.head_dim, rotary_dim(c), taken.interleaved};
  std::vector<Budget> both;
  for (const int which : {0, 1}) {
    std::optional<reference::RopeNorm> norm;
    if (norm_of(c) != kNoNorm) {
      norm = {eps, rope_norm_profile(c.model)};
      if (norm::has_head_weight(norm_of(c))) norm->weight = &in[taken.weights.of[which]];
      if (norm_of(c) == norm::kPerHead1p) norm->weight_offset = taken.weights.one_plus;
    }
    both.push_back(
        reference::rope(in[which == 0 ? "q" : "k"], in["cos_sin"], taken.positions, shape, norm));
  }
  return both;
}

// What a rank makes of its heads with one statistic for `heads_per_statistic` neighbours, those of
// k behind those of q: a head's output is in proportion to its scale.
void share_statistics(const Case& c, double eps, int heads_per_statistic, const WholeInputs& in,
                      std::vector<Budget>& both) {
  const std::int64_t dim = c.model.head_dim;
  const Profile profile = rope_norm_profile(c.model);
  for (int tp_rank = 0; tp_rank < c.tp_size; ++tp_rank) {
    const RankShape rank = partition(c.model, c.tp_size, tp_rank);
    for (std::int64_t token = 0; token < c.num_tokens; ++token) {
      double inverse = 1;  // of the first head that shares it
      for (std::int64_t i = 0; i < rank.heads.size + rank.kv_heads.size; ++i) {
        const bool is_q = i < rank.heads.size;
        const std::int64_t head =
            is_q ? rank.heads.offset + i : rank.kv_heads.offset + i - rank.heads.size;
        const double own = reference::row_scale(in[is_q ? "q" : "k"].row(token) + head * dim, dim,
                                                eps, profile, double(dim))
                               .inverse;
        if (i % heads_per_statistic == 0) inverse = own;
        Budget& out = both[is_q ? 0 : 1];
        double* first = out.r.data() + token * out.cols + head * dim;
        for (std::int64_t j = 0; j < dim; ++j) first[j] *= inverse / own;
      }
    }
  }
}

// Asks of the mistakes that the reference can make as well: would these data have shown them? The
// other shows in all data: what lies behind a row of the table is poison.
std::optional<std::string> blind_to(const Case& c, double eps,
                                    const std::vector<std::int32_t>& positions,
                                    const WholeInputs& in, const std::vector<Budget>& right) {
  const ShardingRules& rules = sharding_rules();
  for (const Mutant& m : mutants()) {
    if (!m.shows(c) || m.rules.rope.rotary_dim != rules.rope.rotary_dim) continue;
    std::vector<Budget> altered =
        rotated(c, eps,
                {prepared(positions, m.rules), m.rules.rope.interleaved(is_interleaved(c)),
                 norm::head_weights(m.rules)},
                in);
    if (m.rules.rope.heads_per_statistic != rules.rope.heads_per_statistic)
      share_statistics(c, eps, m.rules.rope.heads_per_statistic, in, altered);
    bool shown = false;
    for (std::size_t i = 0; i < altered.size(); ++i)
      shown = shown || norm::tells_apart(c.dtype, right[i], altered[i], {0, right[i].cols});
    if (!shown) return m.id;
  }
  return std::nullopt;
}

// Where a rank finds the heads `mine` of a tensor of `all` heads: one after another from column
// `at` on; or, where a law wants them elsewhere, those that come as early from the other end.
std::vector<Piece> heads_of(const std::string& tensor, Shard mine, std::int64_t all,
                            std::int64_t width, std::int64_t at, bool reversed) {
  if (!reversed) return {{tensor, mine.times(width), at}};
  std::vector<Piece> pieces;
  for (std::int64_t i = 0; i < mine.size; ++i) {
    const std::int64_t head = all - 1 - (mine.offset + i);
    pieces.push_back({tensor, Shard{head, 1}.times(width), at + i * width});
  }
  return pieces;
}

std::vector<Stage> stages(const Case& c, const ShardingRules& rules, const Variation& variation) {
  const ModelShape& m = c.model;
  const std::int64_t tokens = c.num_tokens, pad = c.options.at("pad"), dim = m.head_dim,
                     v_dim = m.value_head_dim(), norm_kind = norm_of(c);
  const double eps = norm::eps_of(c, variation);
  const bool has_weight = norm::has_head_weight(norm_kind);
  const bool reversed = variation.law == kOtherHeads;
  const std::vector<std::int32_t> positions = positions_of(c, variation);
  const TensorSpec cos_sin = table(c);
  Stage stage{
      .name = "rope",
      .inputs = {heads(c, "q", m.num_heads, dim), heads(c, "k", m.num_kv_heads, dim),
                 heads(c, "v", m.num_kv_heads, v_dim), cos_sin},
      .outputs = {heads(c, "q_rope", m.num_heads, dim), heads(c, "k_rope", m.num_kv_heads, dim)},
      .buffers = [=](int tp_rank) -> std::vector<LocalBuffer> {
        const RankShape rank = partition(m, c.tp_size, tp_rank);
        const std::int64_t q = rank.heads.size * dim, k = rank.kv_heads.size * dim;
        const auto q_heads = [&](const char* name) {
          return heads_of(name, rank.heads, m.num_heads, dim, 0, reversed);
        };
        const auto k_heads = [&](const char* name, std::int64_t at) {
          return heads_of(name, rank.kv_heads, m.num_kv_heads, dim, at, reversed);
        };
        const Shard v = rank.kv_heads.times(v_dim);
        std::vector<Piece> fused = q_heads("q");
        for (Piece& piece : k_heads("k", q)) fused.push_back(std::move(piece));
        fused.push_back({"v", v, q + k});
        std::vector<LocalBuffer> all = {
            {"qkv", Use::input, c.dtype, tokens, q + k + v.size + pad, std::move(fused)},
            // Rows as far apart as if the whole head rotated: what lies between is nobody's.
            {"cos_sin",
             Use::input,
             DType::f32,
             cos_sin.rows,
             dim,
             {{"cos_sin", {0, cos_sin.cols}}}},
            local_values("positions", prepared(positions, rules)),
            {"q_rope", Use::output, c.dtype, tokens, q + pad, q_heads("q_rope")},
            {"k_rope", Use::output, c.dtype, tokens, k + pad, k_heads("k_rope", 0)}};
        if (has_weight) {
          for (const int which : {0, 1}) {
            all.push_back(
                {which == 0 ? "q_weight" : "k_weight",
                 Use::input,
                 c.dtype,
                 1,
                 dim,
                 {{rules.norm.head_weight[which] == 0 ? "q_weight" : "k_weight", {0, dim}}}});
          }
        }
        return all;
      },
      .run =
          [=](RankRun& run) {
            const RankShape rank = partition(m, c.tp_size, run.group.tp_rank());
            dispatch(c.dtype, [&]<typename T>(T) {
              RopeNorm<T> norm{.eps = float(eps)};
              if (has_weight) {
                norm.q_weight = run.view<T>("q_weight");
                norm.k_weight = run.view<T>("k_weight");
              }
              if (norm_kind == norm::kPerHead1p) norm.weight_offset = rules.norm.one_plus_weight;
              rope<T>(run.view<T>("qkv"), run.view<float>("cos_sin").columns(0, cos_sin.cols),
                      run.integers("positions"), is_interleaved(c),
                      norm_kind == kNoNorm ? nullptr : &norm,
                      run.view<T>("q_rope").columns(0, rank.heads.size * dim),
                      run.view<T>("k_rope").columns(0, rank.kv_heads.size * dim), m, rank, rules,
                      run.stream);
            });
          },
      .cost = [=](int tp_rank) -> Cost {
        const RankShape rank = partition(m, c.tp_size, tp_rank);
        const double row = double(rank.heads.size + rank.kv_heads.size) * double(dim);
        std::vector<std::int32_t> used = positions;
        std::sort(used.begin(), used.end());
        const auto end = std::unique(used.begin(), used.end());
        // q and k read and written, the rows of the table that are used, and the positions. Three
        // operations a rotated column; a square, an addition, two products each for the norm.
        return {.bytes = 2 * double(tokens) * row * double(size_of(c.dtype)) +
                         4 * double(end - used.begin()) * double(cos_sin.cols) + 4 * double(tokens),
                .flops = double(tokens) * row *
                         (3 * double(cos_sin.cols) / double(dim) + (norm_kind == kNoNorm ? 0 : 4))};
      },
      .reference =
          [=](const WholeInputs& in) {
            return rotated(c, eps, {positions, is_interleaved(c)}, in);
          },
      .blind_to =
          [=](const WholeInputs& in, const std::vector<Budget>& budgets) {
            return blind_to(c, eps, positions, in, budgets);
          },
  };
  for (const char* name : {"q_weight", "k_weight"}) {
    if (has_weight) stage.inputs.push_back({name, c.dtype, 1, dim, Role::weight, dim});
  }
  return {std::move(stage)};
}

// A head's place is nothing to it: neither where it lies in a row nor on which rank.
LawRun law_heads() {
  return {.law = {kOtherHeads, "the heads in the opposite order over the ranks give the same bits"},
          .vary = [](const Case& c) {
            return std::pair{c, Variation{.law = kOtherHeads}};
          }};
}

// The varied run is judged by itself: its budget is 0 where nothing is normed.
LawRun law_origin() {
  return {.law = {kAtOrigin, "at position 0 nothing turns: the bits of q and k, or their norm"},
          .vary =
              [](const Case& c) {
                return std::pair{c, Variation{.law = kAtOrigin}};
              },
          .twin = [](const Case&, const Variation&, const TensorSpec&, std::int64_t,
                     std::int64_t) -> std::optional<Place> { return std::nullopt; }};
}

Key head_dim_key() {
  Key key = shared_key("head_dim");
  key.min = 2;  // a pair
  return key;
}

std::optional<std::string> refuse(const Case& c) {
  if (auto reason = partitionable(c.model, c.tp_size)) return reason;
  if (norm_of(c) == kNoNorm && c.options.at("law") == kScaleLaw)
    return "law=scale is about norms, and norm=none";
  if (auto reason = too_large(c.num_tokens, widest_qkv(c))) return reason;
  return too_large(c.options.at("max_position"), std::int64_t{c.model.head_dim} * c.tp_size);
}

}  // namespace

Stage rope_stage(const Case& c, const ShardingRules& rules, const Variation& variation) {
  return stages(c, rules, variation).front();
}

Operator make_rope() {
  return make_operator({
      .name = "rope",
      .what = "rotary embedding of q and k heads, each normed first where the model does so",
      .keys = {shared_key("num_heads"),
               shared_key("num_kv_heads"),
               head_dim_key(),
               shared_key("v_head_dim"),
               shared_key("tp_size"),
               shared_key("num_tokens"),
               shared_key("dtype"),
               shared_key("fill"),
               shared_key("seed"),
               norm::eps_key(),
               pad_key("qkv and of the outputs"),
               {.name = "rotary",
                .help =
                    "the columns of a head that rotate: rounded down to an even number, 2 at least",
                .min = 0,
                .max = 2,
                .words = {"full", "half", "quarter"},
                .shrink = Shrink::to_fallback},
               {.name = "style",
                .help = "which columns are a pair: i and i + rotary_dim / 2, or 2 i and 2 i + 1",
                .min = 0,
                .max = 1,
                .words = {"neox", "interleaved"},
                .shrink = Shrink::to_fallback},
               norm::head_norm_key("norm", "the norm of each head before it rotates", "none", 34),
               {.name = "theta",
                .help = "base of the frequencies theta^(-2 i / rotary_dim)",
                .min = 0,
                .max = 1,
                .words = {"1e4", "1e6"},
                .shrink = Shrink::to_fallback},
               {.name = "max_position",
                .help = "positions that the table has, and tokens are drawn from",
                .min = 8,
                .max = 1 << 20,
                .fallback = 64,
                .draw_max = 256}},
      .laws = {law_tp1(), law_scale(), law_tokens(), law_heads(), law_origin()},
      .mutants = mutants(),
      .refuse = refuse,
      .regime = norm::regime,
      .stages = stages,
  });
}

}  // namespace tp
