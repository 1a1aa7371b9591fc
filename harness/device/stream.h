#pragma once
// An in-order queue of work of one rank, as CUDA has it: everything is asynchronous. A kernel, copy
// or call that was queued has NOT happened until the stream ran it; operations of one stream run in
// order, those of different streams in an order drawn from the scheduler's seed.

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <variant>

#include "harness/device/fault.h"
#include "harness/device/work.h"

namespace tp {

class Scheduler;

// Something that opens once. Whoever opens it sets is_open; streams that wait for it notice.
struct Gate {
  bool is_open = false;
  std::string what = "a gate";  // what is waited for, for the sentence about a hang
};

// A point in a stream that other streams can wait for.
struct Event {
  std::shared_ptr<Gate> gate = std::make_shared<Gate>(Gate{false, "an event"});
};

class Stream {
 public:
  // Streams are made by Scheduler::add_rank and Scheduler::add_stream.
  Stream(Scheduler& scheduler, int tp_rank);
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int tp_rank() const { return tp_rank_; }
  Scheduler& scheduler() const { return scheduler_; }

  // Runs f on the process's own stack (so it may call MPI) once everything before it is complete.
  void call(std::function<void()> f);
  // Holds the queue until the gate is open. The gate must outlive the wait.
  void wait(Gate& gate);
  void record(const Event& event);
  void wait(const Event& event);
  // From the rank's own host code: returns when everything queued so far is complete. Other ranks
  // and streams run meanwhile. Where an exception is being thrown (in a destructor) it returns at
  // once.
  void synchronize();

  // For launch() and copies: queues work of the backend.
  void enqueue(std::unique_ptr<Work> work);
  DeviceQueue& device_queue() { return *queue_; }

 private:
  friend class Scheduler;
  struct Call {
    std::function<void()> f;
  };
  struct Hold {
    Gate* gate;
    std::shared_ptr<Gate> keep;  // an event's gate lives as long as somebody waits for it
  };
  using Operation = std::variant<std::unique_ptr<Work>, Call, Hold>;

  bool empty();     // all complete
  bool runnable();  // step() would do something
  Progress step(Random& random);
  void push(Operation operation);
  bool held();                   // nothing of it runs: it waits for a gate
  std::string describe();        // what it runs or waits for
  std::string_view running() const;

  Scheduler& scheduler_;
  int tp_rank_;
  std::unique_ptr<DeviceQueue> queue_;
  std::deque<Operation> operations_;
};

}  // namespace tp
