// The two kernels against plain loops: exact data bit by bit, for segments that end on no tile,
// LoRA ranks that end on no step, any strides; with NaN wherever nothing may be read. Dense data
// within the declared errors, and the same bits whatever else is in the batch.

#include "kernels/lora.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "harness/device/testing.h"
#include "reference/product.h"

namespace tp {
namespace {

using testing::download;
using testing::fault_of;
using testing::run_rank;
using testing::upload;

// A matrix in a buffer of NaN: its rows begin anywhere, and lie apart.
template <typename V>
struct Host {
  std::int64_t rows, cols, offset, stride;
  std::vector<V> values;

  Host(std::int64_t rows, std::int64_t cols, std::int64_t offset = 0, std::int64_t pad = 0)
      : rows(rows),
        cols(cols),
        offset(offset),
        stride(cols + pad),
        values(std::size_t(offset + rows * stride)) {
    std::memset(static_cast<void*>(values.data()), 0xFF, values.size() * sizeof(V));
  }
  V& at(std::int64_t i, std::int64_t j) { return values[std::size_t(offset + i * stride + j)]; }
  const V& at(std::int64_t i, std::int64_t j) const {
    return values[std::size_t(offset + i * stride + j)];
  }
  View<V> on(const Buffer& buffer) const { return {buffer.as<V>() + offset, rows, cols, stride}; }

  // Elsewhere everything is as it was.
  void expect_pads_untouched() const {
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::int64_t at = std::int64_t(i) - offset;
      if (at < 0 || at % stride >= cols) {
        ASSERT_TRUE(std::isnan(to_float(values[i]))) << "element " << i;
      }
    }
  }
};

// Shrunk activations likewise, in one of the ways that a layer may lay them out.
enum class Layout { dense, tokens_outside, columns_apart };

std::uint32_t as_bits(float value) { return std::bit_cast<std::uint32_t>(value); }

template <typename H>
struct HostShrunk {
  std::int64_t parts, tokens, cols;
  LoraIntermediate<H> strides;
  std::vector<H> values;

  HostShrunk(std::int64_t parts, std::int64_t tokens, std::int64_t cols, Layout layout)
      : parts(parts), tokens(tokens), cols(cols) {
    strides.tokens = tokens;
    strides.cols = cols;
    switch (layout) {
      case Layout::dense:
        strides.token_stride = cols;
        strides.part_stride = tokens * cols;
        break;
      case Layout::tokens_outside:
        strides.part_stride = cols + 3;
        strides.token_stride = parts * strides.part_stride + 1;
        break;
      case Layout::columns_apart:
        strides.col_stride = tokens + 2;
        strides.token_stride = 1;
        strides.part_stride = cols * strides.col_stride + 5;
        break;
    }
    values.resize(std::size_t(index(parts - 1, tokens - 1, cols - 1) + 2));
    std::memset(static_cast<void*>(values.data()), 0xFF, values.size() * sizeof(H));
  }
  std::int64_t index(std::int64_t p, std::int64_t t, std::int64_t j) const {
    return p * strides.part_stride + t * strides.token_stride + j * strides.col_stride;
  }
  H& at(std::int64_t p, std::int64_t t, std::int64_t j) {
    return values[std::size_t(index(p, t, j))];
  }
  template <typename V>
  LoraIntermediate<V> on(const Buffer& buffer) const {
    return {buffer.as<H>(),    tokens, cols, strides.part_stride, strides.token_stride,
            strides.col_stride};
  }
};

// Slots in device memory.
struct OnDevice {
  Buffer order, tiles, ranks, scales;
  LoraBatch batch;

  OnDevice(Stream& stream, const LoraPlan& plan, const std::vector<std::int32_t>& slot_ranks,
           const std::vector<float>& slot_scales, std::int32_t slots)
      : order(upload(stream, plan.order)),
        tiles(upload(stream, plan.tiles)),
        ranks(upload(stream, slot_ranks)),
        scales(upload(stream, slot_scales)),
        batch{.order = order.as<std::int32_t>(),
              .tiles = tiles.as<LoraTile>(),
              .num_tiles = std::int32_t(plan.tiles.size()),
              .ranks = ranks.as<std::int32_t>(),
              .scales = scales.as<float>(),
              .slots = slots,
              .parts = std::int32_t(slot_ranks.size()) / slots} {}
};

// How many tokens each slot has; the last number is of those that have no adapter.
using Segments = std::vector<int>;

// The tokens in no order.
std::vector<std::int32_t> slots_of_tokens(const Segments& segments) {
  std::vector<std::int32_t> slots;
  for (std::size_t s = 0; s < segments.size(); ++s) {
    const auto slot = s + 1 == segments.size() ? -1 : std::int32_t(s);
    slots.insert(slots.end(), std::size_t(segments[s]), slot);
  }
  std::shuffle(slots.begin(), slots.end(), std::mt19937(unsigned(slots.size())));
  return slots;
}

struct Adapters {
  Segments segments;
  std::int64_t max_rank;
  std::vector<std::int32_t> ranks;  // [slots][parts]

