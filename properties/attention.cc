// attention: grouped-query attention over the heads of each rank. Here live the third founding bug
// (vllm-project/vllm#39707: global head counts, views taken for contiguous) and its relatives:
// whose sink, whose slope, which keys, which pages, which parts.

#include "kernels/attention.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <tuple>

#include "properties/attention_call.h"
#include "properties/attention_data.h"
#include "properties/attention_mutants.h"
#include "properties/run/stage.h"
#include "properties/stages.h"
#include "reference/attention.h"

namespace tp {

namespace {

// Laws that only this operator understands; the words of the key `law`.
constexpr const char* kBatch = "batch";
constexpr const char* kDecode = "decode";
constexpr const char* kMha = "mha";
constexpr const char* kShift = "shift";
constexpr const char* kOutside = "outside";
constexpr const char* kPages = "pages";
constexpr const char* kHeads = "heads";

using Value = std::function<double(const DataRegime&, std::int64_t, std::int64_t)>;

// The value of any tensor's element, also of one that is filled by role and regime.
Value value_of(const TensorSpec& tensor) {
  if (tensor.value) return tensor.value;
  // A row at a time: whoever asks for an element asks for its neighbours next.
  const auto asked = [](const DataRegime& g, std::int64_t row) {
    return std::tuple(g.fill, g.seed, g.eps, g.scale_log2, g.rotate_rows, row);
  };
  return [tensor, asked, filled = std::vector<std::byte>(), of = asked({}, -1)](
             const DataRegime& regime, std::int64_t row, std::int64_t col) mutable {
    if (of != asked(regime, row)) {
      filled.resize(std::size_t(tensor.cols * size_of(tensor.dtype)));
      fill_block(tensor, regime, {row, 1}, {0, tensor.cols}, filled.data(), tensor.cols);
      of = asked(regime, row);
    }
    return load(tensor.dtype, filled.data(), col);
  };
}

// The same tensor with its columns, heads of `width`, taken from where `from` says.
template <typename F>
TensorSpec with_heads_from(TensorSpec tensor, std::int64_t heads, std::int64_t width, F from) {
  tensor.value = [value = value_of(tensor), width, from](const DataRegime& g, std::int64_t row,
                                                         std::int64_t col) {
    return value(g, row, from(col / width) * width + col % width);
  };
  tensor.cols = heads * width;
  return tensor;
}

// The list for `model_heads` heads (Press et al., arXiv 2108.12409): a geometric sequence where
// their number is a power of two; otherwise that of the power below, then every other one of the
// power above.
std::vector<float> alibi_slopes(std::int64_t model_heads) {
  std::int64_t power = 1;
  while (2 * power <= model_heads) power *= 2;
  std::vector<float> slopes;
  for (std::int64_t i = 0; i < power; ++i)
    slopes.push_back(float(std::exp2(-8.0 * double(i + 1) / double(power))));
  for (std::int64_t i = 0; power + i < model_heads; ++i)
    slopes.push_back(float(std::exp2(-8.0 * double(2 * i + 1) / double(2 * power))));
  return slopes;
}

// Everything of a case that its stage and its mutants ask for.
struct Plan {
  Case c;
  AttentionSettings settings;
  AttentionCall data_call;  // whose data these are
  AttentionCall call;       // what is called
  bool sinks = false, alibi = false;
  std::int64_t rotate_heads = 0;  // query heads, by a law

  explicit Plan(const Case& from, const Variation& variation = {})
      : c(from), settings(attention_settings(from)), data_call(attention_call(from)) {
    sinks = c.options.at("sinks") == 1;
    alibi = c.options.at("alibi") == 1;
    call = data_call;
    if (variation.law == kBatch) call = only_sequence(data_call, variation.argument);
    if (variation.law == kDecode) call = decode_steps(data_call);
    if (variation.law == kPages) call = data_call = attention_call(c, 1);
    if (variation.law == kHeads) rotate_heads = c.model.num_heads / c.model.num_kv_heads;
  }

