#pragma once
// What a kernel file (.cu) includes: CUDA, or the emulator's CUDA.
//
// The dialect: ordinary CUDA C++ but for
//   launch("name", kernel, grid, block, shared_bytes, stream, args...)  instead of <<<>>>
//   dynamic_shared<T>()                                                 instead of __shared__
//   arrays warp_sum, warp_max, block_sum, block_max, load_vector, ...          instead of writing
//   them again load_acquire, store_release, load_volatile, peer_load, ...          wherever memory
//   is shared
// and neither PTX nor #ifdef in a kernel file. In the emulator atomics and the last group are where
// a thread yields, so that a kernel may spin on memory that another block or another rank's kernel
// writes.

#include "harness/base/dtype.h"
#include "harness/device/buffer.h"
#include "harness/device/stream.h"

// The only choice of backend that a kernel meets, and it does not see it.
#ifdef __CUDACC__
#include "harness/device/cuda/dialect.h"
#else
#include "harness/device/emulator/dialect.h"
#endif

#include "harness/device/larger.h"
#include "harness/device/reduce.h"
#include "harness/device/vector.h"
