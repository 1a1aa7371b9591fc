#include "harness/base/shape.h"

#include <fmt/format.h>

#include "harness/base/check.h"

namespace tp {

std::int64_t div_exact(std::int64_t a, std::int64_t b) {
  if (b <= 0 || a % b != 0)
    throw BadInput(fmt::format("{} cannot be divided into {} equal parts", a, b));
  return a / b;
}

std::optional<std::string> partitionable(const ModelShape& model, int tp_size) {
  const auto [hidden, heads, kv_heads, head_dim, v_head_dim, gate] = model;
  if (tp_size < 1) return fmt::format("tp_size={} is below 1", tp_size);
  if (heads < 1) return fmt::format("num_heads={} is below 1", heads);
  if (kv_heads < 1) return fmt::format("num_kv_heads={} is below 1", kv_heads);
  if (head_dim < 1) return fmt::format("head_dim={} is below 1", head_dim);
  if (v_head_dim < 0) return fmt::format("v_head_dim={} is below 0", v_head_dim);
  if (heads % kv_heads != 0) {
    return fmt::format("num_heads={} is not a multiple of num_kv_heads={}", heads, kv_heads);
  }
  if (heads % tp_size != 0) {
    return fmt::format("num_heads={} cannot be divided by tp_size={}", heads, tp_size);
  }
  if (kv_heads % tp_size != 0 && tp_size % kv_heads != 0) {
    return fmt::format("tp_size={} is neither a divisor nor a multiple of num_kv_heads={}", tp_size,
                       kv_heads);
  }
  return std::nullopt;
}

RankShape partition(const ModelShape& model, int tp_size, int tp_rank) {
  if (auto reason = partitionable(model, tp_size)) throw BadInput(*reason);
  if (tp_rank < 0 || tp_rank >= tp_size) {
    throw BadInput(fmt::format("tp_rank={} is outside 0..{}", tp_rank, tp_size - 1));
  }
  const std::int64_t heads = div_exact(model.num_heads, tp_size);
  // Ranks that share a KV head are neighbours, so that each query head finds its KV head at home.
  const int replicas =
      tp_size > model.num_kv_heads ? int(div_exact(tp_size, model.num_kv_heads)) : 1;
  const std::int64_t kv_heads = div_exact(std::int64_t{model.num_kv_heads} * replicas, tp_size);
  return {.heads = {tp_rank * heads, heads},
          .kv_heads = {(tp_rank / replicas) * kv_heads, kv_heads},
          .num_kv_head_replicas = replicas};
}

}  // namespace tp
