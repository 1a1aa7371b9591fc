#pragma once
// The sequences of one attention call, and which keys a query may see: what kernels' host code, the
// reference and the data agree on. Global: ranks share all of it.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "harness/base/shape.h"

namespace tp {

// One sequence of a batch. Its queries are the last of its positions: query i of n stands at
// position keys.size() - n + i, which is negative where it has fewer keys than queries.
struct Sequence {
  Shard queries;                   // rows of q and of the output
  std::vector<std::int64_t> keys;  // which row of k and v holds the key at position 0, 1, ...

  std::int64_t position_of(std::int64_t query) const {
    return std::int64_t(keys.size()) - queries.size + query;
  }
};

// Which keys a query at a position sees. Bounds are inclusive: with a window of w it sees positions
// p - (w - 1) .. p, and where the mask is not causal up to p + (w - 1).
struct AttentionMask {
  bool causal = true;
  std::int64_t window = 0;  // 0: none

  // Half-open range of the positions 0 .. num_keys that are visible from `position`; maybe empty.
  Shard visible(std::int64_t position, std::int64_t num_keys) const {
    std::int64_t first = 0, end = num_keys;
    if (window > 0) first = std::max(first, position - (window - 1));
    if (window > 0) end = std::min(end, position + window);
    if (causal) end = std::min(end, position + 1);
    return {first, std::max<std::int64_t>(0, end - first)};
  }
};

}  // namespace tp
