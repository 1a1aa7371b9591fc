#pragma once
// Who runs on this process just now. Written at every switch, in memory that outlives a crash
// (harness/group/ledger.h), so that it must be plain data.

#include <cstdint>
#include <cstring>
#include <string_view>

namespace tp {

struct RunningNow {
  std::int32_t tp_rank = -1;  // -1: no rank, the harness itself
  std::int32_t signal = 0;    // the signal that killed the process, if its handler could tell
  char what[56] = {};         // a kernel's name, or "host"

  void set(int rank, std::string_view name) {
    tp_rank = rank;
    const std::size_t n = name.size() < sizeof(what) - 1 ? name.size() : sizeof(what) - 1;
    std::memcpy(what, name.data(), n);
    what[n] = 0;
  }
};

}  // namespace tp
