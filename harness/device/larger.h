#pragma once
// The maximum of two floats as warp_max and block_max take it.

#include <bit>
#include <cstdint>

namespace tp {

// NaN if either is (fmaxf would drop it), and +0 above -0, so that the order of a fold cannot show.
constexpr float larger(float a, float b) {
  if (a == b) {  // equal bits, or two zeros
    return std::bit_cast<float>(std::bit_cast<std::uint32_t>(a) & std::bit_cast<std::uint32_t>(b));
  }
  return a < b || b != b ? b : a;
}

}  // namespace tp
