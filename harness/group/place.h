#pragma once
// Where the ranks of this process run, and how the processes of a job reach each other.

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

namespace tp {

class World;

// "emulator" or "gpu": each executor is a build and a binary of its own.
std::string_view executor_name();

// How the data of a collective cross processes.
enum class Link : std::uint8_t {
  best,  // NCCL between GPUs, MPI between emulators
  mpi,   // staged through host memory, on any machine
  nccl,  // one GPU a process
};
inline constexpr std::array<std::string_view, 3> kLinkWords = {"best", "mpi", "nccl"};

// Gives this process its GPU and connects it to the others. All processes of the world call it
// once, before any case. Returns the same phrase on all of them, which says where every rank runs:
// "emulator", or "NVIDIA H100 80GB HBM3 (sm_90), CUDA 13.0, driver for 13.0: GPU 0". Throws
// Unavailable with the same sentence on all of them if any cannot do it.
std::string take_place(World& world, Link link);

}  // namespace tp
