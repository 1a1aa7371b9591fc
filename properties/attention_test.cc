// attention() itself: what it refuses before a launch, and pools of pages larger than 2^31
// elements.

#include "kernels/attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "harness/device/testing.h"
#include "kernels/attention_testing.h"

namespace tp {
namespace {

using testing::fault_of;
using testing::upload;

// A legal call: two sequences of 2 and 3 tokens, keys in pages of 4, in fp32.
struct Call {
  ModelShape model{.num_heads = 4, .num_kv_heads = 2, .head_dim = 8};
  int tp_size = 1, tp_rank = 0;
  AttentionBatch batch{.query_start = {0, 2, 5},
                       .kv_len = {6, 3},
                       .table = {2, 0, 1, 3},
                       .pages_per_sequence = 2,
                       .page_size = 4};
  AttentionSettings settings{.scale = 0.5};
  std::function<void(AttentionTensors<float>&)> change = [](auto&) {};
  std::vector<float>* keep = nullptr;  // gets the output

  void run(Stream& stream) {
    const std::int64_t tokens = 5, slots = 16, cols = 32, kv_cols = 16;
    const auto ramp = [](std::int64_t count) {
      std::vector<float> values;
      for (std::int64_t i = 0; i < count; ++i) values.push_back(float(i % 37) * 0.125f - 2);
      return values;
    };
    const Buffer q = upload(stream, ramp(tokens * cols)),
                 kv = upload(stream, ramp(2 * slots * kv_cols)),
                 out = upload(stream, std::vector<float>(std::size_t(tokens * cols))),
                 lse = upload(stream, std::vector<float>(20)),
                 workspace = upload(stream, std::vector<float>(4096)),
                 starts = upload(stream, batch.query_start), lengths = upload(stream, batch.kv_len),
                 table = upload(stream, batch.table);
    batch.device = {starts.as<std::int32_t>(), lengths.as<std::int32_t>(),
                    table.as<std::int32_t>()};
    AttentionTensors<float> t{.q = q.as<float>(tokens, cols),
                              .k = kv.as<float>(slots, kv_cols),
                              .v = {kv.as<float>() + slots * kv_cols, slots, kv_cols, kv_cols},
                              .out = out.as<float>(tokens, cols),
                              .lse = lse.as<float>(tokens, 4),
                              .workspace = workspace.as<float>()};
    change(t);
    attention<float>(t, batch, settings, model, sharding_rules(), tp_size, tp_rank, stream);
    stream.synchronize();
    if (keep != nullptr) *keep = testing::download<float>(stream, out);
  }
};

struct Bad {
  const char* name;
  std::function<void(Call&)> spoil;
  const char* sentence;
};

class Refusals : public ::testing::TestWithParam<Bad> {};

TEST_P(Refusals, SayTheNumbers) {
  EXPECT_EQ(fault_of([](Stream& stream) { Call().run(stream); }), "");
  const std::string told = fault_of([](Stream& stream) {
    Call call;
    GetParam().spoil(call);
    call.run(stream);
  });
  EXPECT_EQ(told, std::string("BadLaunch: attention: ") + GetParam().sentence);
}

void with_tensors(Call& c, std::function<void(AttentionTensors<float>&)> change) {
  c.change = std::move(change);
}

INSTANTIATE_TEST_SUITE_P(
    Attention, Refusals,
    ::testing::Values(
        Bad{"PageOutsideThePool", [](Call& c) { c.batch.table[1] = 4; },
            "page 1 of sequence 0 is page 4 of a pool of 4"},
        Bad{"LargestPage", [](Call& c) { c.batch.table[1] = 2147483647; },
            "page 1 of sequence 0 is page 2147483647 of a pool of 4"},
        Bad{"NegativePage", [](Call& c) { c.batch.table[2] = -1; },
            "page 0 of sequence 1 is page -1 of a pool of 4"},
        Bad{"LengthBeyondTheTable", [](Call& c) { c.batch.kv_len[1] = 9; },
            "sequence 1 has 9 keys, its 2 pages of 4 hold 8"},
        Bad{"NegativeLength", [](Call& c) { c.batch.kv_len[0] = -1; },
            "sequence 0 has 2 queries and -1 keys"},
        Bad{"QueriesBeyondTheTokens", [](Call& c) { c.batch.query_start[2] = 6; },
            "the sequences' queries are rows 0 .. 6, q has 5"},
        Bad{"QueriesBackwards", [](Call& c) { c.batch.query_start[1] = 6; },
            "sequence 1 has -1 queries and 3 keys"},
        Bad{"TableTooShort", [](Call& c) { c.batch.table.pop_back(); },
            "the page table has 3 entries, 2 sequences of 2 pages need 4"},
        Bad{"PageTooLarge", [](Call& c) { c.batch.page_size = 65; },
            "a page of 65 keys is not 1 to 64"},
        Bad{"RowsBeyondTheCache",
            [](Call& c) {
              c.batch.page_size = 0;
              c.batch.pages_per_sequence = 1;
              c.batch.table = {0, 14};
            },
            "sequence 1 has keys in rows 14 .. 17, k and v have 16"},
        Bad{"HeadTooWide", [](Call& c) { c.model.head_dim = 257; },
            "heads of 257 and value heads of 257 columns are not 1 to 256"},
        Bad{"WindowOfNothing", [](Call& c) { c.settings.window = 0; },
            "a window of 0 keys is below 1"},
        Bad{"NoSplits", [](Call& c) { c.settings.splits = 0; },
            "0 splits of 2 KV heads of 2 sequences"},
        Bad{"NegativeStride",
            [](Call& c) { with_tensors(c, [](auto& t) { t.k.row_stride = -16; }); },
            "rows of q, k, v, the output and the log-sum-exp are 32, -16, 16, 32 and 4 apart, less "
            "than they are wide"},
        Bad{"OverlappingOutput",
            [](Call& c) {
              with_tensors(c, [](auto& t) { t.out.data = const_cast<float*>(t.q.data); });
            },
            "the output or the log-sum-exp overlaps q, k, v or each other (5 rows)"},
        Bad{"OverlappingLse",
            [](Call& c) { with_tensors(c, [](auto& t) { t.lse.data = t.out.data + 7; }); },
            "the output or the log-sum-exp overlaps q, k, v or each other (5 rows)"},
        Bad{"SplitsWithoutWorkspace",
            [](Call& c) {
              c.settings.splits = 3;
              with_tensors(c, [](auto& t) { t.workspace = nullptr; });
            },
            "3 splits without a workspace"},
        Bad{"GlobalHeadsOnALocalQ", [](Call& c) { c.tp_size = 2; },
            "q has 32 columns, 2 heads of 8 need 16"},
        Bad{"TooFewKvColumns", [](Call& c) { with_tensors(c, [](auto& t) { t.v.cols = 8; }); },
            "k and v have 16 and 8 columns, 2 KV heads of 8 and 8 are read"}),
    [](const auto& info) { return std::string(info.param.name); });

// What an output is in a legal call, after a change of it that must not matter.
std::vector<float> output_of(const std::function<void(Call&)>& change) {
  std::vector<float> out;
  const Report report = testing::run_rank([&](Stream& stream) {
    Call call;
    call.keep = &out;
    change(call);
    call.run(stream);
  });
  EXPECT_FALSE(report.fault) << report.fault->what;
  return out;
}

TEST(Attention, AWindowWiderThanAnyIsNone) {
  const std::vector<float> none = output_of([](Call& c) { c.settings.causal = false; });
  for (const std::int64_t window :
       {std::int64_t{6}, std::int64_t{1} << 31, (std::int64_t{1} << 32) + 1, INT64_MAX}) {
    EXPECT_EQ(none, output_of([=](Call& c) {
                c.settings.causal = false;
                c.settings.window = window;
              }))
        << window;
  }
}

TEST(Attention, ColumnsBesideQAreNoOverlap) {
  // The output lies in the same rows as q, which then are twice as long.
  const std::string told = fault_of([](Stream& stream) {
    Call call;
    call.change = [](AttentionTensors<float>& t) {
      t.q = {t.q.data, 2, 32, 64};
      t.out = {const_cast<float*>(t.q.data) + 32, 2, 32, 64};
      t.lse.rows = 2;
    };
    call.batch.query_start = {0, 1, 2};
    call.run(stream);
  });
  EXPECT_EQ(told, "");
}

TEST(Attention, NoTokensAreNoWork) {
  for (const std::int64_t splits : {1, 2}) {
    EXPECT_EQ(fault_of([=](Stream& stream) {
                Call call;
                call.settings.splits = splits;
                call.batch.query_start = {0, 0, 0};
                call.change = [](auto& t) { t.q.rows = t.out.rows = t.lse.rows = 0; };
                call.run(stream);
              }),
              "");
  }
}

// States as splits leave them: normalised outputs and their log-sum-exp.
struct States {
  std::int64_t dim = 5;
  std::vector<std::vector<float>> out;
  std::vector<float> lse;

