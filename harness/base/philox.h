#pragma once
// Counter-based random numbers: Philox4x32-10 (Salmon et al., SC'11; Random123). A value depends on
// (seed, name, global index) only, so each rank makes its own shard, the reference makes the whole,
// and no message is sent that could hide a bug. Integer operations only: the same bits everywhere.

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

namespace tp {

using Random4 = std::array<std::uint32_t, 4>;

// FNV-1a of a tensor's name: which stream of random numbers it draws from.
constexpr std::uint64_t stream_of(std::string_view name) {
  std::uint64_t h = 0xcbf29ce484222325ull;
  for (char c : name) h = (h ^ std::uint8_t(c)) * 0x100000001b3ull;
  return h;
}

Random4 philox(std::uint64_t seed, std::uint64_t stream, std::uint64_t index);

// Words [first, first + out.size()) of a stream: word i is philox(seed, stream, i / 4)[i % 4].
void philox_words(std::uint64_t seed, std::uint64_t stream, std::uint64_t first,
                  std::span<std::uint32_t> out);

// philox() for whoever computes an element at a time: neighbours share a block, or one of their row
// or head, so the last one is kept.
class LastPhilox {
 public:
  const Random4& operator()(std::uint64_t seed, std::uint64_t stream, std::uint64_t index) {
    const std::array<std::uint64_t, 3> asked{seed, stream, index};
    if (!known_ || asked != of_) value_ = philox(seed, stream, index), of_ = asked, known_ = true;
    return value_;
  }

 private:
  bool known_ = false;
  std::array<std::uint64_t, 3> of_{};
  Random4 value_{};
};

}  // namespace tp
