// What processes tell each other about a case arrives as it was sent, and the cause outweighs its
// consequences.

#include "properties/run/share.h"

#include <gtest/gtest.h>

namespace tp {
namespace {

TEST(Share, ArrivesAsItWasSent) {
  for (const bool of_others : {false, true}) {
    Share sent;
    sent.fault = Fault{Outcome::Hang, "two words,\nand a line", 5, of_others};
    sent.threads = 12345678901;
    sent.trace = "tp_rank 5  x\ntp_rank 6  y\n";
    sent.times = {{4, {1.5, 2.25}}, {-1, {0, 3e-3}}};
    sent.outputs = {std::byte{0}, std::byte{'\n'}, std::byte{255}};
    const Share got = unpack(pack(sent));
    ASSERT_TRUE(got.fault);
    EXPECT_EQ(got.fault->outcome, sent.fault->outcome);
    EXPECT_EQ(got.fault->what, sent.fault->what);
    EXPECT_EQ(got.fault->tp_rank, sent.fault->tp_rank);
    EXPECT_EQ(got.fault->of_others, of_others);
    EXPECT_EQ(got.threads, sent.threads);
    EXPECT_EQ(got.trace, sent.trace);
    ASSERT_EQ(got.times.size(), 2u);
    EXPECT_EQ(got.times.at(4).kernel_us, 1.5);
    EXPECT_EQ(got.times.at(-1).collective_us, 3e-3);
    EXPECT_EQ(got.outputs, sent.outputs);
  }
  EXPECT_FALSE(unpack(pack({})).fault);
}

// Two processes wait for each other in NCCL: a kernel of one of them never ends.
TEST(Share, WhoWaitsForOthersWeighsLessThanWhoRuns) {
  const auto weight = [](Outcome outcome, bool of_others) {
    return weight_of(unpack(pack({.fault = Fault{outcome, "x", 0, of_others}})));
  };
  EXPECT_EQ(weight_of({}), 0);
  EXPECT_EQ(weight(Outcome::Pass, false), 0);
  EXPECT_GT(weight(Outcome::Hang, true), 0);
  EXPECT_GT(weight(Outcome::Hang, false), weight(Outcome::Hang, true));
  EXPECT_GT(weight(Outcome::Hang, false), weight(Outcome::Crash, true)) << "NCCL's remote error";
  EXPECT_GT(weight(Outcome::Crash, false), weight(Outcome::Hang, false));
}

}  // namespace
}  // namespace tp
