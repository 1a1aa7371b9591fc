// lora/tokens:T/k:K/n:N/rank:R/adapters:A/dtype:bf16: shrink and expand, the second beginning while
// the first one runs, of one matrix; lora_qkv of the fused q, k and v projection of MiniMax-M2.5 on
// tp=2. Adapter i has the tokens from T (i / A)^2 on. lora/<tp_size>/<num_tokens>: whole cases.

#include "kernels/lora.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "benches/bench.h"
#include "benches/bench_data.h"
#include "benches/kernel_bench.h"
#include "reference/product.h"

namespace tp {
namespace {

constexpr DType kType = DType::bf16;
constexpr float kScale = 0.5f;

struct Size {
  std::int64_t tokens, in;
  std::vector<std::int64_t> parts;  // rows of B of each matrix
  std::int64_t rank, adapters;

  std::int64_t rows() const { return std::accumulate(parts.begin(), parts.end(), std::int64_t{0}); }
  std::int64_t num_parts() const { return std::int64_t(parts.size()); }
  std::vector<std::int32_t> slots() const {
    std::vector<std::int32_t> of;
    for (std::int64_t i = 0; i < adapters; ++i) {
      const std::int64_t end = tokens * (i + 1) * (i + 1) / (adapters * adapters);
      of.resize(std::size_t(end), std::int32_t(i));
    }
    return of;
  }
};

TensorSpec tensor(const char* name, std::int64_t rows, std::int64_t cols) {
  return {.name = name, .dtype = kType, .rows = rows, .cols = cols, .entity_cols = cols};
}

class LoraCall final : public KernelCall {
 public:
  LoraCall(Stream& stream, const Size& size, std::uint64_t seed)
      : s_(size),
        seed_(seed),
        slots_(size.slots()),
        x_(tensor("x", size.tokens, size.in)),
        a_(tensor("a", size.adapters * size.num_parts() * size.rank, size.in)),
        b_(tensor("b", size.adapters * size.rows(), size.rank)),
        base_(tensor("base", size.tokens, size.rows())),
        x_buffer_(bench_buffer(stream, x_, seed)),
        a_buffer_(bench_buffer(stream, a_, seed)),
        b_buffer_(bench_buffer(stream, b_, seed)),
        base_buffer_(bench_buffer(stream, base_, seed)),
        y_(bench_output(stream, "y", base_buffer_.bytes())),
        h_(bench_output(stream, "h",
                        std::size_t(size.num_parts() * size.tokens * size.rank) * sizeof(float))) {
    const LoraPlan plan = lora_plan(slots_, std::int32_t(size.adapters));
    const std::size_t matrices = std::size_t(size.adapters * size.num_parts());
    order_ = bench_values(stream, "order", plan.order);
    tiles_ = bench_values(stream, "tiles", plan.tiles);
    ranks_ =
        bench_values(stream, "ranks", std::vector<std::int32_t>(matrices, std::int32_t(size.rank)));
    scales_ = bench_values(stream, "scales", std::vector<float>(matrices, kScale));
    batch_ = {.order = order_.as<std::int32_t>(),
              .tiles = tiles_.as<LoraTile>(),
              .num_tiles = std::int32_t(plan.tiles.size()),
              .ranks = ranks_.as<std::int32_t>(),
              .scales = scales_.as<float>(),
              .slots = std::int32_t(size.adapters),
              .parts = std::int32_t(size.num_parts())};
    columns_.parts = batch_.parts;
    std::int64_t at = 0;
    for (std::size_t p = 0; p < size.parts.size(); ++p) {
      columns_.rows[p] = size.parts[p];
      columns_.at[p] = at;
      at += size.parts[p];
    }
  }

  void launch(Stream& stream) override {
    const auto shrunk = [&]<typename H>(H* at) -> LoraIntermediate<H> {
      return {at, s_.tokens, s_.rank, s_.tokens * s_.rank, s_.rank, 1};
    };
    lora_shrink<bf16, float>(view(x_, x_buffer_), view(a_, a_buffer_), batch_, 0,
                             shrunk(h_.as<float>()), stream);
    lora_expand<bf16, float, bf16>(
        shrunk(static_cast<const float*>(h_.as<float>())), view(b_, b_buffer_), {}, batch_,
        columns_, view(base_, base_buffer_), view(base_, y_), stream, LoraBefore::rest);
  }

