// ceilings.cu - the hardware limits that every benchmark ratio divides by.
//
//   nvcc -arch=sm_90 -std=c++20 -O3 -o ceilings ceilings.cu -lnccl -lcublasLt
//   ./ceilings > ceilings.json          (table on stderr)
//
// One JSON object on stdout: the median of every figure under a key that names its unit, the 10th
// and 90th percentile of the same samples under "spread_p10_p90". A group that fails is reported
// under "errors" and does not stop the others.
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>
#include <nccl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <exception>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

// ---------------------------------------------------------------- errors, statistics, results

void check(bool ok, const std::string& what) {
  if (!ok) throw std::runtime_error(what);
}
#define CUDA(x)                                                                \
  do {                                                                         \
    cudaError_t e_ = (x);                                                      \
    check(e_ == cudaSuccess, std::string(#x) + ": " + cudaGetErrorString(e_)); \
  } while (0)
#define NCCL(x)                                                                \
  do {                                                                         \
    ncclResult_t e_ = (x);                                                     \
    check(e_ == ncclSuccess, std::string(#x) + ": " + ncclGetErrorString(e_)); \
  } while (0)
#define LT(x)                                                              \
  do {                                                                     \
    cublasStatus_t e_ = (x);                                               \
    check(e_ == CUBLAS_STATUS_SUCCESS,                                     \
          std::string(#x) + ": cuBLAS status " + std::to_string(int(e_))); \
  } while (0)

struct Stat {
  double median = 0, p10 = 0, p90 = 0;
};

double percentile(std::vector<double> v, double p) {
  std::sort(v.begin(), v.end());
  const double at = p * double(v.size() - 1);
  const size_t lo = size_t(at), hi = std::min(lo + 1, v.size() - 1);
  return v[lo] + (v[hi] - v[lo]) * (at - double(lo));
}

Stat stat_of(const std::vector<double>& v) {
  return {percentile(v, 0.5), percentile(v, 0.1), percentile(v, 0.9)};
}

// A rate is work / time; a long time is a low rate, so the percentiles swap.
Stat rate(double work, Stat us) { return {work / us.median, work / us.p90, work / us.p10}; }

std::string json_string(const std::string& s) {
  std::string q = "\"";
  for (const unsigned char c : s) {
    if (c == '"' || c == '\\') q += '\\';
    q += c < 0x20 ? ' ' : char(c);
  }
  return q + "\"";
}

class Report {
 public:
  void context(const std::string& key, const std::string& json_value) {
    const std::lock_guard lock(mutex_);
    context_.emplace_back(key, json_value);
  }
  void figure(const std::string& key, Stat s, const std::string& note = "") {
    const std::lock_guard lock(mutex_);
    figures_.push_back({key, s, note});
    std::fprintf(stderr, "  %-34s %12.3f   [%.3f .. %.3f]  %s\n", key.c_str(), s.median, s.p10,
                 s.p90, note.c_str());
  }
  void error(const std::string& group, const std::string& what) {
    const std::lock_guard lock(mutex_);
    errors_.emplace_back(group, what);
    std::fprintf(stderr, "  %-34s FAILED: %s\n", group.c_str(), what.c_str());
  }
  void print() {
    const std::lock_guard lock(mutex_);
    std::printf("{\n  \"context\": {");
    for (size_t i = 0; i < context_.size(); ++i)
      std::printf("%s\n    %s: %s", i ? "," : "", json_string(context_[i].first).c_str(),
                  context_[i].second.c_str());
    std::printf("\n  }");
    for (const auto& f : figures_)
      std::printf(",\n  %s: %.6g", json_string(f.key).c_str(), f.stat.median);
    std::printf(",\n  \"spread_p10_p90\": {");
    for (size_t i = 0; i < figures_.size(); ++i)
      std::printf("%s\n    %s: [%.6g, %.6g]", i ? "," : "", json_string(figures_[i].key).c_str(),
                  figures_[i].stat.p10, figures_[i].stat.p90);
    std::printf("\n  },\n  \"notes\": {");
    bool first = true;
    for (const auto& f : figures_) {
      if (f.note.empty()) continue;
      std::printf("%s\n    %s: %s", first ? "" : ",", json_string(f.key).c_str(),
                  json_string(f.note).c_str());
      first = false;
    }
    std::printf("\n  },\n  \"errors\": {");
    for (size_t i = 0; i < errors_.size(); ++i)
      std::printf("%s\n    %s: %s", i ? "," : "", json_string(errors_[i].first).c_str(),
                  json_string(errors_[i].second).c_str());
    std::printf("\n  }\n}\n");
    std::fflush(stdout);
  }
  bool failed() const { return !errors_.empty(); }

 private:
  struct Figure {
    std::string key;
    Stat stat;
    std::string note;
  };
  std::mutex mutex_;
  std::vector<std::pair<std::string, std::string>> context_, errors_;
  std::vector<Figure> figures_;
};

Report report;
int samples = 25;  // timed repetitions behind every median

// ---------------------------------------------------------------- device memory, streams, timing

template <class T>
class Buffer {  // plain device memory on the device that is current when it is made
 public:
  explicit Buffer(size_t count) : count_(count) {
    CUDA(cudaMalloc(&data_, count * sizeof(T)));
    CUDA(cudaMemset(data_, 0, count * sizeof(T)));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { cudaFree(data_); }
  T* get() const { return data_; }
  size_t count() const { return count_; }

 private:
  T* data_ = nullptr;
  size_t count_;
};

class Stream {
 public:
  Stream() { CUDA(cudaStreamCreateWithFlags(&s_, cudaStreamNonBlocking)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(s_); }
  operator cudaStream_t() const { return s_; }

 private:
  cudaStream_t s_;
};

class Graph {  // whatever body() enqueues on the stream, as one executable graph
 public:
  Graph(cudaStream_t s, const std::function<void()>& body) {
    CUDA(cudaStreamBeginCapture(s, cudaStreamCaptureModeThreadLocal));
    try {
      body();
    } catch (...) {
      cudaGraph_t broken = nullptr;
      cudaStreamEndCapture(s, &broken);
      if (broken) cudaGraphDestroy(broken);
      throw;
    }
    cudaGraph_t graph;
    CUDA(cudaStreamEndCapture(s, &graph));
    const cudaError_t e = cudaGraphInstantiate(&exec_, graph, 0);
    cudaGraphDestroy(graph);
    CUDA(e);
  }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  ~Graph() { cudaGraphExecDestroy(exec_); }
  void launch(cudaStream_t s) const { CUDA(cudaGraphLaunch(exec_, s)); }

 private:
  cudaGraphExec_t exec_ = nullptr;
};

__device__ uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t));
  return t;
}

// Keeps the stream busy while the host enqueues what follows, so that launch latency stays out of
// the timed region; also a deliberate delay of one rank.
__global__ void spin(uint64_t ns) {
  const uint64_t start = nanoseconds();
  while (nanoseconds() - start < ns) {
  }
}

class Timer {  // microseconds between two events around body(), behind a gate that hides launch
               // latency
 public:
  Timer() {
    CUDA(cudaEventCreate(&a_));
    CUDA(cudaEventCreate(&b_));
  }
  Timer(const Timer&) = delete;
  Timer& operator=(const Timer&) = delete;
  ~Timer() {
    cudaEventDestroy(a_);
    cudaEventDestroy(b_);
  }
  void enqueue(cudaStream_t s, const std::function<void()>& body, uint64_t gate_ns = 50'000) {
    spin<<<1, 1, 0, s>>>(gate_ns);
    CUDA(cudaEventRecord(a_, s));
    body();
    CUDA(cudaGetLastError());
    CUDA(cudaEventRecord(b_, s));
  }
  double wait_us() {
    float ms = 0;
    CUDA(cudaEventSynchronize(b_));
    CUDA(cudaEventElapsedTime(&ms, a_, b_));
    return double(ms) * 1e3;
  }

 private:
  cudaEvent_t a_, b_;
};

// Per-repetition time of body(), which enqueues `inner` repetitions.
Stat time_us(cudaStream_t s, double inner, const std::function<void()>& body, int count = samples) {
  Timer timer;
  for (int i = 0; i < 2; ++i) body();
  std::vector<double> us;
  for (int i = 0; i < count; ++i) {
    timer.enqueue(s, body);
    us.push_back(timer.wait_us() / inner);
  }
  return stat_of(us);
}

// The same, each repetition after a pause and one untimed run, so that the power limit has not yet
// lowered the clocks. Reproducible where work without pauses varies by several percent.
Stat time_paced_us(cudaStream_t s, double inner, const std::function<void()>& body) {
  Timer timer;
  std::vector<double> us;
  for (int i = 0; i < samples; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    body();
    timer.enqueue(s, body);
    us.push_back(timer.wait_us() / inner);
  }
  return stat_of(us);
}

Stat time_graph_us(cudaStream_t s, int nodes, const std::function<void(int)>& node) {
  const Graph graph(s, [&] {
    for (int i = 0; i < nodes; ++i) node(i);
  });
  return time_us(s, nodes, [&] { graph.launch(s); });
}

// ---------------------------------------------------------------- random data

__host__ __device__ inline uint32_t hash32(uint32_t x) {
  x ^= x >> 16;
  x *= 0x7feb352dU;
  x ^= x >> 15;
  x *= 0x846ca68bU;
  return x ^ (x >> 16);
}

__device__ float normal(uint32_t i, uint32_t seed) {
  const float u = (float(hash32(2 * i + seed)) + 1.0f) * 2.3283064e-10f;
  const float v = float(hash32(2 * i + 1 + seed)) * 2.3283064e-10f;
  return sqrtf(-2.0f * logf(fminf(u, 1.0f))) * cospif(2.0f * v);
}

template <class T>
__global__ void fill_normal(T* out, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n;
       i += size_t(gridDim.x) * blockDim.x)
    out[i] = T(normal(uint32_t(i), seed));
}

__global__ void fill_bits(uint32_t* out, size_t n, uint32_t seed) {
  for (size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x; i < n;
       i += size_t(gridDim.x) * blockDim.x)
    out[i] = hash32(uint32_t(i) ^ seed);
}

uint32_t fresh_seed() {
  static std::atomic<uint32_t> next{
      uint32_t(std::chrono::steady_clock::now().time_since_epoch().count())};
  return hash32(next++);
}

void randomize(void* p, size_t bytes, cudaStream_t s) {
  fill_bits<<<1024, 256, 0, s>>>(static_cast<uint32_t*>(p), bytes / 4, fresh_seed());
  CUDA(cudaGetLastError());
  CUDA(cudaStreamSynchronize(s));
}

// ---------------------------------------------------------------- t0: the smallest kernel as a
// graph node

__global__ void empty() {}

__global__ void read_write_16(const uint4* in, uint4* out) {
  if (threadIdx.x == 0) {
    uint4 v = in[blockIdx.x];
    v.x += 1;
    out[blockIdx.x] = v;
  }
}

// The same under programmatic dependent launch: the next node may start before this one has
// finished and waits for its data at griddepcontrol.wait.
__global__ void read_write_16_pdl(const uint4* in, uint4* out) {
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
  if (threadIdx.x == 0) {
    uint4 v = in[blockIdx.x];
    v.x += 1;
    out[blockIdx.x] = v;
  }
}

void measure_t0() {
  constexpr int nodes = 200;
  const Stream s;
  const Buffer<uint4> a(1024), b(1024);
  uint4* const pair[2] = {a.get(), b.get()};
  report.figure("t0_empty_us", time_graph_us(s, nodes, [&](int) { empty<<<1, 32, 0, s>>>(); }));
  for (const int blocks : {1, 132}) {
    const std::string suffix = blocks == 1 ? "1block_us" : "132blocks_us";
    report.figure(
        "t0_rw16_" + suffix,
        time_graph_us(
            s, nodes,
            [&](int i) { read_write_16<<<blocks, 128, 0, s>>>(pair[i % 2], pair[(i + 1) % 2]); }),
        "each block reads 16 B that the node before wrote, and writes 16 B");
    report.figure("t0_rw16_pdl_" + suffix,
                  time_graph_us(s, nodes,
                                [&](int i) {
                                  cudaLaunchAttribute attribute{};
                                  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
                                  attribute.val.programmaticStreamSerializationAllowed = 1;
                                  cudaLaunchConfig_t config{};
                                  config.gridDim = dim3(blocks);
                                  config.blockDim = dim3(128);
                                  config.stream = s;
                                  config.attrs = &attribute;
                                  config.numAttrs = 1;
                                  CUDA(cudaLaunchKernelEx(&config, read_write_16_pdl,
                                                          static_cast<const uint4*>(pair[i % 2]),
                                                          pair[(i + 1) % 2]));
                                }),
                  "the same with programmatic dependent launch");
  }
}

// ---------------------------------------------------------------- device memory and L2 bandwidth

enum class Traffic { copy, read, write };

// n is a multiple of U * blockDim.x; U independent 16-byte accesses in flight per thread.
template <Traffic K, int U, bool Streaming>
__global__ void stream_kernel(const uint4* __restrict__ in, uint4* __restrict__ out, size_t n) {
  uint4 acc = make_uint4(0, 0, 0, 0);
  for (size_t base = size_t(blockIdx.x) * blockDim.x * U + threadIdx.x; base < n;
       base += size_t(gridDim.x) * blockDim.x * U) {
    uint4 v[U];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const size_t i = base + size_t(u) * blockDim.x;
      if constexpr (K == Traffic::write) {
        const uint32_t h = uint32_t(i) * 2654435761U;
        v[u] = make_uint4(h, ~h, h ^ 0x5bd1e995U, h + 0x27d4eb2fU);
      } else {
        v[u] = Streaming ? __ldcs(in + i) : in[i];
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const size_t i = base + size_t(u) * blockDim.x;
      if constexpr (K == Traffic::read) {
        acc.x ^= v[u].x, acc.y ^= v[u].y, acc.z ^= v[u].z, acc.w ^= v[u].w;
      } else if constexpr (Streaming) {
        __stcs(out + i, v[u]);
      } else {
        out[i] = v[u];
      }
    }
  }
  if constexpr (K == Traffic::read) {  // practically never true, but the compiler cannot know
    if (acc.x == 0x9e3779b9U && acc.y == 0x7f4a7c15U && acc.z == 0xf39cc060U) out[0] = acc;
  }
}

template <Traffic K, int U, bool Streaming>
void launch_stream(int blocks, int threads, const uint4* in, uint4* out, size_t n, cudaStream_t s) {
  stream_kernel<K, U, Streaming><<<blocks, threads, 0, s>>>(in, out, n);
}

// The best of a few launch shapes is the ceiling.
template <Traffic K>
void measure_bandwidth(const char* key, const uint4* in, uint4* out, size_t bytes, cudaStream_t s,
                       int sm_count) {
  const size_t n = bytes / sizeof(uint4);
  const double moved = double(bytes) * (K == Traffic::copy ? 2 : 1);
  constexpr int inner = 4;
  double best = 1e30;
  std::string best_note;
  std::function<void()> best_body;
  const auto attempt = [&](auto unroll, auto streaming, int threads, int per_sm) {
    constexpr int U = decltype(unroll)::value;
    constexpr bool S = decltype(streaming)::value;
    const int blocks = per_sm ? per_sm * sm_count : int(n / (size_t(threads) * U));
    const std::function<void()> body = [=] {
      for (int i = 0; i < inner; ++i) launch_stream<K, U, S>(blocks, threads, in, out, n, s);
    };
    const double us = time_us(s, inner, body, 3).median;
    if (us < best) {
      best = us;
      best_body = body;
      best_note = "best of 16: " + std::to_string(U) + " x 16 B per thread, " +
                  std::to_string(threads) + " threads, " + std::to_string(blocks) + " blocks, " +
                  (S ? "streaming" : "default") + " caching";
    }
  };
  for (const int threads : {256, 512})
    for (const int per_sm : {0, 2048 / threads}) {
      attempt(std::integral_constant<int, 4>{}, std::true_type{}, threads, per_sm);
      attempt(std::integral_constant<int, 8>{}, std::true_type{}, threads, per_sm);
      attempt(std::integral_constant<int, 4>{}, std::false_type{}, threads, per_sm);
      attempt(std::integral_constant<int, 8>{}, std::false_type{}, threads, per_sm);
    }
  report.figure(key, rate(moved / 1e3, time_us(s, inner, best_body)), best_note);
}

// Reads a buffer of a power-of-two size over and over, past L1; each pass starts elsewhere, so that
// no SM sees the same part twice in a row.
__global__ void __launch_bounds__(1024)
    l2_read(const uint4* in, uint32_t mask, int passes, uint4* sink) {
  const uint32_t threads = gridDim.x * blockDim.x, me = blockIdx.x * blockDim.x + threadIdx.x;
  uint4 acc = make_uint4(0, 0, 0, 0);
  for (int p = 0; p < passes; ++p) {
    uint4 v[4];
#pragma unroll
    for (uint32_t u = 0; u < 4; ++u)
      v[u] = __ldcg(in + ((me + (u + 4u * p) * threads + 32u * 977u * p) & mask));
#pragma unroll
    for (int u = 0; u < 4; ++u) acc.x ^= v[u].x, acc.y ^= v[u].y, acc.z ^= v[u].z, acc.w ^= v[u].w;
  }
  if (acc.x == 0x9e3779b9U && acc.y == 0x7f4a7c15U && acc.z == 0xf39cc060U) *sink = acc;
}

__global__ void __launch_bounds__(1024)
    l2_copy(const uint4* in, uint4* out, uint32_t mask, int passes) {
  const uint32_t threads = gridDim.x * blockDim.x, me = blockIdx.x * blockDim.x + threadIdx.x;
  for (int p = 0; p < passes; ++p) {
    uint4 v[4];
#pragma unroll
    for (uint32_t u = 0; u < 4; ++u)
      v[u] = __ldcg(in + ((me + (u + 4u * p) * threads + 32u * 977u * p) & mask));
#pragma unroll
    for (uint32_t u = 0; u < 4; ++u)
      __stcg(out + ((me + (u + 4u * p) * threads + 32u * 977u * p) & mask), v[u]);
  }
}

void measure_memory() {
  cudaDeviceProp prop;
  int device;
  CUDA(cudaGetDevice(&device));
  CUDA(cudaGetDeviceProperties(&prop, device));
  const int sms = prop.multiProcessorCount;
  const Stream s;
  {
    constexpr size_t bytes = size_t(2) << 30;
    const Buffer<uint4> in(bytes / 16), out(bytes / 16);
    randomize(in.get(), bytes, s);
    measure_bandwidth<Traffic::copy>("bw_copy_GBps", in.get(), out.get(), bytes, s, sms);
    measure_bandwidth<Traffic::read>("bw_read_GBps", in.get(), out.get(), bytes, s, sms);
    measure_bandwidth<Traffic::write>("bw_write_GBps", in.get(), out.get(), bytes, s, sms);
    report.figure("bw_memcpy_GBps",
                  rate(2.0 * double(bytes) / 1e3, time_us(s, 1,
                                                          [&] {
                                                            CUDA(cudaMemcpyAsync(
                                                                out.get(), in.get(), bytes,
                                                                cudaMemcpyDeviceToDevice, s));
                                                          })),
                  "cudaMemcpyAsync, read plus written bytes");
  }
  const int passes = 256, blocks = 2 * sms, threads = 1024;
  const double moved = double(passes) * blocks * threads * 64;
  for (const int mb : {16, 32}) {
    const size_t bytes = size_t(mb) << 20;
    const Buffer<uint4> in(bytes / 16), sink(1);
    randomize(in.get(), bytes, s);
    report.figure("l2_read_" + std::to_string(mb) + "MB_GBps",
                  rate(moved / 1e3, time_us(s, 1,
                                            [&] {
                                              l2_read<<<blocks, threads, 0, s>>>(
                                                  in.get(), uint32_t(bytes / 16 - 1), passes,
                                                  sink.get());
                                            })),
                  "one long kernel, ld.cg, 256 passes");
  }
  constexpr size_t bytes = size_t(16) << 20;
  const Buffer<uint4> in(bytes / 16), out(bytes / 16);
  randomize(in.get(), bytes, s);
  report.figure("l2_copy_16MB_GBps",
                rate(2 * moved / 1e3, time_us(s, 1,
                                              [&] {
                                                l2_copy<<<blocks, threads, 0, s>>>(
                                                    in.get(), out.get(), uint32_t(bytes / 32 - 1),
                                                    passes);
                                              })),
                "8 MB read and 8 MB written, over and over in one kernel; read plus written bytes");
  report.figure("l2_read_16MB_node_us",
                time_graph_us(s, 100,
                              [&](int) {
                                stream_kernel<Traffic::read, 8, false>
                                    <<<int(bytes / 16 / 8 / 512), 512, 0, s>>>(in.get(), out.get(),
                                                                               bytes / 16);
                              }),
                "one pass over 16 MB that lies in L2, as a graph node (t0 included)");
  report.figure("l2_copy_8MB_node_us",
                time_graph_us(s, 100,
                              [&](int) {
                                stream_kernel<Traffic::copy, 4, false>
                                    <<<int(bytes / 32 / 4 / 512), 512, 0, s>>>(in.get(), out.get(),
                                                                               bytes / 32);
                              }),
                "8 MB read and 8 MB written within L2, as a graph node (t0 included)");
}

// ---------------------------------------------------------------- matrix ceilings

template <class T>
double to_double(T v) {
  return double(float(v));
}

// D[m,n] = A^T B with K-contiguous operands (the layout of a linear layer), fp32 accumulation, bf16
// out.
template <class T>
void measure_matmul(const std::string& key, cudaDataType_t type, bool fast_accumulate) {
  constexpr int n = 8192;
  constexpr size_t count = size_t(n) * n;
  const Stream s;
  const Buffer<T> a(count), b(count);
  const Buffer<__nv_bfloat16> d(count);
  constexpr size_t workspace_bytes = size_t(64) << 20;
  const Buffer<char> workspace(workspace_bytes);
  const Buffer<float> one(1);
  const float unit = 1.0f, zero = 0.0f;
  CUDA(cudaMemcpy(one.get(), &unit, sizeof unit, cudaMemcpyHostToDevice));
  fill_normal<<<1024, 256, 0, s>>>(a.get(), count, fresh_seed());
  fill_normal<<<1024, 256, 0, s>>>(b.get(), count, fresh_seed());
  CUDA(cudaGetLastError());
  CUDA(cudaMemsetAsync(d.get(), 0xff, count * sizeof(__nv_bfloat16), s));
  CUDA(cudaStreamSynchronize(s));

  cublasLtHandle_t lt;
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t la, lb, ld;
  cublasLtMatmulPreference_t preference;
  LT(cublasLtCreate(&lt));
  LT(cublasLtMatmulDescCreate(&op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t t = CUBLAS_OP_T, no = CUBLAS_OP_N;
  LT(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, &t, sizeof t));
  LT(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSB, &no, sizeof no));
  if (sizeof(T) == 1) {
    const float* scale = one.get();
    const int8_t fast = fast_accumulate ? 1 : 0;
    LT(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &scale,
                                      sizeof scale));
    LT(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &scale,
                                      sizeof scale));
    LT(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast));
  }
  LT(cublasLtMatrixLayoutCreate(&la, type, n, n, n));
  LT(cublasLtMatrixLayoutCreate(&lb, type, n, n, n));
  LT(cublasLtMatrixLayoutCreate(&ld, CUDA_R_16BF, n, n, n));
  LT(cublasLtMatmulPreferenceCreate(&preference));
  LT(cublasLtMatmulPreferenceSetAttribute(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                                          &workspace_bytes, sizeof workspace_bytes));
  cublasLtMatmulHeuristicResult_t found[16];
  int found_count = 0;
  LT(cublasLtMatmulAlgoGetHeuristic(lt, op, la, lb, ld, ld, preference, 16, found, &found_count));
  check(found_count > 0, "no cuBLASLt algorithm");

  const auto run = [&](int i) {
    LT(cublasLtMatmul(lt, op, &unit, a.get(), la, b.get(), lb, &zero, d.get(), ld, d.get(), ld,
                      &found[i].algo, workspace.get(), workspace_bytes, s));
  };
  int best = 0;
  double best_us = 1e30;
  for (int i = 0; i < found_count; ++i) {
    const double us = time_us(
                          s, 4,
                          [&] {
                            for (int k = 0; k < 4; ++k) run(i);
                          },
                          3)
                          .median;
    if (us < best_us) best_us = us, best = i;
  }
  const auto four = [&] {
    for (int k = 0; k < 4; ++k) run(best);
  };
  const Stat paced = time_paced_us(s, 4, four);
  for (int i = 0; i < 2 * samples; ++i) four();
  const Stat sustained = time_us(s, 4, four, 4 * samples);

  // Spot check in double, so that a wrong descriptor cannot pass for a fast one.
  std::vector<T> row(n), column(n);
  double error = 0, norm = 0;
  for (uint32_t k = 0; k < 16; ++k) {
    const size_t i = hash32(3 * k + 1) % n, j = hash32(7 * k + 2) % n;
    __nv_bfloat16 got;
    CUDA(cudaMemcpy(row.data(), a.get() + i * n, n * sizeof(T), cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(column.data(), b.get() + j * n, n * sizeof(T), cudaMemcpyDeviceToHost));
    CUDA(cudaMemcpy(&got, d.get() + j * n + i, sizeof got, cudaMemcpyDeviceToHost));
    double expected = 0;
    for (int q = 0; q < n; ++q) expected += to_double(row[q]) * to_double(column[q]);
    error += std::pow(to_double(got) - expected, 2);
    norm += expected * expected;
  }
  const double relative = std::sqrt(error / norm);
  check(relative < 2e-2, key + ": relative error " + std::to_string(relative));
  char note[160];
  std::snprintf(note, sizeof note,
                "8192^3, normal data, best of %d algorithms, relative error %.1e; after a pause",
                found_count, relative);
  const double work = 2.0 * n * double(n) * n / 1e6;
  report.figure(key + "_TFLOPs", rate(work, paced), note);
  report.figure(key + "_sustained_TFLOPs", rate(work, sustained),
                "the same without pauses, at the power limit");

  cublasLtMatmulPreferenceDestroy(preference);
  cublasLtMatrixLayoutDestroy(la);
  cublasLtMatrixLayoutDestroy(lb);
  cublasLtMatrixLayoutDestroy(ld);
  cublasLtMatmulDescDestroy(op);
  cublasLtDestroy(lt);
}

// mma.sync m16n8k16 bf16 from registers alone: 2 x 4 fragments, 8 accumulators per warp.
__global__ void __launch_bounds__(512)
    mma_peak(const __nv_bfloat162* seed, float* sink, int iterations, uint64_t* clocks) {
  const uint32_t* bits = reinterpret_cast<const uint32_t*>(seed);
  uint32_t a[2][4], b[4][2];
  float c[2][4][4] = {};
  for (int i = 0; i < 2; ++i)
    for (int k = 0; k < 4; ++k) a[i][k] = bits[(threadIdx.x * 16 + i * 4 + k) & 4095];
  for (int j = 0; j < 4; ++j)
    for (int k = 0; k < 2; ++k) b[j][k] = bits[(threadIdx.x * 16 + 8 + j * 2 + k) & 4095];
  const uint64_t t0 = nanoseconds(), c0 = clock64();
  for (int it = 0; it < iterations; ++it)
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
            "{%8,%9}, {%0,%1,%2,%3};"
            : "+f"(c[i][j][0]), "+f"(c[i][j][1]), "+f"(c[i][j][2]), "+f"(c[i][j][3])
            : "r"(a[i][0]), "r"(a[i][1]), "r"(a[i][2]), "r"(a[i][3]), "r"(b[j][0]), "r"(b[j][1]));
  const uint64_t t1 = nanoseconds(), c1 = clock64();
  float sum = 0;
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 4; ++j)
      for (int k = 0; k < 4; ++k) sum += c[i][j][k];
  sink[blockIdx.x * blockDim.x + threadIdx.x] = sum;
  if (blockIdx.x == 0 && threadIdx.x == 0) clocks[0] = t1 - t0, clocks[1] = c1 - c0;
}

