#pragma once
// The device layer's matrix product, as linear layers need it: activations times the rows of a
// weight. f16 and bf16 go through tensor cores, f32 through fmaf.

#include <cstdint>

#include "harness/base/compare.h"
#include "harness/base/dtype.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

// out[i][j] = sum_k x[i][k] * w[j][k] + bias[j], added up in fp32, bias added in fp32, one rounding
// to Out (T or float). x [m, k], w [n, k], out [m, n]: any sizes from 1 on, any row strides, any
// alignment of T. bias: n elements, or nullptr. out must overlap nothing.
// An element's bits depend on its row of x, its row of w and its bias alone, and on who makes the
// product (streamed_size.h): f32 goes in ascending k; f16 and bf16 are streamed where rows have
// enough columns and begin at multiples of 16 bytes; but on a GPU with cuBLASLt, that makes
// products of more than kMostStreamedRows such rows. Throws Fault(BadLaunch) where the sizes do not
// fit each other.
template <typename T, typename Out = T>
void matmul(View<const T> x, View<const T> w, const T* bias, View<Out> out, Stream& stream);

// How matmul adds up k products of elements of type t.
Accumulation matmul_accumulation(DType t, std::int64_t k);

}  // namespace tp
