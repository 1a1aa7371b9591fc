#include "harness/device/cuda/check.h"

#include <fmt/format.h>

#include <new>

#include "harness/base/check.h"
#include "harness/device/fault.h"
#include "harness/device/work.h"

namespace tp {

namespace {
bool lost = false;
}

bool device_is_lost() noexcept { return lost; }

namespace cuda {

bool breaks_device(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
    case cudaErrorNotReady:
    case cudaErrorNoDevice:
    case cudaErrorInsufficientDriver:
    case cudaErrorMemoryAllocation:
    case cudaErrorInvalidConfiguration:
    case cudaErrorLaunchOutOfResources:
    case cudaErrorInvalidValue:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorStreamCaptureUnsupported:
    case cudaErrorStreamCaptureInvalidated:
    case cudaErrorStreamCaptureUnjoined:
    case cudaErrorStreamCaptureIsolation:
    case cudaErrorStreamCaptureImplicit:
      return false;
    default:
      return true;
  }
}

void lose_device() { lost = true; }

cudaError_t query(cudaStream_t stream) noexcept {
  const cudaError_t state = cudaStreamQuery(stream);
  if (state == cudaErrorNotReady) (void)cudaGetLastError();
  return state;
}

void check(cudaError_t error, std::string_view what, int tp_rank) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next launch would be told of it again
  const std::string said = fmt::format("{}: {}", what, cudaGetErrorString(error));
  if (breaks_device(error)) {
    lose_device();
    throw culprit(error, {Outcome::Crash, said, tp_rank});
  }
  if (error == cudaErrorMemoryAllocation) throw std::bad_alloc();
  if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) throw Unavailable(said);
  throw Fault{Outcome::BadLaunch, said, tp_rank};
}

}  // namespace cuda
}  // namespace tp
