#include "harness/group/cuda/peer_memory.h"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <cstring>
#include <utility>
#include <vector>

namespace tp {

namespace {

// More than the largest group takes, one rank a GPU.
constexpr std::size_t kBytes = std::size_t{4} << 20;

class Mapped final : public PeerMemory {
 public:
  explicit Mapped(std::vector<std::byte*> of) : of_(std::move(of)) {}
  std::byte* of(int process) const override { return of_[std::size_t(process)]; }
  std::size_t bytes() const override { return kBytes; }

 private:
  std::vector<std::byte*> of_;
};

// Fixed numbers of bytes, one process's after another.
std::vector<std::string> all_gather(World& world, const std::string& mine) {
  std::string all;
  for (const std::string& one : world.gather(mine)) all += one;
  all = world.broadcast(all);
  std::vector<std::string> each;
  for (std::size_t at = 0; at < all.size(); at += mine.size())
    each.push_back(all.substr(at, mine.size()));
  return each;
}

// What went wrong, of a call that leaves no error behind for the next one.
std::string failure(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return "";
  (void)cudaGetLastError();
  return fmt::format("{}: {}", call, cudaGetErrorString(error));
}

// The same reason on all processes: that of the first one that has any.
std::string first_reason(World& world, const std::string& mine) {
  std::string first;
  for (const std::string& reason : world.gather(mine))
    if (first.empty()) first = reason;
  return world.broadcast(first);
}

// Whether what each process writes into the others' memory gets there.
std::string trial(World& world, const std::vector<std::byte*>& of) {
  const auto me = std::size_t(world.process());
  const auto number = [](std::size_t from, std::size_t to) {
    return std::uint32_t(from * 1000 + to + 1);
  };
  std::string why;
  for (std::size_t p = 0; p < of.size() && why.empty(); ++p) {
    const std::uint32_t sent = number(me, p);
    why = failure(cudaMemcpy(of[p] + 4 * me, &sent, 4, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  if (why.empty()) why = failure(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  why = first_reason(world, why);
  if (!why.empty()) return why;
  std::vector<std::uint32_t> got(of.size());
  why =
      failure(cudaMemcpy(got.data(), of[me], 4 * of.size(), cudaMemcpyDeviceToHost), "cudaMemcpy");
  for (std::size_t p = 0; p < of.size() && why.empty(); ++p) {
    if (got[p] != number(p, me))
      why = fmt::format("what process {} writes to process {} is lost", p, me);
  }
  return first_reason(world, why);
}

}  // namespace

IpcMemory map_peer_memory(World& world, const std::string& gpu) {
  void* own = nullptr;
  cudaIpcMemHandle_t handle{};
  std::string why = failure(cudaMalloc(&own, kBytes), "cudaMalloc");
  if (why.empty()) why = failure(cudaIpcGetMemHandle(&handle, own), "cudaIpcGetMemHandle");
  // A handle of another host means nothing here, or something else.
  if (why.empty() && world.processes_of_host() != world.processes())
    why = "the processes are on several hosts";
  // Ranks must agree on how many blocks run at the same time.
  const bool same = world.broadcast(gpu) == gpu;
  if (why.empty() && !same) why = "the GPUs are of different kinds";
  if (const std::string reason = first_reason(world, why); !reason.empty())
    return {nullptr, reason};
  std::string bytes(sizeof(handle), '\0');
  std::memcpy(bytes.data(), &handle, sizeof(handle));
  std::vector<std::byte*> of;
  for (const std::string& theirs : all_gather(world, bytes)) {
    void* mapped = own;
    if (int(of.size()) != world.process() && why.empty()) {
      std::memcpy(&handle, theirs.data(), sizeof(handle));
      why = failure(cudaIpcOpenMemHandle(&mapped, handle, cudaIpcMemLazyEnablePeerAccess),
                    "cudaIpcOpenMemHandle");
    }
    of.push_back(static_cast<std::byte*>(mapped));
  }
  why = first_reason(world, why);
  if (why.empty()) why = trial(world, of);
  if (!why.empty()) return {nullptr, why};
  return {std::make_unique<Mapped>(std::move(of)), ""};
}

}  // namespace tp
