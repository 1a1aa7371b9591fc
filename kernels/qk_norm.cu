#include <algorithm>
#include <optional>

#include "harness/device/device.h"
#include "harness/device/require.h"
#include "harness/group/peer_exchange.cuh"
#include "kernels/qk_columns.h"
#include "kernels/qk_norm.h"
#include "kernels/reduce.cuh"
#include "kernels/words.cuh"

namespace tp {

namespace {

// One of the two norms as the kernels see it.
template <typename T>
struct Norm {
  View<const T> x;
  const T* weight;
  View<T> out;
  float divisor;     // elements the all-reduced sum stands for
  float multiplier;  // of this rank's sum: 1, or 0 where it does not count
};

// Both of them. A block takes a token: the first q_threads threads its q, all others its k.
template <typename T>
struct Norms {
  Norm<T> q, k;
  int q_threads;
  float eps;
};

// Vectors of 16 bytes that a thread keeps: of a row in registers, of the weight in shared memory.
// Those of very wide rows are read again.
constexpr int kHeld = 4;
constexpr int kMaxWarps = 8;  // of a row

int warps_of(std::int64_t cols, std::int64_t vector) {
  const std::int64_t warp = 32 * kHeld * vector;
  return int(std::clamp<std::int64_t>((cols + warp - 1) / warp, 1, kMaxWarps));
}

// In shared memory; behind it the weights, vectors [kHeld][threads of the block].
struct alignas(16) Scratch {
  float partial[2 * kMaxWarps];  // of the block's warps
  Vec<float, 2> received[kMaxPeers];
  float inverse[2];  // of q and k
};
std::size_t shared_bytes(int threads) {
  return sizeof(Scratch) + std::size_t(threads) * kHeld * 16;
}

// What a thread has of one of the norms: vectors thread, thread + threads, ... of each row.
template <typename T, bool kWhole>  // vectors are aligned, and rows have no rest
class Share {
 public:
  __device__ explicit Share(const Norms<T>& norms)
      : is_q_(int(threadIdx.x) < norms.q_threads),
        x_(is_q_ ? norms.q.x.data : norms.k.x.data),
        weight_(is_q_ ? norms.q.weight : norms.k.weight),
        out_(is_q_ ? norms.q.out.data : norms.k.out.data),
        weights_(reinterpret_cast<Words<T>*>(dynamic_shared<Scratch>() + 1) + threadIdx.x),
        x_stride_(int(is_q_ ? norms.q.x.row_stride : norms.k.x.row_stride)),
        out_stride_(int(is_q_ ? norms.q.out.row_stride : norms.k.out.row_stride)),
        cols_(int(is_q_ ? norms.q.x.cols : norms.k.x.cols)),
        first_((int(threadIdx.x) - (is_q_ ? 0 : norms.q_threads)) * kWide<T>),
        step_((is_q_ ? norms.q_threads : int(blockDim.x) - norms.q_threads) * kWide<T>) {}
  __device__ bool is_q() const { return is_q_; }

  // Begun, and there for this thread, the only one that reads them, when wait_for_weights returns.
  __device__ void load_weights() const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int col = first_ + i * step_;
      if (col >= cols_) break;
      if constexpr (kWhole) {
        copy_async<16>(weight(i), weight_ + col);
      } else {
        *weight(i) = words_at(weight_, col);
      }
    }
    copy_async_commit();
  }
  __device__ void wait_for_weights() const { copy_async_wait<0>(); }

