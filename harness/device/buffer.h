#pragma once
// Device memory that knows when it was overrun: fenced by guards on both sides and filled with
// poison.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "harness/base/tensor.h"
#include "harness/device/memory.h"
#include "harness/device/stream.h"

namespace tp {

// The payload is 256-byte aligned, exactly `bytes` long, and every byte of it is `poison` at first.
// Host code reaches it only through to_host and from_host. Throws std::bad_alloc.
class Buffer {
 public:
  Buffer() = default;
  // Poisoned before the stream's next work. Without poison there are no guards either, and the
  // memory holds what it held: for compute-sanitizer, which knows what was never written.
  Buffer(Stream& stream, std::string name, std::size_t bytes, std::optional<std::uint8_t> poison);
  // Poisoned at once.
  Buffer(std::string name, std::size_t bytes, std::uint8_t poison);
  // Work in flight may still use the memory: it is released once all streams are empty.
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  const std::string& name() const { return name_; }
  std::size_t bytes() const { return layout_.payload_bytes; }
  void* data() const { return layout_.front == nullptr ? nullptr : layout_.payload(); }
  // The payload as rows x cols values of T, contiguous.
  template <typename T>
  View<T> as(std::int64_t rows, std::int64_t cols) const {
    return {static_cast<T*>(data()), rows, cols, cols};
  }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data());
  }

  // Looks at the guards when the stream gets here.
  void check_guards(Stream& stream) const;
  // Once that is complete: what was written outside the payload, in one sentence; nothing if the
  // guards were intact.
  std::optional<std::string> damage() const;

  static constexpr std::size_t kGuard = 256;

 private:
  Buffer(std::string name, std::size_t bytes, std::optional<std::uint8_t> poison);
  void release();

  std::string name_;
  device_memory::Layout layout_;
  std::shared_ptr<device_memory::Damages> damages_ = std::make_shared<device_memory::Damages>();
};

// Asynchronous copies, operations of the stream. from_host copies `source` at once, so that the
// caller may change it; to_host has written `destination` by the next call or synchronize() of the
// stream, and it must live until then.
void from_host(Stream& stream, void* destination, const void* source, std::size_t bytes);
// The same, but `source` is read when the stream gets there, and must live until then.
void from_host_when_reached(Stream& stream, void* destination, const void* source,
                            std::size_t bytes);
void to_host(Stream& stream, void* destination, const void* source, std::size_t bytes);
// Fills the payload with `value` again; asynchronous.
void poison(Stream& stream, const Buffer& buffer, std::uint8_t value);

}  // namespace tp