  std::string verify(Stream& stream) override {
    std::vector<float> h(h_.bytes() / sizeof(float));
    to_host(stream, h.data(), h_.data(), h_.bytes());
    stream.synchronize();
    for (const std::int64_t token : {std::int64_t{0}, s_.tokens - 1}) {
      const std::int64_t slot = slots_[std::size_t(token)];
      Budget y(1, s_.rows());
      const Matrix base = bench_rows(base_, seed_, token, 1);
      for (std::int64_t p = 0; p < s_.num_parts(); ++p) {
        const Budget shrunk = reference::product(
            bench_rows(x_, seed_, token, 1),
            bench_rows(a_, seed_, (slot * s_.num_parts() + p) * s_.rank, s_.rank), {0, s_.in},
            nullptr, lora_shrink_accumulation(kType, s_.in), false);
        const std::int64_t row = p * s_.tokens + token, first = columns_.at[p];
        std::string wrong = wrong_rows(stream, h_, DType::f32, row, shrunk);
        if (!wrong.empty()) return "h: " + wrong;
        Matrix rounded(1, s_.rank);
        for (std::int64_t j = 0; j < s_.rank; ++j)
          rounded.values[std::size_t(j)] =
              round_to(kType, double(h[std::size_t(row * s_.rank + j)]));
        const Budget delta = reference::product(
            rounded, bench_rows(b_, seed_, slot * s_.rows() + first, columns_.rows[p]),
            {0, s_.rank}, nullptr, lora_expand_accumulation(kType, s_.rank), false);
        for (std::int64_t n = 0; n < columns_.rows[p]; ++n) {
          const auto from = std::size_t(n), to = std::size_t(first + n);
          const reference::Bounded sum = reference::plus(
              {delta.r[from] * kScale, delta.rho[from] * kScale}, base.values[to], true);
          y.r[to] = sum.r, y.rho[to] = sum.rho;
        }
      }
      std::string wrong = wrong_rows(stream, y_, kType, token, y);
      if (!wrong.empty()) return "y: " + wrong;
    }
    return "";
  }

 private:
  static View<bf16> view(const TensorSpec& tensor, const Buffer& buffer) {
    return buffer.as<bf16>(tensor.rows, tensor.cols);
  }

  Size s_;
  std::uint64_t seed_;
  std::vector<std::int32_t> slots_;
  TensorSpec x_, a_, b_, base_;
  Buffer x_buffer_, a_buffer_, b_buffer_, base_buffer_, y_, h_, order_, tiles_, ranks_, scales_;
  LoraBatch batch_;
  LoraColumns columns_;
};

void add_kernel(const std::string& name, const Size& s) {
  std::vector<std::int32_t> slots = s.slots();
  const double used = double(std::unique(slots.begin(), slots.end()) - slots.begin());
  const double tokens = double(s.tokens), ranks = double(s.rank * s.num_parts()),
               rank = double(s.rank), in = double(s.in), rows = double(s.rows());
  register_kernel_bench(
      {.name = fmt::format("{}/tokens:{}/k:{}/n:{}/rank:{}/adapters:{}/dtype:bf16", name, s.tokens,
                           s.in, s.rows(), s.rank, s.adapters),
       .work = {.read = 2 * (tokens * in + used * (ranks * in + rank * rows) + tokens * rows) +
                        4 * tokens * ranks,
                .written = 2 * tokens * rows + 4 * tokens * ranks,
                .matrix_flops = 2 * tokens * (ranks * in + rank * rows),
                .launches = 2},
       .make = [=](const BenchRank& at, std::uint64_t seed) {
         return std::make_unique<LoraCall>(at.stream, s, seed);
       }});
}

const bool registered = [] {
  if (!times_kernels()) {
    add_kernel("lora", {20, 256, {128}, 16, 2});
    add_kernel("lora_qkv", {5, 256, {96, 32, 32}, 8, 2});
    return true;
  }
  struct Row {
    std::int64_t tokens, rank, adapters;
  };
  for (const Row& row : {Row{1, 16, 1},
                         {16, 16, 1},
                         {16, 16, 8},
                         {64, 16, 1},
                         {64, 16, 8},
                         {64, 64, 8},
                         {512, 16, 8},
                         {8192, 16, 1},
                         {8192, 16, 8},
                         {8192, 64, 8}})
    add_kernel("lora", {row.tokens, 3072, {4096}, row.rank, row.adapters});
  for (const Row& row : {Row{64, 16, 1}, {64, 16, 8}, {4096, 16, 8}})
    add_kernel("lora_qkv", {row.tokens, 3072, {3072, 512, 512}, row.rank, row.adapters});
  return true;
}();

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