  void add(float state_lse, std::vector<float> values) {
    lse.push_back(state_lse);
    out.push_back(std::move(values));
  }
};

States merged(const States& states, const std::vector<std::size_t>& which) {
  States result{states.dim, {}, {}};
  const Report report = testing::run_rank([&](Stream& stream) {
    std::vector<float> parts;
    for (const std::size_t i : which)
      parts.insert(parts.end(), states.out[i].begin(), states.out[i].end());
    for (const std::size_t i : which) parts.push_back(states.lse[i]);
    const Buffer in = upload(stream, parts),
                 out = upload(stream, std::vector<float>(std::size_t(states.dim))),
                 lse = upload(stream, std::vector<float>(1));
    testing::merge_states(in.as<float>(), std::int64_t(which.size()), 1, states.dim,
                          out.as<float>(), lse.as<float>(), stream);
    const std::vector<float> values = testing::download<float>(stream, out);
    result.add(testing::download<float>(stream, lse)[0], values);
  });
  EXPECT_FALSE(report.fault) << report.fault->what;
  return result;
}

// Within the roundings of a merge: of each weight (an exponent of at most 12 and its power, 2 ulp),
// the sums of three, and the division.
void expect_close(const States& a, const States& b) {
  const double u = 0x1p-24, relative = 2 * (3 * 12 + 4 + 4 + 2) * u;
  EXPECT_NEAR(a.lse[0], b.lse[0], relative + 4 * u * std::fabs(a.lse[0]));
  for (std::size_t d = 0; d < a.out[0].size(); ++d)
    EXPECT_NEAR(a.out[0][d], b.out[0][d], relative * 8) << d;  // no value is above 8
}

TEST(Merge, IsAssociativeAndCommutativeAndTheEmptyStateIsItsIdentity) {
  const float none = -INFINITY;
  States s;
  s.add(1.5f, {1, -2, 3, 0.5f, 7});
  s.add(-9.0f, {-4, 8, 0.25f, 1, -7});
  s.add(2.25f, {6, 5, -1, -3, 2});
  s.add(none, {0, 0, 0, 0, 0});
  const States all = merged(s, {0, 1, 2});
  expect_close(all, merged(s, {2, 0, 1}));
  expect_close(all, merged(s, {1, 2, 0}));
  States halves = merged(s, {0, 1});
  halves.add(s.lse[2], s.out[2]);
  expect_close(all, merged(halves, {0, 1}));
  // Bit for bit: nothing is added, wherever it stands.
  for (const auto& which : std::vector<std::vector<std::size_t>>{
           {3, 0, 1, 2}, {0, 3, 1, 2}, {0, 1, 2, 3}, {3, 0, 3, 1, 2, 3}}) {
    const States more = merged(s, which);
    EXPECT_EQ(more.out, all.out);
    EXPECT_EQ(more.lse, all.lse);
  }
  const States nothing = merged(s, {3, 3});
  EXPECT_EQ(nothing.lse[0], none);
  EXPECT_EQ(nothing.out[0], std::vector<float>(5, 0.0f));
  // And the merge says more than any of its parts.
  EXPECT_NE(all.out, merged(s, {0, 2}).out);
}

// The eighth page of a pool whose pages lie 2^28 elements apart begins at element 2^31: memory that
// is never touched, but for the rows that are read (vllm-project/vllm#47671).
TEST(Attention, PagesBeyondTwoToThe31Elements) {
  const std::int64_t stride = std::int64_t{1} << 28, dim = 8;
  const std::vector<std::int32_t> pages = {8, 7, 2};
  std::vector<float> out;
  const Report report = testing::run_rank([&](Stream& stream) {
    const Buffer pool(stream, "pool", std::size_t(8 * stride + 2 * dim) * sizeof(bf16),
                      std::nullopt);
    for (const std::int32_t page : pages) {
      std::vector<bf16> row(std::size_t(2 * dim));
      for (std::size_t d = 0; d < row.size(); ++d)
        row[d] = from_float<bf16>(d < std::size_t(dim) ? 0.0f : float(page * 8 + std::int64_t(d)));
      from_host(stream, pool.as<bf16>() + page * stride, row.data(), row.size() * sizeof(bf16));
    }
    AttentionBatch batch{.query_start = {0, 1, 2, 3},
                         .kv_len = {1, 1, 1},
                         .table = pages,
                         .pages_per_sequence = 1,
                         .page_size = 1};
    const Buffer q = upload(stream, std::vector<bf16>(std::size_t(3 * dim))),
                 result = upload(stream, std::vector<bf16>(std::size_t(3 * dim))),
                 lse = upload(stream, std::vector<float>(3)),
                 starts = upload(stream, batch.query_start), lengths = upload(stream, batch.kv_len),
                 table = upload(stream, batch.table);
    batch.device = {starts.as<std::int32_t>(), lengths.as<std::int32_t>(),
                    table.as<std::int32_t>()};
    const ModelShape model{.num_heads = 1, .num_kv_heads = 1, .head_dim = int(dim)};
    attention<bf16>({.q = q.as<bf16>(3, dim),
                     .k = {pool.as<bf16>(), 9, dim, stride},
                     .v = {pool.as<bf16>() + dim, 9, dim, stride},
                     .out = result.as<bf16>(3, dim),
                     .lse = lse.as<float>(3, 1)},
                    batch, {}, model, sharding_rules(), 1, 0, stream);
    for (const bf16 x : testing::download<bf16>(stream, result)) out.push_back(to_float(x));
  });
  ASSERT_FALSE(report.fault) << report.fault->what;
  for (std::size_t i = 0; i < out.size(); ++i)
    EXPECT_EQ(out[i], float(pages[i / 8] * 8 + 8 + std::int64_t(i % 8)));
}

}  // namespace
}  // namespace tp
