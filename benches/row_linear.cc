// linear/tokens:T/n:N/k:K/dtype:bf16 and dtype:fp8 (codes and weight with one scale each), and
// dtype:fp8/input:bf16 (quantised on the way), as benches/peers has them; row_linear/..: one with
// its all-reduce; row_linear/<tp_size>/<num_tokens>: whole cases.

#include "kernels/row_linear.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "benches/bench.h"
#include "benches/bench_data.h"
#include "benches/kernel_bench.h"
#include "harness/device/matmul.h"
#include "kernels/quantise.h"
#include "kernels/quantised_linear.h"
#include "reference/quantise.h"
#include "reference/row_linear.h"
#include "reference/scaled_product.h"

namespace tp {
namespace {

struct Size {
  std::int64_t tokens, n, k;
};

TensorSpec tensor(const std::string& name, DType t, std::int64_t rows, std::int64_t cols,
                  Role role) {
  TensorSpec spec{.name = name, .dtype = t, .rows = rows, .cols = cols, .role = role};
  spec.entity_cols = cols;
  if (t == DType::e4m3)
    spec.drawn = [](const DataRegime&, std::uint32_t bits, std::int64_t, std::int64_t) {
      return double(bits) * 0x1p-29 - 4;
    };
  return spec;
}

// What of out [tokens, n] is checked: some columns of some rows.
constexpr std::int64_t kRows = 2, kCols = 32;

// `rows` rows of `buffer`, which has `cols` columns.
std::vector<std::byte> download_rows(Stream& stream, const Buffer& buffer, DType t,
                                     std::int64_t first, std::int64_t rows, std::int64_t cols) {
  std::vector<std::byte> bytes(std::size_t(rows * cols * size_of(t)));
  to_host(stream, bytes.data(),
          static_cast<const std::byte*>(buffer.data()) + first * cols * size_of(t), bytes.size());
  stream.synchronize();
  return bytes;
}

// Calls budget_of(first row, rows, first column, columns) for what is checked.
template <typename F>
std::string wrong_corners(Stream& stream, const Buffer& out, const Size& s, F budget_of) {
  const std::int64_t rows = std::min(kRows, s.tokens), cols = std::min(kCols, s.n);
  for (const std::int64_t row : {std::int64_t{0}, s.tokens - rows}) {
    const std::vector<std::byte> all = download_rows(stream, out, DType::bf16, row, rows, s.n);
    for (const std::int64_t col : {std::int64_t{0}, s.n - cols}) {
      std::vector<std::byte> part;
      for (std::int64_t i = 0; i < rows; ++i) {
        const std::byte* from = all.data() + (i * s.n + col) * 2;
        part.insert(part.end(), from, from + cols * 2);
      }
      const Comparison c = compare(DType::bf16, part.data(), budget_of(row, rows, col, cols));
      if (c.first) {
        return fmt::format("out[{}, {}] is {:.9g}, accepted {:.9g} .. {:.9g}", row + c.first->row,
                           col + c.first->col, c.first->got, c.first->lo, c.first->hi);
      }
    }
  }
  return "";
}

class Bf16Call final : public KernelCall {
 public:
  Bf16Call(Stream& stream, Size s, std::uint64_t seed)
      : s_(s),
        seed_(seed),
        x_(tensor("x", DType::bf16, s.tokens, s.k, Role::activation)),
        w_(tensor("weight", DType::bf16, s.n, s.k, Role::weight)),
        x_buffer_(bench_buffer(stream, x_, seed)),
        w_buffer_(bench_buffer(stream, w_, seed)),
        out_(bench_output(stream, "out", std::size_t(s.tokens * s.n * 2))) {}

  void launch(Stream& stream) override {
    matmul<bf16, bf16>(x_buffer_.as<bf16>(s_.tokens, s_.k), w_buffer_.as<bf16>(s_.n, s_.k), nullptr,
                       out_.as<bf16>(s_.tokens, s_.n), stream);
  }
  std::string verify(Stream& stream) override {
    return wrong_corners(stream, out_, s_, [&](auto row, auto rows, auto col, auto cols) {
      return reference::product(bench_rows(x_, seed_, row, rows), bench_rows(w_, seed_, col, cols),
                                {0, s_.k}, nullptr, matmul_accumulation(DType::bf16, s_.k), false);
    });
  }

