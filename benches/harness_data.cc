// What a case costs beside its kernels: its data, the reference, the comparison. A second is that
// of one core.

#include <benchmark/benchmark.h>

#include <cmath>
#include <vector>

#include "harness/base/compare.h"
#include "harness/base/fill.h"
#include "reference/product.h"
#include "reference/rms_norm.h"

namespace tp {
namespace {

constexpr std::int64_t kRows = 32, kCols = 6144;

std::vector<std::byte> filled(const TensorSpec& tensor, Fill fill) {
  std::vector<std::byte> bytes(std::size_t(tensor.rows * tensor.cols * size_of(tensor.dtype)));
  fill_block(tensor, {.fill = fill, .seed = 1}, {0, tensor.rows}, {0, tensor.cols}, bytes.data(),
             tensor.cols);
  return bytes;
}

Matrix matrix(const TensorSpec& tensor) {
  const std::vector<std::byte> bytes = filled(tensor, Fill::dense);
  Matrix m(tensor.rows, tensor.cols);
  for (std::size_t i = 0; i < m.values.size(); ++i)
    m.values[i] = load(tensor.dtype, bytes.data(), std::int64_t(i));
  return m;
}

const TensorSpec kX{
    .name = "x", .dtype = DType::bf16, .rows = kRows, .cols = kCols, .entity_cols = 128};
const TensorSpec kWeight{.name = "weight",
                         .dtype = DType::bf16,
                         .cols = kCols,
                         .role = Role::weight,
                         .entity_cols = 128};
const Profile kProfile{.depth = 64, .terms = kCols};

// data_fill/<fill>: elements/s of activations in bf16.
void data_fill(benchmark::State& state) {
  for (auto _ : state) benchmark::DoNotOptimize(filled(kX, Fill(state.range(0))).data());
  state.SetItemsProcessed(state.iterations() * kRows * kCols);
  state.SetLabel(std::string(kFillWords[std::size_t(state.range(0))]));
}
BENCHMARK(data_fill)->DenseRange(0, kPlainFills - 1)->Unit(benchmark::kMicrosecond);

void reference_rms_norm(benchmark::State& state) {
  const Matrix x = matrix(kX), weight = matrix(kWeight);
  for (auto _ : state) {
    benchmark::DoNotOptimize(reference::rms_norm(x, weight, 1e-6, kProfile, kCols).r.data());
  }
  state.SetItemsProcessed(state.iterations() * kRows * kCols);
}
BENCHMARK(reference_rms_norm)->Unit(benchmark::kMicrosecond);

// Products/s: 32 rows with as many outputs.
void reference_product(benchmark::State& state) {
  const Matrix x = matrix(kX);
  const Accumulation sum{.depth = kCols / 16, .matrix_steps = true, .least_normal = 0x1p-126};
  for (auto _ : state) {
    benchmark::DoNotOptimize(reference::product(x, x, {0, kCols}, nullptr, sum, true).r.data());
  }
  state.SetItemsProcessed(state.iterations() * kRows * kRows * kCols);
}
BENCHMARK(reference_product)->Unit(benchmark::kMillisecond);

void comparison(benchmark::State& state) {
  const std::vector<std::byte> bytes = filled(kX, Fill::dense);
  const Matrix x = matrix(kX);
  Budget budget(kRows, kCols);
  budget.r = x.values;
  for (std::size_t i = 0; i < budget.r.size(); ++i)
    budget.rho[i] = std::fabs(budget.r[i]) * 0x1p-20;
  for (auto _ : state) {
    if (compare(DType::bf16, bytes.data(), budget).first) state.SkipWithError("a mismatch");
  }
  state.SetItemsProcessed(state.iterations() * kRows * kCols);
}
BENCHMARK(comparison)->Unit(benchmark::kMicrosecond);

}  // namespace
}  // namespace tp
