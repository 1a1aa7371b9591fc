#include "harness/base/fill.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "harness/base/check.h"
#include "harness/base/philox.h"

namespace tp {

namespace {

constexpr std::uint64_t kEntityStream = 0x9e3779b97f4a7c15ull;
constexpr std::uint64_t kRowStream = 0xc2b2ae3d27d4eb4full;

// Word `index` of a stream: 32 random bits, four to a Philox block.
std::uint32_t word(std::uint64_t seed, std::uint64_t stream, std::uint64_t index) {
  return philox(seed, stream, index / 4)[index % 4];
}

double fraction_of(std::uint32_t bits) { return double(bits & 0x7FFFFFu) * 0x1p-23; }  // [0, 1)

// What the elements of a column have in common: each entity has a scale within a factor of 4.
std::vector<double> scales_of_columns(const TensorSpec& t, const DataRegime& g, Shard cols) {
  const std::uint64_t stream = stream_of(t.name) ^ kEntityStream;
  const bool activation = t.role == Role::activation;
  const std::int64_t entities = (t.cols + t.entity_cols - 1) / t.entity_cols;
  const Shard mine{cols.offset / t.entity_cols,
                   (cols.end() - 1) / t.entity_cols - cols.offset / t.entity_cols + 1};
  std::vector<std::uint32_t> bits(std::size_t(mine.size));
  philox_words(g.seed, stream, std::uint64_t(mine.offset) + 1, bits);
  if (activation && g.fill == Fill::equal)
    std::fill(bits.begin(), bits.end(), word(g.seed, stream, 1));
  const std::int64_t first_zero = std::int64_t(word(g.seed, stream, 0)) % entities;
  std::vector<double> scales(std::size_t(cols.size));
  for (std::int64_t e = 0; e < mine.size; ++e) {
    const std::int64_t entity = mine.offset + e;
    double scale = 0.5 + 1.5 * fraction_of(bits[std::size_t(e)]);
    // Half of the entities, in a run.
    if (activation && g.fill == Fill::zero_shard &&
        (entity - first_zero + entities) % entities < (entities + 1) / 2)
      scale = 0;
    const std::int64_t begin = std::max(cols.offset, entity * t.entity_cols);
    const std::int64_t end = std::min(cols.end(), (entity + 1) * t.entity_cols);
    std::fill(scales.begin() + (begin - cols.offset), scales.begin() + (end - cols.offset), scale);
  }
  return scales;
}

double sqrt_of_eps(double eps) {  // its binade is enough, and needs no libm
  int exponent = 0;
  std::frexp(eps, &exponent);
  return std::ldexp(1.0, (exponent - 2) / 2);
}

// Writes a row's values from their random words. Which ones come out matters little, that they are
// the same on every machine does: IEEE double, contraction off, no libm; and the reference reads
// back what was rounded here. Loops without branches, so that compilers use vectors.
template <typename T>
void write_row(const TensorSpec& t, const DataRegime& g, std::int64_t row,
               const std::vector<double>& scales, const std::vector<std::uint32_t>& bits, T* out) {
  const auto each = [&](auto magnitude_of) {
    for (std::size_t i = 0; i < bits.size(); ++i) {
      const auto magnitude = std::bit_cast<std::uint32_t>(float(magnitude_of(bits[i], scales[i])));
      out[i] = from_float<T>(std::bit_cast<float>(magnitude | (bits[i] & 0x80000000u)));
    }
  };
  if (t.role == Role::weight) {
    if (g.fill == Fill::exact)
      return each([](std::uint32_t b, double) { return std::int32_t(1 + (b & 0xFFFFFF) % 127); });
    return each([](std::uint32_t b, double s) { return 0.5 * s + 1.5 * s * fraction_of(b); });
  }
  const std::uint64_t stream = stream_of(t.name) ^ kRowStream;
  const std::uint32_t of_row = word(g.seed, stream, std::uint64_t(row) + 1);
  if (g.fill == Fill::exact) {  // 2^5..2^7, so that eps <= 1e-5 is below half an ulp of the mean
    return each([size = 32 << (of_row % 3)](std::uint32_t, double) { return size; });  // square
  }
  if (g.fill == Fill::wide) {
    // The exponent comes from bits that sign and fraction leave alone, mixed with the low ones.
    return each([](std::uint32_t b, double) {
      const int exponent = int(((b >> 23 & 0xFF) * 7 + (b & 0xFF)) % 17);
      return (1.0 + fraction_of(b)) * double(1 << exponent) * 0x1p-8;
    });
  }
  double size = 0.5 + 0.5 * fraction_of(of_row);
  if (g.fill == Fill::small_rows && row == std::int64_t(word(g.seed, stream, 0)) % t.rows)
    size = sqrt_of_eps(g.eps);
  each([size](std::uint32_t b, double s) {
    return 0.25 * (s * size) + 1.75 * (s * size) * fraction_of(b);
  });
}

template <typename T>
void fill_typed(const TensorSpec& t, const DataRegime& g, Shard rows, Shard cols, T* out,
                std::int64_t out_stride) {
  const std::uint64_t stream = stream_of(t.name);
  const std::vector<double> scales = scales_of_columns(t, g, cols);
  const float scale = t.role == Role::activation ? float(std::ldexp(1.0, g.scale_log2)) : 1.0f;
  std::vector<std::uint32_t> bits(std::size_t(cols.size));
  for (std::int64_t i = 0; i < rows.size; ++i) {
    std::int64_t row = (rows.offset + i + g.rotate_rows) % t.rows;
    if (!t.source.empty()) row = t.source[std::size_t(row)];
    if (g.fill == Fill::equal && t.role == Role::activation) {
      std::fill(bits.begin(), bits.end(), word(g.seed, stream, std::uint64_t(row * t.cols)));
    } else {
      philox_words(g.seed, stream, std::uint64_t(row * t.cols + cols.offset), bits);
    }
    T* line = out + i * out_stride;
    write_row(t, g, row, scales, bits, line);
    // Rounded first, scaled then: scaled data are exactly 2^k times the unscaled ones.
    if (scale == 1.0f) continue;
    for (std::int64_t j = 0; j < cols.size; ++j) line[j] = from_float<T>(to_float(line[j]) * scale);
  }
}

void fill_by_value(const TensorSpec& t, const DataRegime& g, Shard rows, Shard cols, void* out,
                   std::int64_t out_stride) {
  for (std::int64_t i = 0; i < rows.size; ++i) {
    for (std::int64_t j = 0; j < cols.size; ++j)
      store(t.dtype, out, i * out_stride + j, t.value(g, rows.offset + i, cols.offset + j));
  }
}

void fill_drawn(const TensorSpec& t, const DataRegime& g, Shard rows, Shard cols, void* out,
                std::int64_t out_stride) {
  std::vector<std::uint32_t> bits(std::size_t(cols.size));
  for (std::int64_t i = 0; i < rows.size; ++i) {
    const std::int64_t row = (rows.offset + i + g.rotate_rows) % t.rows;
    philox_words(g.seed, stream_of(t.name), std::uint64_t(row * t.cols + cols.offset), bits);
    for (std::int64_t j = 0; j < cols.size; ++j) {
      store(t.dtype, out, i * out_stride + j,
            t.drawn(g, bits[std::size_t(j)], row, cols.offset + j));
    }
  }
}

}  // namespace

void fill_block(const TensorSpec& tensor, const DataRegime& regime, Shard rows, Shard cols,
                void* out, std::int64_t out_stride) {
  TP_CHECK(rows.offset >= 0 && rows.end() <= tensor.rows && cols.offset >= 0 &&
               cols.end() <= tensor.cols,
           "block outside tensor " + tensor.name);
  // A weight keeps its rows whatever a law does to the tokens.
  DataRegime g = regime;
  if (tensor.role == Role::weight) g.rotate_rows = 0;
  if (tensor.value) {
    fill_by_value(tensor, g, rows, cols, out, out_stride);
  } else if (tensor.drawn) {
    fill_drawn(tensor, g, rows, cols, out, out_stride);
  } else {
    dispatch(tensor.dtype, [&]<typename T>(T) {
      fill_typed(tensor, g, rows, cols, static_cast<T*>(out), out_stride);
    });
  }
}

}  // namespace tp
