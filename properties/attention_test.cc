// attention() itself: what it refuses before a launch, and pools of pages larger than 2^31
// elements.

#include "kernels/attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include "harness/device/testing.h"

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

  void run(Stream& stream) {
    const std::int64_t tokens = 5, slots = 16, cols = 32, kv_cols = 16;
    const Buffer q = upload(stream, std::vector<float>(std::size_t(tokens * cols), 0.5f)),
                 kv = upload(stream, std::vector<float>(std::size_t(2 * slots * kv_cols), 0.25f)),
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
            "the output overlaps q, k or v (5 rows)"},
        Bad{"GlobalHeadsOnALocalQ", [](Call& c) { c.tp_size = 2; },
            "q has 32 columns, 2 heads of 8 need 16"},
        Bad{"TooFewKvColumns", [](Call& c) { with_tensors(c, [](auto& t) { t.v.cols = 8; }); },
            "k and v have 16 and 8 columns, 2 KV heads of 8 and 8 are read"}),
    [](const auto& info) { return std::string(info.param.name); });

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
