#pragma once
// For tests of this layer: one rank in a scheduler of its own, and device memory as vectors.

#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "harness/device/buffer.h"
#include "harness/device/scheduler.h"

namespace tp::testing {

inline Report run_rank(std::function<void(Stream&)> body, std::uint64_t seed = 1) {
  Scheduler scheduler({.seed = seed});
  scheduler.add_rank(0, std::move(body));
  return scheduler.run();
}

// What `body` made the run end with, or an empty sentence.
inline std::string fault_of(std::function<void(Stream&)> body, std::uint64_t seed = 1) {
  const Report report = run_rank(std::move(body), seed);
  return report.fault ? std::string(name_of(report.fault->outcome)) + ": " + report.fault->what
                      : "";
}

template <typename T>
Buffer upload(Stream& stream, const std::vector<T>& values) {
  Buffer buffer("upload", values.size() * sizeof(T), 0xFF);
  from_host(stream, buffer.data(), values.data(), buffer.bytes());
  return buffer;
}
template <typename T>
std::vector<T> download(Stream& stream, const Buffer& buffer) {
  std::vector<T> values(buffer.bytes() / sizeof(T));
  to_host(stream, values.data(), buffer.data(), buffer.bytes());
  stream.synchronize();
  return values;
}

// What `kernel` left in device memory of `count` values of T, zero at first.
template <typename T>
std::vector<T> results(std::size_t count, std::function<void(Stream&, T*)> kernel,
                       std::uint64_t seed = 1) {
  std::vector<T> out;
  const Report report = run_rank(
      [&](Stream& stream) {
        Buffer buffer = upload(stream, std::vector<T>(count));
        kernel(stream, buffer.as<T>());
        out = download<T>(stream, buffer);
      },
      seed);
  EXPECT_FALSE(report.fault) << report.fault->what;
  return out;
}

}  // namespace tp::testing
