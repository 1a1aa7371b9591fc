// qk_norm/tokens:T/q_heads:H/kv_heads:K/dim:128/tp:N/dtype:bf16: MiniMax-M2.5's heads on a rank,
// with /path:collective where it is not one kernel; qk_norm/<tp_size>/<num_tokens>: whole cases.

#include "kernels/qk_norm.h"

#include <fmt/format.h>

#include <algorithm>

#include "benches/bench.h"
#include "benches/bench_data.h"
#include "benches/kernel_bench.h"
#include "reference/qk_norm.h"

namespace tp {
namespace {

constexpr double kEps = 1e-6;
constexpr DType kType = DType::bf16;

// The q or the k of each rank, and its weight.
struct Part {
  std::string name;
  std::int64_t at, cols;  // in a rank's fused row

  TensorSpec weight(int rank) const {
    return {.name = fmt::format("{} weight of rank {}", name, rank),
            .dtype = kType,
            .cols = cols,
            .role = Role::weight,
            .entity_cols = cols};
  }
};

class QkNormCall final : public KernelCall {
 public:
  QkNormCall(const BenchRank& rank, const ModelShape& model, std::int64_t tokens, QkNormPath path,
             std::uint64_t seed)
      : group_(rank.group),
        model_(model),
        tokens_(tokens),
        path_(path),
        seed_(seed),
        q_{"q", 0, model.num_heads / group_.tp_size() * model.head_dim},
        k_{"k", q_.cols, model.num_kv_heads / group_.tp_size() * model.head_dim},
        width_(q_.cols + 2 * k_.cols),
        qkv_(bench_buffer(rank.stream, qkv(group_.tp_rank()), seed)),
        q_weight_(bench_buffer(rank.stream, q_.weight(group_.tp_rank()), seed)),
        k_weight_(bench_buffer(rank.stream, k_.weight(group_.tp_rank()), seed)),
        sums_(bench_output(rank.stream, "sums", std::size_t(tokens) * 2 * sizeof(float))),
        q_out_(bench_output(rank.stream, "q_out", bytes(q_))),
        k_out_(bench_output(rank.stream, "k_out", bytes(k_))) {
    if (path != QkNormPath::peer || !group_.peers(rank.stream)) return;
    // Once for all launches: nothing may come between those of a graph.
    group_.peer_exchange<float>(2 * tokens, rank.stream);
    meets_ = true;
  }

  void launch(Stream& stream) override {
    // Its first launch is one as any other: the kernel may have to be loaded.
    TpGroup group = meets_ && launched_ ? group_.agreed() : group_;
    launched_ = true;
    qk_norm<bf16>(qkv_.as<bf16>(tokens_, width_),
                  {q_weight_.as<bf16>(1, q_.cols), k_weight_.as<bf16>(1, k_.cols)},
                  q_out_.as<bf16>(tokens_, q_.cols), k_out_.as<bf16>(tokens_, k_.cols),
                  sums_.as<float>(), model_, sharding_rules(), float(kEps), group, stream, path_);
  }

  std::string verify(Stream& stream) override {
    if (path_ == QkNormPath::peer && !meets_) return "the ranks' kernels cannot meet here";
    const std::int64_t count = std::min<std::int64_t>(tokens_, 4);
    const QkNormProfiles profiles = qk_norm_profiles(model_, kType, group_.tp_size());
    for (const std::int64_t first : {std::int64_t{0}, tokens_ - count}) {
      for (const bool is_q : {true, false}) {
        const std::string wrong =
            wrong_rows(stream, is_q ? q_out_ : k_out_, kType, first,
                       expected(is_q ? q_ : k_, first, count, is_q ? profiles.q : profiles.k));
        if (!wrong.empty()) return wrong;
      }
    }
    return "";
  }

 private:
  TensorSpec qkv(int rank) const {
    return {.name = fmt::format("qkv of rank {}", rank),
            .dtype = kType,
            .rows = tokens_,
            .cols = width_,
            .entity_cols = model_.head_dim};
  }
  std::size_t bytes(const Part& part) const {
    return std::size_t(tokens_ * part.cols * size_of(kType));
  }

