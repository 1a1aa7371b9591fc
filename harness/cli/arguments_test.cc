#include "harness/cli/arguments.h"

#include <gtest/gtest.h>

#include "harness/base/check.h"

namespace tp {
namespace {

TEST(Arguments, Durations) {
  EXPECT_DOUBLE_EQ(duration("--for", "500ms"), 0.5);
  EXPECT_DOUBLE_EQ(duration("--for", "90s"), 90);
  EXPECT_DOUBLE_EQ(duration("--for", "10m"), 600);
  EXPECT_DOUBLE_EQ(duration("--for", "2h"), 7200);
  EXPECT_DOUBLE_EQ(duration("--for", "1h30m"), 5400);
  EXPECT_DOUBLE_EQ(duration("--for", "1.5s"), 1.5);
  EXPECT_DOUBLE_EQ(duration("--for", "60"), 60);
  for (const char* bad : {"", "m", "-1s", "0", "0s", "1x", "1sm", "1e3s", "inf", "nan", " 1s",
                          "1 s", "1001h", "9999999999999999999h"}) {
    EXPECT_THROW(duration("--for", bad), BadInput) << bad;
  }
}

TEST(Arguments, WholeNumbers) {
  EXPECT_EQ(whole_number("-n", "4", 1, 8), 4);
  EXPECT_EQ(whole_number("--seed", "9223372036854775807", 0, INT64_MAX), INT64_MAX);
  for (const char* bad : {"", "0", "9", "-1", "+1", "4.0", "0x4", "4 ", "99999999999999999999"}) {
    EXPECT_THROW(whole_number("-n", bad, 1, 8), BadInput) << bad;
  }
}

TEST(Arguments, TpSizes) {
  EXPECT_EQ(tp_sizes("--tp", {"1..4,8", "2"}), (std::vector<int>{1, 2, 3, 4, 8}));
  EXPECT_EQ(tp_sizes("--tp", {"16"}), std::vector<int>{16});
  EXPECT_TRUE(tp_sizes("--tp", {}).empty());
  for (const char* bad :
       {"", "0", "1,", ",1", "4..2", "1..", "..4", "1...4", "1-4", "1025", "1..99999999999"}) {
    EXPECT_THROW(tp_sizes("--tp", {bad}), BadInput) << bad;
  }
}

}  // namespace
}  // namespace tp
