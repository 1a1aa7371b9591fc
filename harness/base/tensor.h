#pragma once
// Matrices: a view of one in memory (rows of `cols` elements, `row_stride` elements apart), and the
// reference's own kind, dense and in double.

#include <concepts>
#include <cstdint>
#include <type_traits>
#include <vector>

namespace tp {

template <typename T>
struct View {
  T* data = nullptr;
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::int64_t row_stride = 0;

  // Columns [offset, offset + count) of every row: still strided by the whole row.
  View columns(std::int64_t offset, std::int64_t count) const {
    return {data + offset, rows, count, row_stride};
  }
  template <std::same_as<const T> U>  // a template, or nvcc warns where T is const already
  operator View<U>() const requires(!std::is_const_v<T>) {
    return {data, rows, cols, row_stride};
  }
};

struct Matrix {
  std::int64_t rows = 0;
  std::int64_t cols = 0;
  std::vector<double> values;  // row-major

  Matrix(std::int64_t rows, std::int64_t cols)
      : rows(rows), cols(cols), values(std::size_t(rows * cols)) {}
  double* row(std::int64_t i) { return values.data() + i * cols; }
  const double* row(std::int64_t i) const { return values.data() + i * cols; }
};

}  // namespace tp
