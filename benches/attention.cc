// gqa_prefill/... and gqa_decode/..., named as in benches/peers: q_heads and kv_heads are those of
// one rank (24 and 4: MiniMax-M2.5 on tp=2; 6 and 1, 3 and 1: on tp=8 and on tp=16, where each KV
// head is held twice). Keys of a sequence are consecutive rows, or lie in pages. And whole cases.

#include "kernels/attention.h"

#include <fmt/format.h>

#include <cmath>
#include <vector>

#include "benches/bench.h"
#include "benches/bench_data.h"
#include "benches/kernel_bench.h"
#include "reference/attention.h"

namespace tp {
namespace {

constexpr DType kType = DType::bf16;

// `sequences` of `kv_len` keys each, of which the last `queries` ask.
struct Shape {
  std::int64_t sequences = 1, q_heads = 1, kv_heads = 1, dim = 128, queries = 1, kv_len = 1;
  std::int64_t page_size = 0;

  std::int64_t tokens() const { return sequences * queries; }
  std::int64_t rows() const { return sequences * kv_len; }
  ModelShape model() const {
    return {.num_heads = int(q_heads), .num_kv_heads = int(kv_heads), .head_dim = int(dim)};
  }
};

AttentionBatch batch_of(const Shape& s) {
  AttentionBatch batch{.query_start = {0}, .page_size = s.page_size};
  for (std::int64_t i = 0; i < s.sequences; ++i) {
    batch.kv_len.push_back(std::int32_t(s.kv_len));
    batch.query_start.push_back(std::int32_t((i + 1) * s.queries));
    if (s.page_size == 0) batch.table.push_back(std::int32_t(i * s.kv_len));
  }
  if (s.page_size == 0) return batch;
  const std::int64_t pages = s.rows() / s.page_size;
  batch.pages_per_sequence = pages / s.sequences;
  // 7919 is a prime: every page once.
  for (std::int64_t p = 0; p < pages; ++p) batch.table.push_back(std::int32_t(p * 7919 % pages));
  return batch;
}

class AttentionCall final : public KernelCall {
 public:
  AttentionCall(Stream& stream, const Shape& shape, std::uint64_t seed)
      : s_(shape),
        seed_(seed),
        q_(tensor("q", s_.tokens(), s_.q_heads)),
        k_(tensor("k", s_.rows(), s_.kv_heads)),
        v_(tensor("v", s_.rows(), s_.kv_heads)),
        batch_(batch_of(s_)),
        settings_{.scale = float(1 / std::sqrt(double(s_.dim))), .splits = 0},
        q_buffer_(bench_buffer(stream, q_, seed)),
        k_buffer_(bench_buffer(stream, k_, seed)),
        v_buffer_(bench_buffer(stream, v_, seed)),
        out_(bench_output(stream, "out", q_buffer_.bytes())),
        lse_(bench_output(stream, "lse", std::size_t(s_.tokens() * s_.q_heads) * sizeof(float))),
        query_start_(bench_values(stream, "query_start", batch_.query_start)),
        kv_len_(bench_values(stream, "kv_len", batch_.kv_len)),
        table_(bench_values(stream, "table", batch_.table)) {
    settings_.splits = attention_splits(kType, s_.model(), 1, batch_, settings_);
    workspace_ = bench_output(
        stream, "workspace",
        std::size_t(attention_workspace(s_.tokens(), s_.model(), 1, settings_.splits)) *
            sizeof(float));
    batch_.device = {query_start_.as<std::int32_t>(), kv_len_.as<std::int32_t>(),
                     table_.as<std::int32_t>()};
  }

  void launch(Stream& stream) override {
    attention<bf16>({.q = q_buffer_.as<bf16>(q_.rows, q_.cols),
                     .k = k_buffer_.as<bf16>(k_.rows, k_.cols),
                     .v = v_buffer_.as<bf16>(v_.rows, v_.cols),
                     .out = out_.as<bf16>(q_.rows, q_.cols),
                     .lse = lse_.as<float>(q_.rows, s_.q_heads),
                     .workspace = workspace_.as<float>()},
                    batch_, settings_, s_.model(), sharding_rules(), 1, 0, stream);
  }

  // The first and the last query of a sequence, and one in the middle.
  std::string verify(Stream& stream) override {
    std::string wrong;
    for (const std::int64_t query : {std::int64_t{0}, s_.queries / 2, s_.queries - 1}) {
      const std::int64_t sequence = query == 0 ? 0 : s_.sequences - 1;
      if (wrong.empty()) wrong = verify(stream, sequence, query);
    }
    return wrong.empty() ? verify(stream, s_.sequences - 1, s_.queries - 1) : wrong;
  }

 private:
  TensorSpec tensor(const char* name, std::int64_t rows, std::int64_t heads) const {
    return {
        .name = name, .dtype = kType, .rows = rows, .cols = heads * s_.dim, .entity_cols = s_.dim};
  }

