#pragma once
// What every process tells process 0 after its passes of a case, and whose word counts.

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "harness/device/fault.h"
#include "harness/device/work.h"

namespace tp {

struct Share {
  std::optional<Fault> fault;
  std::uint64_t threads = 0;
  std::string trace;                // lines
  std::map<int, DeviceTime> times;  // of the process's ranks
  std::vector<std::byte> outputs;
};

// As one text, and back.
std::string pack(const Share& share);
Share unpack(const std::string& text);

// How much a process's fault explains: most what happened there, less that it waited in vain, and
// next to nothing what may be the consequence of another process's fault. 0: nothing at all; so too
// for having heard of a fault elsewhere (outcome Pass).
int weight_of(const Share& share);

}  // namespace tp
