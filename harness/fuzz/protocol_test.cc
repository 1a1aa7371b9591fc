#include "harness/fuzz/protocol.h"

#include <gtest/gtest.h>

#include "harness/base/check.h"

namespace tp {
namespace {

TEST(Protocol, ARequestComesBackAsItWasSent) {
  for (const Request& sent :
       {Request{"v1 op a=1 b=2", "", std::chrono::milliseconds(0), false, true},
        Request{"v1 op", "2:k_norm", std::chrono::milliseconds(2500), true, false, true},
        Request{"  anything at all ", "-x", std::chrono::milliseconds(1), false, false}}) {
    const Request back = request_from_line(to_line(sent));
    EXPECT_EQ(back.line, sent.line);
    EXPECT_EQ(back.mutant, sent.mutant);
    EXPECT_EQ(back.deadline, sent.deadline);
    EXPECT_EQ(back.trace, sent.trace);
    EXPECT_EQ(back.poison, sent.poison);
    EXPECT_EQ(back.serial, sent.serial);
  }
}

TEST(Protocol, WhatIsNoRequestIsRefused) {
  // The others differ from it in one thing each.
  EXPECT_EQ(request_from_line("run 1 - 0 1 0 v1 op").line, "v1 op");
  for (const char* line :
       {"", "run", "run 1 - 0", "run 1 - 0 1", "run 1 - 0 1 0", "walk 1 - 0 1 0 v1 op",
        "run x - 0 1 0 v1 op", "run -1 - 0 1 0 v1 op", "run 1 - 2 1 0 v1 op", "run 1 - 0 2 0 v1 op",
        "run 1 - 0 1 2 v1 op", "run 1 - 0 1 v1 op", "run 99999999999999999999 - 0 1 0 v1 op"}) {
    EXPECT_THROW(request_from_line(line), BadInput) << line;
  }
}

}  // namespace
}  // namespace tp
