#include "harness/device/device.h"
#include "harness/device/require.h"
#include "kernels/reduce.cuh"
#include "kernels/rms_norm.h"
#include "kernels/words.cuh"

namespace tp {

namespace {

// Calls f with a T where `rounded` and with a float where not: the type that a value is kept in.
template <typename T, typename F>
void kept_in(bool rounded, F f) {
  rounded ? f(T{}) : f(float{});
}

// The tensors of a call. Without a residual, residual and residual_out are not looked at.
template <typename T>
struct Norm {
  View<const T> x, residual;
  const T* weight;
  View<T> residual_out, out;
  float eps;
};

// ---- Rows in registers.

constexpr int kBlockThreads = 128;   // of a block that several rows share
constexpr int kMaxRowThreads = 512;  // of a row
constexpr int kElements = 16;        // of a thread, where so many threads are enough

// What a thread has of a row: vectors t, t + threads, .. of it.
template <typename T, int Vectors>
struct HeldRow {
  Words<T> words[Vectors];

  __device__ float at(int v, int e) const { return element<T>(words[v], e); }
};
// The sum of two rows, as it is in fp32.
template <typename T, int Vectors>
struct HeldSum {
  HeldRow<T, Vectors> x, residual;

  __device__ float at(int v, int e) const { return x.at(v, e) + residual.at(v, e); }
};

// Threads: of a row, if they are a warp or a part of one; 0: all of the block. x * inverse is kept
// in Normed until the weight is multiplied; x + residual, if Adds, in Sum.
template <int Threads, int Vectors, bool Adds, typename Sum, typename Normed, typename T>
__global__ void __launch_bounds__(Threads == 0 ? kMaxRowThreads : kBlockThreads)
    held_rows_kernel(Norm<T> norm) {
  const int threads = Threads == 0 ? int(blockDim.x) : Threads,
            thread = Threads == 0 ? int(threadIdx.x) : int(threadIdx.x) % Threads;
  std::int64_t row = blockIdx.x;
  if constexpr (Threads != 0) row = row * (int(blockDim.x) / Threads) + int(threadIdx.x) / Threads;
  // Those beyond the last row take part in sums.
  const int vectors = row < norm.x.rows ? int(norm.x.cols) / kWide<T> : 0;
  // f(v, k) for each vector of this thread that there is, k being its first column. Without
  // anything else in between, loads are on their way together.
  const auto each = [&](auto f) {
#pragma unroll
    for (int v = 0; v < Vectors; ++v) {
      const int vector = thread + v * threads;
      if (vector < vectors) f(v, vector * kWide<T>);
    }
  };
  const auto load = [&](const T* from) {
    HeldRow<T, Vectors> held{};
    each([&](int v, int k) { held.words[v] = load_words(from + k); });
    return held;
  };

  const HeldRow<T, Vectors> weight = load(norm.weight);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const HeldRow<T, Vectors> x = load(norm.x.data + row * norm.x.row_stride);
  const auto scale = [&](const auto& held) {
    float sum = 0.0f;
#pragma unroll
    for (int v = 0; v < Vectors; ++v) {
      float of_vector = 0.0f;
#pragma unroll
      for (int e = 0; e < kWide<T>; ++e) of_vector = fmaf(held.at(v, e), held.at(v, e), of_vector);
      sum = v == 0 ? of_vector : sum + of_vector;
    }
    if constexpr (Threads == 0) {
      sum = block_sum(sum, dynamic_shared<float>());
    } else {
      sum = part_sum<Threads>(sum);
    }
    const float inverse = inverse_root(sum / float(norm.x.cols), norm.eps);
    T* out = norm.out.data + row * norm.out.row_stride;
    each([&](int v, int k) {
      store_words(out + k, words_of<T>([&](int e) {
                    const float normed = to_float(from_float<Normed>(held.at(v, e) * inverse));
                    return normed * weight.at(v, e);
                  }));
    });
  };
  if constexpr (!Adds) {
    scale(x);
  } else {
    const HeldSum<T, Vectors> sum{x, load(norm.residual.data + row * norm.residual.row_stride)};
    HeldRow<T, Vectors> rounded;
    T* written = norm.residual_out.data + row * norm.residual_out.row_stride;
#pragma unroll
    for (int v = 0; v < Vectors; ++v)
      rounded.words[v] = words_of<T>([&](int e) { return sum.at(v, e); });
    each([&](int v, int k) { store_words(written + k, rounded.words[v]); });
    if constexpr (std::is_same_v<Sum, T>) {
      scale(rounded);
    } else {
      scale(sum);
    }
  }
}

// ---- Any rows: element by element.

// A row that is there.
template <typename T>
struct PlainRow {
  const T* x;

