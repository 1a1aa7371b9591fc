#pragma once
// Kernels that begin before the one before them in their stream has ended (CUDA's programmatic
// dependent launch): what does not depend on that one, a weight to be fetched, is done meanwhile.
// Included by device.h through its dialects, which define what is declared here.
//
// launch_overlapping("name", kernel, grid, block, shared_bytes, stream, args...), instead of
// launch(), lets a kernel begin early. Nothing that the kernel before it writes may be read, and
// nothing that it reads or writes may be written, but behind wait_for_previous_kernel(): every
// thread that does either calls it. What came before that other kernel is complete, unless it
// overlaps itself and called let_next_kernel_start before its own wait. In the emulator a kernel
// begins at any time that this allows, in an order drawn from the seed, so that a missing wait
// shows; TSan alone takes all kernels of a stream to be ordered. On a GPU something else than a
// kernel in between (a copy, an event) leaves nothing to overlap, and is correct, too.

namespace tp {

// Returns when the kernel before this one in its stream has ended and what it wrote can be read: at
// once, where this kernel was launched by launch().
__device__ void wait_for_previous_kernel(Where where = Where::here());

// From here on the next kernel may begin, if it was launched to overlap and once every block of
// this one got here or ended. Says nothing about memory.
__device__ void let_next_kernel_start(Where where = Where::here());

}  // namespace tp
