// attention/...: kernels alone, at the sizes of MiniMax-M2.5 on tp=2 (24 heads, 4 KV heads of 128)
// and of Llama 3.1 8B (32 heads, 8 KV heads), and whole cases with all oracles.

#include "kernels/attention.h"

#include <fmt/format.h>

#include <cmath>
#include <vector>

#include "benches/bench.h"
#include "benches/old_kernel_bench.h"
#include "harness/base/fill.h"
#include "harness/device/buffer.h"
#include "harness/device/ceilings.h"
#include "reference/attention.h"

namespace tp {
namespace {

// `sequences` of `kv_len` keys each, of which the last `queries` ask. Keys lie in pages of 16.
void bench_attention(benchmark::State& state, DType dtype, ModelShape model, int sequences,
                     std::int64_t queries, std::int64_t kv_len, std::int64_t splits) {
  constexpr std::int64_t kPage = 16;
  const std::int64_t tokens = sequences * queries,
                     rows = sequences * ((kv_len + kPage - 1) / kPage) * kPage;
  const std::int64_t q_cols = std::int64_t{model.num_heads} * model.head_dim,
                     k_cols = std::int64_t{model.num_kv_heads} * model.head_dim;
  AttentionBatch batch;
  batch.page_size = kPage;
  batch.pages_per_sequence = rows / kPage / sequences;
  batch.query_start = {0};
  for (int s = 0; s < sequences; ++s) {
    batch.kv_len.push_back(std::int32_t(kv_len));
    batch.query_start.push_back(std::int32_t((s + 1) * queries));
  }
  for (std::int64_t p = 0; p < rows / kPage; ++p)
    batch.table.push_back(std::int32_t((p * 7919) % (rows / kPage)));
  const AttentionSettings settings{.scale = float(1 / std::sqrt(double(model.head_dim))),
                                   .splits = splits};
  const DataRegime regime{.fill = Fill::dense, .seed = 1};
  const auto data = [&](const char* name, std::int64_t r, std::int64_t cols) {
    std::vector<std::byte> bytes(std::size_t(r * cols * size_of(dtype)));
    fill_block({name, dtype, r, cols, Role::activation, model.head_dim}, regime, {0, r}, {0, cols},
               bytes.data(), cols);
    return bytes;
  };
  const std::vector<std::byte> q = data("q", tokens, q_cols), k = data("k", rows, k_cols),
                               v = data("v", rows, k_cols);

  // The sum over queries of the keys they see.
  const double pairs = double(tokens) * (double(kv_len) - double(queries - 1) / 2);
  const double flops = 4 * pairs * double(q_cols);
  const KernelWork work{.bytes = double(size_of(dtype)) *
                                 double(2 * sequences * kv_len * k_cols + 2 * tokens * q_cols),
                        .flops = dtype == DType::f32 ? flops : 0,
                        .matrix_flops = dtype == DType::f32 ? 0 : flops};

  struct Memory {
    Buffer q, k, v, out, lse, workspace, query_start, kv_len, table;
  };
  Memory memory;
  const auto buffer = [](Stream& stream, const char* name, const void* from, std::size_t bytes) {
    Buffer b(stream, name, bytes, std::nullopt);
    if (from != nullptr) from_host(stream, b.data(), from, bytes);
    return b;
  };
  const auto prepare = [&](Stream& stream) -> Launch {
    const auto integers = [&](const char* name, const std::vector<std::int32_t>& values) {
      return buffer(stream, name, values.data(), 4 * values.size());
    };
    memory = {buffer(stream, "q", q.data(), q.size()),
              buffer(stream, "k", k.data(), k.size()),
              buffer(stream, "v", v.data(), v.size()),
              buffer(stream, "out", nullptr, q.size()),
              buffer(stream, "lse", nullptr, std::size_t(tokens * model.num_heads) * 4),
              buffer(stream, "workspace", nullptr,
                     std::size_t(attention_workspace(tokens, model, 1, splits)) * 4),
              integers("query_start", batch.query_start),
              integers("kv_len", batch.kv_len),
              integers("table", batch.table)};
    batch.device = {memory.query_start.as<std::int32_t>(), memory.kv_len.as<std::int32_t>(),
                    memory.table.as<std::int32_t>()};
    return [&](Stream& s) {
      dispatch(dtype, [&]<typename T>(T) {
        attention<T>({.q = memory.q.as<T>(tokens, q_cols),
                      .k = memory.k.as<T>(rows, k_cols),
                      .v = memory.v.as<T>(rows, k_cols),
                      .out = memory.out.as<T>(tokens, q_cols),
                      .lse = memory.lse.as<float>(tokens, model.num_heads),
                      .workspace = memory.workspace.as<float>()},
                     batch, settings, model, sharding_rules(), 1, 0, s);
      });
    };
  };
  // The last query of the last sequence against the reference.
  const auto verify = [&](Stream& stream) -> std::string {
    std::vector<std::byte> row(std::size_t(q_cols * size_of(dtype)));
    const std::size_t at = std::size_t((tokens - 1) * q_cols * size_of(dtype));
    to_host(stream, row.data(), memory.out.as<std::byte>() + at, row.size());
    stream.synchronize();
    Matrix one(1, q_cols), keys(kv_len, k_cols), values(kv_len, k_cols);
    for (std::int64_t j = 0; j < q_cols; ++j)
      one.values[std::size_t(j)] = load(dtype, q.data() + at, j);
    Sequence sequence{{0, 1}, {}};
    for (std::int64_t j = 0; j < kv_len; ++j) {
      sequence.keys.push_back(j);
      const std::int64_t slot =
          batch.table[std::size_t((sequences - 1) * batch.pages_per_sequence + j / kPage)] * kPage +
          j % kPage;
      for (std::int64_t d = 0; d < k_cols; ++d) {
        keys.row(j)[d] = load(dtype, k.data(), slot * k_cols + d);
        values.row(j)[d] = load(dtype, v.data(), slot * k_cols + d);
      }
    }
    const reference::Attention expected =
        reference::attention(one, keys, values, nullptr, nullptr, model, {sequence},
                             {.scale = settings.scale, .mask = settings.mask()},
                             attention_profile(dtype, model, kv_len, settings));
    const auto mismatch = compare(dtype, row.data(), expected.out).first;
    return mismatch ? fmt::format("out[last, {}] is {}, not {} .. {}", mismatch->col, mismatch->got,
                                  mismatch->lo, mismatch->hi)
                    : "";
  };
  bench_kernel(state, work, prepare, verify);
}

const ModelShape kMiniMaxTp2{.num_heads = 24, .num_kv_heads = 4, .head_dim = 128};
const ModelShape kLlama8B{.num_heads = 32, .num_kv_heads = 8, .head_dim = 128};
const ModelShape kSmall{.num_heads = 4, .num_kv_heads = 2, .head_dim = 64};

void attention_prefill(benchmark::State& state) {
  const bool gpu = ceilings().has_value();
  const std::int64_t tokens = gpu ? state.range(0) : std::min<std::int64_t>(state.range(0), 64);
  bench_attention(state, DType(state.range(1)), gpu ? kMiniMaxTp2 : kSmall, 1, tokens, tokens, 1);
}
BENCHMARK(attention_prefill)
    ->ArgsProduct({{1024, 4096}, {int(DType::bf16), int(DType::f32)}})
    ->ArgNames({"tokens", "dtype"})
    ->UseManualTime()
    ->Iterations(3)
    ->Unit(benchmark::kMicrosecond);

void attention_decode(benchmark::State& state) {
  const bool gpu = ceilings().has_value();
  bench_attention(state, DType::bf16, gpu ? kLlama8B : kSmall, gpu ? int(state.range(0)) : 2, 1,
                  gpu ? state.range(1) : 128, gpu ? state.range(2) : 2);
}
BENCHMARK(attention_decode)
    ->Args({1, 4096, 16})
    ->Args({8, 4096, 4})
    ->Args({32, 4096, 1})
    ->Args({32, 4096, 2})
    ->ArgNames({"sequences", "keys", "splits"})
    ->UseManualTime()
    ->Iterations(3)
    ->Unit(benchmark::kMicrosecond);

// With all oracles.
void attention_case(benchmark::State& state) {
  bench_case(state, fmt::format("v1 attention num_heads=48 num_kv_heads=8 head_dim=128 tp_size={} "
                                "num_tokens=4 dtype=bf16 fill=dense seed=1 context=30 page_size=16",
                                state.range(0)));
}
BENCHMARK(attention_case)->Arg(1)->Arg(16)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
