#include "harness/device/cuda/check.h"

#include <fmt/format.h>

#include <new>

#include "harness/base/check.h"
#include "harness/device/fault.h"

namespace tp::cuda {

void check(cudaError_t error, std::string_view what, int tp_rank) {
  const auto say = [&] { return fmt::format("{}: {}", what, cudaGetErrorString(error)); };
  switch (error) {
    case cudaSuccess:
      return;
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
      throw Unavailable(say());
    case cudaErrorMemoryAllocation:
      throw std::bad_alloc();
    case cudaErrorInvalidConfiguration:
    case cudaErrorLaunchOutOfResources:
      throw Fault{Outcome::BadLaunch, say(), tp_rank};
    default:
      throw Fault{Outcome::Crash, say(), tp_rank};
  }
}

}  // namespace tp::cuda
