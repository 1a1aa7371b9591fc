#include "harness/device/stream.h"

#include <utility>

#include "harness/device/scheduler.h"

namespace tp {

Stream::Stream(Scheduler& scheduler, int tp_rank)
    : scheduler_(scheduler), tp_rank_(tp_rank), queue_(make_device_queue(tp_rank)) {}

Stream::~Stream() { operations_.clear(); }

void Stream::push(Operation operation) {
  if (!scheduler_.cancelled()) operations_.push_back(std::move(operation));
}

void Stream::enqueue(std::unique_ptr<Work> work) { push(std::move(work)); }
void Stream::call(std::function<void()> f) { push(Call{std::move(f)}); }
void Stream::wait(Gate& gate) { push(Hold{&gate, nullptr}); }
void Stream::wait(const Event& event) { push(Hold{event.gate.get(), event.gate}); }
void Stream::record(const Event& event) {
  call([gate = event.gate] { gate->is_open = true; });
}
void Stream::synchronize() { scheduler_.wait_until_empty(*this); }

bool Stream::empty() { return operations_.empty() && queue_->finished(); }

bool Stream::runnable() {
  if (operations_.empty()) return false;
  const Operation& head = operations_.front();
  if (const auto* hold = std::get_if<Hold>(&head)) return hold->gate->is_open;
  return std::holds_alternative<std::unique_ptr<Work>>(head) || queue_->finished();
}

Progress Stream::step(Random& random) {
  // The head stays in the queue while it runs: until then the stream is not empty.
  Operation& head = operations_.front();
  Progress progress = Progress::done;
  if (auto* work = std::get_if<std::unique_ptr<Work>>(&head)) {
    progress = (*work)->step(random);
  } else {
    if (auto* call = std::get_if<Call>(&head)) {
      queue_->check();
      queue_->host_joins();
      call->f();
    }
    queue_->host_leaves();
  }
  if (progress == Progress::done) operations_.pop_front();
  return progress;
}

std::string_view Stream::running() const {
  if (operations_.empty()) return "host";
  const auto* work = std::get_if<std::unique_ptr<Work>>(&operations_.front());
  return work != nullptr ? (*work)->name() : "host";
}

// What was handed to a GPU is no longer in the queue, but may run for ever.
bool Stream::held() {
  return !operations_.empty() && std::holds_alternative<Hold>(operations_.front()) &&
         queue_->finished();
}

std::string Stream::describe() {
  if (held()) return "waits for " + std::get<Hold>(operations_.front()).gate->what;
  if (operations_.empty()) return "waits for the device";
  const Operation& head = operations_.front();
  if (const auto* work = std::get_if<std::unique_ptr<Work>>(&head)) return (*work)->describe();
  return "waits for the device";
}

}  // namespace tp
