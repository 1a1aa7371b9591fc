#pragma once
// The oracles that need the whole: outputs of all ranks gathered on process 0, compared with the
// reference (value), with each other (replicas), and hashed.

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "harness/base/case.h"
#include "harness/base/verdict.h"
#include "properties/run/pass.h"
#include "properties/run/stage.h"

namespace tp {

// A global output as the ranks produced it.
struct Gathered {
  TensorSpec tensor;
  std::size_t stage = 0;  // which of them made it
  std::vector<std::byte> bytes;
  bool bits_by_size = false;  // Stage's
};

struct Judgement {
  std::optional<Verdict> finding;         // outcome and detail only
  std::vector<Gathered> outputs;          // of all stages
  std::vector<std::vector<double>> rhos;  // of each output, of its elements; none if not judged
  std::uint64_t digest = 0;
  bool own_bits = false;  // some of them are not exact, and of a stage whose bits are its own
  double score = 0;
  double reference_seconds = 0;
  std::optional<std::string> blind_to;  // a mistake these data could not have shown
};

// `outputs`: what run_pass returned on every process, one after another, so that ranks are in
// order. `discriminate`: also ask each stage whether its data could have shown the mistakes of its
// shape.
Judgement judge(const Case& c, const std::vector<Stage>& stages, InputData& data,
                const std::vector<std::byte>& outputs, bool discriminate);

}  // namespace tp
