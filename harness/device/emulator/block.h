#pragma once
// A block of CUDA threads while it is resident: who can run, who waits where.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "harness/device/emulator/async_copies.h"
#include "harness/device/emulator/fiber_pool.h"
#include "harness/device/emulator/launch.h"
#include "harness/device/emulator/thread.h"
#include "harness/device/emulator/warp.h"
#include "harness/device/fault.h"
#include "harness/device/random.h"
#include "harness/device/work.h"

namespace tp::emulator {

// Thread indices in the order they will run.
class ReadyList {
 public:
  bool empty() const { return head_ == tail_; }
  void push_back(std::uint16_t index) { ring_[tail_++ % kMaxThreads] = index; }
  void push_front(std::uint16_t index) { ring_[--head_ % kMaxThreads] = index; }
  std::uint16_t front() const { return ring_[head_ % kMaxThreads]; }
  std::uint16_t pop_front() { return ring_[head_++ % kMaxThreads]; }

 private:
  std::uint32_t head_ = 0;
  std::uint32_t tail_ = 0;
  std::uint16_t ring_[kMaxThreads];
};

class Block : public BlockInfo {
 public:
  // Prepares to run block `index` of a launch; a Block object is used for one after another.
  void begin(const Launch& launch, std::uint64_t index, void* shared_memory,
             std::uint8_t shared_poison, FiberPool& fibers, std::uint64_t seed);

  // Runs its threads until all wait, yielded or are through. Throws the Fault they made.
  Progress run();
  // Forgets the threads that have not come to their end. Afterwards the Block is of no more use.
  void drop();
  std::size_t shared_bytes() const { return launch_->size.shared_bytes; }
  int threads() const { return int(threads_.size()); }
  const Launch& launch() const { return *launch_; }
  std::string name() const;  // "kernel rms_norm, block 0"
  // "kernel rms_norm, block 0: 7 at __syncthreads (rms_norm.cu:41), 121 exited, of 128"
  std::string describe() const;

  // From the running thread.
  void barrier(Thread& thread, Where where);
  void yield(Thread& thread);
  std::uint64_t meet(Thread& thread, const WarpOperation& operation, std::uint32_t mask,
                     std::uint64_t value, std::uint32_t parameter);
  AsyncCopies& copies(const Thread& thread) {
    any_copies_ = true;
    return copies_[thread.index];
  }
  // Ends the run as BadLaunch. `tell` is asked for the sentence after the thread's stack was left
  // for good (whose objects still exist, but will never be destroyed).
  [[noreturn]] void fail(Thread& thread, std::function<std::string()> tell);
  // What fibers do: runs threads as long as there are any that it may run.
  static void run_threads(KernelFiber& fiber);

 private:
  void make_threads(const LaunchSize& size);
  Fiber& next();              // what shall run now
  void park(Thread& thread);  // runs others until it is resumed
  void exit(Thread& thread);
  void forget_copies(Thread& thread);
  void push_all();  // to the ready list, in a drawn order
  void push_lanes(int warp, std::uint32_t lanes, bool front);
  std::uint32_t lanes_of(int warp) const;
  std::string divergence() const;
  std::string census(int first, int last) const;

  const Launch* launch_ = nullptr;
  FiberPool* fibers_ = nullptr;
  Random random_{0};
  ReadyList ready_;
  std::vector<std::uint16_t> yielded_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<AsyncCopies> copies_;  // of each thread
  bool any_copies_ = false;          // otherwise nobody need look at them
  int alive_ = 0;
  int at_barrier_ = 0;
  int barrier_line_ = 0;          // of the first thread at it
  bool barrier_differs_ = false;  // threads wait at different lines
  bool moved_ = false;            // something but yields has happened
  std::uint64_t barriers_ = 0;
  std::uint64_t barrier_clock_[2] = {};  // TSan; taken in turns
  std::uint64_t begin_clock_ = 0;
  std::function<std::string()> fault_;
};

// The entry of kernel fibers, for FiberPool.
void run_kernel_threads(void* fiber);

// "file.cu:41"
std::string to_string(Where where);

}  // namespace tp::emulator
