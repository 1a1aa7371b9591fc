#include "harness/base/mapped_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>

#include "harness/base/check.h"
#include "harness/base/temp_folder_testing.h"

namespace tp {
namespace {

namespace fs = std::filesystem;

class MappedFileTest : public testing::Test {
 protected:
  void fill(std::size_t size, char c = 'x') const {
    std::ofstream(path_, std::ios::binary) << std::string(size, c);
  }
  static std::string refusal(const std::string& path) {
    try {
      const MappedFile file(path);
    } catch (const BadInput& e) {
      return e.what();
    }
    return "";
  }
  static std::string change(const MappedFile& file) {
    try {
      file.check_unchanged();
    } catch (const BadInput& e) {
      return e.what();
    }
    return "";
  }

  TempFolder folder_;
  std::string path_ = folder_.at("f");
};
using MappedFileDeathTest = MappedFileTest;

TEST_F(MappedFileTest, ItsBytesAreTheFiles) {
  fill(10'000, 'q');
  const MappedFile file(path_);
  ASSERT_EQ(file.bytes().size(), 10'000u);
  for (const std::byte b : file.bytes()) ASSERT_EQ(b, std::byte('q'));
  EXPECT_EQ(file.path(), path_);
  EXPECT_EQ(change(file), "");
}

TEST_F(MappedFileTest, AnEmptyFileHasNoBytes) {
  fill(0);
  const MappedFile file(path_);
  EXPECT_TRUE(file.bytes().empty());
  EXPECT_EQ(change(file), "");
}

TEST_F(MappedFileTest, WhatIsNoRegularFileIsRefused) {
  EXPECT_EQ(refusal(path_), path_ + ": No such file or directory");
  EXPECT_EQ(refusal(folder_.path().string()), folder_.path().string() + ": not a regular file");
  EXPECT_EQ(refusal("/dev/zero"), "/dev/zero: not a regular file");
  ASSERT_EQ(mkfifo(path_.c_str(), 0600), 0);
  EXPECT_EQ(refusal(path_), path_ + ": not a regular file");  // and nobody waits for a writer
}

TEST_F(MappedFileTest, NothingIsLeftOpen) {
  fill(10);
  const auto open_files = [] {
    return std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator());
  };
  const auto before = open_files();
  { const MappedFile file(path_); }
  EXPECT_EQ(refusal("/dev/zero"), "/dev/zero: not a regular file");
  EXPECT_EQ(open_files(), before);
}

TEST_F(MappedFileTest, AnotherSizeIsSeen) {
  fill(100);
  const MappedFile file(path_);
  fs::resize_file(path_, 101);
  EXPECT_EQ(change(file), path_ + ": it has 101 bytes now; it had 100 when it was opened");
}

TEST_F(MappedFileTest, AnotherTimeOfChangeIsSeen) {
  fill(100);
  const MappedFile file(path_);
  fs::last_write_time(path_, fs::last_write_time(path_) + std::chrono::nanoseconds(1));
  EXPECT_EQ(change(file), path_ + ": it was written to after it was opened");
}

TEST_F(MappedFileTest, AnotherFileInItsPlaceIsSeen) {
  fill(100);
  const MappedFile file(path_);
  const auto time = fs::last_write_time(path_);
  fs::rename(path_, path_ + ".old");
  EXPECT_EQ(change(file), "");  // it is still what was opened
  fill(100);
  fs::last_write_time(path_, time);
  EXPECT_EQ(change(file), path_ + ": another file has taken its place since it was opened");
}

TEST_F(MappedFileTest, SlotsOfTheHandlersTableAreGivenBack) {
  fill(10);
  for (int i = 0; i < 10'000; ++i) ASSERT_EQ(refusal(path_), "");
}

TEST_F(MappedFileDeathTest, AFileThatIsCutWhileItIsReadEndsInOneSentence) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  fill(100'000);
  const auto read_what_is_gone = [&] {
    const MappedFile other(folder_.path() / "." / "f");
    const MappedFile file(path_);
    fs::resize_file(path_, 10);
    fs::remove_all(folder_.path());  // this process will not live to do it later
    volatile std::byte last = file.bytes()[99'999];
    (void)last;
  };
  EXPECT_EXIT(read_what_is_gone(), testing::ExitedWithCode(2),
              "^tpcheck: .*/f: it was cut to 10 bytes while it was read; it had 100000 when it was "
              "opened\n$");
}

// A bus error of other memory is not ours to explain.
TEST_F(MappedFileDeathTest, OtherBusErrorsGoWhereTheyWent) {
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  fill(100'000);
  const auto read_elsewhere = [&] {
    struct sigaction before = {};
    before.sa_handler = [](int) { _exit(77); };
    sigaction(SIGBUS, &before, nullptr);
    const MappedFile file(path_);
    std::ofstream(path_ + "2") << "x";
    const int fd = open((path_ + "2").c_str(), O_RDONLY);
    fs::remove_all(folder_.path());
    volatile const char* lost =
        static_cast<const char*>(mmap(nullptr, 8192, PROT_READ, MAP_PRIVATE, fd, 0));
    volatile char last = lost[8191];
    (void)last;
  };
  EXPECT_EXIT(read_elsewhere(), testing::ExitedWithCode(77), "^$");
  const auto send = [&] {
    signal(SIGBUS, SIG_DFL);  // whatever the sanitizers have set up
    const MappedFile file(path_);
    fs::remove_all(folder_.path());
    raise(SIGBUS);
  };
  EXPECT_EXIT(send(), testing::KilledBySignal(SIGBUS), "^$");
}

}  // namespace
}  // namespace tp
