#pragma once
// Device memory that knows when it was overrun: fenced by guards on both sides and filled with
// poison.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

// The payload is 256-byte aligned, exactly `bytes` long, and every byte of it is `poison` at first.
// Host code reaches it only through to_host and from_host. Throws std::bad_alloc.
class Buffer {
 public:
  Buffer() = default;
  Buffer(std::string name, std::size_t bytes, std::uint8_t poison);
  // Work in flight may still use the memory: it is released once all streams are empty.
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  const std::string& name() const { return name_; }
  std::size_t bytes() const { return bytes_; }
  void* data() const { return payload_; }
  // The payload as rows x cols values of T, contiguous.
  template <typename T>
  View<T> as(std::int64_t rows, std::int64_t cols) const {
    return {static_cast<T*>(payload_), rows, cols, cols};
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(payload_);
  }

  // What was written outside the payload, in one sentence; nothing if the guards are intact. Call
  // it when the streams that use the buffer are complete.
  std::optional<std::string> check_guards() const;

  static constexpr std::size_t kGuard = 256;

 private:
  void release();

  std::string name_;
  std::size_t bytes_ = 0;
  std::uint8_t guard_ = 0;  // every byte of the guards
  void* payload_ = nullptr;
};

// Asynchronous copies, operations of the stream. from_host copies `source` at once, so that the
// caller may change it; to_host writes `destination` when the stream gets there, so it must live
// until then.
void from_host(Stream& stream, void* destination, const void* source, std::size_t bytes);
// The same, but `source` is read when the stream gets there, and must live until then.
void from_host_when_reached(Stream& stream, void* destination, const void* source,
                            std::size_t bytes);
void to_host(Stream& stream, void* destination, const void* source, std::size_t bytes);
// Fills the payload with `value` again; asynchronous.
void poison(Stream& stream, Buffer& buffer, std::uint8_t value);

}  // namespace tp
