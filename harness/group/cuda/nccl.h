#pragma once
// The processes' GPUs connected by NCCL.

#include <memory>
#include <string>

#include "harness/group/device_link.h"
#include "harness/group/world.h"

namespace tp {

struct Nccl {
  std::string version;  // "2.28.3"
  std::unique_ptr<DeviceLink> link;
};

// All processes of the world call it, each with its GPU open; no two may have the same. Throws
// Unavailable, on all of them, if NCCL is not there or cannot connect them.
Nccl connect_nccl(World& world);

}  // namespace tp
