#pragma once
// CUDA's warp functions. All are meetings of the lanes of a mask (thread.h).

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "harness/device/emulator/thread.h"

namespace tp::emulator {

// A value of up to 8 bytes on its way through a meeting.
template <typename T>
std::uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}
template <typename T>
T from_bits(std::uint64_t bits) {
  T value;
  std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
  return value;
}

inline std::uint32_t lane() { return running->index % 32u; }

// `source` is a lane of this lane's segment of `width` lanes, or outside it: then the own value.
template <typename T>
T shuffle(const WarpOperation& operation, unsigned mask, T value, int source, bool inside,
          Where where) {
  const std::uint32_t from = inside ? std::uint32_t(source) : lane();
  return from_bits<T>(meet(operation, mask, to_bits(value), from, where));
}
inline int segment(int width) { return int(lane()) & ~(width - 1); }

}  // namespace tp::emulator

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              tp::Where where = tp::Where::here()) {
  using namespace tp::emulator;
  return shuffle(kShuffle, mask, value, segment(width) + (source & (width - 1)), true, where);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32,
                  tp::Where where = tp::Where::here()) {
  using namespace tp::emulator;
  // Lanes of earlier segments can be read, later ones cannot: CUDA's own rule.
  const int source = int(lane()) ^ bits;
  return shuffle(kShuffleXor, mask, value, source, source < segment(width) + width, where);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 tp::Where where = tp::Where::here()) {
  using namespace tp::emulator;
  const int source = int(lane()) - int(delta);
  return shuffle(kShuffleUp, mask, value, source, source >= segment(width), where);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   tp::Where where = tp::Where::here()) {
  using namespace tp::emulator;
  const int source = int(lane()) + int(delta);
  return shuffle(kShuffleDown, mask, value, source, source < segment(width) + width, where);
}

inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, tp::Where where = tp::Where::here()) {
  tp::emulator::meet(tp::emulator::kSync, mask, 0, 0, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, tp::Where where = tp::Where::here()) {
  return unsigned(tp::emulator::meet(tp::emulator::kBallot, mask, predicate != 0, 0, where));
}
inline int __any_sync(unsigned mask, int predicate, tp::Where where = tp::Where::here()) {
  return tp::emulator::meet(tp::emulator::kAny, mask, predicate != 0, 0, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, tp::Where where = tp::Where::here()) {
  return tp::emulator::meet(tp::emulator::kAll, mask, predicate != 0, 0, where) == mask;
}

namespace tp {

// Over all 32 lanes, given to each: v += __shfl_xor_sync(~0u, v, o) for o = 16, 8, 4, 2, 1.
inline float warp_sum(float value, Where where = Where::here()) {
  using namespace emulator;
  return from_bits<float>(meet(kWarpSum, 0xFFFFFFFFu, to_bits(value), 0, where));
}
// Over the `Lanes` lanes that a warp's lanes are divided into, given to each of them: the same with
// o = Lanes / 2 .. 1.
template <int Lanes>
inline float part_sum(float value, Where where = Where::here()) {
  using namespace emulator;
  return from_bits<float>(meet(kPartSum, 0xFFFFFFFFu, to_bits(value), Lanes, where));
}
// The same with `larger`: NaN if any lane's value is.
inline float warp_max(float value, Where where = Where::here()) {
  using namespace emulator;
  return from_bits<float>(meet(kWarpMax, 0xFFFFFFFFu, to_bits(value), 0, where));
}

}  // namespace tp
