#pragma once
// What a kernel file (.cu) includes: CUDA, or the emulator's CUDA.
//
// The dialect is ordinary CUDA C++, but that
//   - launch("name", kernel, grid, block, shared_bytes, stream, args...) replaces <<<>>>,
//   - dynamic_shared<T>() replaces __shared__,
//   - warp_sum, part_sum, warp_max, block_sum, block_max, load_vector, store_vector, round_pair are
//     called, not written again,
//   - matrix products on tensor cores are mma and its helpers (matrix.h), copies to shared memory
//     that run meanwhile are copy_async and its wait (copy_async.h), kernels that begin before the
//     last one has ended are launched by launch_overlapping (overlap.h),
//   - load_acquire, store_release, load_volatile, store_volatile, peer_load, peer_store are called
//     wherever memory is shared, send_words and poll_words where a kernel meets those of other
//     ranks while they run (peer_words.h),
// and a kernel file has neither PTX nor #ifdef. In the emulator atomics and that last group are
// where a thread yields, so that a kernel may spin on memory that another block or another rank's
// kernel writes.

#include "harness/base/dtype.h"
#include "harness/device/buffer.h"
#include "harness/device/stream.h"

// The only choice of backend that a kernel meets, and it does not see it.
#ifdef __CUDACC__
#include "harness/device/cuda/dialect.h"
#else
#include "harness/device/emulator/dialect.h"
#endif

#include "harness/device/copy_async.h"
#include "harness/device/larger.h"
#include "harness/device/matrix.h"
#include "harness/device/overlap.h"
#include "harness/device/reduce.h"
#include "harness/device/vector.h"