  std::int32_t slots() const { return std::int32_t(segments.size()) - 1; }
  std::int64_t parts() const { return std::int64_t(ranks.size()) / slots(); }
  std::int64_t rank(std::int64_t slot, std::int64_t part) const {
    return ranks[std::size_t(slot * parts() + part)];
  }
};

const Adapters kAdapters[] = {
    {{1, 0}, 1, {1}},
    {{2, 3, 0, 1}, 8, {8, 3, 0, 1, 8, 8, 5, 0, 8}},  // a slot that no token has
    {{15, 16, 17, 4}, 16, {16, 1, 3, 16, 9, 16}},
    {{40, 5, 19}, 64, {64, 0, 16, 33}},
    {{100, 3}, 24, {17, 24, 3}},
    {{0, 2, 20}, 20, {20, 7, 1, 20}},  // only few have one
};

std::string describe(const Adapters& adapters) {
  std::string text = "segments";
  for (const int tokens : adapters.segments) text += " " + std::to_string(tokens);
  return text + ", LoRA ranks up to " + std::to_string(adapters.max_rank);
}

// ---- Shrink.

template <typename T, typename H>
struct OneShrink {
  Adapters adapters;
  std::vector<std::int32_t> slot_of_token;
  std::int64_t first_col;
  Host<T> x, a;
  HostShrunk<H> h;

  // The slots' A has `cols` rows for each matrix, from `first_col` of the adapters' on.
  template <typename Draw>
  OneShrink(const Adapters& adapters, std::int64_t in, std::int64_t first_col, std::int64_t cols,
            std::int64_t offset, std::int64_t pad, Layout layout, Draw draw)
      : adapters(adapters),
        slot_of_token(slots_of_tokens(adapters.segments)),
        first_col(first_col),
        x(std::int64_t(slot_of_token.size()), in, offset, pad),
        a(adapters.slots() * adapters.parts() * cols, in, offset, pad),
        h(adapters.parts(), x.rows, cols, layout) {
    for (std::int64_t t = 0; t < x.rows; ++t) {
      const std::int32_t slot = slot_of_token[std::size_t(t)];
      for (std::int64_t k = 0; slot >= 0 && k < in; ++k) x.at(t, k) = from_float<T>(draw());
    }
    for (std::int32_t slot = 0; slot < adapters.slots(); ++slot) {
      if (adapters.segments[std::size_t(slot)] == 0) continue;
      for (std::int64_t p = 0; p < adapters.parts(); ++p) {
        for (std::int64_t j = 0; j < cols && first_col + j < adapters.rank(slot, p); ++j)
          for (std::int64_t k = 0; k < in; ++k) a.at(a_row(slot, p, j), k) = from_float<T>(draw());
      }
    }
  }
  std::int64_t a_row(std::int64_t slot, std::int64_t p, std::int64_t j) const {
    return (slot * adapters.parts() + p) * h.cols + j;
  }
  void go() {
    const Report report = run_rank([&](Stream& stream) {
      const OnDevice on(stream, lora_plan(slot_of_token, adapters.slots()), adapters.ranks,
                        std::vector<float>(adapters.ranks.size(), NAN), adapters.slots());
      const Buffer xs = upload(stream, x.values), as = upload(stream, a.values),
                   hs = upload(stream, h.values);
      lora_shrink<T, H>(x.on(xs), a.on(as), on.batch, first_col, h.template on<H>(hs), stream);
      h.values = download<H>(stream, hs);
    });
    ASSERT_FALSE(report.fault) << report.fault->what;
  }
  void expect_exact() {
    std::size_t written = 0;
    for (std::int64_t p = 0; p < h.parts; ++p) {
      for (std::int64_t t = 0; t < h.tokens; ++t) {
        const std::int32_t slot = slot_of_token[std::size_t(t)];
        for (std::int64_t j = 0; j < h.cols; ++j, ++written) {
          double sum = 0;
          const bool is_there = slot >= 0 && first_col + j < adapters.rank(slot, p);
          for (std::int64_t k = 0; is_there && k < x.cols; ++k)
            sum += double(to_float(x.at(t, k))) * double(to_float(a.at(a_row(slot, p, j), k)));
          ASSERT_EQ(double(float(sum)), sum) << "the test's own data are not exact";
          ASSERT_EQ(to_float(h.at(p, t, j)), to_float(from_float<H>(float(sum))))
              << "matrix " << p << ", token " << t << " of slot " << slot << ", LoRA rank " << j;
        }
      }
    }
    const auto is_nan = [](H value) { return std::isnan(to_float(value)); };
    ASSERT_EQ(std::size_t(std::count_if(h.values.begin(), h.values.end(), is_nan)),
              h.values.size() - written);
  }
};

auto small_numbers(unsigned seed) {
  return [generator = std::mt19937(seed)]() mutable { return float(int(generator() % 7) - 3); };
}
auto dense_numbers(unsigned seed) {
  return [generator = std::mt19937(seed), normal = std::normal_distribution<float>()]() mutable {
    return normal(generator);
  };
}

template <typename T, typename H>
void expect_exact_shrink() {
  struct Case {
    std::int64_t in, offset, pad;
    Layout layout;
  };
  const Case cases[] = {{8, 0, 0, Layout::dense},           {1, 1, 2, Layout::columns_apart},
                        {64, 0, 8, Layout::tokens_outside}, {77, 3, 4, Layout::dense},
                        {296, 8, 8, Layout::columns_apart}, {2100, 0, 4, Layout::dense}};
  for (const Adapters& adapters : kAdapters) {
    for (const Case& c : cases) {
      SCOPED_TRACE(::testing::Message() << describe(adapters) << ", " << c.in << " columns");
      OneShrink<T, H> run(adapters, c.in, 0, adapters.max_rank, c.offset, c.pad, c.layout,
                          small_numbers(7));
      run.go();
      run.expect_exact();
    }
    // A rank's share of the LoRA ranks.
    for (std::int64_t cols = 3, first = 0; first < adapters.max_rank; first += cols) {
      SCOPED_TRACE(::testing::Message() << describe(adapters) << ", from " << first << " on");
      OneShrink<T, H> run(adapters, 40, first, cols, 0, 0, Layout::dense, small_numbers(8));
      run.go();
      run.expect_exact();
    }
  }
}

TEST(LoraShrink, IsExactForExactData) {
  expect_exact_shrink<float, float>();
  expect_exact_shrink<f16, f16>();
  expect_exact_shrink<f16, float>();
  expect_exact_shrink<bf16, bf16>();
  expect_exact_shrink<bf16, float>();
}

template <typename V>
Matrix matrix_of(const Host<V>& m, std::int64_t first, std::int64_t rows) {
  Matrix out(rows, m.cols);
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t j = 0; j < m.cols; ++j) out.row(i)[j] = to_float(m.at(first + i, j));
  return out;
}

