// lora_shrink_kernel, lora_expand_kernel and lora_kernels/<tokens>: alone, at the size of
// MiniMax-M2.5's fused q, k and v projection on tp=2, with 8 adapters of LoRA rank 16 that tokens
// take turns with.

#include "kernels/lora.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "benches/bench.h"
#include "benches/old_kernel_bench.h"
#include "harness/base/fill.h"
#include "harness/device/buffer.h"
#include "harness/device/ceilings.h"
#include "reference/product.h"

namespace tp {
namespace {

constexpr std::int64_t kRank = 16, kAdapters = 8, kParts = 3;
constexpr float kScale = 0.5f;
constexpr DType kType = DType::bf16;

struct Size {
  std::int64_t tokens, in, q, kv;

  std::int64_t rows() const { return q + 2 * kv; }
};

using Bytes = std::vector<std::byte>;

Bytes data(const char* name, std::int64_t rows, std::int64_t cols) {
  Bytes bytes(std::size_t(rows * cols * size_of(kType)));
  fill_block({name, kType, rows, cols, Role::activation, cols}, {.fill = Fill::dense, .seed = 1},
             {0, rows}, {0, cols}, bytes.data(), cols);
  return bytes;
}

Matrix matrix(DType type, const Bytes& bytes, std::int64_t first, std::int64_t rows,
              std::int64_t cols) {
  Matrix m(rows, cols);
  for (std::int64_t i = 0; i < rows * cols; ++i)
    m.values[std::size_t(i)] = load(type, bytes.data(), first * cols + i);
  return m;
}

void bench_lora(benchmark::State& state, bool shrinks, bool expands) {
  const Size s = ceilings() ? Size{state.range(0), 3072, 3072, 512}
                            : Size{std::min<std::int64_t>(state.range(0), 64), 512, 384, 64};
  std::vector<std::int32_t> slots;
  for (std::int64_t t = 0; t < s.tokens; ++t) slots.push_back(std::int32_t(t % kAdapters));
  const LoraPlan plan = lora_plan(slots, kAdapters);
  const std::vector<std::int32_t> ranks(kAdapters * kParts, kRank);
  const std::vector<float> scales(kAdapters * kParts, kScale);
  const LoraColumns columns{kParts, {s.q, s.kv, s.kv}, {0, s.q, s.q + s.kv}};
  const Bytes x = data("x", s.tokens, s.in), a = data("a", kAdapters * kParts * kRank, s.in),
              b = data("b", kAdapters * s.rows(), kRank), base = data("base", s.tokens, s.rows());
  // What lora_expand reads where lora_shrink does not run; and what it shall be compared with.
  Bytes h(std::size_t(kParts * s.tokens * kRank) * sizeof(float));
  for (std::int64_t i = 0; i < kParts * s.tokens * kRank; ++i)
    store(DType::f32, h.data(), i, double(i % 17) / 4 - 2);

  struct Memory {
    Buffer x, a, b, base, y, h, order, tiles, ranks, scales;
  };
  Memory memory;
  const auto prepare = [&](Stream& stream) -> Launch {
    const auto upload = [&](const char* name, const void* from, std::size_t bytes) {
      Buffer buffer(stream, name, bytes, std::nullopt);
      if (from != nullptr) from_host(stream, buffer.data(), from, bytes);
      return buffer;
    };
    memory = {upload("x", x.data(), x.size()),
              upload("a", a.data(), a.size()),
              upload("b", b.data(), b.size()),
              upload("base", base.data(), base.size()),
              upload("y", nullptr, base.size()),
              upload("h", h.data(), h.size()),
              upload("order", plan.order.data(), plan.order.size() * sizeof(std::int32_t)),
              upload("tiles", plan.tiles.data(), plan.tiles.size() * sizeof(LoraTile)),
              upload("ranks", ranks.data(), ranks.size() * sizeof(std::int32_t)),
              upload("scales", scales.data(), scales.size() * sizeof(float))};
    return [&](Stream& on) {
      const LoraBatch batch{.order = memory.order.as<std::int32_t>(),
                            .tiles = memory.tiles.as<LoraTile>(),
                            .num_tiles = std::int32_t(plan.tiles.size()),
                            .ranks = memory.ranks.as<std::int32_t>(),
                            .scales = memory.scales.as<float>(),
                            .slots = kAdapters,
                            .parts = kParts};
      const auto shrunk = [&]<typename H>(H* at) -> LoraIntermediate<H> {
        return {at, s.tokens, kRank, s.tokens * kRank, kRank, 1};
      };
      if (shrinks) {
        lora_shrink<bf16, float>(memory.x.as<bf16>(s.tokens, s.in),
                                 memory.a.as<bf16>(kAdapters * kParts * kRank, s.in), batch, 0,
                                 shrunk(memory.h.as<float>()), on);
      }
      if (expands) {
        const float* read = memory.h.as<float>();
        lora_expand<bf16, float, bf16>(shrunk(read), memory.b.as<bf16>(kAdapters * s.rows(), kRank),
                                       {}, batch, columns, memory.base.as<bf16>(s.tokens, s.rows()),
                                       memory.y.as<bf16>(s.tokens, s.rows()), on);
      }
    };
  };

  // The last token, whose adapter is `slot`.
  const auto verify = [&](Stream& stream) -> std::string {
    const std::int64_t last = s.tokens - 1, slot = slots.back();
    Bytes shrunk(h.size()), y(base.size());
    to_host(stream, shrunk.data(), memory.h.data(), shrunk.size());
    to_host(stream, y.data(), memory.y.data(), y.size());
    stream.synchronize();
    const auto wrong = [](const char* what, std::int64_t part, const Comparison& c) {
      return c.first ? fmt::format("{}[{}, last, {}] is {}, not {} .. {}", what, part, c.first->col,
                                   c.first->got, c.first->lo, c.first->hi)
                     : "";
    };
    std::string said;
    std::int64_t row = 0;  // of the slot's B
    for (std::int64_t p = 0; p < kParts; row += columns.rows[p++]) {
      const std::int64_t at = (p * s.tokens + last) * kRank;
      if (shrinks && said.empty()) {
        said =
            wrong("h", p,
                  compare(DType::f32, shrunk.data() + at * std::int64_t(sizeof(float)),
                          reference::product(
                              matrix(kType, x, last, 1, s.in),
                              matrix(kType, a, (slot * kParts + p) * kRank, kRank, s.in), {0, s.in},
                              nullptr, lora_shrink_accumulation(kType, s.in), false)));
      }
      if (expands && said.empty()) {
        Matrix rounded = matrix(DType::f32, shrunk, at / kRank, 1, kRank);
        for (double& value : rounded.values) value = round_to(kType, value);
        Budget budget = reference::product(
            rounded, matrix(kType, b, slot * s.rows() + row, columns.rows[p], kRank), {0, kRank},
            nullptr, lora_expand_accumulation(kType, kRank), false);
        const std::int64_t first = last * s.rows() + columns.at[p];
        for (std::int64_t n = 0; n < columns.rows[p]; ++n) {
          const auto i = std::size_t(n);
          const reference::Bounded sum =
              reference::plus({budget.r[i] * kScale, budget.rho[i] * kScale},
                              load(kType, base.data(), first + n), true);
          budget.r[i] = sum.r, budget.rho[i] = sum.rho;
        }
        said = wrong("y", p, compare(kType, y.data() + first * size_of(kType), budget));
      }
    }
    return said;
  };

  const double used = double(std::min(kAdapters, s.tokens)), tokens = double(s.tokens),
               rank = double(kRank), shrunk_bytes = tokens * double(kParts) * rank * 4,
               element = size_of(kType);
  KernelWork work;
  if (shrinks) {
    work.bytes += element * double(s.in) * (tokens + used * double(kParts) * rank) + shrunk_bytes;
    work.matrix_flops += 2 * tokens * double(kParts) * rank * double(s.in);
  }
  if (expands) {
    work.bytes += element * double(s.rows()) * (2 * tokens + used * rank) + shrunk_bytes;
    work.matrix_flops += 2 * tokens * rank * double(s.rows());
  }
  bench_kernel(state, work, prepare, verify);
}

void lora_shrink_kernel(benchmark::State& state) { bench_lora(state, true, false); }
void lora_expand_kernel(benchmark::State& state) { bench_lora(state, false, true); }
void lora_kernels(benchmark::State& state) { bench_lora(state, true, true); }

void of_tokens(benchmark::internal::Benchmark* bench) {
  bench->Arg(1)
      ->Arg(64)
      ->Arg(4096)
      ->ArgNames({"tokens"})
      ->UseManualTime()
      ->Iterations(3)
      ->Unit(benchmark::kMicrosecond);
}
BENCHMARK(lora_shrink_kernel)->Apply(of_tokens);
BENCHMARK(lora_expand_kernel)->Apply(of_tokens);
BENCHMARK(lora_kernels)->Apply(of_tokens);

// lora/<tp_size>/<num_tokens>: the whole case, qkv of a narrow model, four adapters of rank 16.
void lora(benchmark::State& state) {
  bench_case(state, fmt::format("v1 lora hidden_size=512 num_heads=16 num_kv_heads=4 head_dim=32 "
                                "tp_size={} num_tokens={} dtype=bf16 fill=dense seed=1 module=qkv "
                                "adapters=4 max_rank=16 segments=runs",
                                state.range(0), state.range(1)));
}
BENCHMARK(lora)->ArgsProduct({{1, 8, 16}, {1, 32}})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
