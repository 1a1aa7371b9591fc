#pragma once
// The named decisions of rotary embeddings, for ShardingRules.

#include <cstdint>

namespace tp {

struct RopeRules {
  // How many columns of a head rotate, where a row of the table of cosines and sines has this many.
  std::int64_t (*rotary_dim)(int head_dim, std::int64_t table_cols) =
      [](int, std::int64_t table_cols) { return table_cols; };
  // Whether neighbours are rotated as a pair, for a model that says so or not.
  bool (*interleaved)(bool model_is_interleaved) = [](bool model_is_interleaved) {
    return model_is_interleaved;
  };
  // Whose position row `token` of the batch takes.
  std::int64_t (*position_of)(std::int64_t token) = [](std::int64_t token) { return token; };
  // How many neighbouring heads of a block take the statistic of the first of them.
  int heads_per_statistic = 1;
};

}  // namespace tp