// Of either path, and of any number of warps.
template <typename T>
void expect_declared_shrink() {
  for (const int tokens : {1, 2, 16}) {
    for (const std::int64_t in : {5, 40, 250, 700, 3000}) {
      SCOPED_TRACE(::testing::Message() << tokens << " tokens, " << in << " columns");
      OneShrink<T, float> run({{tokens, 0}, 12, {12}}, in, 0, 12, 0, 0, Layout::dense,
                              dense_numbers(unsigned(in)));
      run.go();
      const Budget budget =
          reference::product(matrix_of(run.x, 0, tokens), matrix_of(run.a, 0, 12), {0, in}, nullptr,
                             lora_shrink_accumulation(dtype_of<T>::value, in), false);
      const Comparison c = compare(DType::f32, run.h.values.data(), budget);
      EXPECT_FALSE(c.first) << c.first->row << "," << c.first->col << " of " << c.first->count;
      if (in >= 250) {
        EXPECT_GT(c.score, 0);
      }
    }
  }
}

TEST(LoraShrink, IsAsPreciseAsDeclared) {
  expect_declared_shrink<float>();
  expect_declared_shrink<f16>();
  expect_declared_shrink<bf16>();
}

// ---- Expand.

template <typename T, typename H, typename Out>
struct OneExpand {
  Adapters adapters;
  std::vector<std::int32_t> slot_of_token;
  LoraColumns columns;
  bool in_place;
  std::vector<float> scales;
  HostShrunk<H> h;
  Host<T> b, bias;
  Host<Out> base, y;

