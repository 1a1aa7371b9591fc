#pragma once
// One call of attention, as the keys of a case describe it: how many sequences, how long, where
// their keys lie.

#include <cstdint>
#include <vector>

#include "harness/base/case.h"
#include "harness/base/sequences.h"
#include "kernels/attention.h"

namespace tp {

// Keys of the case line that say what a batch looks like; of attention and of attention_block.
std::vector<Key> attention_batch_keys();
// Those that say what attention is computed.
std::vector<Key> attention_model_keys();

struct AttentionCall {
  std::vector<Sequence> sequences;
  std::int64_t rows = 0;  // of k and v: more than the sequences own, so that some are stale
  // k and v are columns of the same rows as q: no cache.
  bool fused = false;
  AttentionBatch batch;
};

// The call of a case. `permutation`: which of the ways to place pages is taken.
AttentionCall attention_call(const Case& c, std::uint64_t permutation = 0);

// The same sequences, each query a sequence of its own that sees the keys up to it: decode steps.
AttentionCall decode_steps(const AttentionCall& call);
// Sequence `s` alone.
AttentionCall only_sequence(const AttentionCall& call, std::int64_t s);

AttentionSettings attention_settings(const Case& c);

}  // namespace tp
