// rms_norm/tokens:T/hidden:H/dtype:bf16, rms_norm_head/tokens:T/heads:N/dim:D/dtype:bf16,
// add_rms_norm/tokens:T/hidden:H/dtype:bf16, rms_norm/<hidden_size>/<num_tokens>.

#include "kernels/rms_norm.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "benches/bench.h"
#include "benches/bench_data.h"
#include "benches/kernel_bench.h"
#include "reference/rms_norm.h"

namespace tp {
namespace {

constexpr double kEps = 1e-6;
constexpr DType kType = DType::bf16;

TensorSpec rows_of(const char* name, std::int64_t rows, std::int64_t cols) {
  return {.name = name, .dtype = kType, .rows = rows, .cols = cols, .entity_cols = cols};
}
TensorSpec weight_of(std::int64_t cols) {
  return {
      .name = "weight", .dtype = kType, .cols = cols, .role = Role::weight, .entity_cols = cols};
}

// Of x, or of x + residual.
class RmsNormCall final : public KernelCall {
 public:
  RmsNormCall(Stream& stream, std::int64_t rows, std::int64_t cols, bool adds, std::uint64_t seed)
      : seed_(seed),
        x_(rows_of("x", rows, cols)),
        residual_(rows_of("residual", rows, cols)),
        weight_(weight_of(cols)),
        x_buffer_(bench_buffer(stream, x_, seed)),
        weight_buffer_(bench_buffer(stream, weight_, seed)),
        out_(bench_output(stream, "out", x_buffer_.bytes())),
        adds_(adds) {
    if (!adds) return;
    residual_buffer_ = bench_buffer(stream, residual_, seed);
    residual_out_ = bench_output(stream, "residual_out", x_buffer_.bytes());
  }

  void launch(Stream& stream) override {
    const View<const bf16> x = view(x_buffer_), weight = weight_buffer_.as<bf16>(1, x_.cols);
    if (adds_) {
      add_rms_norm<bf16>(x, view(residual_buffer_), weight, view(residual_out_), view(out_),
                         float(kEps), {}, stream);
    } else {
      rms_norm<bf16>(x, weight, view(out_), float(kEps), {}, stream);
    }
  }

  std::string verify(Stream& stream) override {
    const std::int64_t count = std::min<std::int64_t>(x_.rows, 8);
    const Profile profile = rms_norm_profile(kType, x_.cols, true);
    std::string wrong;
    for (const std::int64_t first : {std::int64_t{0}, x_.rows - count}) {
      Matrix x = bench_rows(x_, seed_, first, count);
      if (adds_ && wrong.empty()) {
        x = reference::rounded_sum(kType, x, bench_rows(residual_, seed_, first, count));
        Budget sum(count, x.cols);
        sum.r = x.values;
        wrong = wrong_rows(stream, residual_out_, kType, first, sum);
      }
      if (!wrong.empty()) break;
      wrong = wrong_rows(
          stream, out_, kType, first,
          reference::rms_norm(x, bench_rows(weight_, seed_, 0, 1), kEps, profile, double(x.cols)));
    }
    return wrong;
  }

 private:
  View<bf16> view(const Buffer& buffer) const { return buffer.as<bf16>(x_.rows, x_.cols); }

  std::uint64_t seed_;
  TensorSpec x_, residual_, weight_;
  Buffer x_buffer_, weight_buffer_, out_, residual_buffer_, residual_out_;
  bool adds_;
};

void add_kernel(const std::string& name, std::int64_t rows, std::int64_t cols, bool adds) {
  const double elements = double(rows * cols), width = size_of(kType), tensors = adds ? 2 : 1;
  register_kernel_bench({.name = name + "/dtype:bf16",
                         .work = {.read = width * (tensors * elements + double(cols)),
                                  .written = width * tensors * elements},
                         .make = [=](const BenchRank& rank, std::uint64_t seed) {
                           return std::make_unique<RmsNormCall>(rank.stream, rows, cols, adds,
                                                                seed);
                         }});
}
void add_rows(std::int64_t tokens, std::int64_t hidden, bool adds) {
  add_kernel(
      fmt::format("{}/tokens:{}/hidden:{}", adds ? "add_rms_norm" : "rms_norm", tokens, hidden),
      tokens, hidden, adds);
}
void add_heads(std::int64_t tokens, std::int64_t heads) {
  add_kernel(fmt::format("rms_norm_head/tokens:{}/heads:{}/dim:128", tokens, heads), tokens * heads,
             128, false);
}

const bool registered = [] {
  if (!times_kernels()) {
    add_rows(3, 3072, false);
    add_heads(3, 3);
    add_rows(3, 3072, true);
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
    add_rows(tokens, hidden, false);
  for (const auto& [tokens, heads] : {std::pair{64, 48}, {4096, 48}, {27030, 24}})
    add_heads(tokens, heads);
  for (const auto& [tokens, hidden] : {std::pair{64, 8192}, {2048, 3072}, {4096, 8192}})
    add_rows(tokens, hidden, true);
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
