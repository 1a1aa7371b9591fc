#pragma once
// The collectives: what goes into each and what comes out of it, and the kernels that make the one
// into the other where one device reaches both.

#include <cstdint>
#include <string_view>
#include <vector>

#include "harness/base/dtype.h"
#include "harness/base/shape.h"
#include "harness/device/stream.h"

namespace tp {

enum class Collective : std::uint8_t {
  all_reduce_sum,
  all_reduce_max,
  reduce_scatter_sum,
  all_gather,
  broadcast,
  peer_exchange,  // kernels move the data
  barrier
};
std::string_view name_of(Collective what);

// What a collective moves, in elements.
struct Volume {
  Shard contributors;    // tp_ranks whose data go in
  std::int64_t in = 0;   // elements of each of them
  std::int64_t out = 0;  // elements that every rank gets
};
// Of one that was called with this count. `root`: a broadcast's.
Volume volume_of(Collective what, std::int64_t count, std::int64_t root, int tp_size);

// Ranks that one of these kernels takes at most.
inline constexpr int kMaxMembers = 256;

// Each of `out`, `count` elements: the sum, or else the maximum, of in[0], in[1], ... folded in
// this order, one at a time. An `out` may be one of `in`.
void fold_ranks(bool sum, DType dtype, const std::vector<const void*>& in,
                const std::vector<void*>& out, std::int64_t count, Stream& stream);

// out[i], `count` elements: the sum of part first_part + i of in[0], in[1], ..., folded as above.
// Part p of an `in` begins at p * count. An out[i] may be its part of an `in`.
void sum_parts(DType dtype, const std::vector<const void*>& in, const std::vector<void*>& out,
               std::int64_t first_part, std::int64_t count, Stream& stream);

// Each of `out`, in.size() * count elements: in[0], in[1], ... one after another. An `in` may lie
// in its own place in an `out`.
void gather_ranks(DType dtype, const std::vector<const void*>& in, const std::vector<void*>& out,
                  std::int64_t count, Stream& stream);

}  // namespace tp