void measure_mma() {
  cudaDeviceProp prop;
  int device;
  CUDA(cudaGetDevice(&device));
  CUDA(cudaGetDeviceProperties(&prop, device));
  const Stream s;
  const Buffer<__nv_bfloat162> seed(4096);
  const Buffer<float> sink(size_t(prop.multiProcessorCount) * 2 * 512);
  const Buffer<uint64_t> clocks(2);
  fill_normal<<<64, 256, 0, s>>>(reinterpret_cast<__nv_bfloat16*>(seed.get()), 8192, fresh_seed());
  CUDA(cudaStreamSynchronize(s));
  constexpr int iterations = 20000;
  const auto tflops = [&](int blocks, int warps, Stat us) {
    return rate(double(blocks) * warps * iterations * 8 * 4096 / 1e6, us);
  };
  Stat best;
  int best_blocks = 0, best_warps = 0;
  const auto run = [&](int blocks, int warps) {
    mma_peak<<<blocks, warps * 32, 0, s>>>(seed.get(), sink.get(), iterations, clocks.get());
  };
  for (const int blocks : {prop.multiProcessorCount, 2 * prop.multiProcessorCount})
    for (const int warps : {4, 8, 16}) {
      const Stat rate_here = tflops(blocks, warps,
                                    time_us(
                                        s, 1, [&] { run(blocks, warps); }, 3));
      if (rate_here.median > best.median)
        best = rate_here, best_blocks = blocks, best_warps = warps;
    }
  const auto body = [&] { run(best_blocks, best_warps); };
  const auto clock_mhz = [&] {
    uint64_t c[2];
    CUDA(cudaMemcpy(c, clocks.get(), sizeof c, cudaMemcpyDeviceToHost));
    const double mhz = double(c[1]) * 1e3 / double(c[0]);
    return Stat{mhz, mhz, mhz};
  };
  report.figure("mma_sync_bf16_TFLOPs", tflops(best_blocks, best_warps, time_paced_us(s, 1, body)),
                "m16n8k16, " + std::to_string(best_blocks / prop.multiProcessorCount * best_warps) +
                    " warps per SM, 8 accumulators per warp; after a pause");
  report.figure("sm_clock_under_mma_MHz", clock_mhz(), "read inside that kernel");
  for (int i = 0; i < 2 * samples; ++i) body();
  report.figure("mma_sync_bf16_sustained_TFLOPs",
                tflops(best_blocks, best_warps, time_us(s, 1, body, 4 * samples)),
                "the same without pauses, at the power limit");
  report.figure("sm_clock_under_sustained_mma_MHz", clock_mhz());
}

