#include "harness/device/device.h"
#include "harness/device/kernels_testing.h"

namespace tp::testing {
namespace {

constexpr unsigned kAll = 0xFFFFFFFFu;

__global__ void warp_functions_kernel(std::int64_t* out) {
  const int lane = int(threadIdx.x);
  std::int64_t* mine = out + lane * kWarpProbes;
  mine[0] = __shfl_sync(kAll, lane * 10, lane + 3, 8);
  mine[1] = __shfl_xor_sync(kAll, std::int64_t(lane) << 33, 5);
  mine[2] = __shfl_up_sync(kAll, unsigned(lane), 3, 16);
  mine[3] = std::int64_t(__shfl_down_sync(kAll, double(lane) + 0.5, 2) * 2);
  mine[4] = __ballot_sync(kAll, lane % 3 == 0);
  mine[5] = __any_sync(kAll, lane == 31) * 2 + __any_sync(kAll, lane == 32);
  mine[6] = (__all_sync(kAll, lane < 32) != 0) * 2 + (__all_sync(kAll, lane < 31) != 0);
  mine[7] = __shfl_xor_sync(kAll, lane, 8, 8);
}

__global__ void half_masks_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x;
  if (lane % 2 == 0) {
    out[lane] = __ballot_sync(0x55555555u, lane >= 16);
    out[32 + lane] = __shfl_sync(0x55555555u, lane, 0);
  } else {
    out[lane] = __ballot_sync(0xAAAAAAAAu, lane >= 16);
    out[32 + lane] = __shfl_sync(0xAAAAAAAAu, lane, 1);
  }
}

__global__ void nested_masks_kernel(unsigned* out) {
  const unsigned lane = threadIdx.x;
  if (lane > 1) return;
  if (lane == 1) __syncwarp(2u);
  out[lane] = __ballot_sync(3u, lane == 1);
}

__global__ void block_sums_kernel(const float* x, float* out) {
  out[threadIdx.x] = block_sum(x[threadIdx.x], dynamic_shared<float>());
}
__global__ void block_maxima_kernel(const float* x, float* out) {
  out[threadIdx.x] = block_max(x[threadIdx.x], dynamic_shared<float>());
}

__global__ void warp_sums_kernel(const float* x, float* tree, float* butterfly) {
  tree[threadIdx.x] = warp_sum(x[threadIdx.x]);
  float v = x[threadIdx.x];
  for (int distance = 16; distance >= 1; distance /= 2) v += __shfl_xor_sync(kAll, v, distance);
  butterfly[threadIdx.x] = v;
}

template <int Lanes>
__device__ float butterfly_of(float value) {
  for (int distance = Lanes / 2; distance >= 1; distance /= 2)
    value += __shfl_xor_sync(kAll, value, distance);
  return value;
}
__global__ void part_sums_kernel(const float* x, float* tree, float* butterfly) {
  const unsigned t = threadIdx.x;
  tree[t] = part_sum<8>(x[t]);
  tree[32 + t] = part_sum<16>(x[t]);
  butterfly[t] = butterfly_of<8>(x[t]);
  butterfly[32 + t] = butterfly_of<16>(x[t]);
}
__global__ void rounded_pairs_kernel(const float* x, std::uint32_t* to_f16,
                                     std::uint32_t* to_bf16) {
  const unsigned t = threadIdx.x;
  to_f16[t] = round_pair<f16>(x[2 * t], x[2 * t + 1]);
  to_bf16[t] = round_pair<bf16>(x[2 * t], x[2 * t + 1]);
}

__global__ void trace_order_kernel(unsigned* trace, unsigned* counter) {
  trace[atomicAdd(counter, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}

__global__ void trace_barrier_kernel(unsigned* trace, unsigned* counter) {
  unsigned* shared = dynamic_shared<unsigned>();
  if (threadIdx.x == 0) *shared = 0;
  __syncthreads();
  trace[atomicAdd(shared, 1u)] = threadIdx.x;
  if (threadIdx.x == 0) *counter = 1;
}

__global__ void read_fresh_shared_kernel(unsigned* out) {
  unsigned* shared = dynamic_shared<unsigned>();
  out[blockIdx.x * blockDim.x + threadIdx.x] = shared[threadIdx.x];
  shared[threadIdx.x] = 7;
}

__global__ void indices_kernel(unsigned* out) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += block * 1000 + thread;
}

__global__ void atomics_kernel(AtomicResults* r) {
  const int id = int(blockIdx.x * blockDim.x + threadIdx.x);
  atomicAdd(&r->add_int, -id);
  atomicMax(&r->max_int, id);
  atomicMin(&r->min_int, -id);
  atomicAdd(&r->add_unsigned, 2u);
  atomicAdd(&r->add_wide, 1ull << 33);
  atomicAdd(&r->add_float, 1.0f);
  atomicExch(&r->exchanged, 5u);
  while (atomicCAS(&r->lock, 0, 1) != 0) {
  }
  __threadfence();
  r->locked = r->locked + 1;
  __threadfence();
  atomicExch(&r->lock, 0);
}

__global__ void some_skip_barrier_kernel() {
  if (threadIdx.x < 7) __syncthreads();
}
__global__ void barrier_at_two_lines_kernel() {
  if (threadIdx.x < 7) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void some_skip_warp_sum_kernel(float* out) {
  if (threadIdx.x < 32 || threadIdx.x % 32 < 20) {
    const float sum = warp_sum(1.0f);
    if (out != nullptr) *out = sum;
  }
}
__global__ void mask_without_caller_kernel() { __syncwarp(threadIdx.x == 3 ? ~8u : kAll); }
__global__ void overlapping_masks_kernel() {
  __syncwarp(threadIdx.x < 16 ? 0x1FFFFu : 0xFFFF8000u);
}
__global__ void masks_in_a_circle_kernel() {
  __syncwarp(1u << threadIdx.x | 1u << (threadIdx.x + 1) % blockDim.x);
}
__global__ void barriers_kernel() { __syncthreads(); }
__global__ void half_warp_sum_kernel() { warp_sum(1.0f); }
__global__ void read_outside_mask_kernel(int* out) {
  if (threadIdx.x < 16) {
    const int value = __shfl_sync(0xFFFFu, 1, 20);
    if (out != nullptr) *out = value;
  }
}
__global__ void misaligned_load_kernel(const float* x, float* out) {
  *out = load_vector<float, 4>(x + threadIdx.x)[0];
}
__global__ void write_shared_kernel(int index) { dynamic_shared<float>()[index] = 1.0f; }
__global__ void nothing_kernel() {}

__global__ void fill_kernel(float* out, int count, float value) {
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) out[i] = value;
}
__global__ void copy_kernel(const float* in, float* out, int count) {
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) out[i] = in[i];
}

__global__ void reverse_vectors_kernel(const std::uint16_t* in, std::uint16_t* out) {
  const auto v = load_vector<std::uint16_t, 8>(in + threadIdx.x * 8);
  Vec<std::uint16_t, 8> reversed;
  for (int i = 0; i < 8; ++i) reversed[i] = v[7 - i];
  store_vector(out + threadIdx.x * 8, reversed);
}

__global__ void publish_kernel(int* data, int* flag, int value) {
  peer_store(data, value);
  store_release(flag, 1);
}
__global__ void await_kernel(const int* data, const int* flag, int* out) {
  while (load_acquire(flag) == 0) {
  }
  *out = peer_load(data);
}
__global__ void publish_fenced_kernel(int* data, int* flag, int value) {
  *data = value;
  __threadfence_system();
  store_volatile(flag, 1);
}
__global__ void await_fenced_kernel(const int* data, const int* flag, int* out) {
  while (load_volatile(flag) == 0) {
  }
  __threadfence_system();
  *out = *data;
}

__global__ void blocks_wait_kernel(int* flag, int* out) {
  if (blockIdx.x == 0) {
    while (load_acquire(flag) == 0) {
    }
    if (threadIdx.x == 0) *out = 1;
  } else if (blockIdx.x == gridDim.x - 1) {
    store_release(flag, 1);
  }
}

std::size_t scratch(int threads) { return block_scratch_floats(threads) * sizeof(float); }

__global__ void roundings_kernel(const float* x, std::uint32_t* out, int count) {
  const int j = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (j >= count) return;
  const float a = x[j], b = x[(j + 1) % count], c = x[(j + 2) % count];
  const float results[kRoundings] = {a * b + c,
                                     fmaf(a, b, c),
                                     a / b,
                                     sqrtf(fabsf(a)),
                                     1.0f / sqrtf(a * a + 1e-6f),
                                     to_float(from_float<f16>(a)),
                                     to_float(from_float<bf16>(a)),
                                     larger(a, b) - c};
  for (int i = 0; i < kRoundings; ++i)
    out[i * count + j] = std::bit_cast<std::uint32_t>(results[i]);
}

__global__ void conversions_kernel(std::uint32_t* out) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = from_float<e4m3>(to_float(f16{std::uint16_t(i)})).bits;
  std::uint32_t* of_codes = out + 65536;
  if (i < 256) {
    const e4m3 code{std::uint8_t(i)};
    of_codes[i] = std::bit_cast<std::uint32_t>(to_float(code));
    of_codes[256 + i] = widened<f16>(code).bits;
    of_codes[512 + i] = widened<bf16>(code).bits;
  }
  if (i < 16) of_codes[768 + i] = std::bit_cast<std::uint32_t>(e2m1_to_float(i));
}