  // This rank's columns of the norm over those of all ranks.
  Budget expected(const Part& part, std::int64_t first, std::int64_t count,
                  const Profile& profile) const {
    const int ranks = group_.tp_size();
    Matrix x(count, part.cols * ranks), weight(1, part.cols * ranks);
    for (int r = 0; r < ranks; ++r) {
      const Matrix of_rank = bench_rows(qkv(r), seed_, first, count),
                   weight_of_rank = bench_rows(part.weight(r), seed_, 0, 1);
      std::copy_n(weight_of_rank.row(0), part.cols, weight.row(0) + r * part.cols);
      for (std::int64_t i = 0; i < count; ++i)
        std::copy_n(of_rank.row(i) + part.at, part.cols, x.row(i) + r * part.cols);
    }
    const Budget all = reference::rms_norm(x, weight, kEps, profile, double(x.cols));
    Budget mine(count, part.cols);
    for (std::int64_t i = 0; i < count; ++i) {
      const std::int64_t from = i * x.cols + group_.tp_rank() * part.cols;
      std::copy_n(all.r.begin() + from, part.cols, mine.r.begin() + i * part.cols);
      std::copy_n(all.rho.begin() + from, part.cols, mine.rho.begin() + i * part.cols);
    }
    return mine;
  }

  TpGroup group_;
  ModelShape model_;
  std::int64_t tokens_;
  QkNormPath path_;
  std::uint64_t seed_;
  Part q_, k_;
  std::int64_t width_;
  Buffer qkv_, q_weight_, k_weight_, sums_, q_out_, k_out_;
  bool meets_ = false, launched_ = false;
};

void add_kernel(int tp_size, std::int64_t tokens, QkNormPath path) {
  const ModelShape model{.num_heads = 48, .num_kv_heads = 8, .head_dim = 128};
  const int heads = model.num_heads / tp_size, kv_heads = model.num_kv_heads / tp_size;
  const double row = double((heads + kv_heads) * model.head_dim), width = size_of(kType);
  register_kernel_bench(
      {.name = fmt::format("qk_norm/tokens:{}/q_heads:{}/kv_heads:{}/dim:128/tp:{}/dtype:bf16{}",
                           tokens, heads, kv_heads, tp_size,
                           path == QkNormPath::peer ? "" : "/path:collective"),
       .work = {.read = width * row * double(tokens + 1),
                .written = width * row * double(tokens),
                .launches = path == QkNormPath::peer ? 1
                            : tp_size > 1            ? 3
                                                     : 2,
                .signals = tp_size > 1 ? 1 : 0},
       .tp_size = tp_size,
       .make = [=](const BenchRank& rank, std::uint64_t seed) {
         return std::make_unique<QkNormCall>(rank, model, tokens, path, seed);
       }});
}

const bool registered = [] {
  for (const int tp_size : {1, 2}) {
    if (!times_kernels()) {
      add_kernel(tp_size, 3, QkNormPath::peer);
      add_kernel(tp_size, 3, QkNormPath::collective);
      continue;
    }
    for (const int tokens : {1, 16, 64, 256, 2048, 4096, 8192})
      add_kernel(tp_size, tokens, QkNormPath::peer);
    for (const int tokens : {64, 4096}) add_kernel(tp_size, tokens, QkNormPath::collective);
  }
  return true;
}();

// KV heads sharded, one each, and replicated.
void qk_norm_cases(benchmark::State& state) {
  bench_case(
      state,
      fmt::format("v1 qk_norm num_heads=48 num_kv_heads=8 head_dim=128 tp_size={} num_tokens={} "
                  "dtype=bf16 fill=dense seed=1",
                  state.range(0), state.range(1)));
}
BENCHMARK(qk_norm_cases)
    ->Name("qk_norm")
    ->ArgsProduct({{1, 2, 8, 16}, {1, 32}})
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
