// Device memory and copies where the device is this process.

#include "harness/device/memory.h"

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <new>
#include <string>
#include <vector>

#include "harness/device/buffer.h"
#include "harness/device/emulator/fence_bytes.h"
#include "harness/device/sanitizer.h"

namespace tp {
namespace device_memory {

namespace {

// nearest[0] is next to the payload, and so on in steps.
Damage damage_of(const std::byte* nearest, std::ptrdiff_t step, const Layout& layout) {
  Damage damage;
  for (std::size_t i = 0; i < layout.guard_bytes; ++i, nearest += step) {
    if (*nearest == std::byte(layout.guard)) continue;
    if (damage.bytes++ == 0) damage.nearest = std::uint32_t(i + 1);
  }
  return damage;
}

}  // namespace

void* allocate(std::size_t bytes, bool) { return ::operator new (bytes, std::align_val_t{256}); }
void free(void* memory, std::size_t, bool) { ::operator delete (memory, std::align_val_t{256}); }

void fill_now(const Layout& layout) {
  std::memset(layout.front, layout.guard, layout.guard_bytes);
  std::memset(layout.payload(), layout.poison, layout.payload_bytes);
  std::memset(layout.payload() + layout.payload_bytes, layout.guard, layout.guard_bytes);
}

// Nobody can tell that it is not asynchronous.
void fill(Stream&, const Layout& layout) { fill_now(layout); }

void inspect(Stream& stream, const Layout& layout, std::shared_ptr<Damages> damages) {
  stream.call([layout, damages = std::move(damages)] {
    const std::byte* end = layout.payload() + layout.payload_bytes;
    open_up(layout.front, layout.guard_bytes);
    open_up(end, layout.guard_bytes);
    *damages = {};
    if (!emulator::all_bytes(layout.front, layout.guard_bytes, layout.guard))
      damages->before = damage_of(layout.payload() - 1, -1, layout);
    if (!emulator::all_bytes(end, layout.guard_bytes, layout.guard))
      damages->behind = damage_of(end, 1, layout);
    fence_off(layout.front, layout.guard_bytes);
    fence_off(end, layout.guard_bytes);
  });
}

// What the system could give without swapping; where it does not say, nobody knows.
std::size_t available() {
  std::ifstream in("/proc/meminfo");
  std::string name;
  for (std::size_t kilobytes = 0; in >> name >> kilobytes; in.ignore(16, '\n')) {
    if (name == "MemAvailable:") return kilobytes * 1024;
  }
  return std::numeric_limits<std::size_t>::max();
}

}  // namespace device_memory

void from_host(Stream& stream, void* destination, const void* source, std::size_t bytes) {
  const auto* first = static_cast<const std::byte*>(source);
  stream.call([destination, copy = std::vector<std::byte>(first, first + bytes)] {
    if (!copy.empty()) std::memcpy(destination, copy.data(), copy.size());
  });
}

void from_host_when_reached(Stream& stream, void* destination, const void* source,
                            std::size_t bytes) {
  if (bytes > 0) stream.call([=] { std::memcpy(destination, source, bytes); });
}

void to_host(Stream& stream, void* destination, const void* source, std::size_t bytes) {
  if (bytes > 0) stream.call([=] { std::memcpy(destination, source, bytes); });
}

void poison(Stream& stream, const Buffer& buffer, std::uint8_t value) {
  stream.call(
      [value, data = buffer.data(), bytes = buffer.bytes()] { std::memset(data, value, bytes); });
}

}  // namespace tp
