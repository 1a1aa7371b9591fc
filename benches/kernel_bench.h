#pragma once
// Kernels alone, at the sizes of real models: what a call takes on the device's own clock, beside
// the least that it could take. On the emulator each runs once, so that it cannot rot.
//
// A result is checked before and after it is timed, with inputs of its own each time; one that is
// wrong is reported and never timed.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "harness/device/stream.h"
#include "harness/group/tp_group.h"

namespace tp {

// The least that one rank's call must do.
struct KernelWork {
  double read = 0, written = 0;  // bytes of device memory
  double flops = 0;              // in fp32, outside the tensor cores
  double matrix_flops = 0;       // f16 or bf16 on tensor cores
  double fp8_flops = 0;          // e4m3 on tensor cores
  int launches = 1;              // kernels that must wait for one another
  int signals = 0;               // ways from a rank to its peers that must wait for one another
};

// One set of inputs and outputs of one rank in device memory, and the call that is timed. The same
// set is launched again and again.
class KernelCall {
 public:
  virtual ~KernelCall() = default;
  virtual void launch(Stream& stream) = 0;
  // What is wrong with the outputs, in one sentence; nothing where they are what the reference
  // accepts. Some rows will do, the last one among them. Comes after a launch.
  virtual std::string verify(Stream& stream) = 0;
};

// Where a call runs.
struct BenchRank {
  Stream& stream;
  TpGroup& group;  // of KernelBench::tp_size ranks
};

struct KernelBench {
  std::string name;  // "rms_norm/tokens:4096/hidden:8192/dtype:bf16": as benches/peers has it
  KernelWork work;
  int tp_size = 1;
  // Inputs drawn from the seed (bench_data.h). All ranks make theirs at the same time.
  std::function<std::unique_ptr<KernelCall>(const BenchRank&, std::uint64_t seed)> make;
};

// Whether kernels are timed here, and so at real sizes; else each runs once, at a size that the
// emulator is fit for.
bool times_kernels();

// Benchmarks <name>/cache:cold and <name>/cache:warm: inputs and outputs that were in no cache, and
// the same ones every time (left out where they would not fit). Time: that of the slowest rank in
// each replay of a CUDA graph of many calls, the median of some replays. Ranks are shared out among
// the processes of the job. Call it before main, from a static initializer.
//
// Counters: p10_us and p90_us of the replays; bytes/s, flops/s; floor_us, fraction_of_floor,
// time_over_t0; copies (calls in a graph) and sets (of inputs); where there are several ranks,
// slowest_rank and processes.
void register_kernel_bench(KernelBench bench);

}  // namespace tp
