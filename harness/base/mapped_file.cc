#include "harness/base/mapped_file.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <string_view>

#include "harness/base/check.h"
#include "harness/base/exit_codes.h"

namespace tp {

namespace {

// What the handler reads: no locks, nothing that moves. `begin` is set last and cleared first.
struct Mapping {
  std::atomic<bool> taken = false;
  std::atomic<std::uintptr_t> begin = 0;
  std::size_t size = 0;
  const char* path = nullptr;
  int fd = -1;
};
std::array<Mapping, 4096> mappings;
struct sigaction before_ours;

std::int64_t nanoseconds(const timespec& t) {
  return std::int64_t(t.tv_sec) * 1'000'000'000 + t.tv_nsec;
}

// A sentence in a handler: neither memory nor locks are needed.
class Sentence {
 public:
  Sentence& operator<<(std::string_view text) {
    const std::size_t n = std::min(text.size(), sizeof(text_) - size_);
    std::memcpy(text_ + size_, text.data(), n);
    size_ += n;
    return *this;
  }
  Sentence& operator<<(std::uint64_t number) {
    char digits[20];
    std::size_t first = sizeof(digits);
    do {
      digits[--first] = char('0' + number % 10);
      number /= 10;
    } while (number > 0);
    return *this << std::string_view(digits + first, sizeof(digits) - first);
  }
  void write_to(int fd) const { [[maybe_unused]] const auto n = write(fd, text_, size_); }

 private:
  char text_[4096 + 256];  // a path and a sentence
  std::size_t size_ = 0;
};

void bus_error(int signal, siginfo_t* info, void* context) {
  end_if_mapped_file_was_cut(*info);
  if (before_ours.sa_flags & SA_SIGINFO) {
    before_ours.sa_sigaction(signal, info, context);
  } else if (before_ours.sa_handler != SIG_DFL && before_ours.sa_handler != SIG_IGN) {
    before_ours.sa_handler(signal);
  } else if (before_ours.sa_handler == SIG_DFL || info->si_code > 0) {
    struct sigaction fatal = {};
    fatal.sa_handler = SIG_DFL;
    sigaction(signal, &fatal, nullptr);
    // A fault comes again by itself, and from where it happened; a signal that was sent does not.
    if (info->si_code <= 0) raise(signal);
  }
}

void install_handler() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = bus_error;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGBUS, &action, &before_ours);
  });
}

std::size_t take_slot(const std::string& path) {
  for (std::size_t i = 0; i < mappings.size(); ++i) {
    if (!mappings[i].taken.exchange(true)) return i;
  }
  throw BadInput(fmt::format("{}: {} files are mapped already", path, mappings.size()));
}

}  // namespace

void end_if_mapped_file_was_cut(const siginfo_t& info) {
  // A signal that somebody sent has no address.
  if (info.si_signo != SIGBUS || info.si_code <= 0) return;
  const auto address = std::uintptr_t(info.si_addr);
  for (const Mapping& mapping : mappings) {
    const std::uintptr_t begin = mapping.begin;
    if (begin == 0 || address < begin || address - begin >= mapping.size) continue;
    Sentence sentence;
    sentence << "tpcheck: " << std::string_view(mapping.path) << ": ";
    struct stat now;
    if (fstat(mapping.fd, &now) == 0 && std::uint64_t(now.st_size) < mapping.size) {
      sentence << "it was cut to " << std::uint64_t(now.st_size)
               << " bytes while it was read; it had " << mapping.size << " when it was opened\n";
    } else {
      sentence << "the medium failed near byte " << address - begin << " of " << mapping.size
               << "\n";
    }
    sentence.write_to(STDERR_FILENO);
    _exit(kExitBadInput);
  }
}

MappedFile::MappedFile(const std::string& path) : path_(path) {
  // Not blocking: opening a pipe would wait for somebody to write into it.
  fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd_ < 0) throw BadInput(fmt::format("{}: {}", path, std::strerror(errno)));
  try {
    struct stat status;
    if (fstat(fd_, &status) != 0) {
      throw BadInput(fmt::format("{}: {}", path, std::strerror(errno)));
    }
    if (!S_ISREG(status.st_mode)) throw BadInput(fmt::format("{}: not a regular file", path));
    size_ = std::size_t(status.st_size);
    changed_ns_ = nanoseconds(status.st_mtim);
    device_ = status.st_dev;
    inode_ = status.st_ino;
    slot_ = take_slot(path);
  } catch (const BadInput&) {
    close(fd_);
    throw;
  }
  if (size_ == 0) return;  // mmap refuses that
  install_handler();
  void* data = mmap(nullptr, size_, PROT_READ, MAP_PRIVATE, fd_, 0);
  if (data == MAP_FAILED) {
    const int why = errno;
    mappings[slot_].taken = false;
    close(fd_);
    throw BadInput(
        fmt::format("{}: its {} bytes cannot be mapped: {}", path, size_, std::strerror(why)));
  }
  data_ = static_cast<const std::byte*>(data);
  mappings[slot_].size = size_;
  mappings[slot_].path = path_.c_str();
  mappings[slot_].fd = fd_;
  mappings[slot_].begin = std::uintptr_t(data);
}

MappedFile::~MappedFile() {
  mappings[slot_].begin = 0;
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_);
  close(fd_);
  mappings[slot_].taken = false;
}

void MappedFile::check_unchanged() const {
  struct stat now;
  if (fstat(fd_, &now) != 0) throw BadInput(fmt::format("{}: {}", path_, std::strerror(errno)));
  if (std::size_t(now.st_size) != size_) {
    throw BadInput(fmt::format("{}: it has {} bytes now; it had {} when it was opened", path_,
                               now.st_size, size_));
  }
  if (nanoseconds(now.st_mtim) != changed_ns_) {
    throw BadInput(fmt::format("{}: it was written to after it was opened", path_));
  }
  if (stat(path_.c_str(), &now) == 0 && (now.st_dev != device_ || now.st_ino != inode_)) {
    throw BadInput(fmt::format("{}: another file has taken its place since it was opened", path_));
  }
}

}  // namespace tp
