#pragma once
// The partition law: the cheapest oracle, before any kernel runs. It derives who owns what a second
// time, from the owner's side and without partition(), and compares.

#include <optional>
#include <string>

#include "harness/base/shape.h"

namespace tp {

// Which part of the law `partition` breaks for this model on tp_size ranks, in one sentence: every
// query head has one owner, every KV head as many as it has replicas, and every query head finds
// its KV head on its own rank. `rule` is the rule that is put to the test.
std::optional<std::string> broken_partition_law(const ModelShape& model, int tp_size,
                                                RankShape (*rule)(const ModelShape&, int,
                                                                  int) = partition);

}  // namespace tp
