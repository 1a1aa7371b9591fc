#pragma once
// Memory of every process's GPU, mapped into all of them through CUDA IPC.

#include <memory>
#include <string>

#include "harness/group/peer_memory.h"
#include "harness/group/world.h"

namespace tp {

struct IpcMemory {
  std::unique_ptr<PeerMemory> memory;  // null where the GPUs cannot reach each other's memory
  std::string why_not;
};
// All processes of the world call it, each with a GPU of its own and the name of that; all get
// memory, or none does.
IpcMemory map_peer_memory(World& world, const std::string& gpu);

}  // namespace tp
