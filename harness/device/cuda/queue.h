#pragma once
// A rank's stream on the GPU. Never waited for but by asking again: another rank may have to act
// first.

#include <cuda_runtime_api.h>

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "harness/device/cuda/pool.h"
#include "harness/device/fault.h"
#include "harness/device/stream.h"
#include "harness/device/work.h"

namespace tp::cuda {

enum class Kind : std::uint8_t {
  kernel,            // of the code under test
  harness,           // our own: copies, poison
  waits,             // for another stream
  waits_for_others,  // for other ranks
  meets_others,      // a kernel of the code under test that waits for other ranks'
};

class Queue final : public DeviceQueue {
 public:
  Queue(int tp_rank, bool timed);
  ~Queue() override;

  bool finished() noexcept override;
  bool runs_ahead() const override { return true; }
  void check() override;
  void host_joins() override;
  void abandon() override;
  std::shared_ptr<Mark> mark(bool timed) override;
  void follow(const Mark& mark, const std::string& what, bool for_others) override;
  int delay(int units) override;
  std::shared_ptr<Graph> make_graph(std::vector<std::unique_ptr<Work>> kernels) override;
  std::unique_ptr<Work> launch(std::shared_ptr<Graph> graph) override;
  At at() override;
  std::string describe() override;
  DeviceTime time() override;

  int tp_rank() const { return tp_rank_; }
  cudaStream_t stream() const { return counted_->stream; }

  // Hands something to the GPU. `name`: of whom to blame, if it never ends or breaks the device.
  void submit(std::string name, Kind kind, const std::function<void(cudaStream_t)>& hand_over);
  // When the queue is complete: copies `bytes` of pinned memory to where host code wants them;
  // `owner` keeps that alive, if somebody must.
  void deliver(std::shared_ptr<std::byte> pinned, void* destination, std::size_t bytes,
               std::shared_ptr<void> owner = nullptr);
  // Keeps pinned memory that the GPU will read until the queue is complete.
  void keep(std::shared_ptr<std::byte> pinned) { kept_.push_back(std::move(pinned)); }

 private:
  struct InFlight {
    std::string name;
    Kind kind;
  };
  struct Delivery {
    std::shared_ptr<std::byte> pinned;
    void* destination;
    std::size_t bytes;
    std::shared_ptr<void> owner;
  };
  struct Span {
    std::shared_ptr<CUevent_st> begin, end;
    bool collective;
  };

  friend Fault culprit(cudaError_t error, Fault otherwise);
  void count();
  const InFlight* first_in_flight();

  int tp_rank_;
  bool timed_;
  std::unique_ptr<CountedStream> counted_;
  // The last of what was submitted and counted; some may be complete. Our own work is counted
  // together with what comes next: it costs a call, and is seldom to blame.
  std::deque<InFlight> in_flight_;
  bool uncounted_ = false;
  std::vector<Delivery> deliveries_;
  std::vector<std::shared_ptr<std::byte>> kept_;
  std::vector<Span> spans_;
  cudaError_t error_ = cudaSuccess;
  unsigned asked_ = 0;
};

// Hands something to the GPU and goes on: a launch, a copy.
class Submission final : public Work {
 public:
  Submission(std::string name, Kind kind, Stream& stream,
             std::function<void(cudaStream_t)> hand_over)
      : name_(std::move(name)),
        kind_(kind),
        queue_(static_cast<Queue&>(stream.device_queue())),
        hand_over_(std::move(hand_over)) {}

  Progress step(Random&) override {
    queue_.submit(name_, kind_, hand_over_);
    return Progress::done;
  }
  std::string_view name() const override { return name_; }
  std::string describe() const override { return "is about to run " + name_; }
  void hand_over(cudaStream_t to) const { hand_over_(to); }

 private:
  std::string name_;
  Kind kind_;
  Queue& queue_;
  std::function<void(cudaStream_t)> hand_over_;
};

// Whether kernels of this GPU can overlap (sm_90); others run them in order.
bool can_overlap();

// Above 48 KiB shared memory must be asked for. Launches that were queued before may need more than
// this one, so it is never asked for less.
void allow_shared_bytes(const void* kernel, std::size_t bytes, std::string_view name, int tp_rank);

// How many blocks of a launch run on all multiprocessors of this device at the same time.
int resident_blocks(std::string_view name, const void* kernel, int threads,
                    std::size_t shared_bytes);

// Spends so many microseconds, more or less, on one thread of the GPU.
void launch_delay(int microseconds, cudaStream_t stream);

}  // namespace tp::cuda
