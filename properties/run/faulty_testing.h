#pragma once
// A kernel that does what it is told to do wrong, so that every oracle can be seen to fail.

#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

enum class Mistake : int {
  none,
  skips_last_column,  // leaves memory as it was
  writes_input,
  writes_padding,
  overruns,   // one element behind the buffer
  underruns,  // one element before it
  not_a_number,
  wrong_value,
  drifts,  // within the budget, but another factor in each row
};

// out = x but for the mistake. x and out [rows, cols], row_stride > cols.
void faulty_copy(View<float> x, View<float> out, Mistake mistake, Stream& stream);

}  // namespace tp
