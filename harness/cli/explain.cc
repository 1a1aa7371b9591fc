#include "harness/cli/explain.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdio>

#include "harness/base/check.h"
#include "harness/base/exit_codes.h"
#include "harness/cli/shard_map.h"
#include "harness/cli/table.h"

namespace tp {

namespace {

// In tables both ends belong to the range, as people count: 0-383.
std::string span(const Shard& s) {
  return s.size == 1 ? fmt::format("{}", s.offset) : fmt::format("{}-{}", s.offset, s.end() - 1);
}

std::string spans(const std::vector<Shard>& shards) {
  std::vector<std::string> texts;
  for (const Shard& s : shards) texts.push_back(span(s));
  return fmt::format("{}", fmt::join(texts, ", "));
}

// What is worth knowing of one model on one tp_size: the lines of the table are its members.
class Explanation {
 public:
  explicit Explanation(const ExplainOptions& options)
      : options_(options),
        model_(options.model),
        shape_(options.model.shape),
        tp_size_(options.tp_size) {
    if (const auto reason = partitionable(shape_, tp_size_)) {
      const std::string who = model_.id.empty() ? "" : model_.id + ": ";
      const std::vector<int> valid = sizes([&](int t) { return !partitionable(shape_, t); });
      const std::string hint =
          valid.empty() ? "" : fmt::format(" (valid are {})", fmt::join(valid, " "));
      throw BadInput(who + *reason + hint);
    }
    // Of one rank the lines below the table speak: the one asked for, or the last.
    shown_ = options.tp_rank.value_or(tp_size_ - 1);
    map_ = shard_map(shape_, tp_size_, shown_);
    whole_ = projection_rows(shape_);
  }

  std::string text() const {
    std::string out = title() + spread() + "\n" + ranks() + "\n";
    const auto line = [&](const char* name, const std::string& what) {
      if (!what.empty()) out += fmt::format("{:<16} {}\n", name, what);
    };
    line("MLA", latent());
    line("fused qkv", fused());
    line("output gate", gate());
    line("LoRA qkv_proj", lora());
    line("scale slots",
         model_.mla ? "" : "qkv 3 (q k v), gate_up 2; one scale on disk fills every slot");
    line("q/k norm", norm());
    line("K statistic", k_statistic());
    line("quantised", quantised());
    line("note", model_.note);
    line("valid TP", valid_sizes());
    line("read from", model_.source == model_.id ? "" : model_.source);
    return out;
  }

 private:
  bool full_width() const { return model_.qk_norm == "full_width"; }
  bool replicated() const { return map_.rank.num_kv_head_replicas > 1; }

  std::string title() const {
    std::string out = fmt::format("{}   H={} K={} D={}", model_.id.empty() ? "shape" : model_.id,
                                  shape_.num_heads, shape_.num_kv_heads, shape_.head_dim);
    if (shape_.value_head_dim() != shape_.head_dim)
      out += fmt::format(" V={}", shape_.value_head_dim());
    if (shape_.hidden_size > 0) out += fmt::format(" hidden={}", shape_.hidden_size);
    return out + "\n";
  }

  std::string spread() const {
    const RankShape& rank = map_.rank;
    const auto count = [](std::int64_t n, const char* what) {
      return fmt::format("{} {}head{}", n, what, n == 1 ? "" : "s");
    };
    if (model_.mla) return fmt::format("TP {}: {} a rank\n", tp_size_, count(rank.heads.size, ""));
    if (replicated()) {
      return fmt::format("TP {}: {} a rank; each KV head on {} ranks (KV heads < TP, replicated)\n",
                         tp_size_, count(rank.heads.size, "query "), rank.num_kv_head_replicas);
    }
    return fmt::format("TP {}: {} and {} a rank\n", tp_size_, count(rank.heads.size, "query "),
                       count(rank.kv_heads.size, "KV "));
  }

  std::string ranks() const {
    Table table;
    table.header =
        model_.mla
            ? std::vector<std::string>{"rank", "heads", "q_b_proj rows", "o_proj cols"}
            : std::vector<std::string>{"rank",        "q heads",     "q_proj rows", "kv heads",
                                       "k_proj rows", "v_proj rows", "o_proj cols"};
    if (full_width()) table.header.insert(table.header.end(), {"q_norm", "k_norm"});
    for (int r = options_.tp_rank.value_or(0); r <= options_.tp_rank.value_or(tp_size_ - 1); ++r) {
      const ShardMap m = shard_map(shape_, tp_size_, r);
      std::vector<std::string> row = {fmt::format("{:4}", r), span(m.rank.heads), span(m.q_proj)};
      if (!model_.mla) {
        const int copies = m.rank.num_kv_head_replicas;
        const std::string copy = copies > 1 ? fmt::format(" ({}/{})", r % copies + 1, copies) : "";
        row.insert(row.end(), {span(m.rank.kv_heads) + copy, span(m.k_proj), span(m.v_proj)});
      }
      row.push_back(span(m.o_proj_columns));
      if (full_width()) row.insert(row.end(), {span(m.q_norm), span(m.k_norm)});
      table.rows.push_back(row);
    }
    return table.text();
  }

