#pragma once
// What the tensors of a checkpoint mean, on one rank: which of their rows are whose, what packed
// codes stand for, which scale an element has.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "harness/base/compare.h"
#include "harness/base/tensor.h"

namespace tp::reference {

// The rows of a fused tensor that are matrix `which`'s, in its order. `rows`: of each matrix; the
// tensor holds `stripes` times a run of rows of the first, of the second, ...
inline std::vector<std::int64_t> rows_of_matrix(const std::vector<std::int64_t>& rows,
                                                std::int64_t stripes, std::size_t which) {
  std::vector<std::int64_t> found;
  std::int64_t at = 0;
  for (std::int64_t stripe = 0; stripe < stripes; ++stripe) {
    for (std::size_t m = 0; m < rows.size(); ++m) {
      for (std::int64_t i = 0; i < rows[m] / stripes; ++i, ++at) {
        if (m == which) found.push_back(at);
      }
    }
  }
  return found;
}

// Row i is row from[i] / per of m.
inline Matrix taken_rows(const Matrix& m, const std::vector<std::int64_t>& from,
                         std::int64_t per = 1) {
  Matrix taken(std::int64_t(from.size()), m.cols);
  for (std::size_t i = 0; i < from.size(); ++i) {
    const double* row = m.row(from[i] / per);
    std::copy(row, row + m.cols, taken.row(std::int64_t(i)));
  }
  return taken;
}

inline Matrix transposed(const Matrix& m) {
  Matrix t(m.cols, m.rows);
  for (std::int64_t i = 0; i < m.rows; ++i) {
    for (std::int64_t j = 0; j < m.cols; ++j) t.row(j)[i] = m.row(i)[j];
  }
  return t;
}

inline Matrix taken_columns(const Matrix& m, const std::vector<std::int64_t>& from) {
  return transposed(taken_rows(transposed(m), from));
}

// Columns [first, first + count) of m.
inline Matrix columns(const Matrix& m, std::int64_t first, std::int64_t count) {
  Matrix part(m.rows, count);
  for (std::int64_t i = 0; i < m.rows; ++i) std::copy_n(m.row(i) + first, count, part.row(i));
  return part;
}

// e2m1, two codes a byte, the first one in the low half; `cols` of them a row.
inline Matrix unpacked_e2m1(const Matrix& bytes, std::int64_t cols) {
  // OCP Microscaling Formats, table of FP4.
  static constexpr double kValues[16] = {0.0,  0.5,  1.0,  1.5,  2.0,  3.0,  4.0,  6.0,
                                         -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0};
  Matrix values(bytes.rows, cols);
  for (std::int64_t i = 0; i < bytes.rows; ++i) {
    for (std::int64_t k = 0; k < cols; ++k) {
      const int byte = int(bytes.row(i)[k / 2]);
      values.row(i)[k] = kValues[k % 2 == 0 ? byte % 16 : byte / 16];
    }
  }
  return values;
}

// Unsigned 4-bit numbers less 8, eight a word, the first one in the lowest bits.
inline Matrix unpacked_int4(const Matrix& words) {
  Matrix values(words.rows, words.cols * 8);
  for (std::int64_t i = 0; i < words.rows; ++i) {
    for (std::int64_t k = 0; k < values.cols; ++k) {
      const auto word = std::uint32_t(std::int32_t(words.row(i)[k / 8]));
      values.row(i)[k] = double(int(word >> (k % 8 * 4) & 15)) - 8;
    }
  }
  return values;
}

// Values that are copied or looked up: right to the bit.
inline Budget exactly(const Matrix& m) {
  Budget budget(m.rows, m.cols);
  budget.r = m.values;
  return budget;
}

}  // namespace tp::reference