  struct Row {
    Words<T> words[kHeld];
  };
  __device__ void load_row(std::int64_t token, Row& row) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int col = first_ + i * step_;
      if (col < cols_) row.words[i] = words_at(x_ + token * x_stride_, col);
    }
  }

  // The thread's part of a row's sum of squares.
  __device__ float sum_of_squares(std::int64_t token, const Row& row) const {
    float sum = 0.0f;
    each(token, row, [&](int, int, const Words<T>& x) {
#pragma unroll
      for (int e = 0; e < kWide<T>; ++e) sum = fmaf(element<T>(x, e), element<T>(x, e), sum);
    });
    return sum;
  }

  // out = x * inverse * weight, rounded once.
  __device__ void normalize(std::int64_t token, const Row& row, float inverse) const {
    T* const out = out_ + token * out_stride_;
    each(token, row, [&](int i, int col, const Words<T>& x) {
      const Words<T> weight = i < kHeld ? *this->weight(i) : words_at(weight_, col);
      put(out, col,
          words_of<T>([&](int e) { return element<T>(x, e) * inverse * element<T>(weight, e); }));
    });
  }

 private:
  __device__ Words<T>* weight(int i) const { return weights_ + i * int(blockDim.x); }
  // Zeros behind the end of the row.
  __device__ Words<T> words_at(const T* row, int col) const {
    if constexpr (kWhole) {
      return load_words(row + col);
    } else {
      Vec<T, kWide<T>> v;
      for (int e = 0; e < kWide<T>; ++e)
        v[e] = col + e < cols_ ? row[col + e] : from_float<T>(0.0f);
      return std::bit_cast<Words<T>>(v);
    }
  }
  __device__ void put(T* row, int col, const Words<T>& words) const {
    if constexpr (kWhole) {
      store_words(row + col, words);
    } else {
      const auto v = std::bit_cast<Vec<T, kWide<T>>>(words);
      for (int e = 0; e < kWide<T> && col + e < cols_; ++e) row[col + e] = v[e];
    }
  }
  // f(number, column, words) of each of the thread's vectors of a row, held or read again.
  template <typename F>
  __device__ void each(std::int64_t token, const Row& row, F f) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first_ + i * step_ < cols_) f(i, first_ + i * step_, row.words[i]);
    }
#pragma unroll 1
    for (int col = first_ + kHeld * step_; col < cols_; col += step_)
      f(kHeld, col, words_at(x_ + token * x_stride_, col));
  }

  bool is_q_;
  const T* x_;
  const T* weight_;
  T* out_;
  Words<T>* weights_;                                // of this thread, every blockDim.x
  int x_stride_, out_stride_, cols_, first_, step_;  // in elements
};

// This rank's sums of squares of q and k from those of the block's warps, in their order.
template <typename T>
__device__ Vec<float, 2> rank_sums(const Norms<T>& norms, const float (&partial)[2 * kMaxWarps]) {
  const int q_warps = norms.q_threads / 32, k_warps = int(blockDim.x) / 32 - q_warps;
  float q = partial[0], k = partial[q_warps];
#pragma unroll
  for (int w = 1; w < kMaxWarps; ++w) {
    if (w < q_warps) q += partial[w];
    if (w < k_warps) k += partial[q_warps + w];
  }
  return {{q * norms.q.multiplier, k * norms.k.multiplier}};
}

// This rank's sums of squares of a token, in the threads of the first warp.
template <typename T, bool kWhole>
__device__ Vec<float, 2> sum_row(const Norms<T>& norms, const Share<T, kWhole>& share,
                                 std::int64_t token, const typename Share<T, kWhole>::Row& row,
                                 float (&partial)[2 * kMaxWarps]) {
  const float sum = warp_sum(share.sum_of_squares(token, row));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  return threadIdx.x < 32 ? rank_sums(norms, partial) : Vec<float, 2>{};
}

