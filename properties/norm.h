#pragma once
// What the properties of all norms have in common: their keys and their data.

#include <cmath>

#include "properties/run/stage.h"

namespace tp::norm {

inline Key eps_key() {
  return {.name = "eps",
          .help = "added to the mean square",
          .min = 0,
          .max = 1,
          .words = {"1e-6", "1e-5"}};
}

inline Key pad_key(const std::string& of_what) {
  return {.name = "pad", .help = "elements between the rows of " + of_what, .min = 0, .max = 64};
}

// As the kernel gets it, in fp32; scaled with the data where a law scales them.
inline double eps_of(const Case& c, const Variation& v) {
  return double(c.options.at("eps") == 0 ? 1e-6f : 1e-5f) * std::ldexp(1.0, 2 * v.scale_log2);
}

inline DataRegime regime(const Case& c, const Variation& v) {
  return {c.fill, c.seed, eps_of(c, {}), v.scale_log2, v.rotate_rows};
}

}  // namespace tp::norm
