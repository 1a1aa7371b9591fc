#include <type_traits>

#include "harness/device/library_product.h"
#include "harness/device/require.h"
#include "harness/device/scaled_matmul.h"
#include "harness/device/streamed_product.cuh"
#include "harness/device/tiled_product.cuh"

namespace tp {

namespace {

// e4m3 as T has them: exactly.
template <typename T>
class Codes {
 public:
  explicit Codes(const View<const e4m3>& codes)
      : codes_(codes),
        aligned_(reinterpret_cast<std::uintptr_t>(codes.data) % kChunk == 0 &&
                 codes.row_stride % kChunk == 0) {}

  __device__ void load(std::int64_t row, std::int64_t col, int count, T* to) const {
    Vec<T, kChunk> chunk = {};
    if (row < codes_.rows) {
      const e4m3* source = codes_.data + row * codes_.row_stride + col;
      if (aligned_ && count >= kChunk && col % kChunk == 0) {
        const auto codes = load_vector<e4m3, kChunk>(source);
        for (int e = 0; e < kChunk; ++e) chunk[e] = widened<T>(codes[e]);
      } else {
        for (int e = 0; e < kChunk && e < count; ++e) chunk[e] = widened<T>(source[e]);
      }
    }
    store_vector(to, chunk);
  }

 private:
  View<const e4m3> codes_;
  bool aligned_;
};

// The group of columns that a chunk has come to, so that only its first column is divided.
struct Group {
  std::int64_t index, end;  // columns before `end` are of it

  __device__ Group(std::int64_t col, std::int64_t first_col, std::int64_t cols_per)
      : index((col + first_col) / cols_per), end((index + 1) * cols_per - first_col) {}
};

template <typename T>
class Nvfp4Codes {
 public:
  explicit Nvfp4Codes(const Nvfp4Weight& w)
      : w_(w),
        aligned_(reinterpret_cast<std::uintptr_t>(w.codes.data) % 4 == 0 &&
                 w.codes.row_stride % 4 == 0) {}

  __device__ void load(std::int64_t row, std::int64_t col, int count, T* to) const {
    Vec<T, kChunk> chunk = {};
    if (row < w_.codes.rows && count > 0) {
      const e4m3* scales = w_.scales.data + row * w_.scales.row_stride;
      const Group group(col, w_.first_col, Nvfp4Weight::kGroupCols);
      float scale = to_float(scales[group.index]);
      const std::uint32_t codes = eight(w_.codes.data + row * w_.codes.row_stride, col, count);
      for (int e = 0; e < kChunk && e < count; ++e) {
        // Eight columns meet one border at most.
        if (col + e == group.end) scale = to_float(scales[group.index + 1]);
        chunk[e] = from_float<T>(e2m1_to_float(codes >> 4 * e & 0xFu) * scale);
      }
    }
    store_vector(to, chunk);
  }

 private:
  // The codes of columns col .. col + 8, as far as they are among `count`.
  __device__ std::uint32_t eight(const std::uint8_t* row, std::int64_t col, int count) const {
    if (aligned_ && count >= kChunk && col % kChunk == 0) {
      const auto bytes = load_vector<std::uint8_t, 4>(row + col / 2);
      return std::uint32_t{bytes[0]} | std::uint32_t{bytes[1]} << 8 |
             std::uint32_t{bytes[2]} << 16 | std::uint32_t{bytes[3]} << 24;
    }
    std::uint32_t codes = 0;
    for (int e = 0; e < kChunk && e < count; ++e) {
      const std::int64_t k = col + e;
      codes |= (row[k / 2] >> (k % 2 * 4) & 0xFu) << 4 * e;
    }
    return codes;
  }

  Nvfp4Weight w_;
  bool aligned_;
};

template <typename T>
class GptqCodes {
 public:
  explicit GptqCodes(const GptqWeight& w) : w_(w) {}

  __device__ void load(std::int64_t row, std::int64_t col, int count, T* to) const {
    Vec<T, kChunk> chunk = {};
    if (row < w_.codes.rows && count > 0) {
      const std::int32_t* words = w_.codes.data + row * w_.codes.row_stride;
      std::uint32_t codes = std::uint32_t(words[col / 8]) >> col % 8 * 4;
      if (w_.groups != nullptr) {
        for (int e = 0; e < kChunk && e < count; ++e) {
          if (e > 0 && (col + e) % 8 == 0) codes = std::uint32_t(words[(col + e) / 8]);
          chunk[e] = value(codes, scale(w_.groups[col + e], row));
          codes >>= 4;
        }
      } else {
        Group group(col, w_.first_col, w_.group_cols);
        float factor = scale(group.index, row);
        for (int e = 0; e < kChunk && e < count; ++e) {
          if (e > 0 && (col + e) % 8 == 0) codes = std::uint32_t(words[(col + e) / 8]);
          if (col + e == group.end) {
            factor = scale(++group.index, row);
            group.end += w_.group_cols;
          }
          chunk[e] = value(codes, factor);
          codes >>= 4;
        }
      }
    }
    store_vector(to, chunk);
  }