// The whole norm of all tokens on this rank. While a block waits for its peers' sums of a token,
// the next one's row is on its way. `reduced`: which of the statistics are all-reduced, those of q
// of all tokens first. (96 registers: the fastest of 64, 80 and 96
// on an H100.)
template <typename T, bool kWhole>
__global__ void __maxnreg__(96) qk_norm_kernel(Norms<T> norms, Shard reduced, Peers peers) {
  Scratch& scratch = *dynamic_shared<Scratch>();
  const int thread = int(threadIdx.x);
  const bool meets = thread < peers.tp_size;  // a rank each, all in the first warp
  const std::int64_t tokens = norms.q.x.rows, step = gridDim.x;
  const Share<T, kWhole> share(norms);
  typename Share<T, kWhole>::Row row, next;
  wait_for_previous_kernel();
  share.load_row(blockIdx.x, next);
  share.load_weights();
  PeerChannel<> channel(peers, int(blockIdx.x));
  for (std::int64_t token = blockIdx.x; token < tokens; token += step) {
    row = next;
    const Vec<float, 2> mine = sum_row(norms, share, token, row, scratch.partial);
    if (meets) channel.send(peers, thread, mine);
    if (token + step < tokens) share.load_row(token + step, next);
    if (thread < 32) {
      if (meets) scratch.received[thread] = channel.receive(peers, thread, mine);
      __syncwarp();
      if (thread < 2) {  // 0: q, 1: k
        float total = scratch.received[0][thread];
#pragma unroll 4
        for (int r = 1; r < peers.tp_size; ++r) total += scratch.received[r][thread];
        const std::int64_t statistic = thread * tokens + token - reduced.offset;
        if (statistic < 0 || statistic >= reduced.size) total = thread == 0 ? mine[0] : mine[1];
        const float divisor = thread == 0 ? norms.q.divisor : norms.k.divisor;
        scratch.inverse[thread] = inverse_root(total / divisor, norms.eps);
      }
    }
    share.wait_for_weights();
    __syncthreads();
    share.normalize(token, row, scratch.inverse[share.is_q() ? 0 : 1]);
  }
  if (thread == 0) channel.close(peers);
}

// The same in two kernels, with a collective between them. One block a token.
// sums[token] = this rank's sum of squares of q, sums[tokens + token] that of k.
template <typename T, bool kWhole>
__global__ void __launch_bounds__(2 * kMaxWarps * 32)
    sum_squares_kernel(Norms<T> norms, float* sums) {
  Scratch& scratch = *dynamic_shared<Scratch>();
  const std::int64_t token = blockIdx.x;
  const Share<T, kWhole> share(norms);
  typename Share<T, kWhole>::Row row;
  share.load_row(token, row);
  const Vec<float, 2> mine = sum_row(norms, share, token, row, scratch.partial);
  if (threadIdx.x != 0) return;
  sums[token] = mine[0];
  sums[gridDim.x + token] = mine[1];
}

template <typename T, bool kWhole>
__global__ void __launch_bounds__(2 * kMaxWarps * 32)
    normalize_kernel(Norms<T> norms, const float* sums) {
  const std::int64_t token = blockIdx.x;
  const Share<T, kWhole> share(norms);
  typename Share<T, kWhole>::Row row;
  share.load_row(token, row);
  share.load_weights();
  const float total = sums[(share.is_q() ? 0 : gridDim.x) + token];
  const float divisor = share.is_q() ? norms.q.divisor : norms.k.divisor;
  const float inverse = inverse_root(total / divisor, norms.eps);
  share.wait_for_weights();
  share.normalize(token, row, inverse);
}

template <typename T>
bool is_whole(const Norm<T>& norm) {
  return has_aligned_rows(norm.x) && has_aligned_rows(norm.out) && norm.x.cols % kWide<T> == 0 &&
         reinterpret_cast<std::uintptr_t>(norm.weight) % 16 == 0;
}

// One of the two norms of single heads.
template <typename T>
struct HeadNorm {
  View<const T> x;
  NormWeight<T> weight;  // of head_dim columns, for every head the same
  View<T> out;
  std::int64_t width;  // columns that one statistic spans: a head
};

constexpr int kHeadsPerBlock = 4;

// One warp a head: heads of q, then heads of k.
template <typename T>
__global__ void norm_heads_kernel(HeadNorm<T> q, HeadNorm<T> k, int head_dim, float eps) {
  const std::int64_t token = blockIdx.x, q_heads = q.x.cols / q.width;
  const std::int64_t head = std::int64_t{blockIdx.y} * kHeadsPerBlock + threadIdx.x / 32;
  if (head >= q_heads + k.x.cols / k.width) return;
  const HeadNorm<T>& norm = head < q_heads ? q : k;
  const std::int64_t first = (head < q_heads ? head : head - q_heads) * norm.width;
  const T* x = norm.x.data + token * norm.x.row_stride + first;
  T* out = norm.out.data + token * norm.out.row_stride + first;
  const float inverse = inverse_root(warp_sum_of_squares(x, norm.width) / float(norm.width), eps);
  const int in_head = int(first % head_dim);  // 0, where a statistic spans a head
  for (int j = int(threadIdx.x % 32); j < norm.width; j += 32) {
    const int col = in_head + j;
    const float weight = norm.weight[col < head_dim ? col : col - head_dim];
    out[j] = from_float<T>(to_float(x[j]) * inverse * weight);
  }
}

}  // namespace

