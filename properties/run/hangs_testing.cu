#include "harness/device/device.h"
#include "properties/run/hangs_testing.h"

namespace tp {

namespace {

constexpr int kThreads = 64;

// One block a row.
__global__ void row_sums_kernel(View<const float> x, float* sums) {
  const float* row = x.data + std::int64_t(blockIdx.x) * x.row_stride;
  float mine = 0;
  for (std::int64_t j = threadIdx.x; j < x.cols; j += blockDim.x) mine += row[j];
  const float sum = block_sum(mine, dynamic_shared<float>());
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void add_to_rows_kernel(View<const float> x, const float* sums, View<float> out) {
  const std::int64_t i = blockIdx.x;
  for (std::int64_t j = threadIdx.x; j < x.cols; j += blockDim.x) {
    out.data[i * out.row_stride + j] = x.data[i * x.row_stride + j] + sums[i];
  }
}

// One block a row of `out`.
__global__ void join_columns_kernel(const float* blocks, std::int64_t ranks, View<float> out) {
  const std::int64_t i = blockIdx.x, cols = out.cols / ranks;
  for (std::int64_t j = threadIdx.x; j < out.cols; j += blockDim.x) {
    const std::int64_t rank = j / cols;
    out.data[i * out.row_stride + j] = blocks[(rank * out.rows + i) * cols + j % cols];
  }
}

__global__ void until_set_kernel(const float* flag) {
  while (load_volatile(flag) == 0.0f) {
  }
}

__global__ void write_kernel(float* address) { store_volatile(address, 1.0f); }

}  // namespace

void hang_row_sums(View<const float> x, float* sums, Stream& stream) {
  launch("row_sums", row_sums_kernel, dim3(unsigned(x.rows)), dim3(kThreads),
         block_scratch_floats(kThreads) * sizeof(float), stream, x, sums);
}

void hang_add_to_rows(View<const float> x, const float* sums, View<float> out, Stream& stream) {
  launch("add_to_rows", add_to_rows_kernel, dim3(unsigned(x.rows)), dim3(kThreads), 0, stream, x,
         sums, out);
}

void hang_join_columns(const float* blocks, std::int64_t ranks, View<float> out, Stream& stream) {
  launch("join_columns", join_columns_kernel, dim3(unsigned(out.rows)), dim3(kThreads), 0, stream,
         blocks, ranks, out);
}

void hang_until_set(const float* flag, Stream& stream) {
  launch("until_set", until_set_kernel, dim3(1), dim3(1), 0, stream, flag);
}

void hang_write(float* address, Stream& stream) {
  launch("write", write_kernel, dim3(1), dim3(1), 0, stream, address);
}

}  // namespace tp
