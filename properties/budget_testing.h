#pragma once
// What the tests of budgets share.

#include <cstddef>
#include <vector>

#include "harness/base/fill.h"
#include "harness/base/tensor.h"

namespace tp {

// All of a tensor, as an operator gets it.
inline Matrix filled(const TensorSpec& t, const DataRegime& g) {
  std::vector<std::byte> bytes(std::size_t(t.rows * t.cols * size_of(t.dtype)));
  fill_block(t, g, {0, t.rows}, {0, t.cols}, bytes.data(), t.cols);
  Matrix m(t.rows, t.cols);
  for (std::size_t i = 0; i < m.values.size(); ++i)
    m.values[i] = load(t.dtype, bytes.data(), std::int64_t(i));
  return m;
}

}  // namespace tp
