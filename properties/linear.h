#pragma once
// What the properties of linear layers have in common: their keys and their data.

#include <algorithm>
#include <cmath>

#include "properties/run/stage.h"

namespace tp::linear {

// Enough tokens for all of matmul's tilings.
inline Key tokens_key() {
  Key key = shared_key("num_tokens");
  key.draw_max = 160;
  return key;
}

// A shared key that is a width: where a drawn case would be too much work it gives way, so that a
// real model keeps its heads and its tp_size, which is where the bugs are, and gets narrower.
inline Key width_key(std::string_view name) {
  Key key = shared_key(name);
  key.is_size = true;
  return key;
}

inline Key bias_key() {
  return {.name = "bias",
          .help = "whether a bias is added",
          .min = 0,
          .max = 1,
          .words = {"none", "yes"}};
}

// A width that is given for one rank, so that any tp_size cuts it.
inline Key per_rank_key(std::string name, std::string help, std::int64_t draw_max,
                        std::int64_t grain) {
  return {.name = std::move(name),
          .help = std::move(help),
          .min = 1,
          .max = 1 << 16,
          .fallback = 8,
          .always = true,
          .draw_max = draw_max,
          .grain = grain,
          .of_model = true,
          .is_size = true};
}

inline Key output_gate_key() {
  return {.name = "output_gate",
          .help = "1: q_proj has a gate for each head, behind its query",
          .min = 0,
          .max = 1,
          .words = {"0", "1"},
          .weights = {75, 25},
          .of_model = true};
}

inline bool has_bias(const Case& c) { return c.options.at("bias") == 1; }

inline DataRegime regime(const Case& c, const Variation& v) {
  // Products of 17 binades would leave f16 where a few hundred of them are added up.
  const int small = c.fill == Fill::wide && c.dtype == DType::f16 ? -6 : 0;
  return {c.fill, c.seed, 1e-6, v.scale_log2 + small, v.rotate_rows};
}

// A matrix product of more tokens than these is made in tiles of so many rows and columns.
constexpr std::int64_t kFewTokens = 64, kLargeTile = 128;
// Products that an element of a weight counts for: it is drawn twice, copied and converted.
constexpr double kProductsOfWeight = 16;

// Multiply-adds of products of `cols` columns of output on all ranks together, `depth` deep each,
// as far as they take time: those of the reference, and those of the kernel, which takes 16 of the
// rows and of the depth as one, and large tiles whole where there are many tokens.
inline double work(const Case& c, double cols, std::int64_t depth) {
  const bool matrix = c.dtype != DType::f32;
  const auto padded = [](double n, double to) { return std::ceil(n / to) * to; };
  const double step = matrix ? 16 : 1, deep = padded(double(depth), step);
  const double reference = cols * deep * padded(c.num_tokens, step);
  const double kernel = matrix && c.num_tokens > kFewTokens
                            ? c.tp_size * padded(cols / c.tp_size, kLargeTile) *
                                  padded(c.num_tokens, kLargeTile) * deep
                            : reference;
  return reference + kernel + kProductsOfWeight * cols * double(depth);
}

// The cost of `products` multiply-adds and of reading and writing `elements` elements.
inline Cost cost(const Case& c, double elements, double products) {
  const bool matrix = c.dtype != DType::f32;
  return {.bytes = elements * size_of(c.dtype),
          .flops = matrix ? 0 : 2 * products,
          .matrix_flops = matrix ? 2 * products : 0};
}

// A tensor of a linear layer: small integers of both signs where the case wants exact data, so that
// sums of thousands of their products are exact and stay near the spacing of a 16-bit output, where
// a difference of one shows. 1 .. largest in magnitude; `density`: how many are not zero.
inline TensorSpec tensor(const Case& c, std::string name, std::int64_t rows, std::int64_t cols,
                         Role role, int largest, double density = 1) {
  TensorSpec t{std::move(name), c.dtype, rows, cols, role, std::max<std::int64_t>(1, cols / 8)};
  if (c.fill != Fill::exact) return t;
  t.drawn = [=](const DataRegime&, std::uint32_t bits, std::int64_t, std::int64_t) {
    if (double(bits >> 9 & 0x3FFFFF) * 0x1p-22 >= density) return 0.0;
    const double magnitude = double(1 + (bits & 0xFF) % std::uint32_t(largest));
    return bits >> 31 ? -magnitude : magnitude;
  };
  return t;
}

// Magnitudes of exact data: of activations, weights and biases.
constexpr int kLargestX = 2, kLargestWeight = 3, kLargestBias = 31;

}  // namespace tp::linear