// Rows of 16 values, 24 apart in shared memory.
constexpr int kTileStride = 24;
constexpr int kPairStride = 40;
template <typename T>
__device__ void load_tile(T* tile, const T* from, int rows, int columns) {
  for (int i = int(threadIdx.x); i < rows * columns; i += 32) {
    tile[i / columns * kTileStride + i % columns] = from[i];
  }
  __syncwarp();
}
__device__ int quad() { return int(threadIdx.x) / 4; }
__device__ int in_quad() { return int(threadIdx.x) % 4; }
__device__ FragmentC read_c(const float* c, int stride) {
  const float* upper = c + quad() * stride + in_quad() * 2;
  return {{upper[0], upper[1], upper[8 * stride], upper[8 * stride + 1]}};
}
__device__ void write_c(const FragmentC& c, float* out) {
  float* upper = out + quad() * 8 + in_quad() * 2;
  upper[0] = c.x[0];
  upper[1] = c.x[1];
  upper[64] = c.x[2];
  upper[65] = c.x[3];
}

template <typename T>
__global__ void multiply_kernel(const T* a, const T* b, bool by_columns, const float* c,
                                float* out) {
  T* a_tile = dynamic_shared<T>();
  T* b_tile = a_tile + 16 * kTileStride;
  load_tile(a_tile, a, 16, 16);
  load_tile(b_tile, b, by_columns ? 8 : 16, by_columns ? 16 : 8);
  FragmentC sum = read_c(c, 8);
  const FragmentA<T> left = load_a(a_tile, kTileStride);
  const FragmentB<T> right =
      by_columns ? load_b(b_tile, kTileStride) : load_b_transposed(b_tile, kTileStride);
  mma(sum, left, right);
  write_c(sum, out);
}