  // Rows of k and v that some query sees.
  std::set<std::int64_t> seen_rows() const {
    std::set<std::int64_t> rows;
    for (const Sequence& s : data_call.sequences) {
      for (std::int64_t i = 0; i < s.queries.size; ++i) {
        const Shard keys = settings.mask().visible(s.position_of(i), std::int64_t(s.keys.size()));
        for (std::int64_t j = keys.offset; j < keys.end(); ++j) rows.insert(s.keys[std::size_t(j)]);
      }
    }
    return rows;
  }
  double pairs() const {
    double sum = 0;
    for (const Sequence& s : call.sequences) {
      for (std::int64_t i = 0; i < s.queries.size; ++i)
        sum += double(settings.mask().visible(s.position_of(i), std::int64_t(s.keys.size())).size);
    }
    return sum;
  }
};

struct Tensors {
  TensorSpec q, k, v, sinks;
};

// The data of a case, or of what a law makes of it.
Tensors tensors_of(const Plan& plan, const Variation& variation) {
  const Case& c = plan.c;
  ModelShape model = c.model;
  // Repeated KV heads: the data are those of the model with its own KV heads.
  if (variation.law == kMha) model.num_kv_heads = int(variation.argument);
  const AttentionData data{.model = model,
                           .sequences = plan.data_call.sequences,
                           .mask = plan.settings.mask(),
                           .slots = plan.data_call.rows,
                           .tokens = c.num_tokens,
                           .page_size = c.options.at("page_size"),
                           .kv_tile = 16,
                           .scale = plan.settings.scale,
                           .fill = c.fill,
                           .softcap = plan.settings.softcap};
  Tensors t{attention_q(c.dtype, data), attention_k(c.dtype, data), attention_v(c.dtype, data),
            attention_sinks(data)};
  const std::int64_t dim = model.head_dim, v_dim = model.value_head_dim(),
                     kv_heads = model.num_kv_heads, group = model.num_heads / kv_heads;
  if (variation.law == kMha) {
    const auto own = [group](std::int64_t head) { return head / group; };
    t.k = with_heads_from(t.k, model.num_heads, dim, own);
    t.v = with_heads_from(t.v, model.num_heads, v_dim, own);
  }
  if (variation.law == kHeads) {
    const auto next = [](std::int64_t by, std::int64_t of) {
      return [by, of](std::int64_t head) { return (head + by) % of; };
    };
    t.q = with_heads_from(t.q, model.num_heads, dim, next(group, model.num_heads));
    t.k = with_heads_from(t.k, kv_heads, dim, next(1, kv_heads));
    t.v = with_heads_from(t.v, kv_heads, v_dim, next(1, kv_heads));
    t.sinks = with_heads_from(t.sinks, model.num_heads, 1, next(group, model.num_heads));
  }
  if (variation.law == kShift) {
    // Column 0 of q and of k is constant in these data: more of it shifts all logits of a row, far
    // below what anybody would take for minus infinity.
    t.k.value = [value = t.k.value, dim](const DataRegime& g, std::int64_t row, std::int64_t col) {
      return col % dim == 0 ? value(g, row, col) * 128 : value(g, row, col);
    };
  }
  if (variation.law == kOutside) {
    const auto seen = std::make_shared<const std::set<std::int64_t>>(plan.seen_rows());
    for (TensorSpec* tensor : {&t.k, &t.v}) {
      tensor->value = [value = value_of(*tensor), seen](const DataRegime& g, std::int64_t row,
                                                        std::int64_t col) {
        return seen->contains(row) ? value(g, row, col) : std::numeric_limits<double>::quiet_NaN();
      };
    }
  }
  if (variation.law == kBatch) {
    const std::int64_t first =
        plan.data_call.sequences[std::size_t(variation.argument)].queries.offset;
    t.q.value = [value = value_of(t.q), first](const DataRegime& g, std::int64_t row,
                                               std::int64_t col) {
      return value(g, first + row, col);
    };
    t.q.rows = plan.call.sequences[0].queries.size;
  }
  return t;
}

// How upstream code that has the model's counts reads local rows: as fewer rows of all heads
// (vllm-project/vllm#39707), which needs no crash where the sizes happen to fit.
bool reshapes(const Plan& plan, const HeadCounts& counts, const RankShape& rank) {
  const Case& c = plan.c;
  return counts.heads != rank.heads.size && plan.call.fused && c.options.at("pad") == 0 &&
         plan.call.sequences.size() == 1 && c.num_tokens % c.tp_size == 0 &&
         counts.kv_heads == rank.kv_heads.size * c.tp_size;
}

// `sources`: where q, k and v lie if another operator put them there; or null.
Stage make_stage(const Case& c, const ShardingRules& rules, const Variation& variation,
                 const AttentionSources* given) {
  const std::optional<AttentionSources> sources = given ? std::optional(*given) : std::nullopt;
  const Plan plan(c, variation);
  const ModelShape& m = c.model;
  const std::int64_t dim = m.head_dim, v_dim = m.value_head_dim(), pad = c.options.at("pad"),
                     tokens = plan.call.sequences.back().queries.end();
  const Tensors t = tensors_of(plan, variation);
  const AttentionRules& r = rules.attention;
  const bool fused = plan.call.fused && variation.law != kBatch;
  const HeadCounts counts = r.heads(m, c.tp_size);
  AttentionBatch batch = plan.call.batch;
  const bool reshaped = reshapes(plan, counts, partition(m, c.tp_size, 0));
  if (reshaped) {
    const std::int32_t rows = std::int32_t(tokens / c.tp_size);
    batch.query_start = {0, rows};
    batch.kv_len = {rows};
  }

  std::vector<TensorSpec> inputs = {t.q, t.k, t.v};
  if (plan.sinks) inputs.push_back(t.sinks);
  const auto buffers = [=](int tp_rank) -> std::vector<LocalBuffer> {
    const RankShape rank = partition(m, c.tp_size, tp_rank);
    const Shard kv_heads = plan.settings.whole_cache ? Shard{0, m.num_kv_heads} : rank.kv_heads;
    const Shard q = rank.heads.times(dim), k = kv_heads.times(dim), v = kv_heads.times(v_dim),
                o = rank.heads.times(v_dim);
    std::vector<LocalBuffer> all;
    if (sources) {
      const auto add = [&](const AttentionSources::Columns& from, const char* tensor, Shard cols) {
        const Piece piece{tensor, cols, from.at(rank)};
        all.push_back({from.buffer, Use::input, c.dtype, tokens, from.width(rank), {piece}});
      };
      add(sources->q, "q", q);
      add(sources->k, "k", k);
      add(sources->v, "v", v);
    } else if (fused) {
      all.push_back({"qkv",
                     Use::input,
                     c.dtype,
                     tokens,
                     q.size + k.size + v.size + pad,
                     {{"q", q, 0}, {"k", k, q.size}, {"v", v, q.size + k.size}}});
    } else {
      all.push_back({"q", Use::input, c.dtype, tokens, q.size + pad, {{"q", q, 0}}});
      all.push_back({"k_cache", Use::input, c.dtype, plan.call.rows, k.size + pad, {{"k", k, 0}}});
      all.push_back({"v_cache", Use::input, c.dtype, plan.call.rows, v.size + pad, {{"v", v, 0}}});
    }
    all.push_back(local_values("query_start", batch.query_start));
    all.push_back(local_values("kv_len", batch.kv_len));
    all.push_back(local_values("table", batch.table));
    if (plan.sinks) {
      const Shard mine = r.head_vector(m, c.tp_size, tp_rank);
      all.push_back({"sinks", Use::input, DType::f32, 1, mine.size, {{"sinks", mine, 0}}});
    }
    if (plan.alibi) {
      const Slopes mine = r.slopes(m, c.tp_size, tp_rank);
      const std::vector<float> list = alibi_slopes(mine.model_heads);
      std::vector<float> slopes;
      for (std::int64_t i = 0; i < mine.entries.size; ++i) {
        slopes.push_back(
            list[std::size_t((mine.entries.offset + i + plan.rotate_heads) % mine.model_heads)]);
      }
      all.push_back(local_values("slopes", slopes));
    }
    all.push_back({"workspace", Use::workspace, DType::f32, 1,
                   attention_workspace(tokens, m, c.tp_size, plan.settings.splits)});
    all.push_back({"out", Use::output, c.dtype, tokens, o.size + pad, {{"out", o, 0}}});
    all.push_back(
        {"lse", Use::output, DType::f32, tokens, rank.heads.size + pad, {{"lse", rank.heads, 0}}});
    return all;
  };
  const auto run = [=](RankRun& run) {
    const int tp_rank = run.group.tp_rank();
    const RankShape rank = partition(m, c.tp_size, tp_rank);
    const std::int64_t kv_heads = plan.settings.whole_cache ? m.num_kv_heads : rank.kv_heads.size;
    const std::int64_t q_cols = rank.heads.size * dim, k_cols = kv_heads * dim;
    dispatch(c.dtype, [&]<typename T>(T) {
      AttentionTensors<T> a;
      if (sources) {
        const auto view = [&](const AttentionSources::Columns& from, std::int64_t cols) {
          return run.view<T>(from.buffer).columns(from.at(rank), cols);
        };
        a.q = view(sources->q, q_cols);
        a.k = view(sources->k, k_cols);
        a.v = view(sources->v, kv_heads * v_dim);
      } else if (fused) {
        const View<T> qkv = run.view<T>("qkv");
        a.q = qkv.columns(0, q_cols);
        a.k = qkv.columns(q_cols, k_cols);
        a.v = qkv.columns(q_cols + k_cols, kv_heads * v_dim);
      } else {
        a.q = run.view<T>("q").columns(0, q_cols);
        a.k = run.view<T>("k_cache").columns(0, k_cols);
        a.v = run.view<T>("v_cache").columns(0, kv_heads * v_dim);
      }
      a.out = run.view<T>("out").columns(0, rank.heads.size * v_dim);
      a.lse = run.view<float>("lse").columns(0, rank.heads.size);
      if (plan.sinks) a.sinks = run.view<float>("sinks").data;
      if (plan.alibi) a.slopes = run.view<float>("slopes").data;
      a.workspace = run.view<float>("workspace").data;
      if (reshaped) {
        const auto as_all_heads = [&](auto view) {
          view.rows /= c.tp_size;
          view.cols *= c.tp_size;
          view.row_stride = view.cols;
          return view;
        };
        a.q = as_all_heads(a.q);
        a.k = as_all_heads(a.k);
        a.v = as_all_heads(a.v);
        a.out = as_all_heads(a.out);
        a.lse = as_all_heads(a.lse);
      }
      AttentionBatch mine = batch;
      mine.device = {run.integers("query_start"), run.integers("kv_len"), run.integers("table")};
      attention<T>(a, mine, plan.settings, m, rules, c.tp_size, tp_rank, run.stream);
    });
  };
  return {
      .name = "attention",
      .inputs = inputs,
      .outputs = {{"out", c.dtype, tokens, m.num_heads * v_dim, Role::activation, v_dim},
                  {"lse", DType::f32, tokens, m.num_heads, Role::activation, 1}},
      .buffers = buffers,
      .run = run,
      .cost = [=](int tp_rank) -> Cost {
        const RankShape rank = partition(m, c.tp_size, tp_rank);
        const double width = double(size_of(c.dtype)), rows = double(plan.seen_rows().size()),
                     flops = 2 * plan.pairs() * double(rank.heads.size * (dim + v_dim));
        return {.bytes = width * double(rank.kv_heads.size) * rows * double(dim + v_dim) +
                         double(tokens * rank.heads.size) * (width * double(dim + v_dim) + 4),
                .flops = c.dtype == DType::f32 ? flops : 0,
                .matrix_flops = c.dtype == DType::f32 ? 0 : flops};
      },
      .own_bits = true,
      .reference = [=](const WholeInputs& in) -> std::vector<Budget> {
        std::optional<Matrix> slopes;
        if (plan.alibi) {
          const std::vector<float> list = alibi_slopes(m.num_heads);
          slopes.emplace(1, m.num_heads);
          for (std::int64_t h = 0; h < m.num_heads; ++h)
            slopes->values[std::size_t(h)] =
                list[std::size_t((h + plan.rotate_heads) % m.num_heads)];
        }
        reference::Attention result = reference::attention(
            in["q"], in["k"], in["v"], plan.sinks ? &in["sinks"] : nullptr,
            slopes ? &*slopes : nullptr, m, plan.call.sequences,
            {.scale = plan.settings.scale,
             .mask = plan.settings.mask(),
             .softcap = plan.settings.softcap},
            attention_profile(c.dtype, m, c.tp_size, plan.call.batch, plan.settings));
        return {std::move(result.out), std::move(result.lse)};
      },
      .blind_to = {},
  };
}

std::vector<Stage> stages(const Case& c, const ShardingRules& rules, const Variation& variation) {
  return {make_stage(c, rules, variation, nullptr)};
}

// --- laws

LawRun law(const char* name, std::string what, bool always_bitwise,
           std::function<std::pair<Case, Variation>(const Case&)> vary = {}) {
  if (!vary) {
    vary = [name](const Case& c) { return std::pair{c, Variation{.law = name}}; };
  }
  return {.law = {name, std::move(what)}, .vary = vary, .always_bitwise = always_bitwise};
}

std::vector<LawRun> laws() {
  LawRun batch =
      law(kBatch, "a sequence of a batch gets what it gets alone", false, [](const Case& c) {
        // One that has queries: the first is never empty.
        const AttentionCall call = attention_call(c);
        std::int64_t s = std::int64_t(c.seed % call.sequences.size());
        if (call.sequences[std::size_t(s)].queries.size == 0) s = 0;
        const std::int64_t first = call.sequences[std::size_t(s)].queries.offset;
        return std::pair{c, Variation{.rotate_rows = int(first), .law = kBatch, .argument = s}};
      });
  // Asked for each element, so the sequence's first row is known by then.
  batch.twin = [](const Case&, const Variation& v, const TensorSpec&, std::int64_t row,
                  std::int64_t col) -> std::optional<Place> {
    return Place{v.rotate_rows + row, col};
  };
  LawRun heads = law(kHeads, "heads in another order give the same bits in that order", true);
  heads.twin = [](const Case& c, const Variation&, const TensorSpec& t, std::int64_t row,
                  std::int64_t col) -> std::optional<Place> {
    const std::int64_t width = t.cols / c.model.num_heads,
                       group = c.model.num_heads / c.model.num_kv_heads;
    return Place{row, (col / width + group) % c.model.num_heads * width + col % width};
  };
  return {
      law_tp1(),
      batch,
      law(kDecode, "prefill of n tokens gives what n decode steps give", false),
      law(kMha, "KV heads repeated for each query head give the same", false,
          [](const Case& c) {
            Case mha = c;
            mha.model.num_kv_heads = c.model.num_heads;
            return std::pair{mha, Variation{.law = kMha, .argument = c.model.num_kv_heads}};
          }),
      law(kShift, "a constant added to all logits of a row changes nothing", false),
      law(kOutside, "keys that no query sees have exactly no influence", true),
      law(kPages, "pages in another place give the same bits", true),
      heads,
      law("strided", "rows that lie closer together give the same bits", true,
          [](const Case& c) {
            Case dense = c;
            dense.options["pad"] = 0;
            return std::pair{dense, Variation{.law = "strided"}};
          }),
      law("splits", "keys that are not split give the same", false,
          [](const Case& c) {
            Case one = c;
            one.options["split_by"] = 0;
            one.options["splits"] = 1;
            return std::pair{one, Variation{.law = "splits"}};
          }),
  };
}

// Why a law has nothing to say about this case.
std::optional<std::string> idle_law(const Case& c) {
  const std::int64_t number = c.options.at("law");
  if (number == 0) return std::nullopt;
  const std::string name = laws()[std::size_t(number - 1)].law.name;
  const auto option = [&](const char* key) { return c.options.at(key); };
  if (name == kBatch && option("num_seqs") == 1) return "num_seqs=1 is no batch";
  if (name == kDecode && option("mask") != 0) return "law=decode needs mask=causal";
  if (name == kMha && c.model.num_kv_heads == c.model.num_heads)
    return "law=mha needs fewer KV heads than heads";
  if (name == kShift && (c.fill != Fill::one_hot || option("softcap") != 0 || option("sinks") != 0))
    return "law=shift needs fill=one_hot, and neither softcap nor sinks";
  if (name == kOutside && attention_call(c).fused) return "law=outside needs a cache";
  if (name == kPages && option("page_size") == 0) return "law=pages needs pages";
  if (name == kHeads && c.model.num_kv_heads == 1) return "law=heads needs several KV heads";
  if (name == "strided" && option("pad") == 0) return "law=strided needs pad";
  if (name == "splits" && attention_settings(c).splits == 1) return "law=splits needs splits";
  return std::nullopt;
}

// Multiply-adds of the reference; where tiles are mostly padding, those of the kernel count.
double work(const Case& c) {
  const double tokens = c.num_tokens, keys = tokens + double(c.options.at("context"));
  const RankShape rank = partition(c.model, c.tp_size, 0);
  const double kv_heads = double(rank.kv_heads.size * c.tp_size),
               group = double(rank.heads.size / rank.kv_heads.size),
               dims = c.model.head_dim + c.model.value_head_dim();
  const double padded = kv_heads * std::max(16.0, tokens * group) * std::max(16.0, keys) * dims;
  // An element that is made, copied and compared costs as much as a dozen products.
  const double rows = double(c.options.at("num_seqs")) * keys,
               made = dims * (rows * kv_heads + tokens * double(c.model.num_heads));
  return std::max({tokens * double(c.model.num_heads) * keys * dims, padded / 8, 12 * made});
}

std::optional<std::string> refuse(const Case& c) {
  if (auto reason = partitionable(c.model, c.tp_size)) return reason;
  const std::int64_t dim = std::max(c.model.head_dim, c.model.value_head_dim());
  const std::int64_t rows =
      c.num_tokens + c.options.at("num_seqs") * (c.options.at("context") + 64) + 64;
  const std::int64_t heads = std::max({c.model.num_heads, c.model.num_kv_heads, c.tp_size});
  if (auto reason = too_large(rows, heads * dim)) return reason;
  if (c.options.at("split_by") == 1 && c.options.at("splits") != 1)
    return "split_by=kernel leaves nothing to splits=" + std::to_string(c.options.at("splits"));
  return idle_law(c);
}

}  // namespace

Stage attention_stage(const Case& c, const ShardingRules& rules, const Variation& variation,
                      const AttentionSources& sources) {
  return make_stage(c, rules, variation, &sources);
}

Operator make_attention() {
  Key head_dim = shared_key("head_dim"), v_head_dim = shared_key("v_head_dim");
  head_dim.max = v_head_dim.max = kMaxAttentionHeadDim;
  std::vector<Key> keys = {shared_key("num_heads"),
                           shared_key("num_kv_heads"),
                           head_dim,
                           v_head_dim,
                           shared_key("tp_size"),
                           shared_key("num_tokens"),
                           shared_key("dtype"),
                           attention_fill_key(),
                           shared_key("seed")};
  for (const Key& key : attention_batch_keys()) keys.push_back(key);
  for (const Key& key : attention_model_keys()) keys.push_back(key);
  keys.push_back(pad_key("every tensor"));
  return make_operator({
      .name = "attention",
      .what =
          "grouped-query attention over the heads of each rank: prefill, paged decode, split KV",
      .keys = keys,
      .laws = laws(),
      .mutants = attention_mutants(),
      .refuse = refuse,
      .work = work,
      .regime = [](const Case& c,
                   const Variation&) { return DataRegime{.fill = c.fill, .seed = c.seed}; },
      .stages = stages,
  });
}

}  // namespace tp