  template <typename Draw>
  OneExpand(const Adapters& adapters, const LoraColumns& columns, std::int64_t y_cols,
            bool has_bias, bool in_place, std::int64_t offset, std::int64_t pad, Layout layout,
            Draw draw)
      : adapters(adapters),
        slot_of_token(slots_of_tokens(adapters.segments)),
        columns(columns),
        in_place(in_place),
        h(adapters.parts(), std::int64_t(slot_of_token.size()), adapters.max_rank, layout),
        b(adapters.slots() * slot_rows(), adapters.max_rank, offset, pad),
        bias(has_bias ? adapters.slots() : 0, slot_rows(), 1, 1),
        base(h.tokens, y_cols, offset, pad),
        y(h.tokens, y_cols, in_place ? offset : 0, in_place ? pad : 3) {
    const float powers[] = {0.5f, 2.0f, -1.0f, 0.25f};
    for (std::size_t i = 0; i < adapters.ranks.size(); ++i)
      scales.push_back(adapters.ranks[i] == 0 ? NAN : powers[i % 4]);
    for (std::int64_t t = 0; t < h.tokens; ++t) {
      for (std::int64_t c = 0; c < y_cols; ++c) base.at(t, c) = from_float<Out>(draw());
      const std::int32_t slot = slot_of_token[std::size_t(t)];
      for (std::int64_t p = 0; slot >= 0 && p < h.parts; ++p)
        for (std::int64_t j = 0; j < adapters.rank(slot, p); ++j)
          h.at(p, t, j) = from_float<H>(draw());
    }
    for (std::int32_t slot = 0; slot < adapters.slots(); ++slot) {
      if (adapters.segments[std::size_t(slot)] == 0) continue;
      for (std::int64_t p = 0; p < h.parts; ++p) {
        for (std::int64_t n = 0; n < columns.rows[p] && adapters.rank(slot, p) > 0; ++n) {
          for (std::int64_t j = 0; j < adapters.rank(slot, p); ++j)
            b.at(slot * slot_rows() + b_row(p, n), j) = from_float<T>(draw());
          if (has_bias) bias.at(slot, b_row(p, n)) = from_float<T>(draw());
        }
      }
    }
    if (in_place) y.values = base.values;
  }
  std::int64_t slot_rows() const {
    std::int64_t rows = 0;
    for (int p = 0; p < columns.parts; ++p) rows += columns.rows[p];
    return rows;
  }
  std::int64_t b_row(std::int64_t part, std::int64_t n) const {
    for (std::int64_t p = 0; p < part; ++p) n += columns.rows[p];
    return n;
  }
  void go() {
    const Report report = run_rank([&](Stream& stream) {
      const OnDevice on(stream, lora_plan(slot_of_token, adapters.slots()), adapters.ranks, scales,
                        adapters.slots());
      const Buffer hs = upload(stream, h.values), bs = upload(stream, b.values),
                   biases = upload(stream, bias.values), bases = upload(stream, base.values),
                   ys = upload(stream, y.values);
      lora_expand<T, H, Out>(h.template on<const H>(hs), b.on(bs), bias.on(biases), on.batch,
                             columns, base.on(in_place ? ys : bases), y.on(ys), stream);
      y.values = download<Out>(stream, ys);
    });
    ASSERT_FALSE(report.fault) << report.fault->what;
  }
  // The sum of products; the data are exact.
  double delta(std::int64_t t, std::int64_t p, std::int64_t n) {
    const std::int32_t slot = slot_of_token[std::size_t(t)];
    if (slot < 0 || adapters.rank(slot, p) == 0) return 0;
    double sum = bias.rows == 0 ? 0 : to_float(bias.at(slot, b_row(p, n)));
    for (std::int64_t j = 0; j < adapters.rank(slot, p); ++j) {
      const float rounded = to_float(from_float<T>(to_float(h.at(p, t, j))));
      sum += double(rounded) * to_float(b.at(slot * slot_rows() + b_row(p, n), j));
    }
    return scales[std::size_t(slot * adapters.parts() + p)] * sum;
  }
  void expect_exact() {
    for (std::int64_t t = 0; t < h.tokens; ++t) {
      for (std::int64_t c = 0; c < y.cols; ++c) {
        double wanted = to_float(base.at(t, c));
        for (std::int64_t p = 0; p < h.parts; ++p) {
          const std::int64_t n = c - columns.at[p];
          if (n >= 0 && n < columns.rows[p]) wanted += delta(t, p, n);
        }
        ASSERT_EQ(double(float(wanted)), wanted) << "the test's own data are not exact";
        ASSERT_EQ(to_float(y.at(t, c)), to_float(from_float<Out>(float(wanted))))
            << "token " << t << " of slot " << slot_of_token[std::size_t(t)] << ", column " << c;
      }
    }
    y.expect_pads_untouched();
  }
};

// Columns of y for so many matrices, in the layouts that layers have; and how many y has.
std::vector<std::pair<LoraColumns, std::int64_t>> layouts_of_columns(std::int64_t parts) {
  switch (parts) {
    case 1:
      return {{{1, {1}, {0}}, 1}, {{1, {300}, {0}}, 300}, {{1, {37}, {5}}, 200}};
    case 2:
      return {{{2, {16, 24}, {0, 16}}, 40},
              {{2, {130, 7}, {9, 139}}, 150},
              {{2, {20, 33}, {40, 0}}, 61}};  // up before gate
    default:
      return {{{3, {128, 16, 16}, {0, 128, 144}}, 160},
              {{3, {70, 9, 8}, {3, 80, 90}}, 99},
              {{3, {8, 0, 5}, {0, 0, 8}}, 13}};  // a matrix of which the rank has nothing
  }
}

template <typename T, typename H, typename Out>
void expect_exact_expand() {
  struct Place {
    std::int64_t offset, pad;
    Layout layout;
    bool has_bias, in_place;
  };
  const Place places[] = {{0, 0, Layout::dense, false, true},
                          {8, 8, Layout::tokens_outside, true, false},
                          {3, 5, Layout::columns_apart, true, true},
                          {0, 4, Layout::dense, false, false}};
  for (const Adapters& adapters : kAdapters) {
    for (const auto& [columns, y_cols] : layouts_of_columns(adapters.parts())) {
      for (const Place& place : places) {
        SCOPED_TRACE(::testing::Message() << describe(adapters) << ", " << columns.rows[0]
                                          << " columns from " << columns.at[0] << " of " << y_cols
                                          << (place.in_place ? ", in place" : ", apart"));
        OneExpand<T, H, Out> run(adapters, columns, y_cols, place.has_bias, place.in_place,
                                 place.offset, place.pad, place.layout, small_numbers(9));
        run.go();
        run.expect_exact();
      }
    }
  }
}

TEST(LoraExpand, IsExactForExactDataOfF32) { expect_exact_expand<float, float, float>(); }
TEST(LoraExpand, IsExactForExactDataOfF16) {
  expect_exact_expand<f16, f16, f16>();
  expect_exact_expand<f16, float, f16>();
  expect_exact_expand<f16, f16, float>();
}
TEST(LoraExpand, IsExactForExactDataOfBf16) {
  expect_exact_expand<bf16, float, bf16>();
  expect_exact_expand<bf16, bf16, bf16>();
  expect_exact_expand<bf16, float, float>();
}

// Shrunk activations in fp32 are rounded to T first: of 257, which bf16 does not have, 256.
TEST(LoraExpand, RoundsWhatItReads) {
  for (const int tokens : {2, 5}) {
    OneExpand<bf16, float, float> run({{tokens, 0}, 8, {1}}, {1, {16}, {0}}, 16, false, true, 0, 0,
                                      Layout::dense, [] { return 1.0f; });
    for (std::int64_t t = 0; t < tokens; ++t) run.h.at(0, t, 0) = 257;
    run.go();
    for (const float y : run.y.values) EXPECT_EQ(y, 1 + 128);
  }
}

