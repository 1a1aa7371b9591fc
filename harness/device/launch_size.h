#pragma once
// How large a launch is, and what CUDA would refuse. The same limits hold on every backend.

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tp {

inline constexpr int kMaxThreads = 1024;                    // of a block
inline constexpr std::size_t kMaxSharedBytes = 227 * 1024;  // of a block on sm_90

struct LaunchSize {
  std::array<unsigned, 3> grid;   // blocks, x y z
  std::array<unsigned, 3> block;  // threads of a block
  std::size_t shared_bytes = 0;   // dynamic shared memory of a block

  std::uint64_t blocks() const { return std::uint64_t{grid[0]} * grid[1] * grid[2]; }
  std::uint64_t threads() const { return std::uint64_t{block[0]} * block[1] * block[2]; }
};

// Throws Fault, naming the numbers, if CUDA would refuse the launch.
void check_launch(std::string_view kernel, const LaunchSize& size, int tp_rank);

}  // namespace tp
