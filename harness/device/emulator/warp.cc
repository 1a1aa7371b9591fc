#include "harness/device/emulator/warp.h"

#include <bit>

#include "harness/device/larger.h"

namespace tp::emulator {
namespace {

float as_float(std::uint64_t bits) { return std::bit_cast<float>(std::uint32_t(bits)); }

// Folds 32 values as xor butterflies with distances 16, 8, 4, 2, 1 do: since f(a, b) = f(b, a), all
// lanes get the bits of this one tree.
template <typename F>
void fold(std::uint64_t* value, F f) {
  float v[32];
  for (int i = 0; i < 32; ++i) v[i] = as_float(value[i]);
  for (int distance = 16; distance >= 1; distance /= 2) {
    for (int i = 0; i < distance; ++i) v[i] = f(v[i], v[i + distance]);
  }
  for (int i = 0; i < 32; ++i) value[i] = std::bit_cast<std::uint32_t>(v[0]);
}

// The same for each 4 neighbours, with distances 1 and 2.
template <typename F>
void fold_quads(std::uint64_t* value, F f) {
  for (int i = 0; i < 32; i += 4) {
    const float v = f(f(as_float(value[i]), as_float(value[i + 1])),
                      f(as_float(value[i + 2]), as_float(value[i + 3])));
    for (int j = 0; j < 4; ++j) value[i + j] = std::bit_cast<std::uint32_t>(v);
  }
}

// The same for each `width` neighbours, with distances width / 2 .. 1.
bool part_sum(std::uint64_t* value, const std::uint32_t* width, std::uint32_t) {
  const int lanes = int(width[0]);
  for (int first = 0; first < 32; first += lanes) {
    float v[32];
    for (int i = 0; i < lanes; ++i) v[i] = as_float(value[first + i]);
    for (int distance = lanes / 2; distance >= 1; distance /= 2) {
      for (int i = 0; i < distance; ++i) v[i] += v[i + distance];
    }
    for (int i = 0; i < lanes; ++i) value[first + i] = std::bit_cast<std::uint32_t>(v[0]);
  }
  return true;
}

bool sync(std::uint64_t*, const std::uint32_t*, std::uint32_t) { return true; }

bool sum(std::uint64_t* value, const std::uint32_t*, std::uint32_t) {
  fold(value, [](float a, float b) { return a + b; });
  return true;
}

bool maximum(std::uint64_t* value, const std::uint32_t*, std::uint32_t) {
  fold(value, [](float a, float b) { return larger(a, b); });
  return true;
}

bool quad_sum(std::uint64_t* value, const std::uint32_t*, std::uint32_t) {
  fold_quads(value, [](float a, float b) { return a + b; });
  return true;
}

bool quad_maximum(std::uint64_t* value, const std::uint32_t*, std::uint32_t) {
  fold_quads(value, [](float a, float b) { return larger(a, b); });
  return true;
}

bool ballot(std::uint64_t* value, const std::uint32_t*, std::uint32_t mask) {
  std::uint32_t votes = 0;
  for (std::uint32_t lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) != 0 && value[lane] != 0) votes |= 1u << lane;
  }
  for (std::uint32_t lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) != 0) value[lane] = votes;
  }
  return true;
}

bool shuffle(std::uint64_t* value, const std::uint32_t* source, std::uint32_t mask) {
  std::uint64_t result[32];
  for (std::uint32_t lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) == 0) continue;
    if ((mask >> source[lane] & 1u) == 0) return false;
    result[lane] = value[source[lane]];
  }
  for (std::uint32_t lane = 0; lane < 32; ++lane) {
    if ((mask >> lane & 1u) != 0) value[lane] = result[lane];
  }
  return true;
}

}  // namespace

const WarpOperation kSync{"__syncwarp", true, sync};
const WarpOperation kBallot{"__ballot_sync", false, ballot};
const WarpOperation kAny{"__any_sync", false, ballot};
const WarpOperation kAll{"__all_sync", false, ballot};
const WarpOperation kShuffle{"__shfl_sync", false, shuffle};
const WarpOperation kShuffleXor{"__shfl_xor_sync", false, shuffle};
const WarpOperation kShuffleUp{"__shfl_up_sync", false, shuffle};
const WarpOperation kShuffleDown{"__shfl_down_sync", false, shuffle};
const WarpOperation kWarpSum{"warp_sum", false, sum};
const WarpOperation kPartSum{"part_sum", false, part_sum};
const WarpOperation kWarpMax{"warp_max", false, maximum};
const WarpOperation kQuadSum{"quad_sum", false, quad_sum};
const WarpOperation kQuadMax{"quad_max", false, quad_maximum};

}  // namespace tp::emulator
