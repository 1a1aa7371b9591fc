#include "properties/attention_mutants.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>

#include "properties/attention_call.h"

namespace tp {

namespace {

using Change = std::function<void(AttentionRules&)>;
using Decides = std::function<bool(const Case&)>;

Mutant mutant(std::string id, std::string what, std::string upstream, const Change& change,
              Decides decides) {
  Mutant m{std::move(id), std::move(what), std::move(upstream), sharding_rules(),
           std::move(decides)};
  change(m.rules.attention);
  return m;
}

bool has_window(const Case& c) { return c.options.at("window") > 0; }
bool is_whole(const Case& c) { return c.options.at("placement") == 1; }
bool is_causal(const Case& c) { return c.options.at("mask") == 0; }
bool is_decode_law(const Case& c) {
  const std::int64_t law = c.options.at("law");
  return law > 0 && find_operator(c.op).key("law")->print(law) == "decode";
}
bool is_split(const Case& c) { return attention_settings(c).splits > 1; }
bool has_head_vector(const Case& c) {
  return c.tp_size > 1 && (c.options.at("sinks") == 1 || c.options.at("alibi") == 1);
}
bool has_empty_row(const Case& c) {
  const AttentionMask mask = attention_settings(c).mask();
  for (const Sequence& s : attention_call(c).sequences) {
    for (std::int64_t i = 0; i < s.queries.size; ++i) {
      if (mask.visible(s.position_of(i), std::int64_t(s.keys.size())).size == 0) return true;
    }
  }
  return false;
}

bool has_pages_beyond_16_bits(const Case& c) {
  if (c.options.at("page_size") == 0) return false;
  const RankShape rank = partition(c.model, c.tp_size, 0);
  const std::int64_t heads = is_whole(c) ? c.model.num_kv_heads : rank.kv_heads.size,
                     width = heads * std::max(c.model.head_dim, c.model.value_head_dim());
  return attention_call(c).rows * (width + c.options.at("pad")) > 1 << 16;
}

}  // namespace

std::vector<Mutant> attention_mutants() {
  const std::string vllm = "vllm-project/vllm#";
  const auto always = [](const Case&) { return true; };
  return {
      mutant(
          "param2moe-global-heads:counts",
          "attention built with the model's head counts, while q, k and v are local",
          vllm + "39707",
          [](AttentionRules& r) {
            r.heads = [](const ModelShape& m, int) {
              return HeadCounts{m.num_heads, m.num_kv_heads};
            };
            r.kv_heads = [](const ModelShape& m, int, int, bool) {
              return KvHeadMap{0, m.num_heads / m.num_kv_heads};
            };
          },
          [](const Case& c) { return c.tp_size > 1; }),
      mutant(
          "param2moe-global-heads:ratio",
          "queries share KV heads as num_heads / num_kv_heads says, not as this rank's do",
          vllm + "39707",
          [](AttentionRules& r) {
            r.kv_heads = [](const ModelShape& m, int tp, int tp_rank, bool whole) {
              const Shard kv = partition(m, tp, tp_rank).kv_heads;
              return KvHeadMap{whole ? kv.offset : 0, m.num_heads / m.num_kv_heads};
            };
          },
          [](const Case& c) { return c.tp_size > c.model.num_kv_heads; }),
      mutant(
          "param2moe-global-heads:contiguous", "strided views of q, k and v taken for contiguous",
          vllm + "39707",
          [](AttentionRules& r) {
            r.row_stride = [](std::int64_t, std::int64_t cols) { return cols; };
          },
          [](const Case& c) { return c.options.at("pad") > 0 || attention_call(c).fused; }),
      mutant(
          "per-head-param-from-zero:zero", "sinks and slopes of heads 0, 1, ... on every rank",
          "sgl-project/sglang#35092",
          [](AttentionRules& r) {
            r.head_vector = [](const ModelShape& m, int tp, int) {
              return Shard{0, partition(m, tp, 0).heads.size};
            };
            r.slopes = [](const ModelShape& m, int tp, int) {
              return Slopes{m.num_heads, {0, partition(m, tp, 0).heads.size}};
            };
          },
          has_head_vector),
      mutant(
          "per-head-param-from-zero:kv", "sinks and slopes from head tp_rank * local KV heads on",
          "sgl-project/sglang#35092",
          [](AttentionRules& r) {
            r.head_vector = [](const ModelShape& m, int tp, int tp_rank) {
              const RankShape rank = partition(m, tp, 0);
              return Shard{tp_rank * rank.kv_heads.size, rank.heads.size};
            };
            r.slopes = [](const ModelShape& m, int tp, int tp_rank) {
              const RankShape rank = partition(m, tp, 0);
              return Slopes{m.num_heads, {tp_rank * rank.kv_heads.size, rank.heads.size}};
            };
          },
          [](const Case& c) {
            const RankShape rank = partition(c.model, c.tp_size, 0);
            return has_head_vector(c) && rank.heads.size != rank.kv_heads.size;
          }),
      mutant(
          "per-head-param-from-zero:local-formula",
          "ALiBi slopes made for as many heads as this rank has", "flashinfer-ai/flashinfer#1606",
          [](AttentionRules& r) {
            r.slopes = [](const ModelShape& m, int tp, int) {
              const std::int64_t heads = partition(m, tp, 0).heads.size;
              return Slopes{heads, {0, heads}};
            };
          },
          [](const Case& c) { return c.tp_size > 1 && c.options.at("alibi") == 1; }),
      mutant(
          "kv-mirrored-q-split:ratio",
          "the cache holds all KV heads, local queries are spread over all of them",
          "GenerelSchwerz/llama.cpp#66",
          [](AttentionRules& r) {
            r.kv_heads = [](const ModelShape& m, int tp, int tp_rank, bool whole) {
              const RankShape rank = partition(m, tp, tp_rank);
              return KvHeadMap{0, rank.heads.size / (whole ? m.num_kv_heads : rank.kv_heads.size)};
            };
          },
          [](const Case& c) { return is_whole(c) && c.tp_size > 1 && c.model.num_kv_heads > 1; }),
      mutant(
          "kv-mirrored-q-split:from-zero",
          "the cache holds all KV heads, every rank's queries begin at the first",
          "GenerelSchwerz/llama.cpp#66",
          [](AttentionRules& r) {
            r.kv_heads = [](const ModelShape& m, int tp, int tp_rank, bool) {
              const RankShape rank = partition(m, tp, tp_rank);
              return KvHeadMap{0, rank.heads.size / rank.kv_heads.size};
            };
          },
          [](const Case& c) { return is_whole(c) && c.tp_size > 1 && c.model.num_kv_heads > 1; }),
      mutant(
          "merge-both-empty:nan", "states without keys weighed by exp(-inf - -inf)", vllm + "28181",
          [](AttentionRules& r) { r.empty_maximum = -std::numeric_limits<float>::infinity(); },
          [](const Case& c) { return has_empty_row(c) || is_split(c) || has_window(c); }),
      mutant(
          "lse-base-mismatch:base2", "the log-sum-exp of a part is in base 2, merged as if natural",
          "sgl-project/sglang#40903", [](AttentionRules& r) { r.lse_unit = 1.44269504f; }, always),
      mutant(
          "lse-base-mismatch:twice", "the log-sum-exp of a part converted to natural twice",
          "sgl-project/sglang#40903", [](AttentionRules& r) { r.lse_unit = 0.693147182f; }, always),
      mutant(
          "finite-mask-sentinel:5e4", "hidden logits are -5e4, not -infinity",
          "flashinfer-ai/flashinfer#4401", [](AttentionRules& r) { r.hidden_logit = -5e4f; },
          always),
      mutant(
          "finite-mask-sentinel:1e4", "hidden logits are -1e4, not -infinity",
          "flashinfer-ai/flashinfer#4401", [](AttentionRules& r) { r.hidden_logit = -1e4f; },
          always),
      mutant(
          "swa-partition-undercount:aligned",
          "as many tiles as a window fills, though it may begin within one",
          "openvinotoolkit/openvino#38034",
          [](AttentionRules& r) {
            r.tiles_of = [](std::int64_t keys, std::int64_t tile, bool) {
              return (keys + tile - 1) / tile;
            };
          },
          has_window),
      mutant(
          "swa-window-inclusive:one-more", "a window of w shows w + 1 keys",
          "huggingface/transformers#39408",
          [](AttentionRules& r) {
            r.window_left = [](std::int64_t window, bool) { return window; };
          },
          has_window),
      mutant(
          "swa-window-inclusive:one-less", "a window of w shows w - 1 keys",
          "huggingface/transformers#39408",
          [](AttentionRules& r) {
            r.window_left = [](std::int64_t window, bool) {
              return std::max<std::int64_t>(0, window - 2);
            };
          },
          [](const Case& c) { return c.options.at("window") > 1; }),
      mutant(
          "swa-window-inclusive:decode", "in decode, a window of w shows w - 1 keys",
          "huggingface/transformers#39408",
          [](AttentionRules& r) {
            r.window_left = [](std::int64_t window, bool decode) {
              return decode ? std::max<std::int64_t>(0, window - 2) : window - 1;
            };
          },
          [](const Case& c) {
            return c.options.at("window") > 1 &&
                   (attention_call(c).batch.max_queries() <= 1 || is_decode_law(c));
          }),
      mutant(
          "page-offset-int32:16-bit",
          "the product of a page and its stride kept in 16 bits (upstream: in 32)", vllm + "47671",
          [](AttentionRules& r) { r.offset_bits = 16; }, has_pages_beyond_16_bits),
      mutant(
          "own:mask-sees-next", "a causal query sees the token after it", "-",
          [](AttentionRules& r) { r.causal_ahead = 1; }, is_causal),
      mutant(
          "own:mask-misses-last", "a causal query does not see its own token", "-",
          [](AttentionRules& r) { r.causal_ahead = -1; }, is_causal),
      mutant(
          "own:split-drops-tail", "each split takes the same tiles, and nobody takes the rest", "-",
          [](AttentionRules& r) {
            r.tiles_of_split = [](std::int64_t tiles, std::int64_t splits) {
              return std::max<std::int64_t>(1, tiles / splits);
            };
          },
          is_split),
      mutant(
          "own:table-stride",
          "rows of the page table taken to be as long as the longest sequence, not as allocated",
          "-",
          [](AttentionRules& r) {
            r.table_stride = [](std::int64_t, std::int64_t used) { return used; };
          },
          [](const Case& c) {
            return c.options.at("page_size") > 0 &&
                   (c.options.at("num_seqs") > 1 || is_decode_law(c));
          }),
      mutant(
          "own:value-stride", "value heads taken to be as wide as heads", "-",
          [](AttentionRules& r) {
            r.v_head_stride = [](const ModelShape& m) { return std::int64_t{m.head_dim}; };
          },
          [](const Case& c) { return c.model.value_head_dim() != c.model.head_dim; }),
      mutant(
          "swa-window-inclusive:right", "a window of w shows w keys behind its own, too",
          "huggingface/transformers#39408",
          [](AttentionRules& r) {
            r.window_right = [](std::int64_t window, bool causal) { return causal ? 0 : window; };
          },
          [](const Case& c) { return has_window(c) && !is_causal(c); }),
      mutant(
          "own:mask-top-left", "queries of a chunk stand at the first keys, not behind the context",
          "-", [](AttentionRules& r) { r.behind_context = 0; },
          [](const Case& c) {
            return c.options.at("context") != 0 || c.options.at("missing") != 0 || is_decode_law(c);
          }),
      mutant(
          "own:stale-page", "the last page of a sequence read from where the one before it lies",
          "-", [](AttentionRules& r) { r.stale_pages = 1; },
          [](const Case& c) {
            const AttentionBatch batch = attention_call(c).batch;
            return batch.page_size > 0 && batch.max_kv_len() > batch.page_size;
          }),
      mutant(
          "own:length-of-whole-pages", "a sequence's length rounded up to whole pages", "-",
          [](AttentionRules& r) {
            r.length_unit = [](std::int64_t page_size) {
              return std::max<std::int64_t>(1, page_size);
            };
          },
          [](const Case& c) { return c.options.at("page_size") > 1 && !is_causal(c); }),
      mutant(
          "own:scale-of-value-heads", "products scaled as if heads were as wide as value heads",
          "-",
          [](AttentionRules& r) {
            r.scale = [](double scale, const ModelShape& m) {
              return scale * std::sqrt(double(m.head_dim) / m.value_head_dim());
            };
          },
          [](const Case& c) { return c.model.value_head_dim() != c.model.head_dim; }),
  };
}

}  // namespace tp
