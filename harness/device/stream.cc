#include "harness/device/stream.h"

#include <utility>

#include "harness/device/random.h"
#include "harness/device/scheduler.h"

namespace tp {

namespace {

constexpr int kDelayUnits = 64;
constexpr int kHandOverUnits = 100;  // a large graph takes the host less

// How long the n-th work of a stream is delayed: two of three not at all.
int delay_of(std::uint64_t seed, std::uint64_t stream, std::uint64_t n) {
  Random random(seed ^ (stream << 40) ^ (n << 20));
  random.next();
  return random.below(3) == 0 ? 1 + int(random.below(kDelayUnits)) : 0;
}

}  // namespace

double Stopwatch::us() const { return marks_->stop->us_since(*marks_->start); }

Stream::Stream(Scheduler& scheduler, int tp_rank, std::uint64_t number)
    : scheduler_(scheduler),
      tp_rank_(tp_rank),
      queue_(make_device_queue(tp_rank, scheduler.options().timed)),
      number_(number) {}

void Stream::push(Operation operation) {
  if (scheduler_.cancelled()) return;
  flush_kernels();
  operations_.push_back(std::move(operation));
}

void Stream::enqueue(std::unique_ptr<Work> work) { push(std::move(work)); }

void Stream::enqueue_kernel(std::unique_ptr<Work> kernel) {
  if (recording_ != nullptr) return kernels_.push_back(std::move(kernel));
  if (!operations_.empty()) {
    auto* last = std::get_if<std::unique_ptr<Work>>(&operations_.back());
    if (last != nullptr && (*last)->take_in(kernel)) return;
  }
  push(std::move(kernel));
}

void Stream::call(std::function<void()> f) { push(Call{std::move(f), true}); }
void Stream::pass(std::function<void()> f) { push(Call{std::move(f), false}); }
void Stream::wait(Gate& gate) { push(Hold{&gate, nullptr}); }
void Stream::wait(const Event& event) { push(Hold{&event.point->gate, event.point}); }
void Stream::record(const Event& event) { push(Record{event.point}); }
void Stream::start(const Stopwatch& watch) { push(Time{watch.marks_, false}); }
void Stream::stop(const Stopwatch& watch) { push(Time{watch.marks_, true}); }
void Stream::synchronize() { scheduler_.wait_until_empty(*this); }

void Stream::begin_recording(Recording& recording) {
  recording_ = &recording;
  recording.replays_ = !recording.graphs_.empty();
  recording.next_ = 0;
}

void Stream::end_recording() {
  flush_kernels();
  const Recording& recording = *std::exchange(recording_, nullptr);
  if (recording.replays_ && recording.next_ != recording.graphs_.size()) {
    throw Fault{Outcome::BadLaunch, "the second time fewer kernels are launched than were recorded",
                tp_rank_};
  }
}

void Stream::flush_kernels() {
  if (kernels_.empty()) return;
  const std::size_t count = kernels_.size();
  std::vector<std::shared_ptr<Graph>>& graphs = recording_->graphs_;
  if (!recording_->replays_) graphs.push_back(queue_->make_graph(std::move(kernels_)));
  kernels_.clear();
  const std::size_t i = recording_->replays_ ? recording_->next_++ : graphs.size() - 1;
  if (i >= graphs.size() || graphs[i]->size() != count) {
    throw Fault{Outcome::BadLaunch, "the second time other kernels are launched than were recorded",
                tp_rank_};
  }
  if (!scheduler_.cancelled()) operations_.push_back(queue_->launch(graphs[i]));
}

bool Stream::empty() { return operations_.empty() && queue_->finished(); }

bool Stream::runnable() {
  if (operations_.empty()) return false;
  const Operation& head = operations_.front();
  if (const auto* hold = std::get_if<Hold>(&head)) return hold->gate->is_open;
  if (const auto* call = std::get_if<Call>(&head)) return !call->waits || queue_->finished();
  return true;
}

Progress Stream::step(Random& random) {
  // The head stays in the queue while it runs: until then the stream is not empty.
  Operation& head = operations_.front();
  Progress progress = Progress::done;
  if (auto* work = std::get_if<std::unique_ptr<Work>>(&head)) {
    if (scheduler_.options().delays && !std::exchange(delayed_, true)) {
      if (const int units = delay_of(scheduler_.options().seed, number_, begun_++))
        delay_left_ = queue_->delay(units);
    }
    if (delay_left_ > 0) return --delay_left_, Progress::moved;
    progress = (*work)->step(random);
  } else if (auto* call = std::get_if<Call>(&head)) {
    if (call->waits) {
      queue_->check();
      queue_->host_joins();
    }
    call->f();
    if (call->waits) queue_->host_leaves();
  } else if (auto* record = std::get_if<Record>(&head)) {
    record->point->mark = queue_->mark(false);
    record->point->gate.is_open = true;
  } else if (auto* time = std::get_if<Time>(&head)) {
    if (!time->stops) queue_->delay(kHandOverUnits);
    (time->stops ? time->marks->stop : time->marks->start) = queue_->mark(true);
  } else if (const auto& [gate, point] = std::get<Hold>(head); point) {
    queue_->follow(*point->mark, gate->what, gate->for_others);
  } else {
    queue_->host_leaves();
  }
  if (progress == Progress::done) {
    operations_.pop_front();
    delayed_ = false;
  }
  return progress;
}

std::string_view Stream::running() const {
  if (operations_.empty()) return "host";
  const auto* work = std::get_if<std::unique_ptr<Work>>(&operations_.front());
  return work != nullptr ? (*work)->name() : "host";
}

// What was handed to a GPU is no longer in the queue, but may run for ever.
DeviceQueue::At Stream::at() {
  using At = DeviceQueue::At;
  if (!queue_->finished()) return queue_->at();
  if (operations_.empty()) return At::runs;
  if (const auto* hold = std::get_if<Hold>(&operations_.front()))
    return hold->gate->for_others ? At::waits_for_others : At::waits;
  const auto* work = std::get_if<std::unique_ptr<Work>>(&operations_.front());
  return work != nullptr && (*work)->waits_for_others() ? At::waits_for_others : At::runs;
}

std::string Stream::describe() {
  if (!queue_->finished() || operations_.empty()) return queue_->describe();
  const Operation& head = operations_.front();
  if (const auto* hold = std::get_if<Hold>(&head)) return "waits for " + hold->gate->what;
  if (const auto* work = std::get_if<std::unique_ptr<Work>>(&head)) return (*work)->describe();
  return "waits for the device";
}

}  // namespace tp
