#include "benches/bench_data.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <thread>
#include <tuple>

namespace tp {

namespace {

constexpr std::int64_t kThreadBytes = 1 << 20;  // worth a thread of its own

using Key = std::tuple<std::string, DType, std::int64_t, std::int64_t, std::uint64_t>;
std::map<Key, std::vector<std::byte>>& kept() {
  static auto& all = *new std::map<Key, std::vector<std::byte>>;
  return all;
}

}  // namespace

const std::vector<std::byte>& bench_data(const TensorSpec& tensor, std::uint64_t seed) {
  const auto [it, is_new] =
      kept().try_emplace({tensor.name, tensor.dtype, tensor.rows, tensor.cols, seed});
  std::vector<std::byte>& bytes = it->second;
  if (!is_new) return bytes;
  const std::int64_t row_bytes = tensor.cols * size_of(tensor.dtype);
  bytes.resize(std::size_t(tensor.rows * row_bytes));
  const std::int64_t threads = std::clamp<std::int64_t>(
      tensor.rows * row_bytes / kThreadBytes, 1, std::max(1u, std::thread::hardware_concurrency()));
  const auto fill = [&](std::int64_t i) {
    const std::int64_t first = i * tensor.rows / threads, end = (i + 1) * tensor.rows / threads;
    fill_block(tensor, {.fill = Fill::dense, .seed = seed}, {first, end - first}, {0, tensor.cols},
               bytes.data() + first * row_bytes, tensor.cols);
  };
  std::vector<std::thread> others;
  for (std::int64_t i = 1; i < threads; ++i) others.emplace_back(fill, i);
  fill(0);
  for (std::thread& thread : others) thread.join();
  return bytes;
}

Buffer bench_output(Stream& stream, const std::string& name, std::size_t bytes) {
  return Buffer(stream, name, bytes, 0xFF);
}

Buffer bench_buffer(Stream& stream, const TensorSpec& tensor, std::uint64_t seed) {
  return bench_values(stream, tensor.name, bench_data(tensor, seed));
}

Matrix bench_rows(const TensorSpec& tensor, std::uint64_t seed, std::int64_t first,
                  std::int64_t count) {
  const std::vector<std::byte>& bytes = bench_data(tensor, seed);
  Matrix m(count, tensor.cols);
  for (std::int64_t i = 0; i < count * tensor.cols; ++i)
    m.values[std::size_t(i)] = load(tensor.dtype, bytes.data(), first * tensor.cols + i);
  return m;
}

void forget_bench_data() { kept().clear(); }

std::string wrong_rows(Stream& stream, const Buffer& buffer, DType type, std::int64_t first,
                       const Budget& budget) {
  const std::int64_t row_bytes = budget.cols * size_of(type);
  std::vector<std::byte> rows(std::size_t(budget.rows * row_bytes));
  to_host(stream, rows.data(), buffer.as<std::byte>() + first * row_bytes, rows.size());
  stream.synchronize();
  const Comparison c = compare(type, rows.data(), budget);
  if (!c.first) return "";
  return fmt::format("{}[{}, {}] is {:.9g}, accepted {:.9g} .. {:.9g} ({} of {} are wrong)",
                     buffer.name(), first + c.first->row, c.first->col, c.first->got, c.first->lo,
                     c.first->hi, c.first->count, budget.rows * budget.cols);
}

}  // namespace tp
