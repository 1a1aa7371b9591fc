#pragma once
// Between the scheduler and a backend: what a stream can be asked to do, and what a backend keeps
// for it.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace tp {

class Random;

enum class Progress : std::uint8_t {
  done,   // the work is complete, or in the hands of the device
  moved,  // there is more to do
  spun,   // nothing but yields: only somebody else can help
};

// One operation of a stream that runs in slices: a kernel, a copy.
class Work {
 public:
  virtual ~Work() = default;
  virtual Progress step(Random& random) = 0;  // throws Fault
  virtual std::string_view name() const = 0;  // for who-runs-now
  virtual std::string describe() const = 0;   // where it is, for the sentence about a hang
  // Whether it took the next work of its stream in, to run it beside itself.
  virtual bool take_in(std::unique_ptr<Work>&) { return false; }
  // Whether it only waits for other processes, so that a hang is theirs.
  virtual bool waits_for_others() const { return false; }
};

// A point in a stream's work that other streams can be made to wait for.
class Mark {
 public:
  virtual ~Mark() = default;
  // Of marks with a time, when the device has passed both.
  virtual double us_since(const Mark& earlier) const = 0;
};

// Kernels that can be launched again as they were.
class Graph {
 public:
  virtual ~Graph() = default;
  virtual std::size_t size() const = 0;  // kernels
};

// What the device itself measured of a stream.
struct DeviceTime {
  double kernel_us = 0;
  double collective_us = 0;  // until the other ranks had done their part
};

// A backend's side of one stream.
class DeviceQueue {
 public:
  virtual ~DeviceQueue() = default;
  // Whether everything that was handed to the device is complete, or will never be.
  virtual bool finished() noexcept = 0;
  // Whether it hands work to a device and goes on, so that works of several streams run at a time.
  virtual bool runs_ahead() const { return false; }
  // Throws Fault if the device failed.
  virtual void check() {}
  // Host code is about to see, or has just changed, what the stream's work sees.
  virtual void host_joins() {}
  virtual void host_leaves() {}
  // What to_host and others still owe to host memory is forgotten: it may be gone.
  virtual void abandon() { host_joins(); }

  // The stream's work so far, with the time that it is complete, if asked; and what comes after
  // waits for another stream's work.
  virtual std::shared_ptr<Mark> mark(bool timed) = 0;
  virtual void follow(const Mark& mark, const std::string& what, bool for_others) = 0;
  // Lets some time pass before what comes next. Returns how many steps of the scheduler that is,
  // if it is the scheduler that must let it pass.
  virtual int delay(int units) = 0;
  virtual std::shared_ptr<Graph> make_graph(std::vector<std::unique_ptr<Work>> kernels) = 0;
  virtual std::unique_ptr<Work> launch(std::shared_ptr<Graph> graph) = 0;

  // If it is not finished: what the device is at ("runs kernel x"), and whether that is a wait for
  // another stream, or even for other ranks.
  enum class At : std::uint8_t { runs, waits, waits_for_others };
  virtual At at() { return At::runs; }
  virtual std::string describe() { return "waits for the device"; }

  // Of everything since it was made, when it is finished.
  virtual DeviceTime time() { return {}; }
};

// `timed`: the device measures its kernels, where it can.
std::unique_ptr<DeviceQueue> make_device_queue(int tp_rank, bool timed);
// Whether the device of this process can be used no more: a kernel that never ends, or that broke
// it. Only a new process helps.
bool device_is_lost() noexcept;

}  // namespace tp
