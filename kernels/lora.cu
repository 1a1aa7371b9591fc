// The plan of a batch, and lora_join. The two kernels are in lora_shrink.cu and lora_expand.cu.

#include <algorithm>

#include "harness/device/require.h"
#include "kernels/lora.h"
#include "kernels/lora_parts.cuh"

namespace tp {

namespace {

constexpr int kJoinThreads = 256;

template <typename H>
__global__ void join_kernel(const H* gathered, std::int64_t share, std::int64_t elements,
                            LoraIntermediate<H> whole) {
  const std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= elements) return;
  const std::int64_t col = i % whole.cols, token = i / whole.cols % whole.tokens,
                     part = i / whole.cols / whole.tokens;
  const std::int64_t parts = elements / whole.cols / whole.tokens;
  whole.data[part * whole.part_stride + token * whole.token_stride + col * whole.col_stride] =
      gathered[((col / share * parts + part) * whole.tokens + token) * share + col % share];
}

}  // namespace

LoraPlan lora_plan(const std::vector<std::int32_t>& slot_of_token, std::int32_t slots) {
  std::vector<std::vector<std::int32_t>> tokens(std::size_t(slots) + 1);
  for (std::size_t t = 0; t < slot_of_token.size(); ++t) {
    const std::int32_t slot = slot_of_token[t];
    require(slot >= -1 && slot < slots, "lora_plan", "token {} has slot {} of {}",
            {std::int64_t(t), slot, slots});
    tokens[std::size_t(slot == -1 ? slots : slot)].push_back(std::int32_t(t));
  }
  LoraPlan plan;
  for (std::int32_t i = 0; i <= slots; ++i) {
    const std::vector<std::int32_t>& own = tokens[std::size_t(i)];
    for (std::int32_t at = 0; at < std::int32_t(own.size()); at += kLoraTile) {
      const std::int32_t count = std::min(kLoraTile, std::int32_t(own.size()) - at);
      plan.tiles.push_back({i == slots ? -1 : i, count});
      plan.order.insert(plan.order.end(), own.begin() + at, own.begin() + at + count);
      plan.order.resize(plan.tiles.size() * kLoraTile, -1);
    }
  }
  return plan;
}

void lora::require_batch(const LoraBatch& batch, std::int64_t tokens, const char* op) {
  require(batch.num_tiles >= 1 && batch.num_tiles <= tokens && batch.slots >= 1 &&
              batch.parts >= 1 && batch.parts <= LoraColumns::kMaxParts,
          op, "{} tiles of {} tokens, {} slots, {} matrices",
          {batch.num_tiles, tokens, batch.slots, batch.parts});
}

template <typename H>
void lora_join(const H* gathered, int tp_size, std::int64_t parts, LoraIntermediate<H> whole,
               Stream& stream) {
  require(tp_size >= 1 && whole.cols % tp_size == 0, "lora_join", "{} columns are of {} ranks",
          {whole.cols, tp_size});
  const std::int64_t elements = parts * whole.tokens * whole.cols;
  launch("lora_join", join_kernel<H>, dim3(unsigned(lora::ceil_div(elements, kJoinThreads))),
         dim3(kJoinThreads), 0, stream, gathered, whole.cols / tp_size, elements, whole);
}

template void lora_join(const float*, int, std::int64_t, LoraIntermediate<float>, Stream&);
template void lora_join(const f16*, int, std::int64_t, LoraIntermediate<f16>, Stream&);
template void lora_join(const bf16*, int, std::int64_t, LoraIntermediate<bf16>, Stream&);

}  // namespace tp
