#include <algorithm>
#include <cstdint>

#include "harness/base/check.h"
#include "harness/device/device.h"
#include "harness/group/collectives.h"
#include "harness/group/combine.h"

namespace tp {

namespace {

constexpr int kThreads = 256;
constexpr std::int64_t kMaxBlocks = 1024;
// Kernel arguments are copied for each launch, and in the emulator for each thread: few, where that
// is enough.
constexpr int kFew = 16;

// What the kernels read and write.
template <typename T, int kMax>
struct Members {
  const T* in[kMax];
  T* out[kMax];
  int ins, outs;
};

// Element i of all ins, folded.
template <typename T, int kMax>
__device__ T folded(const Members<T, kMax>& m, bool sum, std::int64_t i) {
  T total = m.in[0][i];
  for (int r = 1; r < m.ins; ++r) total = combine(sum, total, m.in[r][i]);
  return total;
}

template <typename T, int kMax>
__global__ void fold_kernel(Members<T, kMax> m, bool sum, std::int64_t count) {
  const std::int64_t stride = std::int64_t(blockDim.x) * gridDim.x;
  for (std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    const T total = folded(m, sum, i);
    for (int r = 0; r < m.outs; ++r) m.out[r][i] = total;
  }
}

// blockIdx.y: which of the outs.
template <typename T, int kMax>
__global__ void sum_parts_kernel(Members<T, kMax> m, std::int64_t first_part, std::int64_t count) {
  const std::int64_t begin = (first_part + blockIdx.y) * count;
  const std::int64_t stride = std::int64_t(blockDim.x) * gridDim.x;
  for (std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    m.out[blockIdx.y][i] = folded(m, true, begin + i);
  }
}

template <typename T, int kMax>
__global__ void gather_kernel(Members<T, kMax> m, std::int64_t count) {
  const std::int64_t stride = std::int64_t(blockDim.x) * gridDim.x;
  for (std::int64_t i = std::int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < count;
       i += stride) {
    for (int from = 0; from < m.ins; ++from) {
      const T value = m.in[from][i];
      for (int to = 0; to < m.outs; ++to) m.out[to][from * count + i] = value;
    }
  }
}

template <typename T, int kMax>
Members<T, kMax> members(const std::vector<const void*>& in, const std::vector<void*>& out) {
  Members<T, kMax> m{};
  for (const void* p : in) m.in[m.ins++] = static_cast<const T*>(p);
  for (void* p : out) m.out[m.outs++] = static_cast<T*>(p);
  return m;
}

// Calls f with the smallest number of members of type T that is enough.
template <typename T, typename F>
void with_members(const std::vector<const void*>& in, const std::vector<void*>& out, F f) {
  const std::size_t most = std::max(in.size(), out.size());
  TP_CHECK(most <= std::size_t(kMaxMembers), "a collective of too many ranks");
  if (most <= std::size_t(kFew)) {
    f(members<T, kFew>(in, out));
  } else {
    f(members<T, kMaxMembers>(in, out));
  }
}

unsigned blocks_of(std::int64_t count) {
  return unsigned(std::clamp<std::int64_t>((count + kThreads - 1) / kThreads, 1, kMaxBlocks));
}
dim3 threads_of(std::int64_t count) {
  return dim3(unsigned(std::clamp<std::int64_t>((count + 31) / 32 * 32, 32, kThreads)));
}

}  // namespace

void fold_ranks(bool sum, DType dtype, const std::vector<const void*>& in,
                const std::vector<void*>& out, std::int64_t count, Stream& stream) {
  dispatch(dtype, [&]<typename Value>(Value) {
    with_members<Value>(in, out, [&]<typename T, int kMax>(Members<T, kMax> m) {
      launch("group.fold", fold_kernel<T, kMax>, dim3(blocks_of(count)), threads_of(count), 0,
             stream, m, sum, count);
    });
  });
}

void sum_parts(DType dtype, const std::vector<const void*>& in, const std::vector<void*>& out,
               std::int64_t first_part, std::int64_t count, Stream& stream) {
  dispatch(dtype, [&]<typename Value>(Value) {
    with_members<Value>(in, out, [&]<typename T, int kMax>(Members<T, kMax> m) {
      launch("group.sum_parts", sum_parts_kernel<T, kMax>,
             dim3(blocks_of(count), unsigned(out.size())), threads_of(count), 0, stream, m,
             first_part, count);
    });
  });
}

void gather_ranks(DType dtype, const std::vector<const void*>& in, const std::vector<void*>& out,
                  std::int64_t count, Stream& stream) {
  // Nothing is computed with what is gathered: its size is all there is to know.
  const auto gather = [&]<typename Value>(Value) {
    with_members<Value>(in, out, [&]<typename T, int kMax>(Members<T, kMax> m) {
      launch("group.gather", gather_kernel<T, kMax>, dim3(blocks_of(count)), threads_of(count), 0,
             stream, m, count);
    });
  };
  switch (size_of(dtype)) {
    case 1:
      return gather(std::uint8_t{});
    case 2:
      return gather(std::uint16_t{});
    default:
      return gather(std::uint32_t{});
  }
}

}  // namespace tp