 private:
  Size s_;
  std::uint64_t seed_;
  TensorSpec x_, w_;
  Buffer x_buffer_, w_buffer_, out_;
};

constexpr float kXScale = 0.0625f, kWScale = 0.5f;

class Fp8Call final : public KernelCall {
 public:
  Fp8Call(Stream& stream, Size s, bool quantises, std::uint64_t seed)
      : s_(s),
        quantises_(quantises),
        seed_(seed),
        x_(tensor("x", quantises ? DType::bf16 : DType::e4m3, s.tokens, s.k, Role::activation)),
        w_(tensor("weight", DType::e4m3, s.n, s.k, Role::weight)),
        x_buffer_(bench_buffer(stream, x_, seed)),
        w_buffer_(bench_buffer(stream, w_, seed)),
        x_scale_(bench_values<float>(stream, "x_scale", {kXScale})),
        w_scale_(bench_values<float>(stream, "w_scale", {kWScale})),
        codes_(bench_output(stream, "codes", std::size_t(quantises ? s.tokens * s.k : 1))),
        out_(bench_output(stream, "out", std::size_t(s.tokens * s.n * 2))) {}

  void launch(Stream& stream) override {
    QuantisedWeight w{.format = {.scheme = Scheme::fp8_tensor}, .cols = s_.k};
    w.codes = w_buffer_.as<e4m3>(s_.n, s_.k);
    w.factors = w_scale_.as<float>(1, 1);
    const View<bf16> out = out_.as<bf16>(s_.tokens, s_.n);
    if (quantises_) {
      quantised_linear<bf16, bf16>(x_buffer_.as<bf16>(s_.tokens, s_.k), x_scale_.as<float>(), w, {},
                                   codes_.as<e4m3>(s_.tokens, s_.k), out, stream);
    } else {
      quantised_product<bf16, bf16>(x_buffer_.as<e4m3>(s_.tokens, s_.k),
                                    Scales{.data = x_scale_.as<float>()}, w, {}, out, stream);
    }
  }
  std::string verify(Stream& stream) override {
    std::string wrong_code;
    std::string wrong =
        wrong_corners(stream, out_, s_, [&](auto row, auto rows, auto col, auto cols) {
          Matrix x = bench_rows(x_, seed_, row, rows), x_scale(1, 1), w_scale(1, 1);
          x_scale.values = {double(kXScale)};
          w_scale.values = {double(kWScale)};
          if (quantises_) {  // the product is judged with the codes that it had
            const Budget budget = reference::quantised(x, {.values = &x_scale});
            const auto codes = download_rows(stream, codes_, DType::e4m3, row, rows, s_.k);
            if (compare(DType::e4m3, codes.data(), budget).first) wrong_code = "a code is wrong";
            for (std::int64_t i = 0; i < rows * s_.k; ++i)
              x.values[std::size_t(i)] = load(DType::e4m3, codes.data(), i);
          }
          return reference::scaled_product(
              x, {.values = &x_scale}, bench_rows(w_, seed_, col, cols), {.values = &w_scale},
              {0, s_.k}, nullptr, tensor_scaled_accumulation(s_.tokens, s_.k), false);
        });
    return wrong_code.empty() ? wrong : wrong_code;
  }

 private:
  Size s_;
  bool quantises_;
  std::uint64_t seed_;
  TensorSpec x_, w_;
  Buffer x_buffer_, w_buffer_, x_scale_, w_scale_, codes_, out_;
};

// A rank's share of a row-parallel linear layer, and the sum over the ranks.
class RowLinearCall final : public KernelCall {
 public:
  RowLinearCall(const BenchRank& rank, Size s, std::uint64_t seed)
      : s_(s), seed_(seed), group_(rank.group) {
    for (int r = 0; r < group_.tp_size(); ++r) {
      x_.push_back(tensor(fmt::format("x{}", r), DType::bf16, s.tokens, s.k, Role::activation));
      w_.push_back(tensor(fmt::format("weight{}", r), DType::bf16, s.n, s.k, Role::weight));
    }
    const std::size_t mine = std::size_t(group_.tp_rank());
    x_buffer_ = bench_buffer(rank.stream, x_[mine], seed);
    w_buffer_ = bench_buffer(rank.stream, w_[mine], seed);
    out_ = bench_output(rank.stream, "out", std::size_t(s.tokens * s.n * 2));
  }

