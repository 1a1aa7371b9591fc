#pragma once
// The named decisions a sharded operator takes. Each is a function, so that a mutant is the same
// operator with one decision replaced by an upstream mistake, and production code has no `if` for
// it. The right decision is the default of each.

#include "harness/base/attention_rules.h"
#include "harness/base/gated_rules.h"
#include "harness/base/linear_rules.h"
#include "harness/base/loader_rules.h"
#include "harness/base/lora_rules.h"
#include "harness/base/norm_rules.h"
#include "harness/base/quant_rules.h"
#include "harness/base/rope_rules.h"

namespace tp {

struct ShardingRules {
  NormRules norm;
  RopeRules rope;
  LinearRules linear;
  LoaderRules loader;
  QuantRules quant;
  GatedRules gated;
  LoraRules lora;
  AttentionRules attention;
};

// The right decisions.
inline const ShardingRules& sharding_rules() {
  static constexpr ShardingRules kRules;
  return kRules;
}

}  // namespace tp
