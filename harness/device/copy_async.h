#pragma once
// Copies from global to shared memory that run while their thread goes on. Included by device.h
// through its dialects, which define what is declared here.

namespace tp {

// Begins to copy Bytes (4, 8 or 16; both addresses are multiples of them) to shared memory. They
// are there for this thread after a copy_async_wait, for others after a barrier behind that. Until
// then nobody may touch the destination: it may hold anything (in the emulator: poison).
template <int Bytes>
__device__ void copy_async(void* shared, const void* global, Where where = Where::here());

// The same, or Bytes of zeros where nothing is `wanted`; then `global` is not read, but still a
// multiple of Bytes.
template <int Bytes>
__device__ void copy_async_or_zero(void* shared, const void* global, bool wanted,
                                   Where where = Where::here());

// Makes one group of all copies that this thread began since its last commit. A group may be empty.
__device__ void copy_async_commit();

// Waits until at most `Pending` of this thread's committed groups, the latest, are outstanding.
// Copies that were not committed are not waited for. The emulator ends the run as BadLaunch if a
// thread exits with copies for which it has not waited.
template <int Pending>
__device__ void copy_async_wait();

}  // namespace tp
