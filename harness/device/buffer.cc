#include "harness/device/buffer.h"

#include <fmt/format.h>

#include <utility>

#include "harness/device/sanitizer.h"
#include "harness/device/scheduler.h"

namespace tp {

namespace {

using device_memory::Layout;

void fence_off_guards(const Layout& layout) {
  fence_off(layout.front, layout.guard_bytes);
  fence_off(layout.payload() + layout.payload_bytes, layout.guard_bytes);
}

}  // namespace

Buffer::Buffer(std::string name, std::size_t bytes, std::optional<std::uint8_t> poison)
    : name_(std::move(name)) {
  layout_ = {.guard_bytes = poison ? kGuard : 0,
             .payload_bytes = bytes,
             .guard = std::uint8_t(poison.value_or(0) ^ 0x5A),
             .poison = poison.value_or(0)};
  layout_.front =
      static_cast<std::byte*>(device_memory::allocate(layout_.bytes(), poison.has_value()));
}

Buffer::Buffer(Stream& stream, std::string name, std::size_t bytes,
               std::optional<std::uint8_t> poison)
    : Buffer(std::move(name), bytes, poison) {
  if (!poison) return;
  device_memory::fill(stream, layout_);
  fence_off_guards(layout_);
}

Buffer::Buffer(std::string name, std::size_t bytes, std::uint8_t poison)
    : Buffer(std::move(name), bytes, std::optional(poison)) {
  device_memory::fill_now(layout_);
  fence_off_guards(layout_);
}

Buffer::~Buffer() { release(); }

Buffer::Buffer(Buffer&& other) noexcept
    : name_(std::move(other.name_)),
      layout_(std::exchange(other.layout_, {})),
      damages_(std::move(other.damages_)) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  if (this == &other) return *this;
  release();
  name_ = std::move(other.name_);
  layout_ = std::exchange(other.layout_, {});
  damages_ = std::move(other.damages_);
  return *this;
}

void Buffer::release() {
  if (layout_.front == nullptr) return;
  const auto free = [layout = std::exchange(layout_, {})] {
    open_up(layout.front, layout.bytes());
    device_memory::free(layout.front, layout.bytes(), layout.guard_bytes > 0);
  };
  Scheduler* scheduler = Scheduler::current();
  if (scheduler == nullptr || scheduler->streams_are_empty()) {
    free();
  } else {
    scheduler->release_later(free);
  }
}

void Buffer::check_guards(Stream& stream) const {
  if (layout_.guard_bytes > 0) device_memory::inspect(stream, layout_, damages_);
}

std::optional<std::string> Buffer::damage() const {
  const auto sentence = [&](const device_memory::Damage& damage, const char* side,
                            std::uint32_t gap, const char* where) {
    return fmt::format("{}: {} bytes written {} its {} bytes, the nearest {} bytes {}", name_,
                       damage.bytes, side, bytes(), gap, where);
  };
  const auto& [before, behind] = *damages_;
  if (behind.bytes > 0) return sentence(behind, "behind", behind.nearest - 1, "past the end");
  if (before.bytes > 0) return sentence(before, "before", before.nearest, "before the start");
  return std::nullopt;
}

}  // namespace tp
