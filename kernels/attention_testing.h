#pragma once
// For tests: the merge of attention's partial states by itself.

#include <cstdint>

#include "harness/device/stream.h"

namespace tp::testing {

// parts: `splits` states of `rows` rows of `dim` values, normalised; then their LSE, splits x rows.
// out [rows, dim], lse [rows].
void merge_states(float* parts, std::int64_t splits, std::int64_t rows, std::int64_t dim,
                  float* out, float* lse, Stream& stream);

}  // namespace tp::testing
