#include "harness/fuzz/report_json.h"

#include <nlohmann/json.hpp>

namespace tp {

namespace {

using Json = nlohmann::ordered_json;

Json to_json(const Finding& f) {
  return {{"op", f.smallest.op},
          {"outcome", name_of(f.verdict.outcome)},
          {"detail", f.verdict.detail},
          {"case", to_line(f.smallest)},
          {"from", to_line(f.original)},
          {"runs", f.runs},
          {"mutant", f.mutant.empty() ? Json() : Json(f.mutant)},
          {"looks_like", f.looks_like.empty() ? Json() : Json(f.looks_like)},
          {"replay", replay_command(f)}};
}

Json to_json(const FloorRatios::Timed& timed) {
  const Timing& t = timed.timing;
  return {{"op", timed.c.op},
          {"ratio", timed.ratio()},
          {"kernel_us", t.kernel_us},
          {"floor_us", t.floor_us},
          {"collective_us", t.collective_us},
          {"slowest_rank", t.slowest_rank},
          {"bytes", t.bytes},
          {"flops", t.flops},
          {"case", to_line(timed.c)}};
}

template <typename Map, typename Name>
Json to_json(const Map& map, Name name) {
  Json out = Json::object();
  for (const auto& [key, value] : map) out[std::string(name(key))] = value;
  return out;
}

}  // namespace

std::string to_json(const FuzzResult& result) {
  const Summary& s = result.summary;
  Json out = {{"exit_code", result.exit_code()},
              {"where", result.where},
              {"poison", result.poison},
              {"seed", s.seed},
              {"seconds", s.seconds},
              {"cases", s.ran()},
              {"cases_per_second", s.cases_per_second()},
              {"on_checkpoint", s.on_checkpoint},
              {"emulated_threads", s.threads},
              {"emulated_threads_per_second", s.seconds > 0 ? double(s.threads) / s.seconds : 0.0},
              {"interrupted", result.interrupted},
              {"repeated", s.repeated},
              {"pairs", s.pairs_legal < 0 ? Json()
                                          : Json{{"legal", s.pairs_legal},
                                                 {"done", s.pairs_done},
                                                 {"refused", s.pairs_refused}}},
              {"mix",
               {{"kv_heads_below_tp_size", s.share(Relation::below)},
                {"kv_heads_at_tp_size", s.share(Relation::equal)},
                {"kv_heads_above_tp_size", s.share(Relation::above)},
                {"tp_size_1", s.share(Relation::single)}}},
              {"ops", to_json(s.ops, [](const std::string& op) { return op; })},
              {"dtypes", to_json(s.dtypes, [](DType t) { return name_of(t); })},
              {"fills", to_json(s.fills, [](Fill f) { return kFillWords[std::size_t(f)]; })},
              {"outcomes", to_json(s.outcomes, [](Outcome o) { return name_of(o); })}};
  // Why cases counted for nothing: the first reason of each kind.
  out["reasons"] = to_json(s.reasons, [](Outcome o) { return name_of(o); });
  out["scores"] = Json::array();
  for (const auto& [key, score] : s.scores) {
    out["scores"].push_back({{"op", key.first}, {"dtype", name_of(key.second)}, {"score", score}});
  }
  // Both are empty where nothing was measured.
  out["floor_ratios"] = Json::array();
  for (const auto& [op, ratios] : s.ratios) {
    out["floor_ratios"].push_back(
        {{"op", op}, {"cases", ratios.count()}, {"median", ratios.median()}});
  }
  out["slowest"] = Json::array();
  for (const FloorRatios::Timed& timed : s.slowest()) out["slowest"].push_back(to_json(timed));
  out["findings"] = Json::array();
  for (const Finding& f : result.findings) out["findings"].push_back(to_json(f));
  out["unstable"] = Json::array();
  for (const Finding& f : result.unstable) out["unstable"].push_back(to_json(f));
  out["not_replayed"] = Json::array();
  for (const Finding& f : result.not_replayed) out["not_replayed"].push_back(to_json(f));
  // Details may quote bytes of the code under test that are not UTF-8.
  return out.dump(2, ' ', false, Json::error_handler_t::replace);
}

}  // namespace tp
