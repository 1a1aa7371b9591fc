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

// Queues kernel<<<grid, block, shared_bytes, stream>>>(arguments...).
template <typename... Parameters, typename... Arguments>
void launch(std::string_view name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            std::size_t shared_bytes, Stream& stream, Arguments&&... arguments) {
  check_launch(name, {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes},
               stream.tp_rank());
  cuda::allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes, name,
                           stream.tp_rank());
  const std::tuple<Parameters...> held(std::forward<Arguments>(arguments)...);
  const auto submit = [=](cudaStream_t to) {
    std::apply([&](const Parameters&... p) { kernel<<<grid, block, shared_bytes, to>>>(p...); },
               held);
  };
  stream.enqueue_kernel(std::make_unique<cuda::Submission>("kernel " + std::string(name),
                                                           cuda::Kind::kernel, stream, submit));
}

}  // namespace tp