 private:
  __device__ float scale(std::int64_t group, std::int64_t row) const {
    return to_float(w_.scales.data[group * w_.scales.row_stride + row]);
  }
  // The product has no more than 15 bits: T's rounding is the only one.
  __device__ static T value(std::uint32_t code, float scale) {
    return from_float<T>(float(int(code & 0xFu) - 8) * scale);
  }

  GptqWeight w_;
};

class InBlocks {
 public:
  static constexpr bool kInBlocks = true;

  InBlocks(const Scales& x, const Scales& w) : x_(x), w_(w) {}

  __device__ std::int64_t border(std::int64_t k) const {
    const std::int64_t of_x = border_of(x_, k), of_w = border_of(w_, k);
    return of_x < of_w ? of_x : of_w;
  }
  __device__ float x_factor(std::int64_t row, std::int64_t k) const { return factor(x_, row, k); }
  __device__ float w_factor(std::int64_t row, std::int64_t k) const { return factor(w_, row, k); }

 private:
  __device__ static std::int64_t border_of(const Scales& s, std::int64_t k) {
    if (s.cols_per == 0) return Unscaled::border(k);
    return Group(k, s.first_col, s.cols_per).end;
  }
  __device__ static float factor(const Scales& s, std::int64_t row, std::int64_t k) {
    if (s.data == nullptr) return 1.0f;
    const std::int64_t block = s.cols_per == 0 ? 0 : (k + s.first_col) / s.cols_per;
    return s.data[row * s.row_stride + block];
  }

