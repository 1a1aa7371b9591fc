// Which of attention's kernels takes a call, and that the fuzzer meets all of them.

#include "kernels/attention_choice.h"

#include <gtest/gtest.h>

#include <map>

#include "harness/fuzz/draw.h"
#include "properties/attention_call.h"

namespace tp {
namespace {

const ModelShape kModel{.num_heads = 24, .num_kv_heads = 4, .head_dim = 128};

AttentionKernel kernel_of(const ModelShape& model, std::int64_t queries, std::int64_t visible,
                          bool simple = true, DType dtype = DType::bf16) {
  const std::int64_t group = model.num_heads / model.num_kv_heads;
  return choose_attention(dtype, model, group, queries, visible, simple).kernel;
}

TEST(AttentionChoice, FollowsTheShape) {
  EXPECT_EQ(kernel_of(kModel, 4096, 4096), AttentionKernel::prefill);
  EXPECT_EQ(kernel_of(kModel, 1, 4096), AttentionKernel::decode);
  // Both sides of each threshold: 16 rows of a pack; 32 keys for more, 64 for those.
  EXPECT_EQ(kernel_of(kModel, 3, 33), AttentionKernel::prefill);
  EXPECT_EQ(kernel_of(kModel, 3, 32), AttentionKernel::matrix);
  EXPECT_EQ(kernel_of(kModel, 2, 65), AttentionKernel::decode);
  EXPECT_EQ(kernel_of(kModel, 2, 64), AttentionKernel::matrix);
  // What only the general kernel can.
  EXPECT_EQ(kernel_of(kModel, 4096, 4096, false), AttentionKernel::matrix);
  EXPECT_EQ(
      kernel_of({.num_heads = 8, .num_kv_heads = 1, .head_dim = 192, .v_head_dim = 128}, 64, 4096),
      AttentionKernel::matrix);
  EXPECT_EQ(kernel_of(kModel, 4096, 4096, true, DType::f32), AttentionKernel::plain);
}

// KV heads that are held by several ranks are read by as many blocks as if they were not.
TEST(AttentionChoice, ReplicatedKvHeadsAreSplitAsMuch) {
  const ModelShape model{.num_heads = 48, .num_kv_heads = 8, .head_dim = 128};
  AttentionBatch batch{.query_start = {0}, .pages_per_sequence = 1};
  for (int s = 0; s < 4; ++s) {
    batch.query_start.push_back(s + 1);
    batch.kv_len.push_back(4096);
    batch.table.push_back(4096 * s);
  }
  const AttentionSettings chosen{.splits = 0};
  EXPECT_EQ(attention_splits(DType::bf16, model, 8, batch, chosen), 33);
  EXPECT_EQ(attention_splits(DType::bf16, model, 16, batch, chosen), 33);
  EXPECT_EQ(attention_splits(DType::bf16, model, 1, batch, chosen), 4);
  EXPECT_EQ(attention_splits(DType::bf16, model, 1, batch, {.splits = 3}), 3);
}

TEST(AttentionChoice, TheFuzzerDrawsAllSides) {
  Draw draw(make_domain({"attention"}, {1, 2, 4, 8, 16}, {}, ""), 11);
  std::map<AttentionKernel, int> kernels;
  int split = 0, wide_merges = 0, chosen = 0;
  constexpr int kDraws = 6000;
  for (int i = 0; i < kDraws; ++i) {
    const Case c = draw.next();
    const AttentionSettings s = attention_settings(c);
    const AttentionBatch batch = attention_call(c).batch;
    const RankShape rank = partition(c.model, c.tp_size, 0);
    ++kernels[choose_attention(c.dtype, c.model, rank.heads.size / rank.kv_heads.size,
                               batch.max_queries(), most_visible(batch.max_kv_len(), s),
                               s.softcap == 0 && c.options.at("alibi") == 0)
                  .kernel];
    split += s.splits > 1;
    wide_merges += s.splits > 4;  // by several warps
    chosen += c.options.at("split_by") == 1 && s.splits > 1;
  }
  EXPECT_GE(kernels[AttentionKernel::plain], kDraws / 10);
  EXPECT_GE(kernels[AttentionKernel::matrix], kDraws / 10);
  EXPECT_GE(kernels[AttentionKernel::prefill], kDraws / 1000);
  EXPECT_GE(kernels[AttentionKernel::decode], kDraws / 500);
  EXPECT_GE(split, kDraws / 10);
  EXPECT_GE(kDraws - split, kDraws / 10);
  EXPECT_GE(wide_merges, kDraws / 50);
  EXPECT_GE(chosen, kDraws / 300);
}

}  // namespace
}  // namespace tp
