#include "harness/group/agreement.h"

#include <fmt/format.h>

#include <algorithm>
#include <string>

namespace tp {

Whereabouts whereabouts_of(const std::vector<CollectiveHeader>& headers, int first_rank,
                           bool fault) {
  Whereabouts w;
  w.fault = fault;
  for (std::size_t r = 0; r < headers.size() && 2 * std::size_t(w.ranks) < headers.size(); ++r) {
    const auto ranks = std::count(headers.begin(), headers.end(), headers[r]);
    if (ranks <= w.ranks) continue;
    w.header = headers[r];
    w.ranks = int(ranks);
    w.first_rank = first_rank + int(r);
  }
  for (std::size_t r = 0; r < headers.size() && w.other_rank < 0; ++r) {
    if (headers[r] == w.header) continue;
    w.other_rank = first_rank + int(r);
    w.other_header = headers[r];
  }
  return w;
}

namespace {

// Ranks of a process that are there, as far as it says.
int ranks_at(const CollectiveHeader& header, const Whereabouts& process) {
  if (process.header == header) return process.ranks;
  return process.other_rank >= 0 && process.other_header == header ? 1 : 0;
}

}  // namespace

std::optional<Fault> disagreement(const std::vector<Whereabouts>& processes, int tp_size) {
  for (std::size_t p = 0; p < processes.size(); ++p) {
    if (processes[p].fault)
      return Fault{Outcome::Pass, fmt::format("process {} reports a fault", p), -1};
  }
  // The majority is right, as far as anybody can tell from here.
  const Whereabouts* right = &processes[0];
  int with_right = 0;
  for (const Whereabouts& candidate : processes) {
    int ranks = 0;
    for (const Whereabouts& w : processes) ranks += ranks_at(candidate.header, w);
    if (ranks <= with_right) continue;
    right = &candidate;
    with_right = ranks;
  }
  const std::string others =
      2 * with_right > tp_size ? "most others" : fmt::format("tp_rank {}", right->first_rank);
  for (const Whereabouts& w : processes) {
    const bool at_right = w.header == right->header;
    if (at_right && w.other_rank < 0) continue;
    return Fault{
        Outcome::CollectiveMismatch,
        fmt::format("tp_rank {} is at {}, {} at {}", at_right ? w.other_rank : w.first_rank,
                    describe(at_right ? w.other_header : w.header), others,
                    describe(right->header)),
        -1};
  }
  return std::nullopt;
}

}  // namespace tp
