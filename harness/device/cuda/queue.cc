#include "harness/device/cuda/queue.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <thread>
#include <tuple>

#include "harness/device/cuda/check.h"
#include "harness/device/cuda/gpu.h"

namespace tp {

std::unique_ptr<DeviceQueue> make_device_queue(int tp_rank, bool timed) {
  return std::make_unique<cuda::Queue>(tp_rank, timed);
}

namespace cuda {

namespace {

constexpr int kHandOverUs = 16;  // a launch between two events takes the host less
constexpr std::chrono::milliseconds kFarewell{20};  // of a stream that nobody waited for
constexpr unsigned kAsksPerQuery = 256;  // looks at the counter, for one question to the driver

// A device that is broken says so to every stream, and not who did it: all queues there are.
std::vector<Queue*>& queues() {
  static auto& all = *new std::vector<Queue*>;
  return all;
}

double us_between(const std::shared_ptr<CUevent_st>& begin, const std::shared_ptr<CUevent_st>& end,
                  int tp_rank) {
  float milliseconds = 0;
  cuda::check(cudaEventElapsedTime(&milliseconds, begin.get(), end.get()), "cudaEventElapsedTime",
              tp_rank);
  return double(milliseconds) * 1e3;
}

struct EventMark final : Mark {
  std::shared_ptr<CUevent_st> event;

  double us_since(const Mark& earlier) const override {
    return us_between(static_cast<const EventMark&>(earlier).event, event, -1);
  }
};

class LaunchGraph final : public Graph {
 public:
  explicit LaunchGraph(std::vector<std::unique_ptr<Work>> kernels) : kernels_(std::move(kernels)) {}
  ~LaunchGraph() override {
    if (graph_ != nullptr) cudaGraphExecDestroy(graph_);
  }

  std::size_t size() const override { return kernels_.size(); }
  std::string name() const {
    return fmt::format("graph of {} kernels from {} on", size(), kernels_[0]->name());
  }

  void launch(cudaStream_t stream, int tp_rank) {
    if (graph_ == nullptr) capture(stream, tp_rank);
    cuda::check(cudaGraphLaunch(graph_, stream), "cudaGraphLaunch", tp_rank);
  }

 private:
  void capture(cudaStream_t stream, int tp_rank) {
    cuda::check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal),
                "cudaStreamBeginCapture", tp_rank);
    for (const auto& kernel : kernels_) static_cast<Submission&>(*kernel).hand_over(stream);
    const cudaError_t refused = cudaGetLastError();
    cudaGraph_t captured = nullptr;
    cudaError_t error = cudaStreamEndCapture(stream, &captured);
    if (error == cudaSuccess) error = cudaGraphInstantiate(&graph_, captured, 0);
    if (captured != nullptr) cudaGraphDestroy(captured);
    cuda::check(refused, name(), tp_rank);
    cuda::check(error, "making a " + name(), tp_rank);
  }

  std::vector<std::unique_ptr<Work>> kernels_;
  cudaGraphExec_t graph_ = nullptr;
};

// One launch of a graph, which it keeps alive.
class GraphLaunch final : public Work {
 public:
  GraphLaunch(std::shared_ptr<LaunchGraph> graph, Queue& queue)
      : graph_(std::move(graph)), name_(graph_->name()), queue_(queue) {}

  Progress step(Random&) override {
    queue_.submit(name_, Kind::kernel,
                  [&](cudaStream_t stream) { graph_->launch(stream, queue_.tp_rank()); });
    return Progress::done;
  }
  std::string_view name() const override { return name_; }
  std::string describe() const override { return "is about to run the " + name_; }

 private:
  std::shared_ptr<LaunchGraph> graph_;
  std::string name_;
  Queue& queue_;
};

}  // namespace

Queue::Queue(int tp_rank, bool timed) : tp_rank_(tp_rank), timed_(timed), counted_(take_stream()) {
  queues().push_back(this);
}

Queue::~Queue() {
  std::erase(queues(), this);
  if (uncounted_ && error_ == cudaSuccess) count();
  const auto complete = [&] { return counted_->seen() == counted_->submitted; };
  const auto until = std::chrono::steady_clock::now() + kFarewell;
  while (error_ == cudaSuccess && !complete() && std::chrono::steady_clock::now() < until)
    std::this_thread::yield();
  if (error_ == cudaSuccess && complete()) {
    give_stream(std::move(counted_));
    return;
  }
  // It still runs, or never will again: whatever it may use is never used for anything else.
  lose_device();
  (void)counted_.release();
  new std::vector(std::move(kept_));
  new std::vector(std::move(deliveries_));
}

bool Queue::finished() noexcept {
  if (error_ != cudaSuccess) return true;
  if (uncounted_) {
    count();
  } else if (counted_->seen() == counted_->submitted) {
    return true;
  }
  if (++asked_ % kAsksPerQuery != 0) return false;
  const cudaError_t state = query(counted_->stream);
  if (state != cudaErrorNotReady) error_ = state;
  return error_ != cudaSuccess;
}

void Queue::check() { cuda::check(error_, "the GPU", tp_rank_); }

// A kernel of the code under test before our own.
Fault culprit(cudaError_t error, Fault otherwise) {
  std::string what;
  int others = 0, tp_rank = -1;
  for (const Kind kind : {Kind::kernel, Kind::meets_others, Kind::harness}) {
    for (Queue* queue : queues()) {
      const Queue::InFlight* at = queue->first_in_flight();
      if (at == nullptr || at->kind != kind) continue;
      if (what.empty()) {
        tp_rank = queue->tp_rank_;
        what = fmt::format("{}: {}", at->name, cudaGetErrorString(error));
      } else if (kind != Kind::harness) {
        constexpr int kNamed = 3;
        if (++others <= kNamed)
          what += fmt::format("; or {} on tp_rank {}", at->name, queue->tp_rank_);
      }
    }
  }
  return what.empty() ? otherwise : Fault{Outcome::Crash, what, tp_rank};
}

