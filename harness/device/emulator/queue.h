#pragma once
// The emulator's side of a stream: the fibers its kernels run on, and who the stream is for TSan.

#include <optional>

#include "harness/device/emulator/fiber_pool.h"
#include "harness/device/work.h"

namespace tp::emulator {

class Queue final : public DeviceQueue {
 public:
  Queue();
  ~Queue() override;

  bool finished() noexcept override { return true; }  // a kernel's last step completes it
  void host_joins() override;
  void host_leaves() override;
  std::shared_ptr<Mark> mark(bool timed) override;
  void follow(const Mark& mark, const std::string& what, bool for_others) override;
  int delay(int units) override { return units; }
  std::shared_ptr<Graph> make_graph(std::vector<std::unique_ptr<Work>> kernels) override;
  std::unique_ptr<Work> launch(std::shared_ptr<Graph> graph) override;

  FiberPool& fibers();

  // For its lifetime TSan takes the running code for the stream: what it acquires and releases is
  // ordered with the stream's kernels, and not with other streams'. Its accesses are overlooked.
  class AsStream {
   public:
    explicit AsStream(Queue& queue);
    ~AsStream();

   private:
    [[maybe_unused]] void* before_ = nullptr;
    std::optional<Overlooked> overlooked_;
  };

 private:
  [[maybe_unused]] void* identity_ = nullptr;
  char clock_ = 0;
  FiberPool* own_fibers_ = nullptr;  // TSan
};

}  // namespace tp::emulator