// ---------------------------------------------------------------- two GPUs

// How the store and the poll are ordered against other memory: not at all (volatile), or on one
// side or both.
enum class Signal {
  volatile4,
  volatile16,
  release_only,
  acquire_only,
  release_acquire,
  release_acquire_gpu
};

template <Signal S>
__device__ void post(uint4* p, uint32_t v) {
  if constexpr (S == Signal::release_acquire || S == Signal::release_only)
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
  else if constexpr (S == Signal::release_acquire_gpu)
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
  else if constexpr (S == Signal::volatile16)
    asm volatile("st.volatile.global.v4.u32 [%0], {%1,%1,%1,%1};" ::"l"(p), "r"(v) : "memory");
  else
    asm volatile("st.volatile.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

template <Signal S>
__device__ bool arrived(const uint4* p, uint32_t v) {
  uint32_t x, y = v, z = v, w = v;
  if constexpr (S == Signal::release_acquire || S == Signal::acquire_only)
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  else if constexpr (S == Signal::release_acquire_gpu)
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  else if constexpr (S != Signal::volatile16)
    asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  else
    asm volatile("ld.volatile.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x), "=r"(y), "=r"(z), "=r"(w)
                 : "l"(p)
                 : "memory");
  return x == v && y == v && z == v && w == v;
}

// One thread per side: each stores into the other's memory and polls its own. Gives up after some
// seconds.
template <Signal S>
__global__ void ping_pong(uint4* flag0, uint4* flag1, int side, int warmup, int rounds,
                          uint64_t* out_ns) {
  const int me = side < 0 ? int(blockIdx.x) : side;
  uint4* const mine = me == 0 ? flag0 : flag1;
  uint4* const peer = me == 0 ? flag1 : flag0;
  uint64_t start = 0;
  for (int i = 1; i <= warmup + rounds; ++i) {
    if (i == warmup + 1) start = nanoseconds();
    if (me == 0) post<S>(peer, uint32_t(i));
    for (int spins = 0; !arrived<S>(mine, uint32_t(i)); ++spins)
      if (spins > (1 << 22)) return;
    if (me == 1) post<S>(peer, uint32_t(i));
  }
  if (me == 0) *out_ns = nanoseconds() - start;
}

template <Signal S>
void measure_tx(const char* key, const char* note, bool one_gpu) {
  constexpr int warmup = 200, rounds = 2000;
  CUDA(cudaSetDevice(0));
  const Stream s0;
  const Buffer<uint4> flag0(8);
  const Buffer<uint64_t> ns(1);
  CUDA(cudaSetDevice(one_gpu ? 0 : 1));
  const Stream s1;
  const Buffer<uint4> flag1(8);
  std::vector<double> us;
  for (int i = 0; i < samples; ++i) {
    CUDA(cudaMemset(flag1.get(), 0, sizeof(uint4)));
    CUDA(cudaDeviceSynchronize());
    CUDA(cudaSetDevice(0));
    CUDA(cudaMemset(flag0.get(), 0, sizeof(uint4)));
    CUDA(cudaMemset(ns.get(), 0, sizeof(uint64_t)));
    CUDA(cudaDeviceSynchronize());
    if (one_gpu) {
      ping_pong<S><<<2, 1, 0, s0>>>(flag0.get(), flag1.get(), -1, warmup, rounds, ns.get());
    } else {
      ping_pong<S><<<1, 1, 0, s0>>>(flag0.get(), flag1.get(), 0, warmup, rounds, ns.get());
      CUDA(cudaSetDevice(1));
      ping_pong<S><<<1, 1, 0, s1>>>(flag0.get(), flag1.get(), 1, warmup, rounds, ns.get());
    }
    CUDA(cudaGetLastError());
    CUDA(cudaStreamSynchronize(s1));
    CUDA(cudaStreamSynchronize(s0));
    uint64_t elapsed = 0;
    CUDA(cudaMemcpy(&elapsed, ns.get(), sizeof elapsed, cudaMemcpyDeviceToHost));
    check(elapsed > 0, "ping-pong timed out");
    us.push_back(double(elapsed) / 1e3 / (2.0 * rounds));
  }
  CUDA(cudaSetDevice(0));
  report.figure(key, stat_of(us), note);
}

void measure_peer_bandwidth() {
  constexpr size_t bytes = size_t(512) << 20;
  constexpr size_t n = bytes / sizeof(uint4);
  constexpr int inner = 4, threads = 512, unroll = 8, blocks = int(n / (threads * unroll));
  const auto copy = [](const uint4* in, uint4* out, cudaStream_t s) {
    for (int i = 0; i < inner; ++i)
      stream_kernel<Traffic::copy, unroll, false><<<blocks, threads, 0, s>>>(in, out, n);
  };
  CUDA(cudaSetDevice(1));
  const Stream s1;
  const Buffer<uint4> in1(n), out1(n);
  randomize(in1.get(), bytes, s1);
  Timer timer1;
  CUDA(cudaSetDevice(0));
  const Stream s0;
  const Buffer<uint4> in0(n), out0(n);
  randomize(in0.get(), bytes, s0);
  Timer timer0;
  const double work = double(bytes) / 1e3;
  report.figure("peer_store_GBps",
                rate(work, time_us(s0, inner, [&] { copy(in0.get(), out1.get(), s0); })),
                "kernel reads its own memory, writes the peer's; one direction");
  report.figure("peer_load_GBps",
                rate(work, time_us(s0, inner, [&] { copy(in1.get(), out0.get(), s0); })),
                "kernel reads the peer's memory, writes its own; one direction");
  report.figure(
      "peer_memcpy_GBps",
      rate(work, time_us(s0, inner,
                         [&] {
                           for (int i = 0; i < inner; ++i)
                             CUDA(cudaMemcpyPeerAsync(out1.get(), 1, in0.get(), 0, bytes, s0));
                         })),
      "cudaMemcpyPeerAsync, one direction");
  for (const bool store : {true, false}) {
    std::vector<double> us;
    for (int i = 0; i < samples + 2; ++i) {
      timer0.enqueue(
          s0, [&] { store ? copy(in0.get(), out1.get(), s0) : copy(in1.get(), out0.get(), s0); },
          200'000);
      CUDA(cudaSetDevice(1));
      timer1.enqueue(
          s1, [&] { store ? copy(in1.get(), out0.get(), s1) : copy(in0.get(), out1.get(), s1); },
          200'000);
      const double t1 = timer1.wait_us();
      CUDA(cudaSetDevice(0));
      const double slowest = std::max(t1, timer0.wait_us()) / inner;
      if (i >= 2) us.push_back(slowest);
    }
    report.figure(store ? "peer_store_bidirectional_GBps" : "peer_load_bidirectional_GBps",
                  rate(work, stat_of(us)), "both GPUs at once, per direction");
  }
}

// body(rank) on one host thread per GPU; the first exception of either is rethrown.
void on_two_ranks(const std::function<void(int)>& body) {
  std::exception_ptr failure[2];
  std::thread threads[2];
  for (int r = 0; r < 2; ++r)
    threads[r] = std::thread([&, r] {
      try {
        CUDA(cudaSetDevice(r));
        body(r);
      } catch (...) {
        failure[r] = std::current_exception();
      }
    });
  for (auto& t : threads) t.join();
  for (const auto& f : failure)
    if (f) std::rethrow_exception(f);
}

// NCCL fp32 all-reduce inside a graph, an unrelated kernel between repeats. The time of the same
// graph without the all-reduces is taken off. delay_ns > 0: rank 1 comes that much later each time,
// and the figure is what the late rank still waits.
Stat time_all_reduce(ncclComm_t* comms, size_t count, float* const* in, float* const* out,
                     uint64_t delay_ns) {
  constexpr int nodes = 50;
  std::barrier<> meet(2);
  std::vector<double> us[2];
  on_two_ranks([&](int r) {
    try {
      const Stream s;
      const Buffer<uint4> a(8), b(8);
      Timer timer;
      const auto between = [&] {
        read_write_16<<<1, 32, 0, s>>>(a.get(), b.get());
        if (delay_ns && r == 1) spin<<<1, 1, 0, s>>>(delay_ns);
      };
      for (int i = 0; i < 20; ++i)
        NCCL(ncclAllReduce(in[r], out[r], count, ncclFloat, ncclSum, comms[r], s));
      CUDA(cudaStreamSynchronize(s));
      const Graph with(s, [&] {
        for (int i = 0; i < nodes; ++i) {
          between();
          NCCL(ncclAllReduce(in[r], out[r], count, ncclFloat, ncclSum, comms[r], s));
        }
      });
      const Graph without(s, [&] {
        for (int i = 0; i < nodes; ++i) between();
      });
      std::vector<double> bare, full;
      for (int i = 0; i < samples + 3; ++i) {
        for (const Graph* g : {&without, &with}) {
          meet.arrive_and_wait();  // threads first, then an all-reduce, so that both GPUs start
                                   // together
          NCCL(ncclAllReduce(in[r], out[r], count, ncclFloat, ncclSum, comms[r], s));
          timer.enqueue(
              s, [&] { g->launch(s); }, 100'000);
          const double t = timer.wait_us() / nodes;
          if (i >= 3) (g == &with ? full : bare).push_back(t);
        }
      }
      const double base = percentile(bare, 0.5);
      for (const double t : full) us[r].push_back(t - base);
    } catch (...) {
      meet.arrive_and_drop();
      throw;
    }
  });
  if (delay_ns) return stat_of(us[1]);
  for (size_t i = 0; i < us[0].size(); ++i) us[0][i] = std::max(us[0][i], us[1][i]);
  return stat_of(us[0]);
}

void check_sum(float* const* in, float* const* out, size_t count) {
  std::vector<float> a(count), b(count), c(count);
  CUDA(cudaMemcpy(a.data(), in[0], count * 4, cudaMemcpyDefault));
  CUDA(cudaMemcpy(b.data(), in[1], count * 4, cudaMemcpyDefault));
  for (int r = 0; r < 2; ++r) {
    CUDA(cudaMemcpy(c.data(), out[r], count * 4, cudaMemcpyDefault));
    for (size_t i = 0; i < count; ++i) check(c[i] == a[i] + b[i], "all-reduce gave a wrong sum");
  }
}

void measure_nccl(bool window) {
  constexpr size_t bytes = 64 << 10;
  ncclComm_t comms[2];
  const int devices[2] = {0, 1};
  NCCL(ncclCommInitAll(comms, 2, devices));
  float *in[2], *out[2];
  ncclWindow_t windows[2][2] = {};
  on_two_ranks([&](int r) {
    for (float** p : {&in[r], &out[r]}) NCCL(ncclMemAlloc(reinterpret_cast<void**>(p), bytes));
    fill_normal<<<64, 256>>>(in[r], bytes / 4, fresh_seed());
    CUDA(cudaMemset(out[r], 0xff, bytes));
    CUDA(cudaDeviceSynchronize());
    if (window) {
      NCCL(ncclCommWindowRegister(comms[r], in[r], bytes, &windows[r][0], NCCL_WIN_COLL_SYMMETRIC));
      NCCL(
          ncclCommWindowRegister(comms[r], out[r], bytes, &windows[r][1], NCCL_WIN_COLL_SYMMETRIC));
      check(windows[r][0] && windows[r][1], "NCCL gave no symmetric window");
    }
  });
  const std::string prefix = window ? "tN_window_" : "tN_";
  for (const size_t size : {size_t(8), size_t(512), size_t(8) << 10, size_t(64) << 10}) {
    const std::string label =
        size < 1024 ? std::to_string(size) + "B" : std::to_string(size >> 10) + "KB";
    report.figure(prefix + label + "_us", time_all_reduce(comms, size / 4, in, out, 0),
                  window ? "buffers in a symmetric window" : "max over ranks, spacer taken off");
    check_sum(in, out, size / 4);
  }
  report.figure(prefix + "512B_skew5us_late_us", time_all_reduce(comms, 128, in, out, 5000),
                "rank 1 comes 5 us late; what the late rank still waits");
  on_two_ranks([&](int r) {
    for (const ncclWindow_t w : windows[r])
      if (w) NCCL(ncclCommWindowDeregister(comms[r], w));
    NCCL(ncclMemFree(in[r]));
    NCCL(ncclMemFree(out[r]));
  });
  for (const ncclComm_t c : comms) NCCL(ncclCommDestroy(c));
}

// ---------------------------------------------------------------- main

void describe_machine(int gpus) {
  cudaDeviceProp prop;
  CUDA(cudaGetDeviceProperties(&prop, 0));
  int driver = 0, runtime = 0, nccl = 0;
  CUDA(cudaDriverGetVersion(&driver));
  CUDA(cudaRuntimeGetVersion(&runtime));
  NCCL(ncclGetVersion(&nccl));
  char date[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  report.context("date", json_string(date));
  report.context("device", json_string(prop.name));
  report.context("gpus_used", std::to_string(gpus));
  report.context("sm_count", std::to_string(prop.multiProcessorCount));
  report.context("l2_bytes", std::to_string(prop.l2CacheSize));
  report.context("cuda_driver", std::to_string(driver));
  report.context("cuda_runtime", std::to_string(runtime));
  report.context("nccl", std::to_string(nccl));
  report.context("cublaslt", std::to_string(cublasLtGetVersion()));
  report.context("nvlink_multicast", "false");
  report.context("samples_per_figure", std::to_string(samples));
  std::fprintf(stderr, "%s, %d GPU(s), driver %d, runtime %d, NCCL %d\n", prop.name, gpus, driver,
               runtime, nccl);
}

// Brings the clocks up before the first figure.
void warm_up(int gpus) {
  for (int d = 0; d < gpus; ++d) {
    CUDA(cudaSetDevice(d));
    const Buffer<__nv_bfloat162> seed(4096);
    const Buffer<float> sink(264 * 256);
    const Buffer<uint64_t> clocks(2);
    for (int i = 0; i < 50; ++i)
      mma_peak<<<264, 256>>>(seed.get(), sink.get(), 10000, clocks.get());
    CUDA(cudaGetLastError());
    CUDA(cudaDeviceSynchronize());
  }
}

void attempt(const char* group, const std::function<void()>& body) {
  try {
    CUDA(cudaSetDevice(0));
    body();
    CUDA(cudaDeviceSynchronize());
  } catch (const std::exception& e) {
    report.error(group, e.what());
    cudaGetLastError();
  }
}

}  // namespace

int main(int argc, char** argv) {
  int wanted = 2, limit_s = 240;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    if (arg == "--gpus" && i + 1 < argc) {
      wanted = std::atoi(argv[++i]);
    } else if (arg == "--quick") {
      samples = 7;
    } else {
      std::fprintf(stderr, "usage: %s [--gpus 1|2] [--quick]   JSON on stdout, table on stderr\n",
                   argv[0]);
      return 2;
    }
  }
  // NVLink multicast stays off, whatever the caller's environment says.
  setenv("NCCL_NVLS_ENABLE", "0", 1);

  int present = 0;
  if (cudaGetDeviceCount(&present) != cudaSuccess || present == 0) {
    std::fprintf(stderr, "no CUDA device\n");
    return 2;
  }
  const int gpus = std::min(wanted, std::min(present, 2));

  // A peer protocol that never answers must not take the other figures with it.
  std::thread([limit_s] {
    std::this_thread::sleep_for(std::chrono::seconds(limit_s));
    report.error("watchdog", "stopped after " + std::to_string(limit_s) + " s");
    report.print();
    _exit(3);
  }).detach();

  attempt("machine", [&] { describe_machine(gpus); });
  attempt("warm_up", [&] { warm_up(gpus); });
  attempt("t0", measure_t0);
  attempt("memory", measure_memory);
  attempt("matmul_bf16", [] { measure_matmul<__nv_bfloat16>("matmul_bf16", CUDA_R_16BF, false); });
  attempt("matmul_fp8_fast",
          [] { measure_matmul<__nv_fp8_e4m3>("matmul_fp8_fast", CUDA_R_8F_E4M3, true); });
  attempt("matmul_fp8", [] { measure_matmul<__nv_fp8_e4m3>("matmul_fp8", CUDA_R_8F_E4M3, false); });
  attempt("mma_sync", measure_mma);
  attempt("tx_same_gpu", [] {
    measure_tx<Signal::volatile16>("tx_same_gpu_volatile_16B_us",
                                   "two blocks of one GPU, through L2", true);
    measure_tx<Signal::release_acquire_gpu>("tx_same_gpu_release_acquire_us",
                                            "the same, st.release.gpu / ld.acquire.gpu", true);
  });
  if (gpus == 2) {
    attempt("peer_access", [] {
      for (const int d : {0, 1}) {
        int can = 0;
        CUDA(cudaDeviceCanAccessPeer(&can, d, 1 - d));
        check(can, "the GPUs cannot access each other's memory");
        CUDA(cudaSetDevice(d));
        CUDA(cudaDeviceEnablePeerAccess(1 - d, 0));
      }
    });
    attempt("tx", [] {
      measure_tx<Signal::volatile16>("tx_volatile_16B_us",
                                     "one way, 16 B volatile: data is its own flag", false);
      measure_tx<Signal::volatile4>("tx_volatile_us", "one way, 4 B volatile", false);
      measure_tx<Signal::acquire_only>("tx_acquire_only_us", "st.volatile / ld.acquire.sys", false);
      measure_tx<Signal::release_only>("tx_release_only_us", "st.release.sys / ld.volatile", false);
      measure_tx<Signal::release_acquire>("tx_release_acquire_us",
                                          "st.release.sys / ld.acquire.sys", false);
    });
    attempt("peer_bandwidth", measure_peer_bandwidth);
    attempt("nccl", [] { measure_nccl(false); });
    attempt("nccl_window", [] { measure_nccl(true); });
  }
  report.print();
  std::fflush(stderr);
  _exit(report.failed() ? 1 : 0);
}