namespace {

// How many blocks of the kernel that meets its peers a rank launches: nothing where they cannot
// meet. Of the same number on all ranks, whatever their rows' alignment.
template <typename T>
std::int64_t meeting_blocks(const Peers& peers, std::int64_t tokens, int threads) {
  const auto resident = [&](auto* kernel) {
    return resident_blocks("qk_norm", kernel, threads, shared_bytes(threads)) /
           peers.ranks_per_device;
  };
  const std::int64_t most = std::min(
      {peers.channels, resident(qk_norm_kernel<T, false>), resident(qk_norm_kernel<T, true>)});
  return std::min(tokens, most);
}

}  // namespace

template <typename T>
void qk_norm(View<const T> qkv, const QkNormWeights<T>& weights, View<T> q_out, View<T> k_out,
             float* sums, const ModelShape& model, const ShardingRules& rules, float eps,
             TpGroup& group, Stream& stream, QkNormPath path) {
  const int tp_size = group.tp_size(), tp_rank = group.tp_rank();
  const auto [q_cols, k_cols] =
      qk_columns("qk_norm", qkv, q_out, k_out, model, partition(model, tp_size, tp_rank));
  require(weights.q.cols == q_cols.size, "qk_norm",
          "the q_norm weight has {} elements, q has {} columns", {weights.q.cols, q_cols.size});
  require(weights.k.cols == k_cols.size, "qk_norm",
          "the k_norm weight has {} elements, k has {} columns", {weights.k.cols, k_cols.size});
  const int q_threads = 32 * warps_of(q_cols.size, kWide<T>);
  const int threads = q_threads + 32 * warps_of(k_cols.size, kWide<T>);
  // Ranks that share a KV head hold equal sums, so the total counts it once per replica, and so
  // does the divisor (sgl-project/sglang#20967 divided by the replicas, which is too little).
  const Norms<T> norms{{qkv.columns(q_cols.offset, q_cols.size), weights.q.data, q_out,
                        float(q_cols.size * rules.norm.q_shards(model, tp_size)), 1.0f},
                       {qkv.columns(k_cols.offset, k_cols.size), weights.k.data, k_out,
                        float(k_cols.size * rules.norm.k_shards(model, tp_size)),
                        rules.norm.k_counts(model, tp_size, tp_rank) ? 1.0f : 0.0f},
                       q_threads,
                       eps};
  const Shard reduced = rules.norm.stats_reduced(qkv.rows);
  const dim3 tokens(unsigned(qkv.rows)), block{unsigned(threads)};
  const bool whole = is_whole(norms.q) && is_whole(norms.k);
  const auto choose = [&](auto* of_whole, auto* of_any) { return whole ? of_whole : of_any; };

  const std::optional<Peers> peers = path == QkNormPath::peer ? group.peers(stream) : std::nullopt;
  const std::int64_t blocks = peers ? meeting_blocks<T>(*peers, qkv.rows, threads) : 0;
  if (blocks > 0) {
    group.peer_exchange<float>(reduced.size, stream);
    const auto start = [&](auto launch_it) {
      launch_it("qk_norm", choose(qk_norm_kernel<T, true>, qk_norm_kernel<T, false>),
                dim3(unsigned(blocks)), block, shared_bytes(threads), stream, norms, reduced,
                *peers);
    };
    if (tp_size == 1) {
      start([](auto&&... what) { launch_overlapping(what...); });
    } else {
      start([](auto&&... what) { launch_meeting(what...); });
    }
    group.peers_launched(stream);
    return;
  }
  launch("qk_norm.sum_squares", choose(sum_squares_kernel<T, true>, sum_squares_kernel<T, false>),
         tokens, block, shared_bytes(threads), stream, norms, sums);
  group.all_reduce_sum(sums + reduced.offset, reduced.size, stream);
  launch("qk_norm.normalize", choose(normalize_kernel<T, true>, normalize_kernel<T, false>), tokens,
         block, shared_bytes(threads), stream, norms, static_cast<const float*>(sums));
}

