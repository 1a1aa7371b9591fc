#include <algorithm>
#include <cmath>
#include <type_traits>

#include "harness/device/require.h"
#include "kernels/attention.h"
#include "kernels/attention_choice.h"
#include "kernels/attention_decode.cuh"
#include "kernels/attention_matrix.cuh"
#include "kernels/attention_plain.cuh"
#include "kernels/attention_prefill.cuh"

namespace tp {

namespace {

constexpr int kMaxWarps = 4;
constexpr int kPlainRows = 4;  // of a warp in fp32

// Measured on an H100: of prefill, shapes of 16 rows a warp, of 32 keys a tile and with more in
// flight were all slower; of decode, more stages or keys a tile changed little.
using Prefill = PrefillShape<4, 2, 64, 2, 2>;
using Decode = DecodeShape<4, 16, 3, 2>;

// Splits that the kernel chooses: enough blocks for the chip's 132 multiprocessors, and not more
// than there are keys worth a block.
constexpr std::int64_t kBlocksOfChip = 132, kLeastOfSplit = 64;

std::int64_t largest(const std::vector<std::int32_t>& values) {
  return values.empty() ? 0 : *std::max_element(values.begin(), values.end());
}

bool is_multiple(const void* address, std::size_t bytes) {
  return reinterpret_cast<std::uintptr_t>(address) % bytes == 0;
}

template <typename T>
bool whole_vectors(const View<const T>& x, std::int64_t head_cols) {
  constexpr std::int64_t kVector = 16 / sizeof(T);
  return is_multiple(x.data, 16) && x.row_stride % kVector == 0 && head_cols % kVector == 0;
}

// Whether some element of `a` is one of `b`. Columns beside each other in the same rows are not.
template <typename A, typename B>
bool overlap(const View<A>& a, const View<B>& b) {
  if (a.rows < 1 || b.rows < 1) return false;
  const auto begin = [](const auto& x) { return reinterpret_cast<std::intptr_t>(x.data); };
  const auto end = [](const auto& x) {
    return reinterpret_cast<std::intptr_t>(x.data + (x.rows - 1) * x.row_stride + x.cols);
  };
  if (end(a) <= begin(b) || end(b) <= begin(a)) return false;
  const std::int64_t stride = a.row_stride * std::int64_t(sizeof(A));
  if (stride != b.row_stride * std::int64_t(sizeof(B))) return true;
  const std::int64_t apart = ((begin(b) - begin(a)) % stride + stride) % stride;
  return apart < a.cols * std::int64_t(sizeof(A)) ||
         apart + b.cols * std::int64_t(sizeof(B)) > stride;
}

// What the kernels would read beyond.
void check_batch(const AttentionBatch& b, std::int64_t tokens, std::int64_t rows) {
  const char* op = "attention";
  const std::int64_t n = b.sequences();
  require(n >= 1 && std::int64_t(b.query_start.size()) == n + 1, op,
          "{} lengths of keys, but {} borders between the queries of sequences",
          {n, std::int64_t(b.query_start.size())});
  require(b.query_start.front() == 0 && b.query_start.back() == tokens, op,
          "the sequences' queries are rows {} .. {}, q has {}",
          {b.query_start.front(), b.query_start.back(), tokens});
  require(b.page_size >= 0 && b.page_size <= 64, op, "a page of {} keys is not 1 to 64",
          {b.page_size});
  require(b.pages_per_sequence >= 1 && std::int64_t(b.table.size()) == n * b.pages_per_sequence, op,
          "the page table has {} entries, {} sequences of {} pages need {}",
          {std::int64_t(b.table.size()), n, b.pages_per_sequence, n * b.pages_per_sequence});
  for (std::int64_t s = 0; s < n; ++s) {
    const std::int64_t length = b.kv_len[std::size_t(s)],
                       queries = b.query_start[std::size_t(s + 1)] - b.query_start[std::size_t(s)];
    require(queries >= 0 && length >= 0, op, "sequence {} has {} queries and {} keys",
            {s, queries, length});
    const std::int32_t* entries = b.table.data() + s * b.pages_per_sequence;
    if (b.page_size == 0) {
      require(entries[0] >= 0 && entries[0] + length <= rows, op,
              "sequence {} has keys in rows {} .. {}, k and v have {}",
              {s, entries[0], entries[0] + length, rows});
      continue;
    }
    require(length <= b.pages_per_sequence * b.page_size, op,
            "sequence {} has {} keys, its {} pages of {} hold {}",
            {s, length, b.pages_per_sequence, b.page_size, b.pages_per_sequence * b.page_size});
    for (std::int64_t i = 0; i * b.page_size < length; ++i) {
      require(entries[i] >= 0 && entries[i] < rows / b.page_size, op,
              "page {} of sequence {} is page {} of a pool of {}",
              {i, s, entries[i], rows / b.page_size});
    }
  }
}

template <typename T>
void check_tensors(const AttentionTensors<T>& t, const ModelShape& model, HeadCounts counts,
                   std::int64_t kv_heads_needed) {
  const char* op = "attention";
  const std::int64_t dim = model.head_dim, v_dim = model.value_head_dim();
  require(dim >= 1 && dim <= kMaxAttentionHeadDim && v_dim >= 1 && v_dim <= kMaxAttentionHeadDim,
          op, "heads of {} and value heads of {} columns are not 1 to {}",
          {dim, v_dim, kMaxAttentionHeadDim});
  require(t.q.cols == counts.heads * dim, op, "q has {} columns, {} heads of {} need {}",
          {t.q.cols, counts.heads, dim, counts.heads * dim});
  require(t.k.cols >= kv_heads_needed * dim && t.v.cols >= kv_heads_needed * v_dim, op,
          "k and v have {} and {} columns, {} KV heads of {} and {} are read",
          {t.k.cols, t.v.cols, kv_heads_needed, dim, v_dim});
  require(t.k.rows == t.v.rows, op, "k has {} rows, v has {}", {t.k.rows, t.v.rows});
  require(t.out.rows == t.q.rows && t.out.cols == counts.heads * v_dim, op,
          "the output is {} x {}, not {} x {}",
          {t.out.rows, t.out.cols, t.q.rows, counts.heads * v_dim});
  require(t.lse.rows == t.q.rows && t.lse.cols == counts.heads, op,
          "the log-sum-exp is {} x {}, not {} x {}",
          {t.lse.rows, t.lse.cols, t.q.rows, counts.heads});
  require(t.q.row_stride >= t.q.cols && t.k.row_stride >= t.k.cols && t.v.row_stride >= t.v.cols &&
              t.out.row_stride >= t.out.cols && t.lse.row_stride >= t.lse.cols,
          op,
          "rows of q, k, v, the output and the log-sum-exp are {}, {}, {}, {} and {} apart, "
          "less than they are wide",
          {t.q.row_stride, t.k.row_stride, t.v.row_stride, t.out.row_stride, t.lse.row_stride});
  require(!overlap(t.out, t.q) && !overlap(t.out, t.k) && !overlap(t.out, t.v) &&
              !overlap(t.lse, t.q) && !overlap(t.lse, t.k) && !overlap(t.lse, t.v) &&
              !overlap(t.lse, t.out),
          op, "the output or the log-sum-exp overlaps q, k, v or each other ({} rows)",
          {t.out.rows});
}

template <typename T, int kTile, int kMaxDim, bool kExact = false>
void launch_matrix(const AttentionLaunch<T>& a, dim3 grid, int warps, Stream& stream) {
  launch("attention", attention_matrix_kernel<T, kTile, kMaxDim, kExact>, grid,
         dim3(unsigned(32 * warps)),
         std::size_t(matrix_shared_bytes<kTile>(a.dim, a.v_dim, a.rows_of_block)), stream, a);
}

// Widths of heads that prefill and decode are made for.
template <typename F>
void with_dim(int dim, const F& f) {
  if (dim == 32) f(std::integral_constant<int, 32>{});
  if (dim == 64) f(std::integral_constant<int, 64>{});
  if (dim == 128) f(std::integral_constant<int, 128>{});
}

template <typename T, int kDim>
void launch_prefill(const AttentionLaunch<T>& a, dim3 grid, Stream& stream) {
  launch("attention", attention_prefill_kernel<T, kDim, Prefill>, grid, dim3(Prefill::kThreads),
         prefill_shared_bytes<T, kDim, Prefill>(), stream, a);
}
template <typename T, int kDim>
void launch_decode(const AttentionLaunch<T>& a, std::int64_t sequences, Stream& stream) {
  const dim3 grid(unsigned(a.splits), unsigned(a.heads / a.group), unsigned(sequences));
  launch("attention", attention_decode_kernel<T, kDim, Decode>, grid, dim3(Decode::kThreads),
         decode_shared_bytes<T, kDim, Decode>(), stream, a);
}

template <typename T>
void launch_merge(const AttentionLaunch<T>& a, bool aligned, Stream& stream) {
  const int warps = (a.splits + kMergedByWarp - 1) / kMergedByWarp;
  const std::size_t shared = warps > 1 ? std::size_t(warps * a.v_dim) * sizeof(float) : 0;
  const dim3 grid(unsigned(a.q.rows), unsigned(a.heads)), block(unsigned(32 * warps));
  launch_overlapping("attention.merge",
                     aligned && a.v_dim % 4 == 0 ? merge_kernel<T, 4> : merge_kernel<T, 1>, grid,
                     block, shared, stream, a);
}

template <typename T, int kRows>
void launch_plain(const AttentionLaunch<T>& a, dim3 grid, int warps, Stream& stream) {
  launch("attention", attention_plain_kernel<T, kRows>, grid, dim3(unsigned(32 * warps)),
         std::size_t(plain_shared_floats(a.dim, a.v_dim, warps, kRows)) * sizeof(float), stream, a);
}

}  // namespace

std::int64_t most_visible(std::int64_t max_kv_len, const AttentionSettings& s) {
  if (!s.window || *s.window >= max_kv_len) return max_kv_len;
  return std::min(max_kv_len, s.causal ? *s.window : 2 * *s.window - 1);
}

AttentionChoice choose_attention(DType dtype, const ModelShape& model, std::int64_t group,
                                 std::int64_t max_queries, std::int64_t visible, bool simple) {
  const std::int64_t pack = max_queries * group;
  const int dim = model.head_dim, v_dim = model.value_head_dim();
  const auto warps_of = [pack](int rows) {
    return int(std::clamp<std::int64_t>((pack + rows - 1) / rows, 1, kMaxWarps));
  };
  if (dtype == DType::f32) {
    const int of_warp = pack >= kPlainRows ? kPlainRows : 1, warps = warps_of(of_warp);
    return {AttentionKernel::plain, kPlainTile, warps * of_warp, warps};
  }
  if (simple && dim == v_dim && (dim == 32 || dim == 64 || dim == 128)) {
    if (pack <= kDecodeRows && visible > Decode::kKeys)
      return {AttentionKernel::decode, Decode::kKeys, kDecodeRows, Decode::kWarps};
    if (pack > kDecodeRows && visible > 32)
      return {AttentionKernel::prefill, Prefill::kTile, Prefill::kRows, Prefill::kWarps};
  }
  // Tiles are short where few keys are visible, and where heads are wide, since a tile's rows fill
  // shared memory. Where there is much to read, warps without rows of their own help to bring it.
  const int tile = visible <= 32 ? 16 : std::max(dim, v_dim) > 128 ? 32 : 64, warps = warps_of(16);
  return {AttentionKernel::matrix, tile, 16 * warps, visible > 256 ? kMaxWarps : warps};
}

std::int64_t AttentionBatch::max_queries() const {
  std::int64_t most = 0;
  for (std::size_t s = 0; s + 1 < query_start.size(); ++s)
    most = std::max<std::int64_t>(most, query_start[s + 1] - query_start[s]);
  return most;
}
std::int64_t AttentionBatch::max_kv_len() const { return largest(kv_len); }

std::int64_t attention_workspace(std::int64_t tokens, const ModelShape& model, int tp_size,
                                 std::int64_t splits) {
  if (splits == 1) return 1;
  const std::int64_t heads = partition(model, tp_size, 0).heads.size;
  return splits * tokens * heads * (model.value_head_dim() + 1);
}

std::int64_t attention_splits(DType dtype, const ModelShape& model, int tp_size,
                              const AttentionBatch& batch, const AttentionSettings& settings) {
  if (settings.splits > 0) return settings.splits;
  const RankShape rank = partition(model, tp_size, 0);
  const std::int64_t group = rank.heads.size / rank.kv_heads.size,
                     visible = most_visible(batch.max_kv_len(), settings);
  const AttentionChoice choice =
      choose_attention(dtype, model, group, batch.max_queries(), visible, true);
  const std::int64_t row_blocks =
      std::max<std::int64_t>(1, (batch.max_queries() * group + choice.rows - 1) / choice.rows);
  const std::int64_t blocks = rank.kv_heads.size * batch.sequences() * row_blocks;
  return std::clamp<std::int64_t>(
      kBlocksOfChip / blocks, 1,
      std::clamp<std::int64_t>(visible / kLeastOfSplit, 1, kMaxAttentionSplits));
}

AttentionProfile attention_profile(DType dtype, const ModelShape& model, int tp_size,
                                   const AttentionBatch& batch, const AttentionSettings& settings) {
  const RankShape rank = partition(model, tp_size, 0);
  const std::int64_t group = rank.heads.size / rank.kv_heads.size,
                     visible = most_visible(batch.max_kv_len(), settings);
  // Logits that are not simple are for another kernel: it has tiles of the same length where there
  // is a choice, and no meeting of warps.
  const AttentionChoice choice =
      choose_attention(dtype, model, group, batch.max_queries(), visible, true);
  const int tile = choice.tile;
  const bool matrix = dtype != DType::f32;
  // A row's keys can begin and end within a tile, whose other keys take part with weight 0.
  const std::int64_t tiles = (visible + tile - 1) / tile + 1, keys = tiles * tile;
  return {
      .qk = {.depth = matrix ? (model.head_dim + 15) / 16 : model.head_dim, .matrix_steps = matrix},
      .pv = {.depth = matrix ? keys / 16 : keys, .matrix_steps = matrix},
      // A lane's own columns of all tiles and then four lanes; or a warp for each tile.
      .sum_depth = matrix ? keys / 4 + 2 : tiles + kWarpSumDepth,
      .p = dtype,
      .kv_tile = tile,
      .merges = choice.kernel == AttentionKernel::decode ? 1 : 0,
      .splits = int(settings.splits)};
}

template <typename T>
void attention(const AttentionTensors<T>& t, const AttentionBatch& batch,
               const AttentionSettings& settings, const ModelShape& model,
               const ShardingRules& rules, int tp_size, int tp_rank, Stream& stream) {
  const AttentionRules& r = rules.attention;
  const char* op = "attention";
  AttentionSettings s = settings;
  const HeadCounts counts = r.heads(model, tp_size);
  const KvHeadMap map = r.kv_heads(model, tp_size, tp_rank, s.whole_cache);
  require(map.group >= 1 && counts.heads % map.group == 0, op,
          "{} query heads do not share KV heads in groups of {}", {counts.heads, map.group});
  const std::int64_t kv_heads = counts.heads / map.group;
  check_tensors(t, model, counts, map.first + kv_heads);
  check_batch(batch, t.q.rows, t.k.rows);
  require(!s.window || *s.window >= 1, op, "a window of {} keys is below 1",
          {s.window.value_or(0)});
  require(s.splits >= 1 && s.splits <= kMaxAttentionSplits && counts.heads <= 65535 &&
              batch.sequences() <= 65535,
          op, "{} splits of {} KV heads of {} sequences", {s.splits, kv_heads, batch.sequences()});
  require(s.splits == 1 || t.workspace != nullptr, op, "{} splits without a workspace", {s.splits});
  if (t.q.rows == 0) return;

  const std::int64_t max_keys = batch.max_kv_len(), max_queries = batch.max_queries();
  // A window as wide as the whole batch is none, and no position is beyond 32 bits.
  if (s.window) s.window = std::min(*s.window, max_keys + max_queries);
  const std::int64_t visible = most_visible(max_keys, s);
  constexpr DType kType = dtype_of<T>::value;
  const std::int64_t pages =
      batch.page_size == 0 ? 1 : (max_keys + batch.page_size - 1) / batch.page_size;
  AttentionLaunch<T> a{
      .q = t.q,
      .k = t.k,
      .v = t.v,
      .sinks = t.sinks,
      .slopes = t.slopes,
      .out = t.out,
      .lse = t.lse,
      .parts = t.workspace,
      .query_start = batch.device.query_start,
      .kv_len = batch.device.kv_len,
      .table = batch.device.table,
      .table_stride = r.table_stride(batch.pages_per_sequence, std::max<std::int64_t>(1, pages)),
      .page_size = std::int32_t(batch.page_size),
      .page_divisor = Divisor(std::max<std::int64_t>(1, batch.page_size)),
      .offset_bits = r.offset_bits,
      .stale_pages = r.stale_pages,
      .dim = model.head_dim,
      .v_dim = model.value_head_dim(),
      .v_head_stride = int(r.v_head_stride(model)),
      .heads = int(counts.heads),
      .group = int(map.group),
      .first_kv_head = int(map.first),
      .group_divisor = Divisor(map.group),
      .splits = int(s.splits),
      .causal = s.causal,
      .causal_ahead = int(r.causal_ahead),
      .behind_context = r.behind_context,
      .length_unit = int(r.length_unit(batch.page_size)),
      .window_left = s.window ? int(r.window_left(*s.window, max_queries <= 1)) : -1,
      .window_right = s.window ? int(r.window_right(*s.window, s.causal)) : -1,
      .scale = float(r.scale(s.scale, model)),
      .softcap = float(s.softcap),
      .hidden_logit = r.hidden_logit,
      .empty_maximum = r.empty_maximum,
      .lse_unit = r.lse_unit};
  // The strides that the views are taken to have.
  a.q.row_stride = r.row_stride(t.q.row_stride, t.q.cols);
  a.k.row_stride = r.row_stride(t.k.row_stride, t.k.cols);
  a.v.row_stride = r.row_stride(t.v.row_stride, t.v.cols);
  a.vectors = whole_vectors(a.q, a.dim) && whole_vectors(a.k, a.dim) &&
              whole_vectors(a.v, a.v_dim) && a.v_head_stride % 8 == 0;

  a.pairs = a.v_dim % 2 == 0 && a.out.row_stride % 2 == 0 &&
            is_multiple(t.out.data, 2 * sizeof(T)) && is_multiple(t.workspace, 8);

  const auto [kernel, tile, rows, warps] =
      choose_attention(kType, model, map.group, max_queries, visible,
                       a.softcap == 0.0f && a.slopes == nullptr && a.scale > 0.0f);
  a.tile = tile;
  a.rows_of_block = rows;
  // The rows of a block see `visible` keys each, from as many different positions as they have
  // queries.
  const std::int64_t spread = std::min(max_queries, (rows + map.group - 1) / map.group + 1);
  const std::int64_t tiles =
      r.tiles_of(std::min(max_keys, visible + spread), tile, s.window.has_value());
  a.tiles_of_split = int(r.tiles_of_split(tiles, s.splits));

  const std::int64_t pack = max_queries * map.group,
                     row_blocks = std::max<std::int64_t>(1, (pack + rows - 1) / rows);
  const dim3 grid(unsigned(row_blocks * kv_heads * s.splits), unsigned(batch.sequences()));
  if constexpr (kType == DType::f32) {
    rows == warps ? launch_plain<T, 1>(a, grid, warps, stream)
                  : launch_plain<T, kPlainRows>(a, grid, warps, stream);
  } else if (kernel == AttentionKernel::prefill) {
    with_dim(a.dim, [&](auto dim) { launch_prefill<T, dim()>(a, grid, stream); });
  } else if (kernel == AttentionKernel::decode) {
    with_dim(a.dim, [&](auto dim) { launch_decode<T, dim()>(a, batch.sequences(), stream); });
  } else if (tile == 16) {
    a.v_dim <= 64 ? launch_matrix<T, 16, 64>(a, grid, warps, stream)
                  : launch_matrix<T, 16, 256>(a, grid, warps, stream);
  } else if (tile == 32) {
    launch_matrix<T, 32, 256>(a, grid, warps, stream);
  } else if (a.dim == 128 && a.v_dim == 128) {
    launch_matrix<T, 64, 128, true>(a, grid, warps, stream);
  } else {
    launch_matrix<T, 64, 128>(a, grid, warps, stream);
  }
  if (s.splits > 1) launch_merge(a, is_multiple(t.workspace, 16), stream);
}

template void attention(const AttentionTensors<float>&, const AttentionBatch&,
                        const AttentionSettings&, const ModelShape&, const ShardingRules&, int, int,
                        Stream&);
template void attention(const AttentionTensors<f16>&, const AttentionBatch&,
                        const AttentionSettings&, const ModelShape&, const ShardingRules&, int, int,
                        Stream&);
template void attention(const AttentionTensors<bf16>&, const AttentionBatch&,
                        const AttentionSettings&, const ModelShape&, const ShardingRules&, int, int,
                        Stream&);

}  // namespace tp
