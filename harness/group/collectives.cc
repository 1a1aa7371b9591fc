#include "harness/group/collectives.h"

namespace tp {

std::string_view name_of(Collective what) {
  constexpr std::string_view kNames[] = {"all_reduce_sum", "all_reduce_max", "reduce_scatter_sum",
                                         "all_gather",     "broadcast",      "peer_exchange",
                                         "barrier"};
  return kNames[std::size_t(what)];
}

Volume volume_of(Collective what, std::int64_t count, std::int64_t root, int tp_size) {
  const Shard everybody{0, tp_size};
  switch (what) {
    case Collective::all_reduce_sum:
    case Collective::all_reduce_max:
      return {everybody, count, count};
    case Collective::reduce_scatter_sum:
      return {everybody, tp_size * count, count};
    case Collective::all_gather:
      return {everybody, count, tp_size * count};
    case Collective::broadcast:
      return {{root, 1}, count, count};
    case Collective::peer_exchange:
    case Collective::barrier:
      break;
  }
  return {everybody, 0, 0};
}

}  // namespace tp
