#pragma once
// Between the scheduler and a backend: what a stream can be asked to do, and what a backend keeps
// for it.

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace tp {

class Random;

enum class Progress : std::uint8_t {
  done,   // the work is complete
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
};

// A backend's side of one stream.
class DeviceQueue {
 public:
  virtual ~DeviceQueue() = default;
  // Whether everything that was handed to the device is complete, or will never be.
  virtual bool finished() noexcept = 0;
  // Throws Fault if the device failed.
  virtual void check() {}
  // Host code is about to see, or has just changed, what the stream's work sees. For race
  // detection.
  virtual void host_joins() {}
  virtual void host_leaves() {}
};

std::unique_ptr<DeviceQueue> make_device_queue(int tp_rank);

}  // namespace tp
