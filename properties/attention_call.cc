#include "properties/attention_call.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "properties/dice.h"

namespace tp {

namespace {

// The queries of each sequence: all together num_tokens, the first one has the most; some may have
// none.
std::vector<std::int64_t> queries_of(const Case& c) {
  const std::int64_t n = c.options.at("num_seqs");
  std::vector<std::int64_t> queries(std::size_t(n), 0);
  Dice dice(c.seed, "queries");
  queries[0] = (c.num_tokens + n - 1) / n;
  for (std::int64_t t = queries[0]; t < c.num_tokens; ++t) ++queries[std::size_t(dice.below(n))];
  return queries;
}

// Pages 0 .. count in a drawn order.
std::vector<std::int32_t> shuffled(std::int64_t count, Dice dice) {
  std::vector<std::int32_t> pages(static_cast<std::size_t>(count));
  std::iota(pages.begin(), pages.end(), 0);
  for (std::int64_t i = count - 1; i > 0; --i)
    std::swap(pages[std::size_t(i)], pages[std::size_t(dice.below(i + 1))]);
  return pages;
}

}  // namespace

std::vector<Key> attention_batch_keys() {
  return {
      {.name = "num_seqs",
       .help = "sequences in the call",
       .min = 1,
       .max = 1024,
       .fallback = 1,
       .draw_max = 6},
      {.name = "context",
       .help =
           "keys in front of a sequence's queries: as many of the first, up to as many of others",
       .min = 0,
       .max = 1 << 20,
       .draw_max = 200,
       .large_max = 800,
       .is_size = true},
      {.name = "missing",
       .help =
           "keys that each sequence has fewer than that, so that its first queries may see none",
       .min = 0,
       .max = 64,
       .weights = {},
       .draw_max = 5},
      {.name = "page_size",
       .help = "keys in a page of the cache; 0: the keys of a sequence are consecutive rows, and "
               "without context or missing those of the fused qkv row",
       .min = 0,
       .max = 64},
      {.name = "split_by",
       .help = "who says into how many parts the keys of a query are split: the case, or the "
               "kernel itself",
       .min = 0,
       .max = 1,
       .words = {"case", "kernel"},
       .weights = {80, 20}},
      {.name = "splits",
       .help = "parts that the keys of a query are split into",
       .min = 1,
       .max = kMaxAttentionSplits,
       .fallback = 1,
       .draw_max = 6,
       .fits = [](const Case& c, std::int64_t) { return c.options.at("split_by") == 0; }},
      {.name = "placement",
       .help = "which KV heads a rank's cache holds: its own, or the whole model's",
       .min = 0,
       .max = 1,
       .words = {"own", "whole"},
       .weights = {75, 25}},
  };
}

std::vector<Key> attention_model_keys() {
  return {
      {.name = "mask",
       .help = "what a query sees",
       .min = 0,
       .max = 1,
       .words = {"causal", "full"},
       .weights = {75, 25},
       .of_model = true},
      {.name = "window",
       .help = "keys that a query sees, its own included; 0: all",
       .min = 0,
       .max = 1 << 20,
       .draw_max = 40,
       .large_max = 800,
       .of_model = true},
      {.name = "scale",
       .help = "what q.k is multiplied by",
       .min = 0,
       .max = 2,
       .words = {"rsqrt", "1", "1/16"},
       .weights = {70, 15, 15},
       .of_model = true},
      {.name = "softcap",
       .help = "logits are softcap * tanh(logit / softcap)",
       .min = 0,
       .max = 2,
       .words = {"none", "50", "5"},
       .weights = {76, 12, 12},
       .of_model = true},
      {.name = "sinks",
       .help = "a logit for each head that takes weight and has no value",
       .min = 0,
       .max = 1,
       .words = {"0", "1"},
       .weights = {75, 25},
       .of_model = true},
      {.name = "alibi",
       .help = "a slope for each head, times the distance, is taken off a logit",
       .min = 0,
       .max = 1,
       .words = {"0", "1"},
       .weights = {80, 20},
       .of_model = true},
  };
}

AttentionCall attention_call(const Case& c, std::uint64_t permutation) {
  const auto option = [&](const char* name) { return c.options.at(name); };
  const std::vector<std::int64_t> queries = queries_of(c);
  const std::int64_t n = std::int64_t(queries.size()), page_size = option("page_size");
  AttentionCall call;
  AttentionBatch& b = call.batch;
  call.fused = page_size == 0 && option("context") == 0 && option("missing") == 0 &&
               option("placement") == 0;
  Dice contexts(c.seed, "contexts");
  b.page_size = page_size;
  b.query_start = {0};
  std::int64_t pages = 0;
  for (std::int64_t s = 0; s < n; ++s) {
    const std::int64_t context = s == 0 ? option("context") : contexts.below(option("context") + 1);
    const std::int64_t keys =
        std::max<std::int64_t>(0, queries[std::size_t(s)] + context - option("missing"));
    b.kv_len.push_back(std::int32_t(keys));
    b.query_start.push_back(b.query_start.back() + std::int32_t(queries[std::size_t(s)]));
    if (page_size > 0) {
      pages += (keys + page_size - 1) / page_size;
      b.pages_per_sequence = std::max(b.pages_per_sequence, (keys + page_size - 1) / page_size + 1);
    }
  }
  // One row of keys in eight, and at least one page, belongs to no sequence any more.
  std::int64_t next = 0;
  const std::int64_t stale = call.fused ? 0 : 1 + (page_size > 0 ? pages / 8 : 7);
  if (page_size == 0) {
    for (std::int64_t s = 0; s < n; ++s) {
      b.table.push_back(std::int32_t(next));
      next += b.kv_len[std::size_t(s)] + (call.fused ? 0 : stale / n);
    }
    call.rows = call.fused ? c.num_tokens : next + stale;
  } else {
    const std::vector<std::int32_t> order =
        shuffled(pages + stale, Dice(c.seed, "pages", permutation));
    call.rows = (pages + stale) * page_size;
    for (std::int64_t s = 0; s < n; ++s) {
      for (std::int64_t p = 0; p < b.pages_per_sequence; ++p) {
        const bool used = p * page_size < b.kv_len[std::size_t(s)];
        // Beyond a sequence's last page an engine's table holds whatever it held.
        b.table.push_back(used ? order[std::size_t(next++)] : order[std::size_t(pages)]);
      }
    }
  }
  for (std::int64_t s = 0; s < n; ++s) {
    Sequence& sequence = call.sequences.emplace_back();
    sequence.queries = {b.query_start[std::size_t(s)], queries[std::size_t(s)]};
    const std::int32_t* entries = b.table.data() + s * b.pages_per_sequence;
    for (std::int64_t j = 0; j < b.kv_len[std::size_t(s)]; ++j) {
      sequence.keys.push_back(page_size == 0 ? entries[0] + j
                                             : entries[j / page_size] * page_size + j % page_size);
    }
  }
  return call;
}

AttentionCall decode_steps(const AttentionCall& call) {
  AttentionCall steps = call;
  AttentionBatch& b = steps.batch;
  b.query_start = {0};
  b.kv_len.clear();
  b.table.clear();
  steps.sequences.clear();
  for (std::size_t s = 0; s < call.sequences.size(); ++s) {
    const Sequence& from = call.sequences[s];
    for (std::int64_t i = 0; i < from.queries.size; ++i) {
      const std::int64_t keys = std::max<std::int64_t>(0, from.position_of(i) + 1);
      steps.sequences.push_back(
          {{from.queries.offset + i, 1}, {from.keys.begin(), from.keys.begin() + keys}});
      b.query_start.push_back(b.query_start.back() + 1);
      b.kv_len.push_back(std::int32_t(keys));
      const auto entries = call.batch.table.begin() + std::ptrdiff_t(s) * b.pages_per_sequence;
      b.table.insert(b.table.end(), entries, entries + b.pages_per_sequence);
    }
  }
  return steps;
}

AttentionCall only_sequence(const AttentionCall& call, std::int64_t s) {
  AttentionCall one = call;
  const std::size_t at = std::size_t(s);
  const Sequence& from = call.sequences[at];
  one.sequences = {{{0, from.queries.size}, from.keys}};
  one.batch.query_start = {0, std::int32_t(from.queries.size)};
  one.batch.kv_len = {call.batch.kv_len[at]};
  const auto entries = call.batch.table.begin() + s * one.batch.pages_per_sequence;
  one.batch.table = {entries, entries + one.batch.pages_per_sequence};
  return one;
}

AttentionSettings attention_settings(const Case& c) {
  constexpr double kSoftcaps[] = {0, 50, 5};
  const std::int64_t scale = c.options.at("scale"), window = c.options.at("window");
  AttentionSettings s;
  // As the kernel gets it, in fp32.
  s.scale = float(scale == 0 ? 1 / std::sqrt(double(c.model.head_dim)) : scale == 1 ? 1 : 0.0625);
  s.causal = c.options.at("mask") == 0;
  if (window > 0) s.window = window;
  s.softcap = kSoftcaps[c.options.at("softcap")];
  s.whole_cache = c.options.at("placement") == 1;
  s.splits = c.options.at("splits");
  if (c.options.at("split_by") == 1) {
    s.splits = 0;
    s.splits = attention_splits(c.dtype, c.model, c.tp_size, attention_call(c).batch, s);
  }
  return s;
}

}  // namespace tp
