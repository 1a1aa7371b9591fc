#pragma once
// launch(): queues a kernel on a stream of the emulator.

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "harness/device/emulator/dim3.h"
#include "harness/device/launch_size.h"
#include "harness/device/stream.h"

namespace tp::emulator {

// A kernel with its arguments.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void run_thread() const = 0;  // as the thread `running`
};

struct Launch {
  std::string name;
  LaunchSize size;
  std::shared_ptr<const Kernel> kernel;
  bool overlaps = false;  // with the kernel before it in its stream
};

template <typename... Parameters>
class KernelCall final : public Kernel {
 public:
  template <typename... Arguments>
  explicit KernelCall(void (*kernel)(Parameters...), Arguments&&... arguments)
      : kernel_(kernel), arguments_(std::forward<Arguments>(arguments)...) {}
  // Each thread gets its own copy of the arguments, as in CUDA.
  void run_thread() const override { std::apply(kernel_, arguments_); }

 private:
  void (*kernel_)(Parameters...);
  std::tuple<Parameters...> arguments_;
};

// Throws Fault if CUDA would refuse the launch.
void enqueue_launch(Launch launch, Stream& stream);

// Blocks of so many threads that are resident at the same time, whatever launches they are of.
int resident_blocks(int threads);

}  // namespace tp::emulator

namespace tp {

// How many blocks of this launch the device surely runs at the same time when it runs nothing else.
template <typename... Parameters>
int resident_blocks(std::string_view, void (*)(Parameters...), int threads, std::size_t) {
  return emulator::resident_blocks(threads);
}

namespace emulator {

template <typename... Parameters, typename... Arguments>
Launch make_launch(std::string_view name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   std::size_t shared_bytes, Arguments&&... arguments) {
  using Call = KernelCall<Parameters...>;
  return {std::string(name),
          {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, shared_bytes},
          std::make_shared<Call>(kernel, std::forward<Arguments>(arguments)...)};
}

}  // namespace emulator

// Queues kernel<<<grid, block, shared_bytes, stream>>>(arguments...).
template <typename... Parameters, typename... Arguments>
void launch(std::string_view name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            std::size_t shared_bytes, Stream& stream, Arguments&&... arguments) {
  emulator::enqueue_launch(emulator::make_launch(name, kernel, grid, block, shared_bytes,
                                                 std::forward<Arguments>(arguments)...),
                           stream);
}

// The same, but the kernel may begin before the one before it has ended: overlap.h.
template <typename... Parameters, typename... Arguments>
void launch_overlapping(std::string_view name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                        std::size_t shared_bytes, Stream& stream, Arguments&&... arguments) {
  emulator::Launch launch = emulator::make_launch(name, kernel, grid, block, shared_bytes,
                                                  std::forward<Arguments>(arguments)...);
  launch.overlaps = true;
  emulator::enqueue_launch(std::move(launch), stream);
}

}  // namespace tp
