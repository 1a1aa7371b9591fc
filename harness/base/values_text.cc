#include "harness/base/values_text.h"

#include <fmt/format.h>

#include <algorithm>

namespace tp {

std::string first_values(DType t, const void* data, std::int64_t count) {
  constexpr std::int64_t kShown = 8;
  std::string text;
  for (std::int64_t i = 0; i < std::min(count, kShown); ++i)
    text += fmt::format(" {:.6g}", load(t, data, i));
  return text + (count > kShown ? " ..." : "");
}

}  // namespace tp