template <typename T>
__global__ void multiply_pairs_kernel(const T* a, const T* b, bool by_columns, float* out) {
  T* a_tile = dynamic_shared<T>();
  T* b_tile = a_tile + 16 * kTileStride;
  load_tile(a_tile, a, 16, 16);
  const FragmentA<T> left = load_a(a_tile, kTileStride);
  const int columns = by_columns ? 32 : 16;
  for (int i = int(threadIdx.x); i < 256; i += 32) {
    b_tile[i / columns * kPairStride + i % columns] = b[i];
  }
  __syncwarp();
  const FragmentB2<T> right =
      by_columns ? load_b2(b_tile, kPairStride) : load_b2_transposed(b_tile, kPairStride);
  for (int i = 0; i < 2; ++i) {
    FragmentC sum{};
    mma(sum, left, right.x[i]);
    write_c(sum, out + i * 128);
  }
}

template <typename T>
__global__ void multiply_rounded_kernel(const float* c, const T* b, float* out) {
  T* b_tile = dynamic_shared<T>();
  load_tile(b_tile, b, 16, 8);
  FragmentC sum{};
  mma(sum, to_a<T>(read_c(c, 16), read_c(c + 8, 16)), load_b_transposed(b_tile, kTileStride));
  write_c(sum, out);
}

