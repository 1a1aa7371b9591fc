#pragma once
// launch(): queues a kernel on a rank's stream of the GPU.

#include <cuda_runtime.h>

#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "harness/device/cuda/check.h"
#include "harness/device/cuda/queue.h"
#include "harness/device/launch_size.h"

namespace tp {

// How many blocks of this launch the device surely runs at the same time when it runs nothing else.
template <typename... Parameters>
int resident_blocks(std::string_view name, void (*kernel)(Parameters...), int threads,
                    std::size_t shared_bytes) {
  return cuda::resident_blocks(name, reinterpret_cast<const void*>(kernel), threads, shared_bytes);
}

namespace cuda {

template <typename... Parameters, typename... Arguments>
void enqueue_launch(std::string_view name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                    std::size_t shared_bytes, bool overlaps, Stream& stream,
                    Arguments&&... arguments) {
  check_launch(name, {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes},
               stream.tp_rank());
  allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes, name, stream.tp_rank());
  const std::tuple<Parameters...> held(std::forward<Arguments>(arguments)...);
  const auto submit = [=](cudaStream_t to) {
    cudaLaunchAttribute overlap = {};
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = to;
    config.attrs = &overlap;
    config.numAttrs = overlaps && can_overlap() ? 1 : 0;
    // Whoever hands it over asks for the last error.
    std::apply([&](const Parameters&... p) { cudaLaunchKernelEx(&config, kernel, p...); }, held);
  };
  stream.enqueue_kernel(
      std::make_unique<Submission>("kernel " + std::string(name), Kind::kernel, stream, submit));
}

}  // namespace cuda

// Queues kernel<<<grid, block, shared_bytes, stream>>>(arguments...).
template <typename... Parameters, typename... Arguments>
void launch(std::string_view name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            std::size_t shared_bytes, Stream& stream, Arguments&&... arguments) {
  cuda::enqueue_launch(name, kernel, grid, block, shared_bytes, false, stream,
                       std::forward<Arguments>(arguments)...);
}

// The same, but the kernel may begin before the one before it has ended: overlap.h.
template <typename... Parameters, typename... Arguments>
void launch_overlapping(std::string_view name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                        std::size_t shared_bytes, Stream& stream, Arguments&&... arguments) {
  cuda::enqueue_launch(name, kernel, grid, block, shared_bytes, true, stream,
                       std::forward<Arguments>(arguments)...);
}

}  // namespace tp
