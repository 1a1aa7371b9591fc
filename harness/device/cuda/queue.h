#pragma once
// A rank's stream on the GPU. Never waited for but by asking again: another rank may have to act
// first.

#include <cuda_runtime_api.h>

#include <functional>
#include <string>

#include "harness/device/stream.h"
#include "harness/device/work.h"

namespace tp::cuda {

class Queue final : public DeviceQueue {
 public:
  explicit Queue(int tp_rank);
  ~Queue() override;

  bool finished() noexcept override;
  void check() override;

  int tp_rank() const { return tp_rank_; }
  cudaStream_t stream() const { return stream_; }
  // What the next error will be blamed on: the GPU tells of it later, and not of whom.
  void blame(std::string name) { last_ = std::move(name); }

 private:
  int tp_rank_;
  cudaStream_t stream_ = nullptr;
  cudaError_t error_ = cudaSuccess;
  std::string last_ = "the GPU";
};

// Hands something to the GPU and goes on: a launch, a copy.
class Submission final : public Work {
 public:
  Submission(std::string name, Stream& stream, std::function<void(cudaStream_t)> submit);
  Progress step(Random& random) override;
  std::string_view name() const override { return name_; }
  std::string describe() const override { return "is about to run " + name_; }

 private:
  std::string name_;
  Queue& queue_;
  std::function<void(cudaStream_t)> submit_;
};

}  // namespace tp::cuda