__global__ void quads_kernel(const float* x, float* sums, float* shuffled_sums, float* maxima,
                             float* shuffled_maxima) {
  const float value = x[threadIdx.x];
  sums[threadIdx.x] = quad_sum(value);
  maxima[threadIdx.x] = quad_max(value);
  float sum = value, maximum = value;
  for (int distance = 1; distance <= 2; distance *= 2) {
    sum += __shfl_xor_sync(kAll, sum, distance);
    maximum = larger(maximum, __shfl_xor_sync(kAll, maximum, distance));
  }
  shuffled_sums[threadIdx.x] = sum;
  shuffled_maxima[threadIdx.x] = maximum;
}

constexpr int kPipelineTile = 1024, kPipelineThreads = 64;

template <int Bytes, int Stages>
__global__ void pipeline_kernel(const float* x, float* out, int tiles) {
  float* ring = dynamic_shared<float>();
  const int thread = int(threadIdx.x);
  const auto begin_tile = [&](int tile) {
    if (tile < tiles) {
      constexpr int kWidth = Bytes / 4;
      for (int i = thread * kWidth; i < kPipelineTile; i += kPipelineThreads * kWidth) {
        copy_async<Bytes>(ring + tile % Stages * kPipelineTile + i, x + tile * kPipelineTile + i);
      }
    }
    copy_async_commit();  // without copies, too, so that the wait always counts the same
  };
  for (int stage = 0; stage < Stages - 1; ++stage) begin_tile(stage);
  float sums[kPipelineTile / kPipelineThreads] = {};
  for (int tile = 0; tile < tiles; ++tile) {
    copy_async_wait<Stages - 2>();
    __syncthreads();  // all threads' copies are there, and the last tile's readers are through
    begin_tile(tile + Stages - 1);
    for (int i = 0; i < kPipelineTile / kPipelineThreads; ++i) {
      // Another thread's copies.
      const int from = i * kPipelineThreads + (thread + 5) % kPipelineThreads;
      sums[i] += ring[tile % Stages * kPipelineTile + from];
    }
  }
  for (int i = 0; i < kPipelineTile / kPipelineThreads; ++i) {
    out[i * kPipelineThreads + (thread + 5) % kPipelineThreads] = sums[i];
  }
}

__global__ void copies_in_flight_kernel(const std::uint32_t* in, std::uint32_t* out) {
  auto* shared = dynamic_shared<std::uint32_t>();
  for (int i = 0; i < 5; ++i) shared[i] = 7;
  for (int i = 0; i < 4; ++i) {
    copy_async<4>(shared + i, in + i);
    copy_async_commit();
  }
  copy_async<4>(shared + 4, in + 4);
  const auto look = [&](int row) {
    for (int i = 0; i < 5; ++i) out[row * 5 + i] = shared[i];
  };
  look(0);
  copy_async_wait<2>();
  look(1);
  copy_async_wait<0>();
  look(2);
  copy_async_commit();
  copy_async_wait<0>();
  look(3);
}
__global__ void misaligned_copy_kernel(const std::uint32_t* in) {
  copy_async<8>(dynamic_shared<std::uint32_t>() + 2, in + 1);
}
__global__ void copy_beyond_shared_kernel(const std::uint32_t* in) {
  copy_async<8>(dynamic_shared<std::uint32_t>() + 4, in);
}
__global__ void copy_nobody_waits_for_kernel(const std::uint32_t* in) {
  if (threadIdx.x == 3) copy_async<8>(dynamic_shared<std::uint32_t>(), in);
  copy_async_commit();
}
__global__ void misaligned_tile_kernel(int stride) {
  load_a(dynamic_shared<bf16>() + (stride == 0 ? 4 : 0), stride);
}
template <typename T>
__device__ void multiply_nothing() {
  FragmentC c{};
  mma(c, FragmentA<T>{}, FragmentB<T>{});
}
__global__ void half_warp_mma_kernel() { multiply_nothing<f16>(); }
__global__ void some_skip_mma_kernel() {
  if (threadIdx.x < 20) multiply_nothing<f16>();
}
__global__ void two_kinds_of_mma_kernel() {
  threadIdx.x < 20 ? multiply_nothing<f16>() : multiply_nothing<bf16>();
}

