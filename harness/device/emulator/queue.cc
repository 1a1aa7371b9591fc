#include "harness/device/emulator/queue.h"

#include <chrono>

#include "harness/device/emulator/block.h"
#include "harness/device/emulator/grid.h"
#include "harness/device/sanitizer.h"

namespace tp {

std::unique_ptr<DeviceQueue> make_device_queue(int, bool) {
  return std::make_unique<emulator::Queue>();
}

bool device_is_lost() noexcept { return false; }

namespace emulator {
namespace {

// TSan: pools of streams that are no more, whose work happened before all that is to come.
[[maybe_unused]] std::vector<FiberPool*>& spare_pools() {
  static auto& pools = *new std::vector<FiberPool*>;
  return pools;
}

// When it was made; and for TSan, what happened before it.
struct Clock final : Mark {
  mutable char clock = 0;
  std::chrono::steady_clock::time_point time = std::chrono::steady_clock::now();

  double us_since(const Mark& earlier) const override {
    const auto passed = time - static_cast<const Clock&>(earlier).time;
    return std::chrono::duration<double, std::micro>(passed).count();
  }
};

struct RecordedKernels final : Graph {
  std::vector<std::unique_ptr<Work>> kernels;
  std::size_t size() const override { return kernels.size(); }
};

// Runs recorded kernels one after another, each as a new launch with the arguments of the old one.
class Rerun final : public Work {
 public:
  explicit Rerun(std::shared_ptr<RecordedKernels> recorded) : recorded_(std::move(recorded)) {}

  Progress step(Random& random) override {
    if (!grid_) {
      grid_ = recorded(at_++).again();
      while (at_ < recorded_->size() && recorded(at_).overlaps()) {
        std::unique_ptr<Work> next = recorded(at_++).again();
        grid_->take_in(next);
      }
    }
    const Progress progress = grid_->step(random);
    if (progress != Progress::done) return progress;
    grid_.reset();
    return at_ == recorded_->size() ? Progress::done : Progress::moved;
  }
  std::string_view name() const override { return at().name(); }
  std::string describe() const override { return at().describe(); }

 private:
  Grid& recorded(std::size_t i) const { return static_cast<Grid&>(*recorded_->kernels[i]); }
  const Work& at() const { return grid_ ? *grid_ : recorded(at_); }

  std::shared_ptr<RecordedKernels> recorded_;
  std::size_t at_ = 0;
  std::unique_ptr<Work> grid_;
};

}  // namespace

Queue::Queue() {
#if TP_TSAN
  identity_ = __tsan_create_fiber(0);
  if (spare_pools().empty()) spare_pools().push_back(new FiberPool(run_kernel_threads));
  own_fibers_ = spare_pools().back();
  spare_pools().pop_back();
#endif
}

Queue::~Queue() {
#if TP_TSAN
  spare_pools().push_back(own_fibers_);
  __tsan_destroy_fiber(identity_);
#endif
}

FiberPool& Queue::fibers() {
  static FiberPool& shared = *new FiberPool(run_kernel_threads);
  return own_fibers_ != nullptr ? *own_fibers_ : shared;
}

void Queue::host_joins() {
  if (!kTsan) return;
  {
    AsStream as_stream(*this);
    release(&clock_);
  }
  acquire(&clock_);
}

void Queue::host_leaves() {
  if (!kTsan) return;
  release(&clock_);
  AsStream as_stream(*this);
  acquire(&clock_);
}

std::shared_ptr<Mark> Queue::mark(bool) {
  auto mark = std::make_shared<Clock>();
  if (kTsan) {
    AsStream as_stream(*this);
    release(&mark->clock);
  }
  return mark;
}

void Queue::follow(const Mark& mark, const std::string&, bool) {
  if (!kTsan) return;
  AsStream as_stream(*this);
  acquire(&static_cast<const Clock&>(mark).clock);
}

std::shared_ptr<Graph> Queue::make_graph(std::vector<std::unique_ptr<Work>> kernels) {
  auto graph = std::make_shared<RecordedKernels>();
  graph->kernels = std::move(kernels);
  return graph;
}

std::unique_ptr<Work> Queue::launch(std::shared_ptr<Graph> graph) {
  return std::make_unique<Rerun>(std::static_pointer_cast<RecordedKernels>(std::move(graph)));
}

Queue::AsStream::AsStream([[maybe_unused]] Queue& queue) {
#if TP_TSAN
  before_ = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(queue.identity_, 1);
  overlooked_.emplace();
#endif
}

Queue::AsStream::~AsStream() {
#if TP_TSAN
  overlooked_.reset();
  __tsan_switch_to_fiber(before_, 1);
#endif
}

}  // namespace emulator
}  // namespace tp
