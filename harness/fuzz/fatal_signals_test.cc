#include "harness/fuzz/fatal_signals.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <csignal>
#include <filesystem>
#include <fstream>
#include <memory>

#include "harness/base/mapped_file.h"
#include "harness/base/temp_folder_testing.h"

namespace tp {
namespace {

namespace fs = std::filesystem;

void say_last(int) { say_in_flight("last words"); }

class FatalSignalsDeathTest : public testing::Test {
 protected:
  FatalSignalsDeathTest() {
    GTEST_FLAG_SET(death_test_style, "threadsafe");
    std::ofstream(path_) << std::string(100'000, 'x');
  }

  void read_what_is_gone(const MappedFile& file) const {
    fs::resize_file(path_, 10);
    fs::remove_all(folder_.path());  // this process will not live to do it later
    volatile std::byte last = file.bytes()[99'999];
    (void)last;
  }

  const TempFolder folder_;
  const std::string path_ = folder_.at("f");
  static constexpr const char* kSentence =
      "^tpcheck: .*: it was cut to 10 bytes while it was read; it had 100000 when it was opened\n$";
};

TEST_F(FatalSignalsDeathTest, AFileThatWasCutIsNoCrashOfTheCase) {
  const auto signals_last = [&] {
    const MappedFile file(path_);
    on_fatal_signal(say_last);
    read_what_is_gone(file);
  };
  EXPECT_EXIT(signals_last(), testing::ExitedWithCode(2), kSentence);
  const auto signals_first = [&] {
    on_fatal_signal(say_last);
    const MappedFile file(path_);
    read_what_is_gone(file);
  };
  EXPECT_EXIT(signals_first(), testing::ExitedWithCode(2), kSentence);
}

TEST_F(FatalSignalsDeathTest, AnotherBusErrorStillIs) {
  const auto mapped_first = [&](bool first) {
    // Last words go to standard output, and death tests read standard error.
    dup2(STDERR_FILENO, STDOUT_FILENO);
    for (const int signal : {SIGBUS, SIGSEGV})
      std::signal(signal, SIG_DFL);  // sanitizers have some
    std::unique_ptr<MappedFile> file;
    if (first) file = std::make_unique<MappedFile>(path_);
    set_in_flight("v1 canary");
    on_fatal_signal(say_last);
    if (!first) file = std::make_unique<MappedFile>(path_);
    fs::remove_all(folder_.path());
    raise(SIGBUS);
  };
  EXPECT_EXIT(mapped_first(true), testing::KilledBySignal(SIGBUS), "^last words: v1 canary\n$");
  EXPECT_EXIT(mapped_first(false), testing::KilledBySignal(SIGBUS), "^last words: v1 canary\n$");
}

}  // namespace
}  // namespace tp
