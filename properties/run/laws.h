#pragma once
// Metamorphic laws: what must not change when a case is changed in a known way.

#include <optional>
#include <string>

#include "properties/run/judge.h"
#include "properties/run/stage.h"

namespace tp {

// How the outputs of the run of `other`, c varied, break the law; nothing if they keep it.
std::optional<std::string> broken_law(const LawRun& law, const Case& c, const Case& other,
                                      const Variation& variation, const Judgement& original,
                                      const Judgement& varied);

}  // namespace tp