__global__ void packed_conversions_kernel(std::uint32_t* out) {
  const std::uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < 65536) {
    const float v = to_float(f16{std::uint16_t(i)});
    out[i] = codes_of(v, -v);
  } else if (i < 65536 + 256) {
    const std::uint32_t c = i - 65536;
    widen_codes(c | (c + 1) % 256 << 8 | (c + 2) % 256 << 16 | (c + 3) % 256 << 24,
                out[65536 + 2 * c], out[65536 + 2 * c + 1]);
  }
}

__global__ void hand_over_kernel(const int* last_but_one, const int* last, int* to,
                                 OverlapMistake mistake) {
  const int i = int(blockIdx.x * blockDim.x + threadIdx.x);
  if (mistake == OverlapMistake::early_start) let_next_kernel_start();
  const int seen = last_but_one == nullptr ? -1 : last_but_one[i];
  if (mistake != OverlapMistake::no_wait) wait_for_previous_kernel();
  if (mistake == OverlapMistake::none) let_next_kernel_start();
  to[i] = seen < 0 || seen + 1 == last[i] ? last[i] + 1 : -1;
}

}  // namespace

void warp_functions(Stream& stream, std::int64_t* out) {
  launch("warp_functions", warp_functions_kernel, 1, 32, 0, stream, out);
}
void half_masks(Stream& stream, unsigned* out) {
  launch("half_masks", half_masks_kernel, 1, 32, 0, stream, out);
}
void nested_masks(Stream& stream, unsigned* out) {
  launch("nested_masks", nested_masks_kernel, 1, 32, 0, stream, out);
}
void block_sums(Stream& stream, const float* x, float* out, int threads) {
  launch("block_sums", block_sums_kernel, 1, threads, scratch(threads), stream, x, out);
}
void block_maxima(Stream& stream, const float* x, float* out, int threads) {
  launch("block_maxima", block_maxima_kernel, 1, threads, scratch(threads), stream, x, out);
}
void warp_sums(Stream& stream, const float* x, float* tree, float* butterfly) {
  launch("warp_sums", warp_sums_kernel, 1, 32, 0, stream, x, tree, butterfly);
}
void part_sums(Stream& stream, const float* x, float* tree, float* butterfly) {
  launch("part_sums", part_sums_kernel, 1, 32, 0, stream, x, tree, butterfly);
}
void rounded_pairs(Stream& stream, const float* x, std::uint32_t* to_f16, std::uint32_t* to_bf16,
                   int threads) {
  launch("rounded_pairs", rounded_pairs_kernel, 1, threads, 0, stream, x, to_f16, to_bf16);
}
void trace_order(Stream& stream, unsigned* trace, unsigned* counter, int blocks, int threads) {
  launch("trace_order", trace_order_kernel, blocks, threads, 0, stream, trace, counter);
}
void trace_barrier(Stream& stream, unsigned* trace, unsigned* counter, int threads) {
  launch("trace_barrier", trace_barrier_kernel, 1, threads, sizeof(unsigned), stream, trace,
         counter);
}
void read_fresh_shared(Stream& stream, unsigned* out, int blocks, int threads) {
  launch("read_fresh_shared", read_fresh_shared_kernel, blocks, threads, threads * sizeof(unsigned),
         stream, out);
}
void indices(Stream& stream, unsigned* out) {
  launch("indices", indices_kernel, dim3(2, 3, 2), dim3(4, 2, 3), 0, stream, out);
}
void atomics(Stream& stream, AtomicResults* results, int blocks, int threads) {
  launch("atomics", atomics_kernel, blocks, threads, 0, stream, results);
}