  std::string latent() const {
    if (!model_.mla) return "";
    return "k and v are expanded from one latent a token: kv_b_proj is cut by head like q_b_proj; "
           "kv_a_proj, the "
           "latent and its norms are whole on every rank";
  }

  std::string fused() const {
    if (model_.mla) return "";
    return fmt::format("{} rows (q {}, k {}, v {}); rank {} takes {}", whole_.qkv(),
                       span({0, whole_.q}), span({whole_.q, whole_.k}),
                       span({whole_.q + whole_.k, whole_.v}), shown_, spans(map_.qkv_proj));
  }

  std::string quantised() const {
    const Quantization& q = model_.quantization;
    if (q.groups.empty()) return "";
    return q.refusal.empty() ? to_text(q) : q.refusal;
  }

  std::string gate() const {
    if (!shape_.attn_output_gate) return "";
    return fmt::format("q_proj has for each head {0} query rows, then {0} gate rows",
                       shape_.head_dim);
  }

  std::string lora() const {
    if (model_.mla) return "";
    std::int64_t rows = 0;
    for (const Shard& s : map_.lora_qkv_b) rows += s.size;
    std::string out = fmt::format("B has {} rows a rank", rows);
    if (options_.lora_rank > 0) {
      const std::string width =
          shape_.hidden_size > 0 ? std::to_string(shape_.hidden_size) : "hidden_size";
      out =
          fmt::format("A [{0}, {1}] for each of q, k, v, whole on every rank; B [{2}, {0}] a rank",
                      options_.lora_rank, width, rows);
    }
    if (!replicated()) return out;
    return out + (whole_.qkv() % tp_size_ == 0
                      ? fmt::format(" (an even split of {} would be {})", whole_.qkv(),
                                    whole_.qkv() / tp_size_)
                      : fmt::format(" ({} does not even divide by {})", whole_.qkv(), tp_size_));
  }

  std::string norm() const {
    if (model_.qk_norm == "none") return "none";
    if (full_width())
      return "full width: one RMS over all heads, weights cut by head, statistics summed over "
             "ranks";
    if (model_.qk_norm == "per_head") {
      return fmt::format(
          "per head: one weight of {} for all heads, whole on every rank, nothing to reduce",
          shape_.head_dim);
    }
    if (model_.qk_norm == "weightless_after_rope")
      return "per head, without a weight, after RoPE: nothing to reduce";
    if (model_.qk_norm == "mla_latent") return "on the compressed latents, whole on every rank";
    return "not known";
  }

  std::string k_statistic() const {
    if (!full_width() || tp_size_ == 1) return "";
    const std::int64_t local = map_.k_norm.size;
    if (!replicated()) {
      return fmt::format("the sum of squares over {} ranks: divide by {}*{}, not {}", tp_size_,
                         tp_size_, local, local);
    }
    return fmt::format(
        "the sum of squares over {0} ranks counts each KV head {1} times: divide by {0}*{2}, not "
        "{3}*{2}",
        tp_size_, map_.rank.num_kv_head_replicas, shape_.head_dim, shape_.num_kv_heads);
  }

  // The sizes that divide the query heads and of which `wanted` holds.
  template <typename F>
  std::vector<int> sizes(F wanted) const {
    std::vector<int> found;
    for (int t = 1; t <= shape_.num_heads; ++t) {
      if (shape_.num_heads % t == 0 && wanted(t)) found.push_back(t);
    }
    return found;
  }

  // Cut, replicated, or refused for the sake of the KV heads.
  std::string valid_sizes() const {
    const int kv_heads = shape_.num_kv_heads;
    const auto cut = sizes([&](int t) { return t <= kv_heads && !partitionable(shape_, t); });
    const auto replicated = sizes([&](int t) { return t > kv_heads && !partitionable(shape_, t); });
    const auto refused = sizes([&](int t) { return partitionable(shape_, t).has_value(); });
    std::string out = fmt::format("{}", fmt::join(cut, " "));
    if (!replicated.empty()) out += fmt::format(" | replicated {}", fmt::join(replicated, " "));
    if (!refused.empty()) {
      out += fmt::format(" | refused {}: {}", fmt::join(refused, " "),
                         *partitionable(shape_, refused.back()));
    }
    return out;
  }

  const ExplainOptions& options_;
  const Model& model_;
  const ModelShape& shape_;
  int tp_size_;
  int shown_ = 0;
  ShardMap map_;
  ProjectionRows whole_;
};

}  // namespace

std::string explain_table(const ExplainOptions& options) { return Explanation(options).text(); }

int explain_main(const ExplainOptions& options) {
  const std::string text = options.json ? explain_json(options) + "\n" : explain_table(options);
  std::fputs(text.c_str(), stdout);
  return partitionable(options.model.shape, options.tp_size) ? kExitBadInput : 0;
}

}  // namespace tp
