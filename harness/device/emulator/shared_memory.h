#pragma once
// Dynamic shared memory of blocks: fresh, poisoned, exactly as large as asked for, and fenced.

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace tp::emulator {

// The shared memory of the blocks of one launch.
class SharedMemory {
 public:
  SharedMemory(std::size_t bytes, std::uint8_t poison) : bytes_(bytes), poison_(poison) {}
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  void* take();
  void give(void* memory);
  // What was written beside `memory`, in one sentence. ASan builds have no fences: ASan itself
  // speaks.
  std::optional<std::string> check(const void* memory) const;

 private:
  std::size_t bytes_;
  std::uint8_t poison_;
  std::vector<void*> free_;
};

}  // namespace tp::emulator