void some_skip_barrier(Stream& stream) {
  launch("some_skip_barrier", some_skip_barrier_kernel, 1, 128, 0, stream);
}
void barrier_at_two_lines(Stream& stream) {
  launch("barrier_at_two_lines", barrier_at_two_lines_kernel, dim3(1, 2), 64, 0, stream);
}
void some_skip_warp_sum(Stream& stream) {
  launch("some_skip_warp_sum", some_skip_warp_sum_kernel, 1, 64, 0, stream, nullptr);
}
void mask_without_caller(Stream& stream) {
  launch("mask_without_caller", mask_without_caller_kernel, 1, 32, 0, stream);
}
void overlapping_masks(Stream& stream) {
  launch("overlapping_masks", overlapping_masks_kernel, 1, 32, 0, stream);
}
void masks_in_a_circle(Stream& stream) {
  launch("masks_in_a_circle", masks_in_a_circle_kernel, 1, 3, 0, stream);
}
void barriers(Stream& stream, int threads) {
  launch("barriers", barriers_kernel, 1, threads, 0, stream);
}
void half_warp_sum(Stream& stream) {
  launch("half_warp_sum", half_warp_sum_kernel, 1, 48, 0, stream);
}
void read_outside_mask(Stream& stream) {
  launch("read_outside_mask", read_outside_mask_kernel, 1, 32, 0, stream, nullptr);
}
void misaligned_load(Stream& stream, const float* x, float* out) {
  launch("misaligned_load", misaligned_load_kernel, 1, 2, 0, stream, x, out);
}
void copies_in_flight(Stream& stream, const std::uint32_t* in, std::uint32_t* out) {
  launch("copies_in_flight", copies_in_flight_kernel, 1, 1, 20, stream, in, out);
}
void misaligned_copy(Stream& stream, const std::uint32_t* in) {
  launch("misaligned_copy", misaligned_copy_kernel, 1, 1, 16, stream, in);
}
void copy_beyond_shared(Stream& stream, const std::uint32_t* in) {
  launch("copy_beyond_shared", copy_beyond_shared_kernel, 1, 1, 16, stream, in);
}
void copy_nobody_waits_for(Stream& stream, const std::uint32_t* in) {
  launch("copy_nobody_waits_for", copy_nobody_waits_for_kernel, 1, 32, 16, stream, in);
}
void misaligned_tile(Stream& stream, int stride) {
  launch("misaligned_tile", misaligned_tile_kernel, 1, 32, 1024, stream, stride);
}
void half_warp_mma(Stream& stream) {
  launch("half_warp_mma", half_warp_mma_kernel, 1, 48, 0, stream);
}
void some_skip_mma(Stream& stream) {
  launch("some_skip_mma", some_skip_mma_kernel, 1, 32, 0, stream);
}
void two_kinds_of_mma(Stream& stream) {
  launch("two_kinds_of_mma", two_kinds_of_mma_kernel, 1, 32, 0, stream);
}
void write_shared(Stream& stream, int floats, int index) {
  launch("write_shared", write_shared_kernel, 3, 1, floats * sizeof(float), stream, index);
}
void launch_sized(Stream& stream, unsigned grid_x, unsigned block_x, unsigned block_y,
                  std::size_t shared) {
  launch("sized", nothing_kernel, grid_x, dim3(block_x, block_y), shared, stream);
}

void fill(Stream& stream, float* out, int count, float value) {
  launch("fill", fill_kernel, 1, 64, 0, stream, out, count, value);
}
void copy(Stream& stream, const float* in, float* out, int count) {
  launch("copy", copy_kernel, 1, 64, 0, stream, in, out, count);
}
void reverse_vectors(Stream& stream, const std::uint16_t* in, std::uint16_t* out, int count) {
  launch("reverse_vectors", reverse_vectors_kernel, 1, count / 8, 0, stream, in, out);
}

void roundings(Stream& stream, const float* x, std::uint32_t* out, int count) {
  launch("roundings", roundings_kernel, (count + 63) / 64, 64, 0, stream, x, out, count);
}