  Scales x_, w_;
};

// How T reads each kind of operand.
template <typename T>
Plain<T> operand(const View<const T>& values) {
  return Plain<T>(values);
}
template <typename T>
Codes<T> operand(const View<const e4m3>& codes) {
  return Codes<T>(codes);
}
template <typename T>
Nvfp4Codes<T> operand(const Nvfp4Weight& w) {
  return Nvfp4Codes<T>(w);
}
template <typename T>
GptqCodes<T> operand(const GptqWeight& w) {
  return GptqCodes<T>(w);
}

std::int64_t rows_of(const View<const e4m3>& w) { return w.rows; }
std::int64_t cols_of(const View<const e4m3>& w) { return w.cols; }
template <typename Packed>
std::int64_t rows_of(const Packed& w) {
  return w.codes.rows;
}
template <typename Packed>
std::int64_t cols_of(const Packed& w) {
  return w.cols;
}

constexpr char kName[] = "scaled_matmul";

// Whether the parts of a weight fit each other.
void require_parts(const View<const e4m3>&) {}
void require_parts(const Nvfp4Weight& w) {
  const std::int64_t bytes = (w.cols + 1) / 2,
                     groups = (w.first_col + w.cols + w.kGroupCols - 1) / w.kGroupCols;
  require(w.first_col >= 0 && w.codes.cols >= bytes && w.scales.cols >= groups &&
              w.scales.rows == w.codes.rows,
          kName, "{} columns from {} on are in {} x {} bytes with {} x {} scales",
          {w.cols, w.first_col, w.codes.rows, w.codes.cols, w.scales.rows, w.scales.cols});
}
void require_parts(const GptqWeight& w) {
  require(w.codes.cols >= (w.cols + 7) / 8 && w.scales.cols == w.codes.rows, kName,
          "{} columns are in {} x {} words with {} x {} scales",
          {w.cols, w.codes.rows, w.codes.cols, w.scales.rows, w.scales.cols});
  if (w.groups != nullptr) return;
  require(w.group_cols > 0 && w.first_col >= 0 &&
              w.scales.rows >= (w.first_col + w.cols + w.group_cols - 1) / w.group_cols,
          kName, "{} columns from {} on have {} scales, one for {} columns each",
          {w.cols, w.first_col, w.scales.rows, w.group_cols});
}
void require_blocks(const Scales& s) {
  require(s.cols_per >= 0 && s.first_col >= 0, kName,
          "a scale is for {} columns, of which {} are missing at first", {s.cols_per, s.first_col});
}

// Products of codes whose scales do not change along a row. False, and nothing is queued, where
// tiles have to make them.
template <typename T, typename Out>
bool codes_matmul(const View<const e4m3>& x, const Scales& x_scales, const View<const e4m3>& w,
                  const Scales& w_scales, const T* bias, const View<Out>& out, bool overlaps,
                  Stream& stream) {
  if (x_scales.cols_per != 0 || w_scales.cols_per != 0) return false;
  return launch_untiled<e4m3>(kName,
                              {.x = x,
                               .w = w,
                               .x_scales = x_scales.data,
                               .x_scale_stride = x_scales.row_stride,
                               .w_scales = w_scales.data,
                               .w_scale_stride = w_scales.row_stride,
                               .bias = bias,
                               .bias_type = dtype_of<T>::value,
                               .out = out.data,
                               .out_type = dtype_of<Out>::value,
                               .out_stride = out.row_stride},
                              overlaps, stream);
}

}  // namespace

template <typename X, typename Weight, typename T, typename Out>
void scaled_matmul(View<const X> x, const Scales& x_scales, const Weight& w, const Scales& w_scales,
                   const T* bias, View<Out> out, Stream& stream, bool overlaps) {
  require(x.cols == cols_of(w) && out.rows == x.rows && out.cols == rows_of(w), kName,
          "x is {} x {}, w is {} x {}, out is {} x {}",
          {x.rows, x.cols, rows_of(w), cols_of(w), out.rows, out.cols});
  require_parts(w);
  require_blocks(x_scales);
  require_blocks(w_scales);
  if constexpr (std::is_same_v<X, float>) {
    require(false, kName, "x is f32, which tensor cores do not multiply: quantise it first", {});
  } else {
    if constexpr (std::is_same_v<X, e4m3>) {
      if (codes_matmul(x, x_scales, w, w_scales, bias, out, overlaps, stream)) return;
    }
    using Multiplied = std::conditional_t<std::is_same_v<X, e4m3>, f16, X>;
    const auto x_operand = operand<Multiplied>(x);
    const auto w_operand = operand<Multiplied>(w);
    launch_tiled<Multiplied>(
        kName,
        Product<decltype(x_operand), decltype(w_operand), InBlocks, T, Out>{
            x_operand, w_operand, InBlocks(x_scales, w_scales), x.cols, bias, out},
        stream);
  }
}

Accumulation scaled_accumulation(DType x, std::int64_t k) {
  // As f16 and as bf16, codes of e4m3 are normal numbers: only what f16 brings itself is not.
  return {.depth = (k + kStep - 1) / kStep,
          .matrix_steps = true,
          .least_normal = x == DType::f16 ? 0x1p-14 : 0x1p-126};
}

Accumulation tensor_scaled_accumulation(std::int64_t rows, std::int64_t k) {
  Accumulation accumulation = scaled_accumulation(DType::e4m3, k);
  accumulation.narrow_steps = library_takes(DType::e4m3, rows, k);
  return accumulation;
}

template void scaled_matmul(View<const e4m3>, const Scales&, const View<const e4m3>&, const Scales&,
                            const float*, View<float>, Stream&, bool);
template void scaled_matmul(View<const e4m3>, const Scales&, const View<const e4m3>&, const Scales&,
                            const f16*, View<f16>, Stream&, bool);
template void scaled_matmul(View<const e4m3>, const Scales&, const View<const e4m3>&, const Scales&,
                            const f16*, View<float>, Stream&, bool);
template void scaled_matmul(View<const e4m3>, const Scales&, const View<const e4m3>&, const Scales&,
                            const bf16*, View<bf16>, Stream&, bool);
template void scaled_matmul(View<const e4m3>, const Scales&, const View<const e4m3>&, const Scales&,
                            const bf16*, View<float>, Stream&, bool);
template void scaled_matmul(View<const float>, const Scales&, const View<const e4m3>&,
                            const Scales&, const float*, View<float>, Stream&, bool);
template void scaled_matmul(View<const float>, const Scales&, const Nvfp4Weight&, const Scales&,
                            const float*, View<float>, Stream&, bool);
template void scaled_matmul(View<const float>, const Scales&, const GptqWeight&, const Scales&,
                            const float*, View<float>, Stream&, bool);
template void scaled_matmul(View<const f16>, const Scales&, const View<const e4m3>&, const Scales&,
                            const f16*, View<f16>, Stream&, bool);
template void scaled_matmul(View<const f16>, const Scales&, const View<const e4m3>&, const Scales&,
                            const f16*, View<float>, Stream&, bool);
template void scaled_matmul(View<const f16>, const Scales&, const Nvfp4Weight&, const Scales&,
                            const f16*, View<f16>, Stream&, bool);
template void scaled_matmul(View<const f16>, const Scales&, const Nvfp4Weight&, const Scales&,
                            const f16*, View<float>, Stream&, bool);
template void scaled_matmul(View<const f16>, const Scales&, const GptqWeight&, const Scales&,
                            const f16*, View<f16>, Stream&, bool);
template void scaled_matmul(View<const f16>, const Scales&, const GptqWeight&, const Scales&,
                            const f16*, View<float>, Stream&, bool);
template void scaled_matmul(View<const bf16>, const Scales&, const View<const e4m3>&, const Scales&,
                            const bf16*, View<bf16>, Stream&, bool);
template void scaled_matmul(View<const bf16>, const Scales&, const View<const e4m3>&, const Scales&,
                            const bf16*, View<float>, Stream&, bool);
template void scaled_matmul(View<const bf16>, const Scales&, const Nvfp4Weight&, const Scales&,
                            const bf16*, View<bf16>, Stream&, bool);
template void scaled_matmul(View<const bf16>, const Scales&, const Nvfp4Weight&, const Scales&,
                            const bf16*, View<float>, Stream&, bool);
template void scaled_matmul(View<const bf16>, const Scales&, const GptqWeight&, const Scales&,
                            const bf16*, View<bf16>, Stream&, bool);
template void scaled_matmul(View<const bf16>, const Scales&, const GptqWeight&, const Scales&,
                            const bf16*, View<float>, Stream&, bool);

}  // namespace tp
