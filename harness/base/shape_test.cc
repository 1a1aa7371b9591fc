#include "harness/base/shape.h"

#include <gtest/gtest.h>

#include "harness/base/check.h"
#include "harness/base/partition_law.h"

namespace tp {
namespace {

ModelShape model(int heads, int kv_heads) {
  return {.num_heads = heads, .num_kv_heads = kv_heads, .head_dim = 8};
}

TEST(PartitionLaw, HoldsForAll2236LegalTriples) {
  int triples = 0;
  for (int heads = 1; heads <= 128; ++heads) {
    for (int kv_heads = 1; kv_heads <= heads; ++kv_heads) {
      for (int tp_size = 1; tp_size <= 16; ++tp_size) {
        if (partitionable(model(heads, kv_heads), tp_size)) continue;
        ++triples;
        EXPECT_EQ(broken_partition_law(model(heads, kv_heads), tp_size), std::nullopt);
      }
    }
  }
  EXPECT_EQ(triples, 2236);
}

TEST(PartitionLaw, SeesEveryWayToGetItWrong) {
  const auto strided_replicas = [](const ModelShape& m, int tp_size, int r) {
    RankShape rank = partition(m, tp_size, r);
    rank.kv_heads.offset = r % m.num_kv_heads;
    return rank;
  };
  const auto no_replicas = [](const ModelShape& m, int tp_size, int r) {
    RankShape rank = partition(m, tp_size, r);
    rank.num_kv_head_replicas = 1;
    return rank;
  };
  const auto one_head_short = [](const ModelShape& m, int tp_size, int r) {
    RankShape rank = partition(m, tp_size, r);
    if (r == 0) --rank.heads.size;
    return rank;
  };
  const auto overlapping = [](const ModelShape& m, int tp_size, int r) {
    RankShape rank = partition(m, tp_size, r);
    if (r == 0) ++rank.heads.size;
    return rank;
  };
  EXPECT_EQ(broken_partition_law(model(8, 2), 4), std::nullopt);
  EXPECT_NE(broken_partition_law(model(8, 2), 4, strided_replicas), std::nullopt);
  EXPECT_NE(broken_partition_law(model(8, 2), 4, no_replicas), std::nullopt);
  EXPECT_NE(broken_partition_law(model(8, 2), 4, one_head_short), std::nullopt);
  EXPECT_NE(broken_partition_law(model(8, 2), 4, overlapping), std::nullopt);
}

TEST(Partition, MiniMaxM2OnSixteenRanksHasEachKvHeadTwice) {
  const ModelShape m = {.num_heads = 48, .num_kv_heads = 8, .head_dim = 128};
  EXPECT_EQ(partition(m, 16, 0), (RankShape{{0, 3}, {0, 1}, 2}));
  EXPECT_EQ(partition(m, 16, 3), (RankShape{{9, 3}, {1, 1}, 2}));
  EXPECT_EQ(partition(m, 16, 15), (RankShape{{45, 3}, {7, 1}, 2}));
  EXPECT_EQ(partition(m, 4, 1), (RankShape{{12, 12}, {2, 2}, 1}));
}

TEST(Partition, RefusesWithTheNumbers) {
  EXPECT_EQ(partitionable(model(48, 8), 12),
            "tp_size=12 is neither a divisor nor a multiple of num_kv_heads=8");
  EXPECT_EQ(partitionable(model(48, 8), 5), "num_heads=48 cannot be divided by tp_size=5");
  EXPECT_EQ(partitionable(model(6, 4), 2), "num_heads=6 is not a multiple of num_kv_heads=4");
  EXPECT_EQ(partitionable(model(8, 2), 0), "tp_size=0 is below 1");
  EXPECT_EQ(partitionable(model(8, 0), 1), "num_kv_heads=0 is below 1");
  EXPECT_THROW(partition(model(48, 8), 12, 0), BadInput);
  EXPECT_THROW(partition(model(48, 8), 8, 8), BadInput);
}

// A fractional shard by integer division (sgl-project/sglang#20967: 8 * d / 16) cannot even be
// written down.
TEST(Partition, DivExactRefusesARemainder) {
  EXPECT_EQ(div_exact(12, 4), 3);
  EXPECT_THROW(div_exact(8, 16), BadInput);
  EXPECT_THROW(div_exact(8, 0), BadInput);
  try {
    div_exact(8, 3);
    FAIL();
  } catch (const BadInput& e) {
    EXPECT_STREQ(e.what(), "8 cannot be divided into 3 equal parts");
  }
}

}  // namespace
}  // namespace tp