// Scaling and adding apart, in fp32: once for each column.
template <typename T>
void expect_declared_expand() {
  for (const int tokens : {1, 2, 16}) {
    for (const std::int64_t rank : {1, 4, 16, 17, 64, 200}) {
      SCOPED_TRACE(::testing::Message() << tokens << " tokens, LoRA rank " << rank);
      OneExpand<T, T, float> run({{tokens, 0}, rank, {std::int32_t(rank)}}, {1, {50}, {0}}, 50,
                                 false, true, 0, 0, Layout::dense, dense_numbers(unsigned(rank)));
      for (float& value : run.y.values) value = 0;
      run.scales[0] = 1;
      run.go();
      Matrix h(tokens, rank);
      for (std::int64_t t = 0; t < tokens; ++t)
        for (std::int64_t j = 0; j < rank; ++j) h.row(t)[j] = to_float(run.h.at(0, t, j));
      const Budget budget =
          reference::product(h, matrix_of(run.b, 0, 50), {0, rank}, nullptr,
                             lora_expand_accumulation(dtype_of<T>::value, rank), false);
      const Comparison c = compare(DType::f32, run.y.values.data(), budget);
      EXPECT_FALSE(c.first) << c.first->row << "," << c.first->col << " of " << c.first->count;
      if (rank >= 16) {
        EXPECT_GT(c.score, 0);
      }
    }
  }
}

TEST(LoraExpand, IsAsPreciseAsDeclared) {
  expect_declared_expand<float>();
  expect_declared_expand<f16>();
  expect_declared_expand<bf16>();
}

// ---- Both.

// The same tokens of slot 0 beside nobody, and in a batch that is large enough for wider blocks;
// neither strides nor the slots' room matter.
TEST(Lora, BitsAreATokensOwn) {
  constexpr std::int64_t kIn = 600, kRank = 13;
  const Adapters alone{{10, 0}, kRank, {kRank}};
  Adapters among{{10, 1000, 40, 700, 33}, 64, {kRank, 64, 2, 64}};
  using Shrink = OneShrink<bf16, float>;
  Shrink few(alone, kIn, 0, kRank, 3, 3, Layout::columns_apart, dense_numbers(1)),
      many(among, kIn, 0, 64, 0, 0, Layout::dense, dense_numbers(2));
  ASSERT_GE(lora_plan(many.slot_of_token, 4).tiles.size() * 4, 128u);
  std::vector<std::int64_t> tokens;  // of `many`
  for (std::int64_t t = 0; t < many.x.rows; ++t)
    if (many.slot_of_token[std::size_t(t)] == 0) tokens.push_back(t);
  for (std::int64_t k = 0; k < kIn; ++k) {
    for (std::int64_t t = 0; t < 10; ++t) few.x.at(t, k) = many.x.at(tokens[std::size_t(t)], k);
    for (std::int64_t j = 0; j < kRank; ++j) few.a.at(j, k) = many.a.at(j, k);
  }
  few.go();
  many.go();
  for (std::int64_t t = 0; t < 10; ++t) {
    for (std::int64_t j = 0; j < kRank; ++j)
      ASSERT_EQ(few.h.at(0, t, j), many.h.at(0, tokens[std::size_t(t)], j)) << t << "," << j;
  }

  using Expansion = OneExpand<bf16, float, float>;
  Expansion few_y(alone, {1, {45}, {7}}, 60, false, true, 1, 2, Layout::dense, dense_numbers(3)),
      many_y(among, {1, {200}, {0}}, 200, false, true, 0, 0, Layout::dense, dense_numbers(4));
  for (std::int64_t n = 0; n < 45; ++n) {
    for (std::int64_t t = 0; t < 10; ++t)
      few_y.y.at(t, 7 + n) = many_y.y.at(tokens[std::size_t(t)], 150 + n);
    for (std::int64_t j = 0; j < kRank; ++j) few_y.b.at(n, j) = many_y.b.at(150 + n, j);
  }
  for (std::int64_t t = 0; t < 10; ++t)
    for (std::int64_t j = 0; j < kRank; ++j)
      few_y.h.at(0, t, j) = many_y.h.at(0, tokens[std::size_t(t)], j);
  few_y.go();
  many_y.go();
  for (std::int64_t t = 0; t < 10; ++t) {
    for (std::int64_t n = 0; n < 45; ++n)
      ASSERT_EQ(few_y.y.at(t, 7 + n), many_y.y.at(tokens[std::size_t(t)], 150 + n))
          << t << "," << n;
  }
}

