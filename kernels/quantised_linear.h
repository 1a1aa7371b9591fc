#pragma once
// A quantised linear layer on one rank once its weights are loaded: what is made of them before the
// first call (vLLM's process_weights_after_loading), and the product.

#include <cstdint>

#include "harness/base/quantization.h"
#include "harness/base/sharding_rules.h"
#include "harness/base/tensor.h"
#include "harness/device/scaled_matmul.h"
#include "harness/device/stream.h"

namespace tp {

// Everything is in device memory; what the format has no need of is empty.
struct QuantisedWeight {
  QuantFormat format;
  std::int64_t cols = 0;            // of the input that this rank has
  std::int64_t first_col = 0;       // columns of the first block or group that are other ranks'
  View<const e4m3> codes;           // fp8: [rows, cols]
  View<const std::uint8_t> packed;  // nvfp4: [rows, ceil(cols / 2)]
  View<const e4m3> group_scales;    // nvfp4: [rows, groups touched]
  View<const std::int32_t> words;   // gptq: [rows, cols / 8]
  View<const f16> table;            // gptq: [groups loaded, rows]
  const std::int32_t* groups = nullptr;  // gptq: of each column
  // fp8_tensor [1, 1]; fp8_channel and nvfp4's global ones [rows, 1]; fp8_block [rows, blocks].
  View<const float> factors;
};

// factors [rows, 1]: each row's global scale, of slots [1, matrices]. slot_of_row: factors.rows
// elements in device memory. Throws Fault(BadLaunch) where the sizes do not fit each other.
void global_factors(View<const float> slots, const std::int32_t* slot_of_row, View<float> factors,
                    const ShardingRules& rules, Stream& stream);

// rows [n, m] becomes columns [m, n] transposed: gptq's packed columns, a row for each output.
void transpose_words(View<const std::int32_t> columns, View<std::int32_t> rows, Stream& stream);

// out = x weight^T + bias (1 x rows, or no rows: none), as scaled_matmul says. Of activations as
// they are (T f16 or bf16); of codes and their scales. Out: T or float.
template <typename T, typename Out>
void quantised_product(View<const T> x, const QuantisedWeight& weight, View<const T> bias,
                       View<Out> out, Stream& stream);
template <typename T, typename Out>
void quantised_product(View<const e4m3> x, const Scales& x_scales, const QuantisedWeight& weight,
                       View<const T> bias, View<Out> out, Stream& stream);

// quantise_fixed and quantised_product of the codes, of fp8 with one scale (fp8_tensor): the weight
// is on its way while x is quantised. So it (not its scale, nor x, nor the bias) must be complete
// before the kernel before this call: weights that were loaded are. codes [x.rows, x.cols], any row
// stride, becomes the quantised x.
template <typename T, typename Out>
void quantised_linear(View<const T> x, const float* x_scale, const QuantisedWeight& weight,
                      View<const T> bias, View<e4m3> codes, View<Out> out, Stream& stream);

}  // namespace tp
