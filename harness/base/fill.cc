#include "harness/base/fill.h"

#include <cmath>

#include "harness/base/check.h"
#include "harness/base/philox.h"

namespace tp {

namespace {

// 32 random bits for each global index, four to a Philox block.
class Bits {
 public:
  Bits(std::uint64_t seed, std::uint64_t stream) : seed_(seed), stream_(stream) {}
  std::uint32_t operator[](std::uint64_t index) {
    if (index / 4 != block_) words_ = philox(seed_, stream_, block_ = index / 4);
    return words_[index % 4];
  }

 private:
  std::uint64_t seed_, stream_, block_ = ~std::uint64_t{0};
  Random4 words_{};
};

constexpr std::uint64_t kEntityStream = 0x9e3779b97f4a7c15ull;
constexpr std::uint64_t kRowStream = 0xc2b2ae3d27d4eb4full;

double sign_of(std::uint32_t bits) { return bits >> 31 ? -1.0 : 1.0; }
double fraction_of(std::uint32_t bits) { return double(bits & 0x7FFFFFu) * 0x1p-23; }  // [0, 1)

// The value before rounding to the tensor's type. Integer and exact operations only, no libm.
class Values {
 public:
  Values(const TensorSpec& t, const DataRegime& g)
      : t_(t),
        g_(g),
        elements_(g.seed, stream_of(t.name)),
        entities_(g.seed, stream_of(t.name) ^ kEntityStream),
        rows_(g.seed, stream_of(t.name) ^ kRowStream) {}

  void begin_row(std::int64_t row) {
    row_ = row;
    entity_ = -1;
    const std::uint32_t bits = rows_[std::uint64_t(row) + 1];
    // exact: 2^5..2^7, so that eps <= 1e-5 is below half an ulp of the mean square 4^k in fp32.
    row_scale_ = g_.fill == Fill::exact ? double(32u << (bits % 3)) : 0.5 + 0.5 * fraction_of(bits);
    row_value_ = sign_of(bits) * (0.5 + fraction_of(bits));
    if (g_.fill == Fill::small_rows && row == std::int64_t(rows_[0] % std::uint64_t(t_.rows))) {
      int exponent = 0;
      std::frexp(g_.eps, &exponent);
      row_scale_ = std::ldexp(1.0, (exponent - 2) / 2);  // of the size of sqrt(eps)
    }
  }

  double operator()(std::int64_t col) {
    const std::uint32_t bits =
        elements_[std::uint64_t(row_) * std::uint64_t(t_.cols) + std::uint64_t(col)];
    const double sign = sign_of(bits), f = fraction_of(bits);
    if (g_.fill == Fill::exact) {
      return t_.role == Role::weight ? sign * double(1 + (bits & 0xFFFFFF) % 127)
                                     : sign * row_scale_;
    }
    const double scale = entity_scale(col);
    if (t_.role == Role::weight) return sign * (0.5 + 1.5 * f) * scale;
    switch (g_.fill) {
      case Fill::wide:
        return sign * (1.0 + f) * std::ldexp(1.0, int(rotated(bits) % 17) - 8);
      case Fill::equal:
        return row_value_;
      case Fill::zero_shard:
        return entity_zero_ ? 0.0 : sign * (0.25 + 1.75 * f) * scale * row_scale_;
      default:
        return sign * (0.25 + 1.75 * f) * scale * row_scale_;
    }
  }

 private:
  // Bits 23..30, which fraction_of and sign_of leave alone, mixed with the low ones.
  static std::uint32_t rotated(std::uint32_t bits) {
    return (bits >> 23 & 0xFF) * 7 + (bits & 0xFF);
  }

  double entity_scale(std::int64_t col) {
    const std::int64_t entity = col / t_.entity_cols;
    if (entity != entity_) {
      entity_ = entity;
      entity_scale_ = 0.5 + 1.5 * fraction_of(entities_[std::uint64_t(entity) + 1]);
      const std::int64_t count = (t_.cols + t_.entity_cols - 1) / t_.entity_cols;
      const std::int64_t first = entities_[0] % std::uint64_t(count);
      entity_zero_ = (entity - first + count) % count < (count + 1) / 2;  // half of them, in a run
    }
    return entity_scale_;
  }

  const TensorSpec& t_;
  const DataRegime& g_;
  Bits elements_, entities_, rows_;
  std::int64_t row_ = 0, entity_ = -1;
  double row_scale_ = 1, row_value_ = 1, entity_scale_ = 1;
  bool entity_zero_ = false;
};

template <typename T>
void fill_typed(const TensorSpec& t, const DataRegime& g, Shard rows, Shard cols, T* out,
                std::int64_t out_stride) {
  Values value(t, g);
  const double scale = t.role == Role::activation ? std::ldexp(1.0, g.scale_log2) : 1.0;
  for (std::int64_t i = 0; i < rows.size; ++i) {
    value.begin_row((rows.offset + i + g.rotate_rows) % t.rows);
    T* line = out + i * out_stride;
    for (std::int64_t j = 0; j < cols.size; ++j) {
      // Which value comes out matters little, that it is the same on every machine does: IEEE
      // double, no contraction, and the reference reads back what was rounded here. Rounded first,
      // scaled then: scaled data are exactly 2^k times the unscaled ones.
      line[j] =
          from_float<T>(to_float(from_float<T>(float(value(cols.offset + j)))) * float(scale));
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
  dispatch(tensor.dtype, [&]<typename T>(T) {
    fill_typed(tensor, g, rows, cols, static_cast<T*>(out), out_stride);
  });
}

}  // namespace tp