// Rows that are aligned and whole take other kernels than those that are not.
TEST(Lora, BitsDoNotDependOnTheKernel) {
  for (const int tokens : {1, 2, 3, 17}) {
    for (const std::int32_t rank : {1, 6, 16, 20, 40}) {
      SCOPED_TRACE(::testing::Message() << tokens << " tokens, LoRA rank " << rank);
      const Adapters adapters{{tokens, 0, 3}, 40, {rank, 40}};
      constexpr std::int64_t kIn = 672;
      ASSERT_EQ(lora_shrink_kernel(DType::bf16, kIn, true, 3, 1, 40), LoraKernel::whole);
      const auto shrunk = [&](std::int64_t pad) {
        OneShrink<bf16, float> run(adapters, kIn, 0, 40, pad, pad, Layout::dense, dense_numbers(1));
        run.go();
        return run.h.values;
      };
      EXPECT_TRUE(std::ranges::equal(shrunk(0), shrunk(3), {}, as_bits, as_bits));

      const LoraColumns columns{1, {200}, {8}};
      ASSERT_EQ(lora_expand_kernel(DType::bf16, columns, 216, true, false, 3), LoraKernel::whole);
      const auto expanded = [&](std::int64_t pad) {
        OneExpand<bf16, float, float> run(adapters, columns, 216, false, true, pad, pad,
                                          Layout::dense, dense_numbers(2));
        run.go();
        std::vector<std::uint32_t> bits;
        for (std::int64_t t = 0; t < run.y.rows; ++t)
          for (std::int64_t c = 0; c < 216; ++c) bits.push_back(as_bits(run.y.at(t, c)));
        return bits;
      };
      EXPECT_EQ(expanded(0), expanded(3));
    }
  }
}

// lora_expand begins while lora_shrink runs, in any order of their threads.
TEST(Lora, ExpandsBehindShrink) {
  OneShrink<f16, float> shrink({{20, 2, 0}, 16, {16, 16, 9, 3}}, 608, 0, 16, 0, 0, Layout::dense,
                               small_numbers(1));
  OneExpand<f16, float, float> expand(shrink.adapters, {2, {200, 40}, {0, 200}}, 240, false, true,
                                      0, 0, Layout::dense, small_numbers(2));
  const std::vector<float> base = expand.y.values;
  for (std::uint64_t seed = 0; seed < 8; ++seed) {
    const Report report = run_rank(
        [&](Stream& stream) {
          const OnDevice on(stream, lora_plan(shrink.slot_of_token, 2), shrink.adapters.ranks,
                            expand.scales, 2);
          const Buffer xs = upload(stream, shrink.x.values), as = upload(stream, shrink.a.values),
                       hs = upload(stream, shrink.h.values), bs = upload(stream, expand.b.values),
                       ys = upload(stream, base);
          lora_shrink<f16, float>(shrink.x.on(xs), shrink.a.on(as), on.batch, 0,
                                  shrink.h.on<float>(hs), stream);
          lora_expand<f16, float, float>(shrink.h.on<const float>(hs), expand.b.on(bs), {},
                                         on.batch, expand.columns, expand.y.on(ys), expand.y.on(ys),
                                         stream, LoraBefore::rest);
          expand.h.values = download<float>(stream, hs);
          expand.y.values = download<float>(stream, ys);
        },
        seed);
    ASSERT_FALSE(report.fault) << report.fault->what;
    expand.expect_exact();
  }
}

// Nor on how many tokens the slot has, and in which tile this one is.
TEST(Lora, BitsDoNotDependOnTheOtherTokens) {
  const auto shrunk = [](int tokens) {
    OneShrink<f16, float> run({{tokens, 0}, 8, {8}}, 500, 0, 8, 0, 0, Layout::dense,
                              dense_numbers(6));
    for (std::int64_t k = 0; k < 500; ++k) {
      for (std::int64_t t = 0; t < tokens; ++t)
        run.x.at(t, k) = from_float<f16>(1.0f / float(k + 1));
      for (std::int64_t j = 0; j < 8; ++j)
        run.a.at(j, k) = from_float<f16>(1.0f / float(k + j + 2));
    }
    run.go();
    const auto last = run.h.values.begin() + 8 * (tokens - 1);
    return std::vector<float>(last, last + 8);
  };
  for (const int tokens : {2, 3, 16, 17}) EXPECT_EQ(shrunk(tokens), shrunk(1)) << tokens;
}

// One token's NaN or infinity is no other's.
TEST(Lora, NaNStaysWithItsToken) {
  for (const int tokens : {2, 7}) {
    OneShrink<f16, float> shrink({{tokens, 0}, 8, {8}}, 100, 0, 8, 0, 0, Layout::dense,
                                 [] { return 1.0f; });
    shrink.x.at(1, 99) = from_float<f16>(NAN);
    shrink.x.at(0, 50) = from_float<f16>(INFINITY);
    shrink.go();
    OneExpand<f16, float, f16> expand({{tokens, 0}, 8, {8}}, {1, {40}, {0}}, 40, false, true, 0, 0,
                                      Layout::dense, [] { return 1.0f; });
    expand.h.at(0, 1, 7) = NAN;
    expand.h.at(0, 0, 7) = INFINITY;
    expand.go();
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int64_t j = 0; j < 8; ++j) {
        const float h = shrink.h.at(0, t, j);
        EXPECT_TRUE(t == 0 ? h == INFINITY : t == 1 ? std::isnan(h) : h == 100) << t << ": " << h;
      }
      for (std::int64_t c = 0; c < 40; ++c) {
        const float y = to_float(expand.y.at(t, c));
        EXPECT_TRUE(t == 0   ? y == INFINITY
                    : t == 1 ? std::isnan(y)
                             : y == 1 + 0.5f * 8)
            << t << ": " << y;
      }
    }
  }
}