void conversions(Stream& stream, std::uint32_t* out) {
  launch("conversions", conversions_kernel, 65536 / 64, 64, 0, stream, out);
}

template <typename T>
void multiply(Stream& stream, const T* a, const T* b, bool by_columns, const float* c, float* out) {
  launch("multiply", multiply_kernel<T>, 1, 32, 32 * kTileStride * sizeof(T), stream, a, b,
         by_columns, c, out);
}
template <typename T>
void multiply_pairs(Stream& stream, const T* a, const T* b, bool by_columns, float* out) {
  launch("multiply_pairs", multiply_pairs_kernel<T>, 1, 32,
         16 * (kTileStride + kPairStride) * sizeof(T), stream, a, b, by_columns, out);
}
template <typename T>
void multiply_rounded(Stream& stream, const float* c, const T* b, float* out) {
  launch("multiply_rounded", multiply_rounded_kernel<T>, 1, 32, 16 * kTileStride * sizeof(T),
         stream, c, b, out);
}
template void multiply(Stream&, const f16*, const f16*, bool, const float*, float*);
template void multiply(Stream&, const bf16*, const bf16*, bool, const float*, float*);
template void multiply_pairs(Stream&, const f16*, const f16*, bool, float*);
template void multiply_pairs(Stream&, const bf16*, const bf16*, bool, float*);
template void multiply_rounded(Stream&, const float*, const f16*, float*);
template void multiply_rounded(Stream&, const float*, const bf16*, float*);
void quads(Stream& stream, const float* x, float* sums, float* shuffled_sums, float* maxima,
           float* shuffled_maxima) {
  launch("quads", quads_kernel, 1, 32, 0, stream, x, sums, shuffled_sums, maxima, shuffled_maxima);
}
void pipeline(Stream& stream, const float* x, float* out, int tiles, int stages, int bytes) {
  const auto kernel = [&] {
    if (stages == 2) {
      return bytes == 4   ? pipeline_kernel<4, 2>
             : bytes == 8 ? pipeline_kernel<8, 2>
                          : pipeline_kernel<16, 2>;
    }
    return bytes == 4   ? pipeline_kernel<4, 3>
           : bytes == 8 ? pipeline_kernel<8, 3>
                        : pipeline_kernel<16, 3>;
  }();
  launch("pipeline", kernel, 1, kPipelineThreads, stages * kPipelineTile * sizeof(float), stream, x,
         out, tiles);
}

void publish(Stream& stream, int* data, int* flag, int value) {
  launch("publish", publish_kernel, 1, 1, 0, stream, data, flag, value);
}
void await(Stream& stream, const int* data, const int* flag, int* out) {
  launch("await", await_kernel, 1, 1, 0, stream, data, flag, out);
}
void publish_fenced(Stream& stream, int* data, int* flag, int value) {
  launch("publish_fenced", publish_fenced_kernel, 1, 1, 0, stream, data, flag, value);
}
void await_fenced(Stream& stream, const int* data, const int* flag, int* out) {
  launch("await_fenced", await_fenced_kernel, 1, 1, 0, stream, data, flag, out);
}
void blocks_wait(Stream& stream, int* flag, int* out, int blocks) {
  launch("blocks_wait", blocks_wait_kernel, blocks, 32, 0, stream, flag, out);
}
void packed_conversions(Stream& stream, std::uint32_t* out) {
  launch("packed_conversions", packed_conversions_kernel, 257, 256, 0, stream, out);
}

void hand_over(Stream& stream, int* data, OverlapMistake mistake) {
  for (int i = 0; i < kHandOvers; ++i) {
    const auto launch_it = [&](auto launch_as) {
      launch_as("hand_over", hand_over_kernel, dim3(kHandedOver / 100), dim3(100), std::size_t{0},
                stream, i == 0 ? nullptr : data + (i - 1) * kHandedOver, data + i * kHandedOver,
                data + (i + 1) * kHandedOver, mistake);
    };
    if (i == 0) {
      launch_it([](auto&&... a) { launch(a...); });
    } else {
      launch_it([](auto&&... a) { launch_overlapping(a...); });
    }
  }
}

}  // namespace tp::testing
