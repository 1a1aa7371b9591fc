#pragma once
// An in-order queue of work of one rank, as CUDA has it: everything is asynchronous. A kernel, copy
// or call that was queued has NOT happened until the stream ran it; operations of one stream run in
// order, those of different streams in an order drawn from the scheduler's seed.

#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "harness/device/fault.h"
#include "harness/device/work.h"

namespace tp {

class Scheduler;

// Something that opens once. Whoever opens it sets is_open; streams that wait for it notice.
struct Gate {
  bool is_open = false;
  std::string what = "a gate";  // what is waited for, for the sentence about a hang
  bool for_others = false;      // other ranks open it: who waits for it is not to blame
};

// A point in a stream that other streams can wait for, without the host.
struct Event {
  struct Point {
    Gate gate{false, "an event"};  // opens when the stream got there, maybe before its work did
    std::shared_ptr<Mark> mark;
  };
  std::shared_ptr<Point> point = std::make_shared<Point>();
};

// The device's own time from one point of a stream to a later one.
class Stopwatch {
 public:
  // Once the stream is complete.
  double us() const;

 private:
  friend class Stream;
  struct Marks {
    std::shared_ptr<Mark> start, stop;
  };
  std::shared_ptr<Marks> marks_ = std::make_shared<Marks>();
};

// The kernels of a stream, kept to be launched again with the same arguments over whatever memory
// holds by then: CUDA graphs, one for each row of kernels that nothing else interrupts. The same
// host code must launch the same kernels each time. It must outlive the streams' work.
class Recording {
 public:
  Recording() = default;

 private:
  friend class Stream;
  std::vector<std::shared_ptr<Graph>> graphs_;
  bool replays_ = false;
  std::size_t next_ = 0;  // of graphs_, in this replay
};

class Stream {
 public:
  // Streams are made by Scheduler::add_rank and Scheduler::add_stream.
  Stream(Scheduler& scheduler, int tp_rank, std::uint64_t number);
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  int tp_rank() const { return tp_rank_; }  // -1: all ranks' of this process
  Scheduler& scheduler() const { return scheduler_; }

  // Runs f on the process's own stack (so it may call MPI) once everything before it is complete.
  void call(std::function<void()> f);
  // The same, but without waiting for the device to complete what was handed to it.
  void pass(std::function<void()> f);
  // Holds the queue until the gate is open. The gate must outlive the wait.
  void wait(Gate& gate);
  void record(const Event& event);
  void wait(const Event& event);
  // The device starts with what follows only once the host has had the time to hand it over.
  void start(const Stopwatch& watch);
  void stop(const Stopwatch& watch);
  // From the rank's own host code: returns when everything queued so far is complete. Other ranks
  // and streams run meanwhile. Where an exception is being thrown (in a destructor) it returns at
  // once.
  void synchronize();

  // Until end_recording() the kernels that are launched are kept in `recording` as well; and once
  // more until end_recording(), they are launched from there, and not as they are. Throws
  // Fault(BadLaunch) where those are not the kernels that were recorded.
  void begin_recording(Recording& recording);
  void end_recording();

  // For launch() and copies: queues work of the backend. Only kernels can be recorded.
  void enqueue(std::unique_ptr<Work> work);
  void enqueue_kernel(std::unique_ptr<Work> kernel);
  DeviceQueue& device_queue() { return *queue_; }

 private:
  friend class Scheduler;
  struct Call {
    std::function<void()> f;
    bool waits;  // for the device
  };
  struct Hold {
    Gate* gate;
    std::shared_ptr<Event::Point> point;  // of an event, which lives as long as somebody waits
  };
  struct Record {
    std::shared_ptr<Event::Point> point;
  };
  struct Time {
    std::shared_ptr<Stopwatch::Marks> marks;
    bool stops;
  };
  using Operation = std::variant<std::unique_ptr<Work>, Call, Hold, Record, Time>;

  bool empty();     // all complete
  bool runnable();  // step() would do something
  Progress step(Random& random);
  void push(Operation operation);
  void flush_kernels();
  DeviceQueue::At at();    // if it is not empty
  std::string describe();  // what it runs or waits for
  std::string_view running() const;

  Scheduler& scheduler_;
  int tp_rank_;
  std::unique_ptr<DeviceQueue> queue_;
  std::deque<Operation> operations_;
  Recording* recording_ = nullptr;
  std::vector<std::unique_ptr<Work>> kernels_;  // launched since the last other operation, if so
  // Perturbation of the schedule: seeded, and so the same in every run of a case.
  std::uint64_t number_;     // of this stream
  std::uint64_t begun_ = 0;  // works that had their delay
  bool delayed_ = false;     // the head had its delay
  int delay_left_ = 0;       // in steps
};

}  // namespace tp
