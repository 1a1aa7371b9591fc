#include "harness/device/device.h"
#include "harness/device/require.h"
#include "kernels/quantise.h"
#include "kernels/reduce.cuh"

namespace tp {

namespace {

// NaN where the maximum is.
__device__ float scale_of(float maximum) { return larger(maximum, kLeastMaximum) / kLargestCode; }

struct FixedScale {
  const float* scale;

  __device__ float operator()() const { return *scale; }
};

struct ScaleOfMaximum {
  const float* maximum;
  float* scale;

  __device__ float operator()() const {
    const float value = scale_of(*maximum);
    if (blockIdx.x == 0 && threadIdx.x == 0) *scale = value;
    return value;
  }
};

// A block takes kBlockCols columns of a row, 16 bytes at a time where that is how rows lie. Whoever
// comes next may begin meanwhile, and fetch a weight.
constexpr std::int64_t kBlockCols = 2048;

template <typename T, typename Scale>
__global__ void quantise_kernel(View<const T> x, Scale scale_for, View<e4m3> codes,
                                bool in_vectors) {
  constexpr int kVector = 16 / int(sizeof(T));
  let_next_kernel_start();
  wait_for_previous_kernel();
  const std::int64_t across = (x.cols + kBlockCols - 1) / kBlockCols;
  const std::int64_t row = blockIdx.x / across, first = blockIdx.x % across * kBlockCols;
  const std::int64_t end = first + kBlockCols < x.cols ? first + kBlockCols : x.cols;
  const T* from = x.data + row * x.row_stride;
  e4m3* to = codes.data + row * codes.row_stride;
  const float scale = scale_for();
  if (in_vectors) {
    for (std::int64_t j = first + threadIdx.x * kVector; j < end; j += blockDim.x * kVector) {
      const Vec<T, kVector> values = load_vector<T, kVector>(from + j);
      Vec<std::uint16_t, kVector / 2> pairs;
      for (int i = 0; i < kVector; i += 2)
        pairs[i / 2] = codes_of(to_float(values[i]) / scale, to_float(values[i + 1]) / scale);
      store_vector(reinterpret_cast<std::uint16_t*>(to + j), pairs);
    }
  } else {
    for (std::int64_t j = first + threadIdx.x; j < end; j += blockDim.x)
      to[j] = e4m3{std::uint8_t(codes_of(to_float(from[j]) / scale, 0.0f))};
  }
}

// The largest magnitude of row[begin..end), in every thread of the block.
template <typename T>
__device__ float block_maximum(const T* row, std::int64_t begin, std::int64_t end) {
  float maximum = 0.0f;
  for (std::int64_t j = begin + threadIdx.x; j < end; j += blockDim.x)
    maximum = larger(maximum, fabsf(to_float(row[j])));
  return block_max(maximum, dynamic_shared<float>());
}

__global__ void zero_kernel(float* value) { *value = 0.0f; }

// One block a row. Magnitudes are ordered as their bits are, and NaN comes last.
template <typename T>
__global__ void maximum_kernel(View<const T> x, float* maximum) {
  const float of_row = block_maximum(x.data + std::int64_t{blockIdx.x} * x.row_stride, 0, x.cols);
  if (threadIdx.x == 0)
    atomicMax(reinterpret_cast<unsigned*>(maximum), std::bit_cast<unsigned>(of_row));
}

// One block a block of columns of a row.
template <typename T>
__global__ void quantise_groups_kernel(View<const T> x, std::int64_t block_cols,
                                       std::int64_t first_col, View<e4m3> codes,
                                       View<float> scales) {
  const std::int64_t row = blockIdx.x / scales.cols, group = blockIdx.x % scales.cols;
  const std::int64_t from = group * block_cols - first_col, to = from + block_cols;
  const std::int64_t begin = from < 0 ? 0 : from, end = to < x.cols ? to : x.cols;
  const T* in = x.data + row * x.row_stride;
  e4m3* out = codes.data + row * codes.row_stride;
  const float scale = scale_of(block_maximum(in, begin, end));
  if (threadIdx.x == 0) scales.data[row * scales.row_stride + group] = scale;
  for (std::int64_t j = begin + threadIdx.x; j < end; j += blockDim.x)
    out[j] = from_float<e4m3>(to_float(in[j]) / scale);
}

__global__ void reduce_slots_kernel(const float* slots, std::int64_t count, SlotReduction how,
                                    float* scale) {
  float result = slots[0];
  double sum = slots[0];  // equal slots have that mean
  for (std::int64_t i = 1; i < count; ++i) {
    const float slot = slots[i];
    switch (how) {
      case SlotReduction::max:
        result = larger(result, slot);
        break;
      case SlotReduction::min:
        result = -larger(-result, -slot);
        break;
      case SlotReduction::first:
        break;
      case SlotReduction::last:
        result = slot;
        break;
      case SlotReduction::mean:
        sum += slot;
        break;
    }
  }
  *scale = how == SlotReduction::mean ? float(sum / double(count)) : result;
}

// One block a row.
__global__ void requantise_kernel(View<const e4m3> weight, const std::int32_t* slot_of_row,
                                  const float* slots, const float* scale, View<e4m3> out) {
  const std::int64_t row = blockIdx.x;
  const e4m3* from = weight.data + row * weight.row_stride;
  e4m3* to = out.data + row * out.row_stride;
  const float slot = slots[slot_of_row[row]], divisor = *scale;
  for (std::int64_t j = threadIdx.x; j < weight.cols; j += blockDim.x)
    to[j] = from_float<e4m3>(to_float(from[j]) * slot / divisor);
}

template <typename T>
void require_same(const char* op, const View<const T>& x, const View<e4m3>& codes) {
  require(codes.rows == x.rows && codes.cols == x.cols, op, "x is {} x {}, its codes are {} x {}",
          {x.rows, x.cols, codes.rows, codes.cols});
}

template <typename T, typename Scale>
void launch_quantise(const char* op, View<const T> x, const Scale& scale, View<e4m3> codes,
                     Stream& stream, bool overlaps = false) {
  require_same(op, x, codes);
  constexpr std::int64_t kVector = 16 / sizeof(T);
  const auto starts_at = [](const void* data, std::int64_t bytes) {
    return reinterpret_cast<std::uintptr_t>(data) % std::uintptr_t(bytes) == 0;
  };
  const bool in_vectors = x.cols % kVector == 0 && x.row_stride % kVector == 0 &&
                          codes.row_stride % kVector == 0 && starts_at(x.data, 16) &&
                          starts_at(codes.data, kVector);
  const std::int64_t across = (x.cols + kBlockCols - 1) / kBlockCols;
  const dim3 grid = dim3(unsigned(x.rows * across)),
             block = dim3(unsigned(row_threads(x.cols < kBlockCols ? x.cols : kBlockCols)));
  if (overlaps) {
    launch_overlapping(op, quantise_kernel<T, Scale>, grid, block, 0, stream, x, scale, codes,
                       in_vectors);
  } else {
    launch(op, quantise_kernel<T, Scale>, grid, block, 0, stream, x, scale, codes, in_vectors);
  }
}

}  // namespace

template <typename T>
void quantise_fixed(View<const T> x, const float* scale, View<e4m3> codes, Stream& stream,
                    bool overlaps) {
  launch_quantise("quantise_fixed", x, FixedScale{scale}, codes, stream, overlaps);
}

template <typename T>
void absolute_maximum(View<const T> x, float* maximum, Stream& stream) {
  const int threads = row_threads(x.cols);
  launch("zero", zero_kernel, dim3(1), dim3(1), 0, stream, maximum);
  launch("absolute_maximum", maximum_kernel<T>, dim3(unsigned(x.rows)), dim3(unsigned(threads)),
         block_scratch_floats(threads) * sizeof(float), stream, x, maximum);
}

template <typename T>
void quantise_by_maximum(View<const T> x, const float* maximum, View<e4m3> codes, float* scale,
                         Stream& stream) {
  launch_quantise("quantise_by_maximum", x, ScaleOfMaximum{maximum, scale}, codes, stream);
}

template <typename T>
void quantise_token(View<const T> x, View<e4m3> codes, float* scales, Stream& stream) {
  quantise_token_groups(x, x.cols, 0, codes, View<float>{scales, x.rows, 1, 1}, stream);
}

template <typename T>
void quantise_token_groups(View<const T> x, std::int64_t block_cols, std::int64_t first_col,
                           View<e4m3> codes, View<float> scales, Stream& stream) {
  const char* op = "quantise_token_groups";
  require_same(op, x, codes);
  require(block_cols > 0 && first_col >= 0 && first_col < block_cols && scales.rows == x.rows &&
              scales.cols == (first_col + x.cols + block_cols - 1) / block_cols,
          op, "{} x {} in blocks of {}, the first without {}, have {} x {} scales",
          {x.rows, x.cols, block_cols, first_col, scales.rows, scales.cols});
  const int threads = row_threads(block_cols < x.cols ? block_cols : x.cols);
  launch(op, quantise_groups_kernel<T>, dim3(unsigned(x.rows * scales.cols)),
         dim3(unsigned(threads)), block_scratch_floats(threads) * sizeof(float), stream, x,
         block_cols, first_col, codes, scales);
}

void reduce_slots(const float* slots, std::int64_t count, SlotReduction how, float* scale,
                  Stream& stream) {
  require(count > 0, "reduce_slots", "{} scales", {count});
  launch("reduce_slots", reduce_slots_kernel, dim3(1), dim3(1), 0, stream, slots, count, how,
         scale);
}

void requantise(View<const e4m3> weight, const std::int32_t* slot_of_row, const float* slots,
                const float* scale, View<e4m3> out, Stream& stream) {
  require_same("requantise", weight, out);
  launch("requantise", requantise_kernel, dim3(unsigned(weight.rows)),
         dim3(unsigned(row_threads(weight.cols))), 0, stream, weight, slot_of_row, slots, scale,
         out);
}

template void quantise_fixed(View<const float>, const float*, View<e4m3>, Stream&, bool);
template void absolute_maximum(View<const float>, float*, Stream&);
template void quantise_by_maximum(View<const float>, const float*, View<e4m3>, float*, Stream&);
template void quantise_token(View<const float>, View<e4m3>, float*, Stream&);
template void quantise_token_groups(View<const float>, std::int64_t, std::int64_t, View<e4m3>,
                                    View<float>, Stream&);
template void quantise_fixed(View<const f16>, const float*, View<e4m3>, Stream&, bool);
template void absolute_maximum(View<const f16>, float*, Stream&);
template void quantise_by_maximum(View<const f16>, const float*, View<e4m3>, float*, Stream&);
template void quantise_token(View<const f16>, View<e4m3>, float*, Stream&);
template void quantise_token_groups(View<const f16>, std::int64_t, std::int64_t, View<e4m3>,
                                    View<float>, Stream&);
template void quantise_fixed(View<const bf16>, const float*, View<e4m3>, Stream&, bool);
template void absolute_maximum(View<const bf16>, float*, Stream&);
template void quantise_by_maximum(View<const bf16>, const float*, View<e4m3>, float*, Stream&);
template void quantise_token(View<const bf16>, View<e4m3>, float*, Stream&);
template void quantise_token_groups(View<const bf16>, std::int64_t, std::int64_t, View<e4m3>,
                                    View<float>, Stream&);

}  // namespace tp
