// Kernels with a mistake planted, so that it can be seen that each build finds its kind: run with
// none, missing_barrier, missing_wait, early_copy, shared_overrun, block_race, missing_fence or
// buffer_overrun; and for compute-sanitizer, in memory without poison and guards, bare_overrun or
// unwritten. A second word, `alone`, leaves out the kernels that wait for each other: a tool that
// runs one kernel at a time would never see their end. Exit code 0: nothing was found, 1: something
// was.

#include <cstdio>
#include <numeric>
#include <optional>
#include <string_view>
#include <vector>

#include "harness/device/device.h"
#include "harness/device/scheduler.h"

namespace tp {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 4;

struct Bugs {
  bool missing_barrier;
  bool missing_wait;
  bool early_copy;
  bool shared_overrun;
  bool block_race;
  bool missing_fence;
  bool buffer_overrun;
  bool unwritten;
};

// out[block * kThreads + i] = i + 1: what the thread's neighbour wrote into shared memory.
__global__ void rotate(const float* zeros, float* out, Bugs bugs) {
  float* shared = dynamic_shared<float>();
  const int i = int(threadIdx.x);
  shared[i] = float(i) + (bugs.unwritten ? zeros[i] : 0.0f);
  if (i == 0 && bugs.shared_overrun) shared[kThreads] = 0.0f;
  if (!bugs.missing_barrier) __syncthreads();
  const float neighbour = shared[(i + 1) % kThreads];
  const int block = bugs.block_race ? 0 : int(blockIdx.x);
  out[block * kThreads + i] = neighbour;
  if (bugs.buffer_overrun && block + 1 == kBlocks && i == 0) out[kBlocks * kThreads] = 0.0f;
}

// out[i]: the sum over two tiles of what the thread's neighbour copied to the one buffer in shared
// memory: element i + 1 of each.
__global__ void sum_tiles(const float* x, float* out, Bugs bugs) {
  float* shared = dynamic_shared<float>();
  const int i = int(threadIdx.x);
  float sum = 0.0f;
  for (int tile = 0; tile < 2; ++tile) {
    if (!bugs.early_copy) __syncthreads();  // the last tile was read
    copy_async<4>(shared + i, x + tile * kThreads + i);
    copy_async_commit();
    if (!bugs.missing_wait) copy_async_wait<0>();
    __syncthreads();
    sum += shared[(i + 1) % kThreads];
    if (bugs.missing_wait) copy_async_wait<0>();
  }
  out[i] = sum;
}

// One rank's kernel hands a value to another's.
__global__ void hand_over(int* data, int* flag, Bugs bugs) {
  *data = 42;
  if (!bugs.missing_fence) __threadfence_system();
  store_volatile(flag, 1);
}
__global__ void take_over(const int* data, const int* flag, int* out) {
  while (load_volatile(flag) == 0) {
  }
  __threadfence_system();
  *out = *data;
}

int run(std::string_view mode, bool alone) {
  const Bugs bugs{mode == "missing_barrier",
                  mode == "missing_wait",
                  mode == "early_copy",
                  mode == "shared_overrun",
                  mode == "block_race",
                  mode == "missing_fence",
                  mode == "buffer_overrun" || mode == "bare_overrun",
                  mode == "unwritten"};
  const bool bare = mode == "bare_overrun" || mode == "unwritten";
  const auto poison = bare ? std::nullopt : std::optional<std::uint8_t>(0xFF);
  int wrong = 0;
  const Buffer peer("peer memory", 2 * sizeof(int), 0);
  int* data = peer.as<int>();
  Scheduler scheduler({.seed = 1});
  scheduler.add_rank(0, [&](Stream& stream) {
    const Buffer zeros(stream, "zeros", kThreads * sizeof(float), poison);
    const Buffer out(stream, "out", kBlocks * kThreads * sizeof(float), poison);
    launch("rotate", rotate, kBlocks, kThreads, kThreads * sizeof(float), stream, zeros.as<float>(),
           out.as<float>(), bugs);
    std::vector<float> got(kBlocks * kThreads);
    to_host(stream, got.data(), out.data(), out.bytes());
    out.check_guards(stream);
    stream.synchronize();
    if (const auto overrun = out.damage()) throw Fault{Outcome::OutOfBounds, *overrun};
    const int blocks = bugs.block_race ? 1 : kBlocks;
    for (int i = 0; i < blocks * kThreads; ++i) wrong += !(got[i] == float((i + 1) % kThreads));
  });
  scheduler.add_rank(3, [&](Stream& stream) {
    std::vector<float> x(2 * kThreads);
    std::iota(x.begin(), x.end(), 0.0f);
    const Buffer in(stream, "in", x.size() * sizeof(float), poison);
    const Buffer out(stream, "sums", kThreads * sizeof(float), poison);
    from_host(stream, in.data(), x.data(), in.bytes());
    launch("sum_tiles", sum_tiles, 1, kThreads, kThreads * sizeof(float), stream, in.as<float>(),
           out.as<float>(), bugs);
    std::vector<float> got(kThreads);
    to_host(stream, got.data(), out.data(), out.bytes());
    stream.synchronize();
    for (int i = 0; i < kThreads; ++i) {
      wrong += !(got[i] == float(kThreads + 2 * ((i + 1) % kThreads)));
    }
  });
  const auto hand = [&](Stream& stream) {
    launch("hand_over", hand_over, 1, 1, 0, stream, data, data + 1, bugs);
    stream.synchronize();
  };
  const auto take = [&](Stream& stream) {
    const Buffer out("out", sizeof(int), 0);
    launch("take_over", take_over, 1, 1, 0, stream, data, data + 1, out.as<int>());
    int got = 0;
    to_host(stream, &got, out.data(), sizeof(int));
    stream.synchronize();
    wrong += got != 42;
  };
  if (!alone) scheduler.add_rank(1, hand);
  if (!alone) scheduler.add_rank(2, take);
  const Report report = scheduler.run();
  if (report.fault) {
    std::printf("%s: %s\n", std::string(name_of(report.fault->outcome)).c_str(),
                report.fault->what.c_str());
    return 1;
  }
  if (wrong > 0) std::printf("WrongValue: %d values are wrong\n", wrong);
  return wrong > 0;
}

}  // namespace
}  // namespace tp

int main(int argc, char** argv) {
  const bool alone = argc == 3 && std::string_view(argv[2]) == "alone";
  return argc == 2 || alone ? tp::run(argv[1], alone) : 2;
}
