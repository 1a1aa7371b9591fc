#include "harness/device/launch_size.h"

#include <fmt/format.h>

#include "harness/device/fault.h"

namespace tp {

void check_launch(std::string_view kernel, const LaunchSize& size, int tp_rank) {
  const auto dims = [](const auto& d) { return fmt::format("{} x {} x {}", d[0], d[1], d[2]); };
  const auto refuse = [&](const std::string& why) {
    throw Fault{Outcome::BadLaunch, fmt::format("kernel {}: {}", kernel, why), tp_rank};
  };
  const auto& [grid, block, shared_bytes] = size;
  if (size.blocks() == 0) refuse(fmt::format("a grid of {} blocks is empty", dims(grid)));
  if (size.threads() == 0) refuse(fmt::format("a block of {} threads is empty", dims(block)));
  if (grid[0] > 0x7FFFFFFFu || grid[1] > 65535 || grid[2] > 65535) {
    refuse(fmt::format("a grid of {} blocks exceeds 2147483647 x 65535 x 65535", dims(grid)));
  }
  if (block[0] > 1024 || block[1] > 1024 || block[2] > 64) {
    refuse(fmt::format("a block of {} threads exceeds 1024 x 1024 x 64", dims(block)));
  }
  if (size.threads() > kMaxThreads) {
    refuse(fmt::format("a block of {} = {} threads exceeds {}", dims(block), size.threads(),
                       kMaxThreads));
  }
  if (shared_bytes > kMaxSharedBytes) {
    refuse(fmt::format("{} bytes of shared memory exceed {}", shared_bytes, kMaxSharedBytes));
  }
}

}  // namespace tp
