#pragma once
// Quantisation to e4m3: of activations on their way into a linear layer, and, anew, of weights that
// were stored with several scales and shall have one.
//
// A code is RN_e4m3(x / scale), saturated at 448: a true division in fp32, and one rounding. NaN
// stays NaN, in the codes as in a maximum that is taken of it. A scale that is made here is
// max(largest |x|, kLeastMaximum) / kLargestCode, one division in fp32.

#include <cstdint>

#include "harness/base/dtype.h"
#include "harness/base/slot_reduction.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

inline constexpr float kLargestCode = 448;
// The scale stays a normal number, and nothing is divided by 0.
inline constexpr float kLeastMaximum = kLargestCode * 0x1p-126f;

// In all of these: x [tokens, cols] of f32, f16 or bf16, codes [tokens, cols], any row strides.
// Scales and maxima are in device memory. They throw Fault(BadLaunch) where the sizes do not fit
// each other.

// By a scale that is known beforehand. `overlaps`: it may begin before the kernel before it in the
// stream has ended (overlap.h).
template <typename T>
void quantise_fixed(View<const T> x, const float* scale, View<e4m3> codes, Stream& stream,
                    bool overlaps = false);

// By the largest element, in two parts: a group can take the maximum over its ranks in between.
// *maximum = max |x|, NaN if any element is.
template <typename T>
void absolute_maximum(View<const T> x, float* maximum, Stream& stream);
// *scale (not *maximum itself) = what *maximum makes it.
template <typename T>
void quantise_by_maximum(View<const T> x, const float* maximum, View<e4m3> codes, float* scale,
                         Stream& stream);

// By the largest element of each token: scales[token].
template <typename T>
void quantise_token(View<const T> x, View<e4m3> codes, float* scales, Stream& stream);

// By the largest element of each block of block_cols columns of a token. The first one has lost
// first_col of its columns to other ranks. scales [tokens, ceil((first_col + cols) / block_cols)],
// any row stride.
template <typename T>
void quantise_token_groups(View<const T> x, std::int64_t block_cols, std::int64_t first_col,
                           View<e4m3> codes, View<float> scales, Stream& stream);

// *scale = slots[0..count) reduced; the mean is made in double.
void reduce_slots(const float* slots, std::int64_t count, SlotReduction how, float* scale,
                  Stream& stream);

// out = RN_e4m3(weight * slots[slot_of_row[row]] / *scale), the product and the division in fp32.
// slot_of_row: weight.rows elements in device memory. out may be the weight itself.
void requantise(View<const e4m3> weight, const std::int32_t* slot_of_row, const float* slots,
                const float* scale, View<e4m3> out, Stream& stream);

}  // namespace tp
