#pragma once
// Inputs of kernels that are timed: dense data, the same for the same name and seed.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "harness/base/compare.h"
#include "harness/base/fill.h"
#include "harness/base/tensor.h"
#include "harness/device/buffer.h"

namespace tp {

// rows x cols values, contiguous. They are kept until forget_bench_data(): several sets of inputs,
// and what checks a result, ask for the same ones. Call it from host code of a rank.
const std::vector<std::byte>& bench_data(const TensorSpec& tensor, std::uint64_t seed);
// A buffer of the device with them.
Buffer bench_buffer(Stream& stream, const TensorSpec& tensor, std::uint64_t seed);
// A buffer of `bytes`, for outputs: every byte 0xFF, NaN in every format.
Buffer bench_output(Stream& stream, const std::string& name, std::size_t bytes);
// A buffer with these values.
template <typename T>
Buffer bench_values(Stream& stream, const std::string& name, const std::vector<T>& values) {
  Buffer buffer = bench_output(stream, name, values.size() * sizeof(T));
  from_host(stream, buffer.data(), values.data(), values.size() * sizeof(T));
  return buffer;
}
// Rows [first, first + count) of them as the reference takes them.
Matrix bench_rows(const TensorSpec& tensor, std::uint64_t seed, std::int64_t first,
                  std::int64_t count);
void forget_bench_data();

// Rows [first, first + budget.rows) of `buffer` (budget.cols values of `type` each) against the
// reference; what KernelCall::verify says of them.
std::string wrong_rows(Stream& stream, const Buffer& buffer, DType type, std::int64_t first,
                       const Budget& budget);

}  // namespace tp
