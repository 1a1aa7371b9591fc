#include <fmt/format.h>
#include <fmt/ranges.h>

#include "harness/base/json.h"
#include "harness/cli/explain.h"
#include "harness/cli/shard_map.h"

namespace tp {

namespace {

std::string shard(const Shard& s) {
  return fmt::format(R"({{"offset":{},"size":{}}})", s.offset, s.size);
}

std::string ranges(const std::vector<Shard>& shards) {
  std::vector<std::string> pairs;
  for (const Shard& s : shards) pairs.push_back(fmt::format("[{},{}]", s.offset, s.end()));
  return fmt::format("[{}]", fmt::join(pairs, ","));
}

std::string rank_json(const ModelShape& model, int tp_size, int tp_rank) {
  const ShardMap map = shard_map(model, tp_size, tp_rank);
  return fmt::format(
      R"({{"tp_rank":{},"heads":{},"kv_heads":{},"num_kv_head_replicas":{},"rows":{{"q_proj":{},"k_proj":{},)"
      R"("v_proj":{},"qkv_proj":{},"o_proj_columns":{},"q_norm":{},"k_norm":{},"lora_qkv_b":{}}}}})",
      tp_rank, shard(map.rank.heads), shard(map.rank.kv_heads), map.rank.num_kv_head_replicas,
      ranges({map.q_proj}), ranges({map.k_proj}), ranges({map.v_proj}), ranges(map.qkv_proj),
      ranges({map.o_proj_columns}), ranges({map.q_norm}), ranges({map.k_norm}),
      ranges(map.lora_qkv_b));
}

std::string text_or_null(const std::string& text) {
  return text.empty() ? "null" : json_quoted(text);
}

// What is not known is null: hidden_size and eps of 0, and empty texts.
std::string model_json(const Model& model) {
  const ModelShape& s = model.shape;
  return fmt::format(
      R"({{"id":{},"hidden_size":{},"num_heads":{},"num_kv_heads":{},"head_dim":{},"v_head_dim":{},)"
      R"("attn_output_gate":{},"mla":{},"qk_norm":{},"eps":{},"source":{}}})",
      text_or_null(model.id), s.hidden_size > 0 ? std::to_string(s.hidden_size) : "null",
      s.num_heads, s.num_kv_heads, s.head_dim, s.value_head_dim(), s.attn_output_gate, model.mla,
      text_or_null(model.qk_norm), model.eps > 0 ? fmt::format("{}", model.eps) : "null",
      text_or_null(model.source));
}

}  // namespace

std::string explain_json(const ExplainOptions& options) {
  const ModelShape& shape = options.model.shape;
  const auto reason = partitionable(shape, options.tp_size);
  std::vector<std::string> ranks;
  if (!reason) {
    const int first = options.tp_rank.value_or(0);
    const int last = options.tp_rank.value_or(options.tp_size - 1);
    for (int r = first; r <= last; ++r) ranks.push_back(rank_json(shape, options.tp_size, r));
  }
  return fmt::format(R"({{"model":{},"tp_size":{},"valid":{},"reason":{},"ranks":[{}]}})",
                     model_json(options.model), options.tp_size, !reason,
                     reason ? json_quoted(*reason) : "null", fmt::join(ranks, ","));
}

}  // namespace tp
