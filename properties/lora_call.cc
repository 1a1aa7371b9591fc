#include "properties/lora_call.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "properties/dice.h"
#include "properties/lora_user.h"
#include "properties/run/stage.h"

namespace tp::lora {

namespace {

// Words of the key `segments`.
enum class Segments : std::int64_t { one, runs, mixed };
// Words of the key `stored`.
enum class Stored : std::int64_t { split, fused, some_of_each };

std::int64_t option(const Case& c, const char* name) { return c.options.at(name); }

bool is_row_parallel(const Case& c) {
  const auto module = c.options.find("module");
  return module != c.options.end() && module->second >= 2;
}
bool shared_out_fits(const Case& c, std::int64_t on) {
  return on == 0 || !is_row_parallel(c) ||
         (c.model.hidden_size % c.tp_size == 0 && option(c, "joins") == 0);
}
bool stored_fits(const Case& c, std::int64_t stored) { return stored == 0 || !is_row_parallel(c); }
// The sum or the shares of ranks do not stand between the two kernels.
bool together_fits(const Case& c, std::int64_t on) {
  return on == 0 ||
         (option(c, "shared_out") == 0 && (!is_row_parallel(c) || option(c, "joins") == 0));
}
bool joins_fit(const Case& c, std::int64_t joins) { return joins == 0 || is_row_parallel(c); }

}  // namespace

std::vector<Key> keys() {
  const auto flag = [](const char* name, std::string help, std::vector<int> weights = {}) {
    return Key{.name = name,
               .help = std::move(help),
               .min = 0,
               .max = 1,
               .words = {"0", "1"},
               .weights = std::move(weights)};
  };
  std::vector<Key> all = {
      {.name = "adapters",
       .help = "adapters, each in a slot",
       .min = 1,
       .max = 64,
       .fallback = 1,
       .draw_max = 6},
      {.name = "max_rank",
       .help = "LoRA ranks that a slot has room for; rounded up to shares of one size where ranks "
               "share them out",
       .min = 1,
       .max = 512,
       .fallback = 8,
       .always = true,
       .draw_max = 48,
       .large_max = 128,
       .grain = 8},
      {.name = "ranks",
       .help = "LoRA ranks of the adapters: a slot's room, one each, or one each matrix "
               "(rank_pattern and alpha_pattern)",
       .min = 0,
       .max = 2,
       .words = {"full", "lower", "pattern"}},
      {.name = "segments",
       .help = "tokens that use an adapter: all of them the first; runs of them, or any; and some "
               "of these none",
       .min = 0,
       .max = 2,
       .words = {"one", "runs", "mixed"},
       .weights = {25, 40, 35}},
      {.name = "joins",
       .help = "of a row-parallel layer: the ranks' parts of the delta join those of the base "
               "(vLLM), or the delta the base's sum (SGLang)",
       .min = 0,
       .max = 1,
       .words = {"partial", "whole"},
       .weights = {65, 35},
       .fits = joins_fit},
      {.name = "stored",
       .help = "how adapters are stored: a module for each matrix, or one for all",
       .min = 0,
       .max = 2,
       .words = {"split", "fused", "some_of_each"},
       .fits = stored_fits},
      flag("some_modules", "1: adapters that are stored split do not change all matrices"),
      flag("rslora", "1: factors are alpha / sqrt(rank)"),
      flag("merged_scale", "1: B is multiplied by the factor when it is loaded, not the delta"),
      {.name = "shared_out",
       .help = "1: ranks have a share each of A's rows, or of a row-parallel layer's B (\"fully "
               "sharded\")",
       .min = 0,
       .max = 1,
       .words = {"0", "1"},
       .fits = shared_out_fits},
      {.name = "intermediate",
       .help = "type of the shrunk activations",
       .min = 0,
       .max = 1,
       .words = {"f32", "activation"}},
      {.name = "layout",
       .help = "what of the shrunk activations lies together: matrices, tokens, or (as gathered) "
               "LoRA ranks",
       .min = 0,
       .max = 2,
       .words = {"parts", "tokens", "ranks"}},
      {.name = "file_dtype",
       .help = "type of the adapters' files",
       .min = 0,
       .max = 1,
       .words = {"activation", "f32"},
       .weights = {60, 40}},
      flag("lora_bias", "1: B of some adapters has a bias", {75, 25}),
      flag("in_place", "1: the delta is added where the base's output is", {60, 40}),
      flag("reload", "1: slots held other adapters before"),
      {.name = "together",
       .help = "1: shrunk again and expanded at once, the second kernel beginning while the first "
               "one runs",
       .min = 0,
       .max = 1,
       .words = {"0", "1"},
       .fits = together_fits},
  };
  return all;
}

bool shares_out_rank(const Case& c) { return option(c, "shared_out") == 1; }
bool merges_scale(const Case& c) { return option(c, "merged_scale") == 1; }
bool shrinks_again(const Case& c) { return option(c, "together") == 1; }
bool has_bias(const Case& c) { return option(c, "lora_bias") == 1; }
DeltaJoins joins(const Case& c, const Layer& layer) {
  return layer.cuts_columns && option(c, "joins") == 0 ? DeltaJoins::partial : DeltaJoins::whole;
}
std::int64_t slots(const Case& c) { return option(c, "adapters"); }
std::int64_t max_rank(const Case& c, const Layer& layer) {
  const std::int64_t rank = option(c, "max_rank");
  if (!shares_out_rank(c) || layer.cuts_columns) return rank;
  return (rank + c.tp_size - 1) / c.tp_size * c.tp_size;
}
DType intermediate_dtype(const Case& c) {
  return option(c, "intermediate") == 1 ? c.dtype : DType::f32;
}
DType file_dtype(const Case& c) { return option(c, "file_dtype") == 1 ? DType::f32 : c.dtype; }
Layout layout(const Case& c) { return Layout(option(c, "layout")); }

std::optional<std::string> refuse(const Case& c, const Layer& layer) {
  if (layer.fused.empty() && option(c, "stored") != 0)
    return "an adapter of one matrix is not stored as one of several: stored=split";
  if (!layer.cuts_columns && option(c, "joins") != 0)
    return "a column-parallel layer has no sum for a delta to join: joins=partial";
  if (layer.cuts_columns && shares_out_rank(c)) {
    if (joins(c, layer) == DeltaJoins::whole)
      return "shared_out=1 gives a rank a share of the delta's columns, and joins=whole needs all";
    if (layer.rows.front() % c.tp_size != 0)
      return fmt::format("shared_out=1: {} rows of B are not {} equal shares", layer.rows.front(),
                         c.tp_size);
  }
  if (!together_fits(c, option(c, "together")))
    return "together=1: what ranks tell each other stands between shrink and expand";
  const std::int64_t rows = *std::max_element(layer.rows.begin(), layer.rows.end()),
                     room = max_rank(c, layer) * slots(c);
  if (auto reason = too_large(rows, room)) return reason;
  if (auto reason = too_large(layer.in_features, room)) return reason;
  return too_large(std::int64_t{c.num_tokens} * c.tp_size, std::max(rows, layer.in_features));
}

std::vector<Adapter> adapters(const Case& c, const Layer& layer) {
  const std::int64_t room = max_rank(c, layer), parts = std::int64_t(layer.parts.size());
  const bool reload = option(c, "reload") == 1;
  std::vector<Adapter> all;
  for (std::int64_t slot = 0; slot < slots(c) + reload; ++slot) {
    Dice dice(c.seed, "adapters", std::uint64_t(slot));
    const bool is_former = slot == slots(c);
    Adapter adapter{.use_rslora = option(c, "rslora") == 1};
    const auto stored = Stored(option(c, "stored"));
    adapter.is_fused = stored == Stored::fused ||
                       (stored == Stored::some_of_each && !is_former && dice.below(2) == 0);
    const auto drawn = [&] {
      Module m{.rank = room};
      // A slot that was full shows what is left of it.
      if (option(c, "ranks") != 0 && !is_former) m.rank = 1 + dice.below(room);
      // So that exact data stay exact: the rank times a power of two other than 1.
      static constexpr double kFactors[] = {0.5, 2, -4};
      static constexpr double kAlphas[] = {6, 12, -24, 40};
      const std::int64_t which = dice.below(12);
      m.alpha = c.fill == Fill::exact ? double(m.rank) * kFactors[which % 3] : kAlphas[which % 4];
      if (m.alpha == double(m.rank)) m.alpha += 2;
      return m;
    };
    // An adapter without a bias may get the slot of one that has it.
    adapter.has_bias = has_bias(c) && (slot == 0 || is_former || dice.below(3) != 0);
    const Module first = drawn();
    for (std::int64_t p = 0; p < parts; ++p) {
      const bool is_own = option(c, "ranks") == 2 && !adapter.is_fused && p > 0;
      adapter.modules.push_back(is_own ? drawn() : first);
    }
    if (option(c, "some_modules") == 1 && !adapter.is_fused && !is_former && parts > 1)
      adapter.modules[std::size_t(dice.below(parts))] = {};
    all.push_back(adapter);
  }
  if (is_users(c)) all.front() = user_modules(layer);
  return all;
}

std::string config_text(const Layer& layer, const Adapter& adapter, double alpha_times) {
  std::string targets, ranks, alphas;
  const auto add = [](std::string& list, const std::string& item) {
    if (!list.empty()) list += ", ";
    list += item;
  };
  const Module* first = nullptr;
  for (std::size_t p = 0; p < layer.parts.size(); ++p) {
    const Module& m = adapter.modules[p];
    if (m.rank == 0 || (adapter.is_fused && first != nullptr)) continue;
    const std::string& name = adapter.is_fused ? layer.fused : layer.parts[p];
    add(targets, '"' + name + '"');
    if (first == nullptr) {
      first = &m;
    } else {
      if (m.rank != first->rank) add(ranks, fmt::format("\"{}\": {}", name, m.rank));
      if (m.alpha != first->alpha)
        add(alphas, fmt::format("\"{}\": {}", name, m.alpha * alpha_times));
    }
  }
  return fmt::format(
      R"({{"peft_type": "LORA", "r": {}, "lora_alpha": {}, "use_rslora": {}, "lora_bias": {}, )"
      R"("bias": "none", "target_modules": [{}], "rank_pattern": {{{}}}, "alpha_pattern": {{{}}}}})",
      first->rank, first->alpha * alpha_times, adapter.use_rslora, adapter.has_bias, targets, ranks,
      alphas);
}

std::vector<std::int32_t> slot_of_token(const Case& c, std::int64_t rotate) {
  const std::int64_t n = slots(c), tokens = c.num_tokens;
  Dice dice(c.seed, "segments");
  std::vector<std::int32_t> of(static_cast<std::size_t>(tokens), 0);
  const auto drawn = [&] { return std::int32_t(dice.below(n + 1)) - 1; };
  switch (Segments(option(c, "segments"))) {
    case Segments::one:
      break;
    case Segments::runs:
      for (std::int64_t t = 0; t < tokens;) {
        const std::int64_t longest = std::max<std::int64_t>(2, tokens / 2);
        const std::int64_t length = 1 + dice.below(dice.below(2) == 0 ? 3 : longest);
        const std::int32_t slot = drawn();
        for (std::int64_t end = std::min(tokens, t + length); t < end; ++t)
          of[std::size_t(t)] = slot;
      }
      break;
    case Segments::mixed:
      for (std::int32_t& slot : of) slot = drawn();
      break;
  }
  // A case without any adapter in use would show nothing.
  if (std::all_of(of.begin(), of.end(), [](std::int32_t s) { return s < 0; })) of[0] = 0;
  std::rotate(of.begin(), of.begin() + rotate % tokens, of.end());
  return of;
}

LoraLayer lora_layer(const Case& c, const Layer& layer, int tp_rank) {
  LoraLayer l{.base = {.rows = layer.rows,
                       .own = layer.own(tp_rank),
                       .replicas = layer.replicas,
                       .in_features = layer.in_features,
                       .cuts_columns = layer.cuts_columns,
                       .tp_size = c.tp_size,
                       .tp_rank = tp_rank},
              .max_rank = max_rank(c, layer),
              .shares_out_rank = shares_out_rank(c),
              .merges_scale = merges_scale(c),
              .prefix = layer.prefix,
              .parts = layer.parts,
              .fused = layer.fused};
  if (layer.cuts_columns && shares_out_rank(c)) {
    const std::int64_t share = layer.rows.front() / c.tp_size;
    l.base.own = {{tp_rank * share, share}};
  }
  return l;
}

}  // namespace tp::lora
