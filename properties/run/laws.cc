#include "properties/run/laws.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdint>
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

std::optional<std::string> broken_law(const LawRun& law, const Case& c, const Case& other,
                                      const Variation& variation, const Judgement& original,
                                      const Judgement& varied) {
  // A varied run that is wrong by itself breaks the law in the plainest way.
  if (varied.finding) return fmt::format("law {}: {}", law.law.name, varied.finding->detail);
  // Where a stage's outputs differ within their budgets, the next stages have other inputs.
  std::size_t comparable_stages = SIZE_MAX;
  for (std::size_t o = 0; o < varied.outputs.size(); ++o) {
    const Gathered& mine = varied.outputs[o];
    const TensorSpec& t = mine.tensor;
    const std::string name = law.counterpart ? law.counterpart(t.name) : t.name;
    const auto same = std::find_if(original.outputs.begin(), original.outputs.end(),
                                   [&](const Gathered& g) { return g.tensor.name == name; });
    if (same == original.outputs.end() || mine.stage > comparable_stages) continue;
    const std::vector<double>& rho = varied.rhos[o];
    const std::vector<double>& rho_there =
        original.rhos[std::size_t(same - original.outputs.begin())];
    const bool bitwise =
        law.always_bitwise && !(mine.bits_by_size && other != c && !law.keeps_sizes);
    const std::int64_t width = size_of(t.dtype);
    for (std::int64_t i = 0; i < t.rows; ++i) {
      for (std::int64_t j = 0; j < t.cols; ++j) {
        std::optional<Place> twin = Place{(i + variation.rotate_rows) % t.rows, j};
        if (law.twin) twin = law.twin(c, variation, t, i, j);
        if (!twin) continue;
        const std::int64_t at = twin->row * same->tensor.cols + twin->col, here = i * t.cols + j;
        if (std::memcmp(same->bytes.data() + at * width, mine.bytes.data() + here * width,
                        std::size_t(width)) == 0)
          continue;
        if (!bitwise && !(rho[std::size_t(here)] == 0 && rho_there[std::size_t(at)] == 0)) {
          comparable_stages = std::min(comparable_stages, mine.stage);
          continue;
        }
        return fmt::format("law {}: {}[{}, {}] is {:.9g} in the varied run, {:.9g} in the original",
                           law.law.name, t.name, twin->row, twin->col,
                           load(t.dtype, mine.bytes.data(), here),
                           load(t.dtype, same->bytes.data(), at));
      }
    }
  }
  return std::nullopt;
}

}  // namespace tp
