#include "harness/group/place.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <set>
#include <vector>

#include "harness/base/check.h"
#include "harness/device/ceilings.h"
#include "harness/device/cuda/gpu.h"
#include "harness/device/library_product.h"
#include "harness/group/cuda/nccl.h"
#include "harness/group/cuda/peer_memory.h"
#include "harness/group/device_link.h"
#include "harness/group/world.h"

namespace tp {

namespace {

std::unique_ptr<DeviceLink>& link_of_process() {
  static auto& link = *new std::unique_ptr<DeviceLink>;  // the GPU may still be at work at exit
  return link;
}

std::unique_ptr<PeerMemory>& memory_of_process() {
  static auto& memory = *new std::unique_ptr<PeerMemory>;
  return memory;
}

// Why these processes, each with the GPU of this id, cannot meet through NCCL; nothing if they can.
// Launchers may show each process a GPU of its own, so that it is not the numbers that count.
std::string shared_gpu(const World& world, const std::vector<std::string>& ids) {
  const std::set<std::string> different(ids.begin(), ids.end());
  if (different.size() == ids.size()) return "";
  return fmt::format(
      "{} processes have {} GPU{}, and NCCL needs one for each: start fewer, or let collectives go "
      "through the host with --group mpi",
      world.processes(), different.size(), different.size() == 1 ? "" : "s");
}

}  // namespace

std::string_view executor_name() { return "gpu"; }

DeviceLink* device_link() { return link_of_process().get(); }

const PeerMemory* peer_memory() { return memory_of_process().get(); }

// More than the blocks of 128 threads that the largest of GPUs runs at the same time.
int peer_channels(int ranks_per_device) { return 3072 / ranks_per_device; }

std::string take_place(World& world, Link link) {
  std::string why, here;
  cuda::Gpu gpu;
  try {
    const int index = world.local_process() % cuda::gpu_count();
    gpu = cuda::open_gpu(index);
    here = fmt::format("GPU {}", index);
  } catch (const Unavailable& e) {
    why = e.what();
  }
  world.agree(why);
  if (world.processes() > 1 && link != Link::mpi) {
    const std::vector<std::string> ids = world.gather(gpu.id);
    world.agree(world.is_root() ? shared_gpu(world, ids) : "");
  }
  ceilings();  // while nothing else runs
  open_library();
  std::string through;
  if (world.processes() > 1 && link != Link::mpi) {
    Nccl nccl = connect_nccl(world);
    link_of_process() = std::move(nccl.link);
    through = "; NCCL " + nccl.version;
    IpcMemory mapped = map_peer_memory(world, gpu.name);
    memory_of_process() = std::move(mapped.memory);
    through += mapped.why_not.empty() ? "; peer memory" : "; no peer memory: " + mapped.why_not;
  } else if (world.processes() > 1) {
    through = "; through the host by MPI";
  }
  const std::vector<std::string> names = world.gather(gpu.name), places = world.gather(here);
  std::string said;
  if (world.is_root()) {
    std::vector<std::string> parts;
    for (std::size_t p = 0; p < names.size(); ++p) {
      parts.push_back(names.size() == 1 ? places[p]
                                        : fmt::format("process {} on {}", p, places[p]));
      if (names[p] != names[0]) parts.back() += ", " + names[p];
    }
    said = fmt::format("{}, {}: {}{}", names[0], gpu.built, fmt::join(parts, ", "), through);
  }
  return world.broadcast(said);
}

}  // namespace tp