  std::string verify(Stream& stream, std::int64_t sequence, std::int64_t query) {
    const std::int64_t token = sequence * s_.queries + query,
                       keys = s_.kv_len - s_.queries + query + 1;  // those it sees
    Matrix k(keys, k_.cols), v(keys, v_.cols);
    const auto row_of = [&](std::int64_t j) {
      if (s_.page_size == 0) return sequence * s_.kv_len + j;
      const auto* pages = batch_.table.data() + sequence * batch_.pages_per_sequence;
      return pages[j / s_.page_size] * s_.page_size + j % s_.page_size;
    };
    const std::byte* k_data = bench_data(k_, seed_).data();
    const std::byte* v_data = bench_data(v_, seed_).data();
    Sequence seen{{0, 1}, {}};
    for (std::int64_t j = 0; j < keys; ++j) {
      seen.keys.push_back(j);
      for (std::int64_t d = 0; d < k.cols; ++d) {
        k.row(j)[d] = load(kType, k_data, row_of(j) * k.cols + d);
        v.row(j)[d] = load(kType, v_data, row_of(j) * v.cols + d);
      }
    }
    return wrong_rows(
        stream, out_, kType, token,
        reference::attention(bench_rows(q_, seed_, token, 1), k, v, nullptr, nullptr, s_.model(),
                             {seen}, {.scale = settings_.scale, .mask = settings_.mask()},
                             attention_profile(kType, s_.model(), 1, batch_, settings_))
            .out);
  }

  Shape s_;
  std::uint64_t seed_;
  TensorSpec q_, k_, v_;
  AttentionBatch batch_;
  AttentionSettings settings_;
  Buffer q_buffer_, k_buffer_, v_buffer_, out_, lse_, query_start_, kv_len_, table_, workspace_;
};

// bf16; as peers count it.
KernelWork work_of(const Shape& s) {
  const double kv = double(2 * s.rows() * s.kv_heads * s.dim),
               q = double(s.tokens() * s.q_heads * s.dim);
  // Of a prefill, half of all pairs.
  const double pairs = double(s.tokens()) * double(s.kv_len) / (s.queries > 1 ? 2 : 1);
  return {.read = 2 * (kv + q),
          .written = 2 * q,
          .matrix_flops = 4 * pairs * double(s.q_heads * s.dim)};
}

void add(const std::string& name, const Shape& shape) {
  register_kernel_bench({.name = name,
                         .work = work_of(shape),
                         .make = [=](const BenchRank& rank, std::uint64_t seed) {
                           return std::make_unique<AttentionCall>(rank.stream, shape, seed);
                         }});
}

std::string pages(const Shape& s) {
  return s.page_size == 0 ? "" : fmt::format("/page:{}", s.page_size);
}
void add_prefill(Shape s) {
  s.kv_len = s.queries;
  add(fmt::format("gqa_prefill/batch:{}/q_heads:{}/kv_heads:{}/dim:{}/seq:{}/causal:1/dtype:bf16{}",
                  s.sequences, s.q_heads, s.kv_heads, s.dim, s.queries, pages(s)),
      s);
}
void add_decode(const Shape& s) {
  add(fmt::format("gqa_decode/batch:{}/q_heads:{}/kv_heads:{}/dim:{}/kv:{}/dtype:bf16{}",
                  s.sequences, s.q_heads, s.kv_heads, s.dim, s.kv_len, pages(s)),
      s);
}

const bool registered = [] {
  if (!times_kernels()) {
    add_prefill({.sequences = 1, .q_heads = 6, .kv_heads = 1, .queries = 70});
    add_decode({.sequences = 2, .q_heads = 6, .kv_heads = 1, .kv_len = 320, .page_size = 16});
    return true;
  }
  const auto prefill = [](std::int64_t batch, std::int64_t heads, std::int64_t kv_heads,
                          std::int64_t seq, std::int64_t page_size = 0) {
    add_prefill({.sequences = batch,
                 .q_heads = heads,
                 .kv_heads = kv_heads,
                 .queries = seq,
                 .page_size = page_size});
  };
  prefill(8, 24, 4, 1024);
  prefill(4, 24, 4, 2048);
  for (const std::int64_t seq : {4096, 8192, 16384}) prefill(1, 24, 4, seq);
  prefill(1, 24, 4, 8192, 16);
  prefill(1, 48, 8, 4096);
  prefill(1, 8, 1, 8192);
  const auto decode = [](std::int64_t batch, std::int64_t heads, std::int64_t kv_heads,
                         std::int64_t kv, std::int64_t page_size = 0) {
    add_decode({.sequences = batch,
                .q_heads = heads,
                .kv_heads = kv_heads,
                .kv_len = kv,
                .page_size = page_size});
  };
  for (const std::int64_t kv : {1024, 2048, 4096, 16384}) decode(1, 24, 4, kv);
  decode(8, 24, 4, 4096);
  for (const std::int64_t kv : {1024, 4096, 16384}) decode(32, 24, 4, kv);
  decode(32, 24, 4, 4096, 16);
  decode(1, 8, 1, 4096);
  decode(32, 8, 1, 4096);
  decode(128, 8, 1, 4096);
  // Twice as many ranks as KV heads read the same bytes as one rank for each.
  for (const std::int64_t heads : {6, 3}) decode(128, heads, 1, 4096);
  return true;
}();

// With all oracles.
void attention_case(benchmark::State& state) {
  bench_case(state, fmt::format("v1 attention num_heads=48 num_kv_heads=8 head_dim=128 tp_size={} "
                                "num_tokens=4 dtype=bf16 fill=dense seed=1 context=30 page_size=16",
                                state.range(0)));
}
BENCHMARK(attention_case)->Arg(1)->Arg(16)->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
