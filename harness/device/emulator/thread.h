#pragma once
// What a CUDA thread of the emulator knows of itself, and what it can ask of its block. Kernel
// files see this through dialect.h.

#include <cstddef>
#include <cstdint>

#include "harness/device/emulator/dim3.h"
#include "harness/device/emulator/where.h"

namespace tp::emulator {

struct KernelFiber;
struct Launch;

// What kernels see of their block.
struct BlockInfo {
  dim3 block_idx;
  dim3 block_dim;
  dim3 grid_dim;
  void* shared = nullptr;
  std::uint8_t poison = 0;  // every byte of shared memory, at first
  // Of a launch that overlaps with the one before it: whether that one has ended.
  const bool* previous_ended = nullptr;
  bool* lets_next_start = nullptr;  // set where it calls let_next_kernel_start before its wait
};

enum class State : std::uint8_t {
  unstarted,  // also once it has exited: the next block begins with it again
  ready,      // running, or in line
  at_barrier,
  in_warp,
};

// One cache line: a switch touches it and little else.
struct alignas(64) Thread {
  BlockInfo* block = nullptr;
  KernelFiber* fiber = nullptr;
  dim3 thread_idx;
  std::uint16_t index = 0;  // in its block
  State state = State::unstarted;
  bool fenced = false;           // it has passed a __threadfence: fences.cc
  bool waited = false;           // for the kernel before its own
  const void* loaded = nullptr;  // where its last atomic or volatile load was
  const char* what = nullptr;    // where it waits or yielded last
  Where where;
};

// The thread whose kernel code runs just now.
extern Thread* running;

// All threads of the block must meet at one place.
void block_barrier(Where where);

// Lets all others that can run go first.
void yield(const char* what, Where where);

// The launch before this one in the stream, and the one behind it: overlap.h.
void wait_for_previous(Where where);
void let_next_start(Where where);

[[noreturn]] void misaligned(const void* address, std::size_t bytes, const char* what, Where where);

// What a warp does together. The last lane to arrive computes the results of all.
struct WarpOperation {
  const char* name;
  bool orders_memory;  // only __syncwarp does in CUDA: a shuffle or a vote is no fence
  // value[lane]: what each lane of `mask` brought, replaced by what it gets. False: a lane asked
  // for a value of a lane that is not in the mask.
  bool (*complete)(std::uint64_t* value, const std::uint32_t* parameter, std::uint32_t mask);
};

// Meets the lanes of `mask` and returns this lane's result.
std::uint64_t meet(const WarpOperation& operation, std::uint32_t mask, std::uint64_t value,
                   std::uint32_t parameter, Where where);

extern const WarpOperation kSync, kBallot, kAny, kAll, kShuffle, kShuffleXor, kShuffleUp,
    kShuffleDown, kWarpSum, kPartSum, kWarpMax, kQuadSum, kQuadMax;

const Launch& launch_of(const Thread& thread);

// For TSan: what an atomic or volatile access of the running thread means after or before a fence.
void fence();
void before_store(void* address);
void after_load(const void* address);

}  // namespace tp::emulator
