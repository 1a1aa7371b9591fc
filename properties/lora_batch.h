#pragma once
// What the kernels of lora are told of a batch, and the shrunk activations that go from one to the
// other.

#include <vector>

#include "kernels/lora.h"
#include "kernels/lora_layer.h"
#include "properties/lora_call.h"
#include "properties/run/stage.h"

namespace tp::lora {

// The slot of each token; -1: none.
std::vector<std::int32_t> tokens_of(const Case& c, const Variation& v);
// The order of the tokens, and their tiles.
std::vector<LocalBuffer> batch_buffers(const Case& c, const Variation& v,
                                       const ShardingRules& rules);
// These, as they are in the rank's memory.
LoraBatch batch_of(RankRun& run, const Case& c, const Layer& layer);

// Where part p, token t, LoRA rank j of a rank's shrunk activations are in the buffer.
struct Places {
  std::int64_t rows = 0, cols = 0;
  std::int64_t part = 0, token = 0, rank = 0;  // strides, the buffer being dense
  std::int64_t at(std::int64_t p, std::int64_t t, std::int64_t j) const {
    return p * part + t * token + j * rank;
  }
};
Places places(const Case& c, const Layer& layer);

template <typename H>
LoraIntermediate<H> intermediate(const View<H>& view, const Case& c, const Layer& layer) {
  const Places at = places(c, layer);
  return {.data = view.data,
          .tokens = c.num_tokens,
          .cols = max_rank(c, layer),
          .part_stride = at.part,
          .token_stride = at.token,
          .col_stride = at.rank};
}

// Whether ranks have shrunk activations of their own: those of their columns.
bool has_own_part(const Case& c, const Layer& layer);
TensorSpec h_spec(const Case& c, const Layer& layer);
// With as many rows again that are nobody's: where a wrong stride leads to.
LocalBuffer h_buffer(const Case& c, const Layer& layer, Use use, int tp_rank);
// [tokens, LoRA ranks] of one part, as rank `tp_rank` has it.
Matrix h_of_part(const Case& c, const Layer& layer, const Matrix& h, std::size_t part, int tp_rank);

// Columns of x that a rank has.
std::int64_t columns_of_x(const Case& c, const Layer& layer);
// x, and what lora_shrink_over_ranks needs beside the slots and h.
std::vector<LocalBuffer> shrink_buffers(const Case& c, const Layer& layer, int tp_rank);
ShrinkCollective collective_of(const Case& c, const Layer& layer, const ShardingRules& rules);

// Shrinks x to the buffer `h`.
template <typename T, typename H>
void run_shrink(RankRun& run, const Case& c, const Layer& layer, const ShardingRules& rules,
                const char* h) {
  lora_shrink_over_ranks<T, H>(
      run.view<T>("x").columns(0, columns_of_x(c, layer)), run.view<T>("lora_a"),
      batch_of(run, c, layer), lora_layer(c, layer, run.group.tp_rank()), joins(c, layer),
      {run.view<H>("lora_mine").data, run.view<H>("lora_gathered").data},
      intermediate(run.view<H>(h), c, layer), rules, run.group, run.stream);
}

// Calls f with values of the type of the activations and of that of the intermediate.
template <typename F>
void with_types(const Case& c, F f) {
  dispatch(c.dtype, [&]<typename T>(T) {
    if (intermediate_dtype(c) == c.dtype) {
      f(T{}, T{});
    } else {
      f(T{}, float{});
    }
  });
}

}  // namespace tp::lora
