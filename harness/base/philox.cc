#include "harness/base/philox.h"

#include <Random123/philox.h>

#include <algorithm>
#include <cstddef>

namespace tp {
namespace {

constexpr std::size_t kLanes = 8;

// philox() of kLanes indices side by side: loops of a fixed length, which compilers turn into
// vectors.
void philox_lanes(std::uint64_t seed, std::uint64_t stream, std::uint64_t index,
                  std::uint32_t* out) {
  std::uint32_t c0[kLanes], c1[kLanes], c2[kLanes], c3[kLanes];
  for (std::size_t i = 0; i < kLanes; ++i) {
    c0[i] = std::uint32_t(index + i), c1[i] = std::uint32_t((index + i) >> 32);
    c2[i] = std::uint32_t(stream), c3[i] = std::uint32_t(stream >> 32);
  }
  std::uint32_t k0 = std::uint32_t(seed), k1 = std::uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (std::size_t i = 0; i < kLanes; ++i) {
      const std::uint64_t a = std::uint64_t{PHILOX_M4x32_0} * c0[i];
      const std::uint64_t b = std::uint64_t{PHILOX_M4x32_1} * c2[i];
      c0[i] = std::uint32_t(b >> 32) ^ c1[i] ^ k0, c1[i] = std::uint32_t(b);
      c2[i] = std::uint32_t(a >> 32) ^ c3[i] ^ k1, c3[i] = std::uint32_t(a);
    }
    k0 += PHILOX_W32_0, k1 += PHILOX_W32_1;
  }
  for (std::size_t i = 0; i < kLanes; ++i) {
    out[4 * i] = c0[i], out[4 * i + 1] = c1[i], out[4 * i + 2] = c2[i], out[4 * i + 3] = c3[i];
  }
}

}  // namespace

Random4 philox(std::uint64_t seed, std::uint64_t stream, std::uint64_t index) {
  const r123::Philox4x32::ctr_type counter{{std::uint32_t(index), std::uint32_t(index >> 32),
                                            std::uint32_t(stream), std::uint32_t(stream >> 32)}};
  const r123::Philox4x32::key_type key{{std::uint32_t(seed), std::uint32_t(seed >> 32)}};
  const auto r = r123::Philox4x32{}(counter, key);
  return {r[0], r[1], r[2], r[3]};
}

void philox_words(std::uint64_t seed, std::uint64_t stream, std::uint64_t first,
                  std::span<std::uint32_t> out) {
  std::size_t i = 0;
  const auto one_by_one = [&](std::size_t end) {
    while (i < end) {
      const Random4 block = philox(seed, stream, (first + i) / 4);
      do {
        out[i] = block[(first + i) % 4];
      } while (++i < end && (first + i) % 4 != 0);
    }
  };
  one_by_one(std::min(out.size(), std::size_t(-first % 4)));  // to where a block begins
  for (; out.size() - i >= 4 * kLanes; i += 4 * kLanes)
    philox_lanes(seed, stream, (first + i) / 4, &out[i]);
  one_by_one(out.size());
}

}  // namespace tp
