#include "harness/device/cuda/queue.h"

#include <utility>

#include "harness/device/cuda/check.h"

namespace tp {

std::unique_ptr<DeviceQueue> make_device_queue(int tp_rank) {
  return std::make_unique<cuda::Queue>(tp_rank);
}

namespace cuda {

Queue::Queue(int tp_rank) : tp_rank_(tp_rank) {
  cuda::check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate",
              tp_rank);
}

Queue::~Queue() { cudaStreamDestroy(stream_); }

bool Queue::finished() noexcept {
  if (error_ != cudaSuccess) return true;
  const cudaError_t state = cudaStreamQuery(stream_);
  if (state == cudaErrorNotReady) return false;
  error_ = state;
  return true;
}

void Queue::check() { cuda::check(error_, last_, tp_rank_); }

Submission::Submission(std::string name, Stream& stream, std::function<void(cudaStream_t)> submit)
    : name_(std::move(name)),
      queue_(static_cast<Queue&>(stream.device_queue())),
      submit_(std::move(submit)) {}

Progress Submission::step(Random&) {
  queue_.check();
  queue_.blame(name_);
  submit_(queue_.stream());
  cuda::check(cudaGetLastError(), name_, queue_.tp_rank());
  return Progress::done;
}

}  // namespace cuda
}  // namespace tp
