#include "harness/device/buffer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "harness/device/kernels_testing.h"
#include "harness/device/sanitizer.h"
#include "harness/device/testing.h"

namespace tp::testing {
namespace {

using ::testing::Each;

TEST(Buffer, IsPoisonedAndAligned) {
  run_rank([](Stream& stream) {
    const Buffer buffer("x", 37, 0x7F);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(buffer.data()) % 256, 0u);
    EXPECT_THAT(download<std::uint8_t>(stream, buffer), Each(0x7F));
    buffer.check_guards(stream);
    stream.synchronize();
    EXPECT_EQ(buffer.damage(), std::nullopt);
  });
}

TEST(Buffer, GuardsTellWhatWasWrittenBeside) {
  if (kAsan) GTEST_SKIP() << "ASan itself ends the process";
  const auto overrun = [](int first, int count) {
    std::optional<std::string> said;
    run_rank([&](Stream& stream) {
      const Buffer buffer("out of rank 3", 20, 0xFF);
      fill(stream, buffer.as<float>() + first, count, 1.0f);
      buffer.check_guards(stream);
      stream.synchronize();
      said = buffer.damage();
    });
    return said.value_or("");
  };
  EXPECT_EQ(overrun(0, 5), "");
  EXPECT_EQ(overrun(0, 6),
            "out of rank 3: 4 bytes written behind its 20 bytes, the nearest 0 bytes past the end");
  EXPECT_EQ(overrun(7, 2),
            "out of rank 3: 8 bytes written behind its 20 bytes, the nearest 8 bytes past the end");
  EXPECT_EQ(
      overrun(-3, 2),
      "out of rank 3: 8 bytes written before its 20 bytes, the nearest 5 bytes before the start");
}

TEST(Buffer, MayGoWhileWorkIsInFlight) {
  for (std::uint64_t seed = 0; seed < 5; ++seed) {
    const Report report = run_rank(
        [](Stream& stream) {
          for (int i = 0; i < 5; ++i) {
            Buffer buffer("temporary", 4096, 0);
            fill(stream, buffer.as<float>(), 1024, 1.0f);
          }
        },
        seed);
    EXPECT_FALSE(report.fault) << report.fault->what;
  }
}

TEST(Buffer, Moves) {
  Buffer a("a", 8, 1);
  void* data = a.data();
  Buffer b = std::move(a);
  EXPECT_EQ(b.data(), data);
  EXPECT_EQ(a.data(), nullptr);
  b = Buffer("c", 4, 2);
  EXPECT_EQ(b.name(), "c");
  EXPECT_EQ(b.as<int>(1, 1).row_stride, 1);
}

}  // namespace
}  // namespace tp::testing
