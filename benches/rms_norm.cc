// rms_norm/tokens:T/hidden:H/dtype:bf16, rms_norm/<hidden_size>/<num_tokens>.

#include "kernels/rms_norm.h"

#include <fmt/format.h>

#include <algorithm>

#include "benches/bench.h"
#include "benches/bench_data.h"
#include "benches/kernel_bench.h"
#include "reference/rms_norm.h"

namespace tp {
namespace {

constexpr double kEps = 1e-6;
constexpr DType kType = DType::bf16;

class RmsNormCall final : public KernelCall {
 public:
  RmsNormCall(Stream& stream, std::int64_t rows, std::int64_t cols, std::uint64_t seed)
      : seed_(seed),
        x_{.name = "x", .dtype = kType, .rows = rows, .cols = cols, .entity_cols = cols},
        weight_{.name = "weight",
                .dtype = kType,
                .cols = cols,
                .role = Role::weight,
                .entity_cols = cols},
        x_buffer_(bench_buffer(stream, x_, seed)),
        weight_buffer_(bench_buffer(stream, weight_, seed)),
        out_(bench_output(stream, "out", x_buffer_.bytes())) {}

  void launch(Stream& stream) override {
    rms_norm<bf16>(x_buffer_.as<bf16>(x_.rows, x_.cols), weight_buffer_.as<bf16>(1, x_.cols),
                   out_.as<bf16>(x_.rows, x_.cols), float(kEps), {}, stream);
  }

  std::string verify(Stream& stream) override {
    const std::int64_t count = std::min<std::int64_t>(x_.rows, 8);
    std::string wrong;
    for (const std::int64_t first : {std::int64_t{0}, x_.rows - count}) {
      if (!wrong.empty()) break;
      wrong = wrong_rows(
          stream, out_, kType, first,
          reference::rms_norm(bench_rows(x_, seed_, first, count), bench_rows(weight_, seed_, 0, 1),
                              kEps, rms_norm_profile(kType, x_.cols, true), double(x_.cols)));
    }
    return wrong;
  }

 private:
  std::uint64_t seed_;
  TensorSpec x_, weight_;
  Buffer x_buffer_, weight_buffer_, out_;
};

void add_kernel(std::int64_t tokens, std::int64_t hidden) {
  const double elements = double(tokens * hidden), width = size_of(kType);
  register_kernel_bench(
      {.name = fmt::format("rms_norm/tokens:{}/hidden:{}/dtype:bf16", tokens, hidden),
       .work = {.read = width * (elements + double(hidden)), .written = width * elements},
       .make = [=](const BenchRank& rank, std::uint64_t seed) {
         return std::make_unique<RmsNormCall>(rank.stream, tokens, hidden, seed);
       }});
}

const bool registered = [] {
  if (!times_kernels()) {
    add_kernel(3, 3072);
    return true;
  }
  for (const auto& [tokens, hidden] : {std::pair{1, 8192},
                                       {64, 4096},
                                       {64, 8192},
                                       {512, 4096},
                                       {2048, 3072},
                                       {4096, 4096},
                                       {4096, 8192},
                                       {4096, 16384},
                                       {16384, 8192}})
    add_kernel(tokens, hidden);
  return true;
}();

// rms_norm/<hidden_size>/<num_tokens>: whole cases, rows of MiniMax-M2 and of Llama 3.1 70B.
void rms_norm(benchmark::State& state) {
  bench_case(
      state,
      fmt::format("v1 rms_norm hidden_size={} tp_size=1 num_tokens={} dtype=bf16 fill=dense seed=1",
                  state.range(0), state.range(1)));
}
BENCHMARK(rms_norm)->ArgsProduct({{3072, 8192}, {1, 32}})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