const Queue::InFlight* Queue::first_in_flight() {
  if (uncounted_) count();
  const std::size_t open = counted_->submitted - counted_->seen();
  while (in_flight_.size() > open) in_flight_.pop_front();
  return in_flight_.empty() ? nullptr : &in_flight_.front();
}

void Queue::submit(std::string name, Kind kind,
                   const std::function<void(cudaStream_t)>& hand_over) {
  check();
  // Not of the group's stream: every rank measures how long it waits for that.
  const bool measure = timed_ && tp_rank_ >= 0 && kind != Kind::harness && kind != Kind::waits;
  const auto record = [&](const std::shared_ptr<CUevent_st>& event) {
    cuda::check(cudaEventRecord(event.get(), stream()), "cudaEventRecord", tp_rank_);
  };
  Span span;
  if (measure) {
    span = {take_event(true), take_event(true), kind != Kind::kernel};
    // The GPU must not come to the first event before the host has handed over the last.
    if (kind == Kind::kernel) launch_delay(kHandOverUs, stream());
    record(span.begin);
  }
  hand_over(stream());
  cuda::check(cudaGetLastError(), name, tp_rank_);
  if (measure) {
    record(span.end);
    spans_.push_back(std::move(span));
  }
  if (in_flight_.size() >= 64) first_in_flight();
  if (uncounted_) {
    in_flight_.back() = {std::move(name), kind};
  } else {
    in_flight_.push_back({std::move(name), kind});
  }
  uncounted_ = true;
  if (kind != Kind::harness) count();
}

void Queue::count() {
  uncounted_ = false;
  error_ = counted_->count();
}

void Queue::deliver(std::shared_ptr<std::byte> pinned, void* destination, std::size_t bytes,
                    std::shared_ptr<void> owner) {
  deliveries_.push_back({std::move(pinned), destination, bytes, std::move(owner)});
}

void Queue::host_joins() {
  for (const Delivery& d : deliveries_) std::memcpy(d.destination, d.pinned.get(), d.bytes);
  deliveries_.clear();
  kept_.clear();
}

void Queue::abandon() {
  for (Delivery& d : deliveries_) kept_.push_back(std::move(d.pinned));
  deliveries_.clear();
}

std::shared_ptr<Mark> Queue::mark(bool timed) {
  auto mark = std::make_shared<EventMark>();
  mark->event = take_event(timed);
  const auto record = [&](cudaStream_t stream) { cudaEventRecord(mark->event.get(), stream); };
  if (timed) {  // as work of its own: the queue is not finished before its time is there
    submit("a stopwatch", Kind::harness, record);
  } else {
    record(stream());
    cuda::check(cudaGetLastError(), "cudaEventRecord", tp_rank_);
  }
  return mark;
}

void Queue::follow(const Mark& mark, const std::string& what, bool for_others) {
  submit(what, for_others ? Kind::waits_for_others : Kind::waits, [&](cudaStream_t stream) {
    cudaStreamWaitEvent(stream, static_cast<const EventMark&>(mark).event.get(), 0);
  });
}

int Queue::delay(int units) {
  submit("a delay", Kind::harness, [&](cudaStream_t stream) { launch_delay(units, stream); });
  return 0;
}

std::shared_ptr<Graph> Queue::make_graph(std::vector<std::unique_ptr<Work>> kernels) {
  return std::make_shared<LaunchGraph>(std::move(kernels));
}

std::unique_ptr<Work> Queue::launch(std::shared_ptr<Graph> graph) {
  return std::make_unique<GraphLaunch>(std::static_pointer_cast<LaunchGraph>(std::move(graph)),
                                       *this);
}

DeviceQueue::At Queue::at() {
  const InFlight* first = first_in_flight();
  // Whoever waits on the device waits for a stream that says for itself what it is at.
  const bool waits =
      first != nullptr && first->kind != Kind::kernel && first->kind != Kind::harness;
  return waits ? At::waits_for_others : At::runs;
}

std::string Queue::describe() {
  const InFlight* first = first_in_flight();
  if (first == nullptr) return "waits for the device";
  return (at() == At::runs ? "runs " : "waits for ") + first->name;
}

DeviceTime Queue::time() {
  DeviceTime time;
  for (const Span& span : spans_) {
    (span.collective ? time.collective_us : time.kernel_us) +=
        us_between(span.begin, span.end, tp_rank_);
  }
  return time;
}

int resident_blocks(std::string_view name, const void* kernel, int threads,
                    std::size_t shared_bytes) {
  static auto& known = *new std::map<std::tuple<const void*, int, std::size_t>, int>;
  const auto [it, is_new] = known.try_emplace({kernel, threads, shared_bytes}, 0);
  if (is_new) {
    allow_shared_bytes(kernel, shared_bytes, name, -1);
    int each = 0;
    cuda::check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, threads, shared_bytes),
                name);
    it->second = attribute(cudaDevAttrMultiProcessorCount) * each;
  }
  return it->second;
}

bool can_overlap() {
  static const bool can = attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  return can;
}

void allow_shared_bytes(const void* kernel, std::size_t bytes, std::string_view name, int tp_rank) {
  constexpr std::size_t kAlwaysAllowed = 48 * 1024;
  static auto& allowed = *new std::map<const void*, std::size_t>;
  if (bytes <= kAlwaysAllowed || bytes <= allowed[kernel]) return;
  cuda::check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)),
              name, tp_rank);
  allowed[kernel] = bytes;
}

}  // namespace cuda
}  // namespace tp
