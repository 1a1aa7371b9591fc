#include "harness/base/fill.h"

#include <algorithm>
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

// Words [first, first + out.size()).
void words(std::uint64_t seed, std::uint64_t stream, std::uint64_t first,
           std::vector<std::uint32_t>& out) {
  Random4 block{};
  for (std::size_t i = 0; i < out.size(); ++i) {
    const std::uint64_t index = first + i;
    if (i == 0 || index % 4 == 0) block = philox(seed, stream, index / 4);
    out[i] = block[index % 4];
  }
}

double sign_of(std::uint32_t bits) { return bits >> 31 ? -1.0 : 1.0; }
double fraction_of(std::uint32_t bits) { return double(bits & 0x7FFFFFu) * 0x1p-23; }  // [0, 1)

// An element is sign * (a + b * fraction) of its random word.
struct Magnitude {
  double a = 0;
  double b = 0;
};

// What the elements of a row, and of the entities in it, have in common.
class Scales {
 public:
  Scales(const TensorSpec& t, const DataRegime& g)
      : t_(t),
        g_(g),
        stream_(stream_of(t.name)),
        entities_((t.cols + t.entity_cols - 1) / t.entity_cols) {}

  Magnitude of(std::int64_t row, std::int64_t entity) const {
    const double scale = 0.5 + 1.5 * fraction_of(entity_word(entity + 1));
    if (t_.role == Role::weight) return {0.5 * scale, 1.5 * scale};
    const std::uint32_t bits = word(g_.seed, stream_ ^ kRowStream, std::uint64_t(row) + 1);
    switch (g_.fill) {
      case Fill::exact:  // 2^5..2^7, so that eps <= 1e-5 is below half an ulp of the mean square
        return {double(32u << (bits % 3)), 0};
      case Fill::zero_shard:
        if (is_zero(entity)) return {0, 0};
        break;
      case Fill::small_rows:
        if (row == small_row()) return dense(scale * sqrt_of_eps());
        break;
      default:
        break;
    }
    return dense(scale * (0.5 + 0.5 * fraction_of(bits)));
  }

 private:
  static Magnitude dense(double scale) { return {0.25 * scale, 1.75 * scale}; }
  std::uint32_t entity_word(std::int64_t i) const {
    return word(g_.seed, stream_ ^ kEntityStream, std::uint64_t(i));
  }
  // Half of the entities, in a run.
  bool is_zero(std::int64_t entity) const {
    const std::int64_t first = std::int64_t(entity_word(0)) % entities_;
    return (entity - first + entities_) % entities_ < (entities_ + 1) / 2;
  }
  std::int64_t small_row() const {
    return std::int64_t(word(g_.seed, stream_ ^ kRowStream, 0)) % t_.rows;
  }
  double sqrt_of_eps() const {  // its binade is enough, and needs no libm
    int exponent = 0;
    std::frexp(g_.eps, &exponent);
    return std::ldexp(1.0, (exponent - 2) / 2);
  }

  const TensorSpec& t_;
  const DataRegime& g_;
  std::uint64_t stream_;
  std::int64_t entities_;
};

// The value of a random word. Which one comes out matters little, that it is the same on every
// machine does: IEEE double, contraction off, no libm; and the reference reads back what was
// rounded here.
double value_of(const TensorSpec& t, Fill fill, const Magnitude& m, std::uint32_t bits) {
  if (fill == Fill::exact && t.role == Role::weight) {
    return sign_of(bits) * double(1 + (bits & 0xFFFFFFu) % 127);
  }
  if (fill == Fill::wide && t.role == Role::activation) {
    // The exponent comes from bits that sign and fraction leave alone, mixed with the low ones.
    const int exponent = int(((bits >> 23 & 0xFF) * 7 + (bits & 0xFF)) % 17) - 8;
    return sign_of(bits) * (1.0 + fraction_of(bits)) * double(1 << (exponent + 8)) * 0x1p-8;
  }
  return sign_of(bits) * (m.a + m.b * fraction_of(bits));
}

template <typename T>
void fill_typed(const TensorSpec& t, const DataRegime& g, Shard rows, Shard cols, T* out,
                std::int64_t out_stride) {
  const Scales scales(t, g);
  const float scale = t.role == Role::activation ? float(std::ldexp(1.0, g.scale_log2)) : 1.0f;
  const bool all_equal = g.fill == Fill::equal && t.role == Role::activation;
  std::vector<std::uint32_t> bits(std::size_t(cols.size));
  for (std::int64_t i = 0; i < rows.size; ++i) {
    std::int64_t row = (rows.offset + i + g.rotate_rows) % t.rows;
    if (!t.source.empty()) row = t.source[std::size_t(row)];
    const std::uint64_t first = std::uint64_t(row * t.cols + cols.offset);
    words(g.seed, stream_of(t.name), first, bits);
    if (all_equal) {
      std::fill(bits.begin(), bits.end(),
                word(g.seed, stream_of(t.name), std::uint64_t(row * t.cols)));
    }
    T* line = out + i * out_stride;
    for (std::int64_t j = 0; j < cols.size;) {
      const std::int64_t entity = (cols.offset + j) / t.entity_cols;
      const std::int64_t end = std::min(cols.size, (entity + 1) * t.entity_cols - cols.offset);
      const Magnitude m = scales.of(row, all_equal ? 0 : entity);
      for (; j < end; ++j)
        line[j] = from_float<T>(float(value_of(t, g.fill, m, bits[std::size_t(j)])));
    }
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
    words(g.seed, stream_of(t.name), std::uint64_t(row * t.cols + cols.offset), bits);
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
