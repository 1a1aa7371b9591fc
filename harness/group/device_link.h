#pragma once
// How the devices of several processes reach each other without the host.

#include <cstddef>
#include <string>
#include <vector>

#include "harness/device/stream.h"

namespace tp {

class DeviceLink {
 public:
  virtual ~DeviceLink() = default;
  // An operation of the stream among the first bytes.size() processes of the world, all of which
  // call it in the same order: `all` becomes everybody's contribution, process 0's bytes[0] first;
  // `mine` is this process's. `what`: for the sentence about a hang.
  virtual void all_gather(Stream& stream, const void* mine, void* all,
                          const std::vector<std::size_t>& bytes, const std::string& what) = 0;
  // Gives up what is under way; nothing can be exchanged any more.
  virtual void abort() = 0;
};

// This process's, made by take_place(). Null: what crosses processes is staged through the host.
DeviceLink* device_link();

}  // namespace tp
