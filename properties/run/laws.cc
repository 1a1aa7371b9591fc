#include "properties/run/laws.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace tp {

LawRun law_tp1() {
  return {.law = {"tp1",
                  "one rank computes what tp_size ranks do: bitwise for exact data, within the "
                  "budget else"},
          .vary =
              [](const Case& c) {
                Case one = c;
                one.tp_size = 1;
                return std::pair{one, Variation{}};
              },
          .always_bitwise = false};
}

LawRun law_scale() {
  return {.law = {"scale", "x times 2^k with eps times 4^k gives the same bits"},
          .vary = [](const Case& c) {
            return std::pair{c, Variation{.scale_log2 = 1 + int(c.seed % 2)}};
          }};
}

LawRun law_tokens() {
  return {.law = {"tokens", "the tokens in another order give the same bits in that order"},
          .vary = [](const Case& c) {
            return std::pair{
                c, Variation{.rotate_rows =
                                 1 + int(c.seed % std::uint64_t(std::max(1, c.num_tokens - 1)))}};
          }};
}

std::optional<std::string> broken_law(const LawRun& law, const Variation& variation,
                                      const Judgement& original, const Judgement& varied) {
  // A varied run that is wrong by itself breaks the law in the plainest way.
  if (varied.finding) return fmt::format("law {}: {}", law.law.name, varied.finding->detail);
  for (std::size_t o = 0; o < original.outputs.size(); ++o) {
    if (!law.always_bitwise && !(original.exact[o] && varied.exact[o])) continue;
    const TensorSpec& t = original.outputs[o].tensor;
    const std::size_t row_bytes = std::size_t(t.cols * size_of(t.dtype));
    for (std::int64_t i = 0; i < t.rows; ++i) {
      const std::int64_t twin = (i + variation.rotate_rows) % t.rows;
      const std::byte* a = original.outputs[o].bytes.data() + std::size_t(twin) * row_bytes;
      const std::byte* b = varied.outputs[o].bytes.data() + std::size_t(i) * row_bytes;
      if (std::memcmp(a, b, row_bytes) == 0) continue;
      for (std::int64_t j = 0;; ++j) {
        const std::int64_t width = size_of(t.dtype);
        if (std::memcmp(a + j * width, b + j * width, std::size_t(width)) == 0) continue;
        return fmt::format("law {}: {}[{}, {}] is {:.9g} in the varied run, {:.9g} in the original",
                           law.law.name, t.name, twin, j, load(t.dtype, b, j), load(t.dtype, a, j));
      }
    }
  }
  return std::nullopt;
}

}  // namespace tp