// What A has beyond the adapter's LoRA rank, and the rows of B's columns there, may not even exist:
// AddressSanitizer and compute-sanitizer say so.
TEST(Lora, ReadsNothingBeyondTheLoraRank) {
  for (const int tokens : {2, 5}) {
    OneShrink<f16, f16> shrink({{tokens, 0}, 8, {3}}, 24, 0, 8, 0, 0, Layout::dense,
                               small_numbers(3));
    shrink.a.values.resize(3 * 24);
    shrink.go();
    shrink.expect_exact();
    OneExpand<f16, f16, f16> expand({{tokens, 0}, 40, {3}}, {1, {9}, {0}}, 9, false, true, 0, 0,
                                    Layout::dense, small_numbers(4));
    expand.b.values.resize(8 * 40 + 3);
    expand.go();
    expand.expect_exact();
  }
}

// A second time, and in another order of blocks and threads.
TEST(Lora, BitsAreTheSameInAnySchedule) {
  const auto results = [](std::uint64_t seed) {
    OneShrink<f16, float> run({{17, 3, 0}, 16, {16, 16}}, 900, 0, 16, 0, 0, Layout::dense,
                              dense_numbers(5));
    const Report report = run_rank(
        [&](Stream& stream) {
          const OnDevice on(stream, lora_plan(run.slot_of_token, 2), run.adapters.ranks, {1, 1}, 2);
          const Buffer xs = upload(stream, run.x.values), as = upload(stream, run.a.values),
                       hs = upload(stream, run.h.values);
          lora_shrink<f16, float>(run.x.on(xs), run.a.on(as), on.batch, 0, run.h.on<float>(hs),
                                  stream);
          run.h.values = download<float>(stream, hs);
        },
        seed);
    EXPECT_FALSE(report.fault) << report.fault->what;
    std::vector<std::uint32_t> bits;
    for (const float value : run.h.values) bits.push_back(std::bit_cast<std::uint32_t>(value));
    return bits;
  };
  const std::vector<std::uint32_t> first = results(1);
  for (const std::uint64_t seed : {1, 2, 3}) EXPECT_EQ(results(seed), first);
}

// One launch each: what was recorded as one is replaced by one.
TEST(Lora, IsOneLaunchEach) {
  OneShrink<f16, float> shrink({{40, 3, 9, 2}, 16, {16, 16, 3, 3, 8, 0}}, 64, 0, 16, 0, 0,
                               Layout::dense, small_numbers(1));
  OneExpand<f16, float, f16> expand(shrink.adapters, {2, {200, 30}, {0, 210}}, 300, false, false, 0,
                                    0, Layout::dense, small_numbers(2));
  const std::string fault = fault_of([&](Stream& stream) {
    const OnDevice on(stream, lora_plan(shrink.slot_of_token, 3), shrink.adapters.ranks,
                      expand.scales, 3);
    const Buffer xs = upload(stream, shrink.x.values), as = upload(stream, shrink.a.values),
                 hs = upload(stream, shrink.h.values), bs = upload(stream, expand.b.values),
                 bases = upload(stream, expand.base.values), ys = upload(stream, expand.y.values);
    for (const bool is_shrink : {true, false}) {
      Recording recording;
      stream.begin_recording(recording);
      lora_join<float>(hs.as<float>(), 1, 1, {hs.as<float>(), 1, 1, 0, 1, 1}, stream);
      stream.end_recording();
      stream.begin_recording(recording);
      if (is_shrink) {
        lora_shrink<f16, float>(shrink.x.on(xs), shrink.a.on(as), on.batch, 0,
                                shrink.h.on<float>(hs), stream);
      } else {
        lora_expand<f16, float, f16>(expand.h.on<const float>(hs), expand.b.on(bs), {}, on.batch,
                                     expand.columns, expand.base.on(bases), expand.y.on(ys),
                                     stream);
      }
      stream.end_recording();
      stream.synchronize();
    }
  });
  EXPECT_EQ(fault, "");
}

TEST(LoraJoin, PutsTheRanksSharesSideBySide) {
  constexpr int kRanks = 3;
  constexpr std::int64_t kParts = 2, kTokens = 5, kCols = 4;
  std::vector<f16> gathered;
  for (int i = 0; i < kRanks * kParts * kTokens * kCols; ++i)
    gathered.push_back({std::uint16_t(i)});
  for (const Layout layout : {Layout::dense, Layout::tokens_outside, Layout::columns_apart}) {
    HostShrunk<f16> whole(kParts, kTokens, kRanks * kCols, layout);
    const Report report = run_rank([&](Stream& stream) {
      const Buffer from = upload(stream, gathered), to = upload(stream, whole.values);
      lora_join<f16>(from.as<f16>(), kRanks, kParts, whole.on<f16>(to), stream);
      whole.values = download<f16>(stream, to);
    });
    ASSERT_FALSE(report.fault) << report.fault->what;
    for (int r = 0; r < kRanks; ++r) {
      for (std::int64_t p = 0; p < kParts; ++p) {
        for (std::int64_t t = 0; t < kTokens; ++t) {
          for (std::int64_t c = 0; c < kCols; ++c) {
            ASSERT_EQ(whole.at(p, t, r * kCols + c).bits,
                      ((r * kParts + p) * kTokens + t) * kCols + c);
          }
        }
      }
    }
  }
}