template <typename T>
void qk_head_norm(View<const T> qkv, const QkNormWeights<T>& weights, float weight_offset,
                  View<T> q_out, View<T> k_out, const ModelShape& model, const RankShape& rank,
                  const ShardingRules& rules, float eps, Stream& stream) {
  const auto [q_cols, k_cols] = qk_columns("qk_head_norm", qkv, q_out, k_out, model, rank);
  const auto check_weight = [&](const View<const T>& weight) {
    require(weight.data == nullptr || weight.cols == model.head_dim, "qk_head_norm",
            "the weight has {} elements, a head has {} columns", {weight.cols, model.head_dim});
  };
  check_weight(weights.q);
  check_weight(weights.k);
  const auto norm = [&](Shard cols, View<const T> weight, View<T> out, Shard heads, int all_heads) {
    const std::int64_t width = rules.norm.head_width(model.head_dim, heads.size, all_heads);
    require(width > 0 && cols.size % width == 0, "qk_head_norm",
            "{} columns are not a whole number of heads of {}", {cols.size, width});
    return HeadNorm<T>{
        qkv.columns(cols.offset, cols.size), {weight.data, weight_offset}, out, width};
  };
  const HeadNorm<T> q = norm(q_cols, weights.q, q_out, rank.heads, model.num_heads),
                    k = norm(k_cols, weights.k, k_out, rank.kv_heads, model.num_kv_heads);
  const std::int64_t heads = q.x.cols / q.width + k.x.cols / k.width;
  launch("qk_head_norm", norm_heads_kernel<T>,
         dim3(unsigned(qkv.rows), unsigned((heads + kHeadsPerBlock - 1) / kHeadsPerBlock)),
         dim3(kHeadsPerBlock * 32), 0, stream, q, k, model.head_dim, eps);
}

Profile qk_head_norm_profile(const ModelShape& model) {
  return {.depth = warp_row_sum_depth(model.head_dim),
          .all_reduce_terms = 1,
          .terms = model.head_dim,
          .rsqrt_ulps = 1};
}

QkNormProfiles qk_norm_profiles(const ModelShape& model, DType dtype, int tp_size) {
  const RankShape rank = partition(model, tp_size, 0);  // all ranks are equally wide
  const std::int64_t vector = 16 / size_of(dtype);
  const auto profile = [&](std::int64_t cols) {
    const int warps = warps_of(cols, vector);
    const std::int64_t step = 32 * warps * vector;  // what all threads take at a time
    // A thread's vectors, its warp, the warps one after another.
    return Profile{.depth = (cols + step - 1) / step * vector + kWarpSumDepth + warps - 1,
                   .all_reduce_terms = tp_size,
                   .terms = cols * tp_size,
                   .rsqrt_ulps = 1};
  };
  return {profile(rank.heads.size * model.head_dim), profile(rank.kv_heads.size * model.head_dim)};
}

template void qk_norm(View<const float>, const QkNormWeights<float>&, View<float>, View<float>,
                      float*, const ModelShape&, const ShardingRules&, float, TpGroup&, Stream&,
                      QkNormPath);
template void qk_norm(View<const f16>, const QkNormWeights<f16>&, View<f16>, View<f16>, float*,
                      const ModelShape&, const ShardingRules&, float, TpGroup&, Stream&,
                      QkNormPath);
template void qk_norm(View<const bf16>, const QkNormWeights<bf16>&, View<bf16>, View<bf16>, float*,
                      const ModelShape&, const ShardingRules&, float, TpGroup&, Stream&,
                      QkNormPath);
template void qk_head_norm(View<const float>, const QkNormWeights<float>&, float, View<float>,
                           View<float>, const ModelShape&, const RankShape&, const ShardingRules&,
                           float, Stream&);
template void qk_head_norm(View<const f16>, const QkNormWeights<f16>&, float, View<f16>, View<f16>,
                           const ModelShape&, const RankShape&, const ShardingRules&, float,
                           Stream&);
template void qk_head_norm(View<const bf16>, const QkNormWeights<bf16>&, float, View<bf16>,
                           View<bf16>, const ModelShape&, const RankShape&, const ShardingRules&,
                           float, Stream&);

}  // namespace tp
