#pragma once
// Making a failing case small: fewest ranks, one token, smallest heads, options at their defaults.

#include <functional>
#include <optional>
#include <vector>

#include "harness/base/operator.h"

namespace tp {

// Legal cases that are smaller than `c`, the boldest first. num_heads, num_kv_heads and tp_size
// only fit together, and so change together.
std::vector<Case> shrinks(const Case& c);

// What is tried when the descent has come to its end: of each key the few smallest values, one by
// one.
std::vector<Case> sweep(const Case& c);

struct ShrinkLimits {
  int runs = 200;
  double seconds = 60;
};

struct Shrunk {
  Case smallest;
  Verdict verdict;  // of `smallest`
  int runs = 0;
};

// Runs smaller and smaller cases as long as they fail. `fails` runs one and returns its verdict if
// that is the same failure.
Shrunk minimise(const Case& failing, const Verdict& verdict,
                const std::function<std::optional<Verdict>(const Case&)>& fails,
                const ShrinkLimits& limits = {});

// Whether `b` may stand for `a` while shrinking: a crash or a hang stays what it is, and any other
// finding may turn into another one of those.
bool same_failure(const Verdict& a, const Verdict& b);

}  // namespace tp