TEST(LoraPlan, SortsTokensBySlotAndCutsTiles) {
  const LoraPlan plan = lora_plan({2, -1, 0, 2, -1, 2, 0}, 3);
  ASSERT_EQ(plan.tiles.size(), 3u);
  const std::int32_t tiles[][2] = {{0, 2}, {2, 3}, {-1, 2}};
  std::vector<std::int32_t> order(3 * kLoraTile, -1);
  order[0] = 2, order[1] = 6;
  order[16] = 0, order[17] = 3, order[18] = 5;
  order[32] = 1, order[33] = 4;
  EXPECT_EQ(plan.order, order);
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(plan.tiles[i].slot, tiles[i][0]);
    EXPECT_EQ(plan.tiles[i].count, tiles[i][1]);
  }
  const LoraPlan one = lora_plan(std::vector<std::int32_t>(33, 0), 1);
  ASSERT_EQ(one.tiles.size(), 3u);
  EXPECT_EQ(one.order[32], 32);
  EXPECT_EQ(one.order[33], -1);
  EXPECT_EQ(one.tiles[2].count, 1);
  for (const std::int32_t slot : {-2, 3}) {
    EXPECT_EQ(fault_of([slot](Stream&) {
                lora_plan({0, slot}, 3);
              }),
              "BadLaunch: lora_plan: token 1 has slot " + std::to_string(slot) + " of 3");
  }
}

TEST(Lora, RefusesWhatDoesNotFit) {
  const auto shrink = [](std::int64_t x_cols, std::int64_t a_rows, std::int32_t tiles) {
    return fault_of([=](Stream& stream) {
      const Buffer some = upload(stream, std::vector<float>(64));
      const LoraBatch batch{.num_tiles = tiles, .slots = 2, .parts = 1};
      lora_shrink<float, float>({some.as<float>(), 3, x_cols, x_cols},
                                {some.as<float>(), a_rows, 4, 4}, batch, 0,
                                {some.as<float>(), 3, 2, 6, 2, 1}, stream);
    });
  };
  EXPECT_EQ(shrink(5, 4, 1),
            "BadLaunch: lora_shrink: x is 3 x 5, A is 4 x 4 of 2 slots with 1 matrices, h is 3 x "
            "2");
  EXPECT_EQ(shrink(4, 3, 1),
            "BadLaunch: lora_shrink: x is 3 x 4, A is 3 x 4 of 2 slots with 1 matrices, h is 3 x "
            "2");
  EXPECT_EQ(shrink(4, 4, 4), "BadLaunch: lora_shrink: 4 tiles of 3 tokens, 2 slots, 1 matrices");

  const auto expand = [](std::int64_t b_rows, std::int64_t b_cols, std::int64_t bias_cols,
                         std::int64_t y_cols, const LoraColumns& columns) {
    return fault_of([=](Stream& stream) {
      const Buffer some = upload(stream, std::vector<float>(64)),
                   y = upload(stream, std::vector<float>(64));
      const LoraBatch batch{.num_tiles = 1, .slots = 1, .parts = 2};
      lora_expand<float, float, float>(
          {some.as<float>(), 3, 2, 6, 2, 1}, {some.as<float>(), b_rows, b_cols, b_cols},
          {some.as<float>(), 1, bias_cols, bias_cols}, batch, columns, {some.as<float>(), 3, 8, 8},
          {y.as<float>(), 3, y_cols, y_cols}, stream);
    });
  };
  const LoraColumns columns{2, {5, 3}, {0, 5}};
  EXPECT_EQ(expand(9, 2, 8, 8, columns),
            "BadLaunch: lora_expand: h is 3 x 2, B is 9 x 2 of 1 slots with 8 rows, y is 3 x 8");
  EXPECT_EQ(expand(8, 3, 8, 8, columns),
            "BadLaunch: lora_expand: h is 3 x 2, B is 8 x 3 of 1 slots with 8 rows, y is 3 x 8");
  EXPECT_EQ(expand(8, 2, 7, 8, columns),
            "BadLaunch: lora_expand: the bias is 1 x 7, of 1 slots with 8 rows");
  EXPECT_EQ(expand(8, 2, 8, 7, columns), "BadLaunch: lora_expand: the base is 3 x 8, y is 3 x 7");
  EXPECT_EQ(expand(8, 2, 8, 8, {1, {8}, {0}}),
            "BadLaunch: lora_expand: 1 matrices have columns, 2 adapters");
  EXPECT_EQ(expand(8, 2, 8, 8, {2, {5, 3}, {0, 4}}),
            "BadLaunch: lora_expand: matrix 1 has 3 columns from 4 on, but those up to 5 are taken "
            "of 8");
  EXPECT_EQ(expand(8, 2, 8, 8, {2, {5, 3}, {0, 6}}),
            "BadLaunch: lora_expand: matrix 1 has 3 columns from 6 on, but those up to 5 are taken "
            "of 8");

  EXPECT_EQ(fault_of([](Stream& stream) {
              lora_join<float>(nullptr, 3, 1, {nullptr, 1, 8, 8, 8, 1}, stream);
            }),
            "BadLaunch: lora_join: 8 columns are of 3 ranks");
}

}  // namespace
}  // namespace tp
