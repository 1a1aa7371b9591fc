#pragma once
// Device memory that the kernels of all processes of a job reach.

#include <cstddef>
#include <vector>

namespace tp {

class PeerMemory {
 public:
  virtual ~PeerMemory() = default;
  // Of each process of the world, `bytes()` long.
  virtual std::byte* of(int process) const = 0;
  virtual std::size_t bytes() const = 0;
};

// This process's, made by take_place(). Null: kernels reach their own process's memory only.
const PeerMemory* peer_memory();

// Channels of a rank where so many share a device: at least as many as blocks of each can run.
int peer_channels(int ranks_per_device);

}  // namespace tp
