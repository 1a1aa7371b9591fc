#include "harness/base/partition_law.h"

#include <fmt/format.h>

#include <vector>

namespace tp {

std::optional<std::string> broken_partition_law(const ModelShape& model, int tp_size,
                                                RankShape (*rule)(const ModelShape&, int, int)) {
  const int H = model.num_heads, K = model.num_kv_heads;
  const auto broken = [&](const std::string& what) {
    return fmt::format("partition of {} heads and {} KV heads on {} ranks: {}", H, K, tp_size,
                       what);
  };
  std::vector<int> head_owner(std::size_t(H), -1), kv_owners(std::size_t(K), 0);
  const int replicas = tp_size > K ? tp_size / K : 1;
  for (int r = 0; r < tp_size; ++r) {
    const RankShape rank = rule(model, tp_size, r);
    if (rank.num_kv_head_replicas != replicas) {
      return broken(fmt::format("tp_rank {} counts {} replicas, not {}", r,
                                rank.num_kv_head_replicas, replicas));
    }
    if (rank.heads.offset < 0 || rank.heads.end() > H || rank.kv_heads.offset < 0 ||
        rank.kv_heads.end() > K) {
      return broken(fmt::format("tp_rank {} owns heads beyond the model's", r));
    }
    for (std::int64_t g = rank.kv_heads.offset; g < rank.kv_heads.end(); ++g)
      ++kv_owners[std::size_t(g)];
    for (std::int64_t h = rank.heads.offset; h < rank.heads.end(); ++h) {
      if (head_owner[std::size_t(h)] >= 0)
        return broken(fmt::format("query head {} has two owners", h));
      head_owner[std::size_t(h)] = r;
      const std::int64_t kv = h * K / H;  // the KV head of query head h, whoever owns it
      if (kv < rank.kv_heads.offset || kv >= rank.kv_heads.end()) {
        return broken(
            fmt::format("query head {} is on tp_rank {}, its KV head {} is not", h, r, kv));
      }
    }
  }
  for (int h = 0; h < H; ++h) {
    if (head_owner[std::size_t(h)] < 0) return broken(fmt::format("query head {} has no owner", h));
  }
  for (int g = 0; g < K; ++g) {
    if (kv_owners[std::size_t(g)] != replicas) {
      return broken(
          fmt::format("KV head {} is on {} ranks, not {}", g, kv_owners[std::size_t(g)], replicas));
    }
  }
  return std::nullopt;
}

}  // namespace tp
