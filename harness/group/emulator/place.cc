#include "harness/group/place.h"

#include "harness/base/check.h"
#include "harness/group/device_link.h"
#include "harness/group/peer_memory.h"

namespace tp {

std::string_view executor_name() { return "emulator"; }

DeviceLink* device_link() { return nullptr; }

const PeerMemory* peer_memory() { return nullptr; }

// Few, so that each sees several exchanges of a case.
int peer_channels(int) { return 2; }

std::string take_place(World&, Link link) {
  if (link == Link::nccl)
    throw Unavailable("--group nccl: NCCL connects GPUs, and this is the emulator");
  return "emulator";
}

}  // namespace tp