  void launch(Stream& stream) override {
    const View<bf16> out = out_.as<bf16>(s_.tokens, s_.n);
    partial_sums<bf16, bf16>(x_buffer_.as<bf16>(s_.tokens, s_.k), w_buffer_.as<bf16>(s_.n, s_.k),
                             {}, out, {}, group_, stream);
    reduce_results<bf16>(out, true, {}, group_, stream);
  }
  std::string verify(Stream& stream) override {
    return wrong_corners(stream, out_, s_, [&](auto row, auto rows, auto col, auto cols) {
      const reference::RowLinearTypes types{.partial = DType::bf16, .out = DType::bf16};
      std::vector<Budget> runs;
      for (std::size_t r = 0; r < x_.size(); ++r)
        runs.push_back(reference::product(bench_rows(x_[r], seed_, row, rows),
                                          bench_rows(w_[r], seed_, col, cols), {0, s_.k}, nullptr,
                                          matmul_accumulation(DType::bf16, s_.k), false));
      return reference::sum_of_runs(runs, types);
    });
  }

 private:
  Size s_;
  std::uint64_t seed_;
  TpGroup& group_;
  std::vector<TensorSpec> x_, w_;
  Buffer x_buffer_, w_buffer_, out_;
};

void add_linear(Size s) {
  const double tokens = double(s.tokens), n = double(s.n), k = double(s.k),
               flops = 2 * tokens * n * k;
  const std::string name = fmt::format("linear/tokens:{}/n:{}/k:{}", s.tokens, s.n, s.k);
  register_kernel_bench(
      {.name = name + "/dtype:bf16",
       .work = {.read = 2 * (tokens + n) * k, .written = 2 * tokens * n, .matrix_flops = flops},
       .make = [=](const BenchRank& rank, std::uint64_t seed) {
         return std::make_unique<Bf16Call>(rank.stream, s, seed);
       }});
  for (const bool quantises : {false, true}) {
    register_kernel_bench({.name = name + (quantises ? "/dtype:fp8/input:bf16" : "/dtype:fp8"),
                           .work = {.read = ((quantises ? 2 : 1) * tokens + n) * k,
                                    .written = 2 * tokens * n,
                                    .fp8_flops = flops},
                           .make = [=](const BenchRank& rank, std::uint64_t seed) {
                             return std::make_unique<Fp8Call>(rank.stream, s, quantises, seed);
                           }});
  }
}

void add_row_linear(Size s, int tp_size) {
  const double tokens = double(s.tokens), n = double(s.n), k = double(s.k);
  register_kernel_bench({.name = fmt::format("row_linear/tokens:{}/n:{}/k:{}/tp:{}/dtype:bf16",
                                             s.tokens, s.n, s.k, tp_size),
                         .work = {.read = 2 * (tokens + n) * k,
                                  .written = 2 * tokens * n,
                                  .matrix_flops = 2 * tokens * n * k,
                                  .launches = 2,
                                  .signals = 1},
                         .tp_size = tp_size,
                         .make = [=](const BenchRank& rank, std::uint64_t seed) {
                           return std::make_unique<RowLinearCall>(rank, s, seed);
                         }});
}

const bool registered = [] {
  if (!times_kernels()) {
    add_linear({3, 48, 256});
    add_row_linear({3, 32, 256}, 2);
    return true;
  }
  for (const auto& [n, k] : {std::pair{12288, 5376}, {8192, 3072}, {4096, 3072}, {1280, 8192}})
    for (const int tokens : {1, 16, 64, 1024, 4096, 8192}) add_linear({tokens, n, k});
  for (const int tokens : {1, 64, 1024}) add_row_linear({tokens, 8192, 4096}, 2);
  return true;
}();

// row_linear/<tp_size>/<num_tokens>: the same weight over all group sizes, 512 x 768.
void row_linear(benchmark::State& state) {
  bench_case(state, fmt::format("v1 row_linear hidden_size=512 in_per_rank={} tp_size={} "
                                "num_tokens={} dtype=bf16 fill=dense seed=1",
                                768 / state.range(0), state.range(0), state.range(1)));
}
BENCHMARK(row_linear)->ArgsProduct({{1, 8, 16}, {1, 32}})->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
