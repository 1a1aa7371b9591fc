#pragma once
// The kernels behind the collectives of ranks whose memory one device reaches.

#include <cstdint>
#include <vector>

#include "harness/base/dtype.h"
#include "harness/device/stream.h"

namespace tp {

enum class Collective : std::uint8_t { all_reduce_sum, all_reduce_max, all_gather, barrier };

// Ranks that one of these takes at most.
inline constexpr int kMaxMembers = 256;

// Each of `out`, `count` elements: in[0], in[1], ... folded in this order, one at a time. An `out`
// may be one of `in`.
void fold_ranks(Collective what, DType dtype, const std::vector<const void*>& in,
                const std::vector<void*>& out, std::int64_t count, Stream& stream);

// Each of `out`, in.size() * count elements: in[0], in[1], ... one after another. An `in` may lie
// in its own place in an `out`.
void gather_ranks(DType dtype, const std::vector<const void*>& in, const std::vector<void*>& out,
                  std::int64_t count, Stream& stream);

}  // namespace tp
