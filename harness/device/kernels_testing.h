#pragma once
// Kernels for the tests of this layer, each behind the host function that launches it.

#include <cstdint>

#include "harness/base/dtype.h"
#include "harness/device/stream.h"

namespace tp::testing {

// out[thread * 8 + i], one warp: results of the shuffles and votes, in the order of the kernel.
inline constexpr int kWarpProbes = 8;
void warp_functions(Stream& stream, std::int64_t* out);
// One warp: the even lanes and the odd lanes meet under masks of their own; out[lane] is the ballot
// of (lane >= 16), and out[32 + lane] the value of the first lane of the group.
void half_masks(Stream& stream, unsigned* out);
// One warp: lane 1 meets itself, and then lane 0, which waits for it by then; out[lane] is the
// ballot of the two.
void nested_masks(Stream& stream, unsigned* out);
// out[thread]: block_sum (or block_max) of x.
void block_sums(Stream& stream, const float* x, float* out, int threads);
void block_maxima(Stream& stream, const float* x, float* out, int threads);
void warp_sums(Stream& stream, const float* x, float* tree, float* butterfly);
// The same of each 8, then of each 16 neighbours: 32 sums and 32 sums.
void part_sums(Stream& stream, const float* x, float* tree, float* butterfly);
// round_pair of x[2 i] and x[2 i + 1], for each of `threads` threads.
void rounded_pairs(Stream& stream, const float* x, std::uint32_t* to_f16, std::uint32_t* to_bf16,
                   int threads);
// trace[i]: the i-th thread that took a number, over the whole grid.
void trace_order(Stream& stream, unsigned* trace, unsigned* counter, int blocks, int threads);
// trace[i]: the i-th thread of the one block to pass a barrier.
void trace_barrier(Stream& stream, unsigned* trace, unsigned* counter, int threads);
// out[block * threads + thread]: the thread's word of shared memory as the block found it.
void read_fresh_shared(Stream& stream, unsigned* out, int blocks, int threads);
void indices(Stream& stream, unsigned* out);  // 2 x 3 x 2 blocks of 4 x 2 x 3 threads

struct AtomicResults {
  int add_int, max_int, min_int;
  unsigned add_unsigned, exchanged;
  unsigned long long add_wide;
  float add_float;
  int locked;  // counted under a lock made of atomicCAS
  int lock;
};
void atomics(Stream& stream, AtomicResults* results, int blocks, int threads);

// Wrong on purpose.
void some_skip_barrier(Stream& stream);
void barrier_at_two_lines(Stream& stream);
void some_skip_warp_sum(Stream& stream);
void mask_without_caller(Stream& stream);
void overlapping_masks(Stream& stream);
void masks_in_a_circle(Stream& stream);
void barriers(Stream& stream, int threads);  // nothing wrong but for lack of memory
void half_warp_sum(Stream& stream);          // a block of 48 threads
void read_outside_mask(Stream& stream);
void misaligned_load(Stream& stream, const float* x, float* out);
// Five words copied to shared memory, the first four in groups of their own, the fifth in none; and
// out[look * 5 + i]: word i as it was found before any wait, after wait<2>, after wait<0>, and
// after a commit and another wait<0>.
void copies_in_flight(Stream& stream, const std::uint32_t* in, std::uint32_t* out);
void misaligned_copy(Stream& stream, const std::uint32_t* in);
void copy_beyond_shared(Stream& stream, const std::uint32_t* in);
void copy_nobody_waits_for(Stream& stream, const std::uint32_t* in);
void misaligned_tile(Stream& stream, int stride);
void half_warp_mma(Stream& stream);
void some_skip_mma(Stream& stream);
void two_kinds_of_mma(Stream& stream);
void write_shared(Stream& stream, int floats, int index);
void launch_sized(Stream& stream, unsigned grid_x, unsigned block_x, unsigned block_y,
                  std::size_t shared);

void fill(Stream& stream, float* out, int count, float value);  // writes out[0..count)
void copy(Stream& stream, const float* in, float* out, int count);
// Vec copies of 8 values of 2 bytes, written back in reverse.
void reverse_vectors(Stream& stream, const std::uint16_t* in, std::uint16_t* out, int count);

// out[i * count + j]: the bits of operation i on x[j] (and x[j + 1]): fp32 arithmetic as kernels
// use it, and conversions.
inline constexpr int kRoundings = 8;
void roundings(Stream& stream, const float* x, std::uint32_t* out, int count);

// What a device makes of the small types, of every pattern: out[i], i < 65536, is the e4m3 of the
// f16 i. Behind them, 256 each: e4m3 i as float, as f16 and as bf16; and e2m1 i as float, 16.
inline constexpr int kConversions = 65536 + 3 * 256 + 16;
void conversions(Stream& stream, std::uint32_t* out);

// The same in packs: out[i], i < 65536, is codes_of(v, -v) of the f16 v = i, and out[65536 + 2 i]
// and the next what widen_codes makes of the codes i, i + 1, i + 2, i + 3 (modulo 256), i < 256.
inline constexpr int kPackedConversions = 65536 + 2 * 256;
void packed_conversions(Stream& stream, std::uint32_t* out);

// One warp: out (16 x 8) = c + a b, by one mma of T (f16 or bf16): a is 16 x 16, and b is 16 x 8,
// or 8 x 16 if it is given by columns (load_b; otherwise load_b_transposed).
template <typename T>
void multiply(Stream& stream, const T* a, const T* b, bool by_columns, const float* c, float* out);
// out (2 x 16 x 8): a times either half of b, which is 8 x 32 if by columns (load_b2) or 16 x 16
// (load_b2_transposed).
template <typename T>
void multiply_pairs(Stream& stream, const T* a, const T* b, bool by_columns, float* out);
// out (16 x 8) = to_a(c) b; c is 16 x 16, b is 16 x 8.
template <typename T>
void multiply_rounded(Stream& stream, const float* c, const T* b, float* out);
// One warp: quad_sum and quad_max of x, and the shuffles they are defined by.
void quads(Stream& stream, const float* x, float* sums, float* shuffled_sums, float* maxima,
           float* shuffled_maxima);
// out[i] = sum over tiles t of x[t * 1024 + i], i < 1024, each of 64 threads copying `bytes` at a
// time to a ring of `stages` tiles in shared memory.
void pipeline(Stream& stream, const float* x, float* out, int tiles, int stages, int bytes);

// Publishes data and then *flag = 1; waits for *flag and then copies the data.
void publish(Stream& stream, int* data, int* flag, int value);
void await(Stream& stream, const int* data, const int* flag, int* out);
void publish_fenced(Stream& stream, int* data, int* flag, int value);
void await_fenced(Stream& stream, const int* data, const int* flag, int* out);
// Block 0 waits for what the last block writes.
void blocks_wait(Stream& stream, int* flag, int* out, int blocks);

// data[i][j] = data[i - 1][j] + 1, i = 1 .. kHandOvers, by kernels that overlap each with the one
// before it, the first one excepted; data [1 + kHandOvers, kHandedOver]. Before its wait each looks
// at what the last but one wrote, which is complete unless the last one starts it early.
inline constexpr int kHandOvers = 6, kHandedOver = 300;
enum class OverlapMistake { none, no_wait, early_start };
void hand_over(Stream& stream, int* data, OverlapMistake mistake);

}  // namespace tp::testing