  __device__ float operator[](std::int64_t j) const { return to_float(x[j]); }
};

// The sum of two rows, kept in Sum.
template <typename T, typename Sum>
struct AddedRow {
  const T* x;
  const T* residual;

  __device__ float operator[](std::int64_t j) const {
    return to_float(from_float<Sum>(to_float(x[j]) + to_float(residual[j])));
  }
};

// One block a row.
template <typename Normed, typename T, typename Row>
__device__ void norm_row(const Row& x, const Norm<T>& norm) {
  const std::int64_t cols = norm.x.cols;
  float sum = 0.0f;
  for (std::int64_t j = threadIdx.x; j < cols; j += blockDim.x) sum = fmaf(x[j], x[j], sum);
  const float inverse =
      inverse_root(block_sum(sum, dynamic_shared<float>()) / float(cols), norm.eps);
  T* out = norm.out.data + blockIdx.x * norm.out.row_stride;
  for (std::int64_t j = threadIdx.x; j < cols; j += blockDim.x) {
    const float normed = to_float(from_float<Normed>(x[j] * inverse));
    out[j] = from_float<T>(normed * to_float(norm.weight[j]));
  }
}

template <bool Adds, typename Sum, typename Normed, typename T>
__global__ void any_rows_kernel(Norm<T> norm) {
  const std::int64_t row = blockIdx.x;
  const T* x = norm.x.data + row * norm.x.row_stride;
  if constexpr (Adds) {
    // Added again in every loop: both rows are in the cache by then, and the sum is the same.
    const AddedRow<T, Sum> sum{x, norm.residual.data + row * norm.residual.row_stride};
    T* written = norm.residual_out.data + row * norm.residual_out.row_stride;
    for (std::int64_t j = threadIdx.x; j < norm.x.cols; j += blockDim.x)
      written[j] = from_float<T>(sum[j]);
    norm_row<Normed>(sum, norm);
  } else {
    norm_row<Normed>(PlainRow<T>{x}, norm);
  }
}

// ---- Launches.

template <bool Adds, typename Sum, typename Normed, typename T>
void launch_norm(const char* name, const Norm<T>& norm, bool aligned, Stream& stream) {
  const auto rows = unsigned(norm.x.rows);
  const RowShare share = rms_norm_share(dtype_of<T>::value, norm.x.cols, aligned);
  const auto of_part = [&]<int Threads, int Vectors>() {
    const unsigned in_block = max(1u, min(rows, unsigned(kBlockThreads / Threads))),
                   warps = (in_block * Threads + 31) / 32, of_block = warps * 32 / Threads;
    launch_overlapping(name, held_rows_kernel<Threads, Vectors, Adds, Sum, Normed, T>,
                       dim3((rows + of_block - 1) / of_block), dim3(warps * 32), 0, stream, norm);
  };
  const auto of_block = [&]<int Vectors>() {
    launch_overlapping(name, held_rows_kernel<0, Vectors, Adds, Sum, Normed, T>, dim3(rows),
                       dim3(unsigned(share.threads)),
                       block_scratch_floats(share.threads) * sizeof(float), stream, norm);
  };
  if (share.vectors == 0) {
    launch(name, any_rows_kernel<Adds, Sum, Normed, T>, dim3(rows), dim3(unsigned(share.threads)),
           block_scratch_floats(share.threads) * sizeof(float), stream, norm);
  } else if (share.threads == 8) {
    of_part.template operator()<8, 1>();
  } else if (share.threads == 16) {
    of_part.template operator()<16, 1>();
  } else if (share.threads == 32) {
    share.vectors == 1   ? of_part.template operator()<32, 1>()
    : share.vectors == 2 ? of_part.template operator()<32, 2>()
                         : of_part.template operator()<32, 4>();
  } else {
    share.vectors == 2   ? of_block.template operator()<2>()
    : share.vectors == 4 ? of_block.template operator()<4>()
                         : of_block.template operator()<8>();
  }
}

template <typename T>
void require_norm(const Norm<T>& norm, std::int64_t weights, const char* op) {
  require(weights == norm.x.cols && norm.out.cols == norm.x.cols && norm.out.rows == norm.x.rows,
          op, "x is {} x {}, weight has {} columns, out is {} x {}",
          {norm.x.rows, norm.x.cols, weights, norm.out.rows, norm.out.cols});
}

template <typename T>
bool is_aligned(const Norm<T>& norm) {
  return has_aligned_rows(norm.x) && has_aligned_rows(norm.out) &&
         has_aligned_rows(View<const T>{norm.weight, 1, norm.x.cols, 0});
}

}  // namespace

template <typename T>
void rms_norm(View<const T> x, View<const T> weight, View<T> out, float eps,
              const NormRounding& rounding, Stream& stream) {
  const Norm<T> norm{x, {}, weight.data, {}, out, eps};
  require_norm(norm, weight.cols, "rms_norm");
  kept_in<T>(rounding.before_weight, [&]<typename Normed>(Normed) {
    launch_norm<false, T, Normed>("rms_norm", norm, is_aligned(norm), stream);
  });
}

template <typename T>
void add_rms_norm(View<const T> x, View<const T> residual, View<const T> weight,
                  View<T> residual_out, View<T> out, float eps, const NormRounding& rounding,
                  Stream& stream) {
  const Norm<T> norm{x, residual, weight.data, residual_out, out, eps};
  require_norm(norm, weight.cols, "add_rms_norm");
  require(residual.rows == x.rows && residual.cols == x.cols && residual_out.rows == x.rows &&
              residual_out.cols == x.cols,
          "add_rms_norm", "x is {} x {}, residual is {} x {}, residual_out is {} x {}",
          {x.rows, x.cols, residual.rows, residual.cols, residual_out.rows, residual_out.cols});
  const bool aligned =
      is_aligned(norm) && has_aligned_rows(residual) && has_aligned_rows(residual_out);
  kept_in<T>(rounding.sum, [&]<typename Sum>(Sum) {
    kept_in<T>(rounding.before_weight, [&]<typename Normed>(Normed) {
      launch_norm<true, Sum, Normed>("add_rms_norm", norm, aligned, stream);
    });
  });
}

RowShare rms_norm_share(DType t, std::int64_t cols, bool aligned) {
  const std::int64_t wide = 16 / size_of(t), vectors = cols / wide;
  // A thread has room for 8 vectors.
  if (!aligned || cols % wide != 0 || vectors > 8 * kMaxRowThreads)
    return {.threads = row_threads(cols), .vectors = 0};
  if (vectors <= 32) return {.threads = vectors <= 8 ? 8 : vectors <= 16 ? 16 : 32, .vectors = 1};
  if (vectors <= 64) return {.threads = 32, .vectors = 2};
  int each = int(kElements / wide);
  while (vectors > each * kMaxRowThreads) each *= 2;
  return {.threads = int((vectors + each * 32 - 1) / (each * 32)) * 32, .vectors = each};
}

Profile rms_norm_profile(DType t, std::int64_t cols, bool aligned) {
  const RowShare share = rms_norm_share(t, cols, aligned);
  // Of a vector, of a thread's vectors, and of the threads.
  const std::int64_t depth =
      share.vectors == 0
          ? row_sum_depth(cols, share.threads)
          : 16 / size_of(t) + share.vectors - 1 +
                (share.threads < 32 ? ceil_log2(share.threads) : block_sum_depth(share.threads));
  return {.depth = depth, .all_reduce_terms = 1, .terms = cols, .rsqrt_ulps = 1};
}

template void rms_norm(View<const float>, View<const float>, View<float>, float,
                       const NormRounding&, Stream&);
template void rms_norm(View<const f16>, View<const f16>, View<f16>, float, const NormRounding&,
                       Stream&);
template void rms_norm(View<const bf16>, View<const bf16>, View<bf16>, float, const NormRounding&,
                       Stream&);
template void add_rms_norm(View<const float>, View<const float>, View<const float>, View<float>,
                           View<float>, float, const NormRounding&, Stream&);
template void add_rms_norm(View<const f16>, View<const f16>, View<const f16>, View<f16>, View<f16>,
                           float, const NormRounding&, Stream&);
template void add_rms_norm(View<const bf16>, View<const bf16>, View<const bf16>, View<bf16>,
                           View<bf16>, float, const NormRounding&, Stream&);

}  // namespace tp
