#pragma once
// A file's bytes, mapped read-only: nothing is read before it is looked at.

#include <csignal>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace tp {

class MappedFile {
 public:
  // A regular file, also one without a name (/proc/self/fd/N of a memfd). Throws BadInput naming
  // the path and why it cannot be mapped. Whoever looks at a byte that the file has lost since
  // (somebody truncated it) ends the process with one sentence and exit code 2.
  explicit MappedFile(const std::string& path);
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;
  ~MappedFile();

  const std::string& path() const { return path_; }
  std::span<const std::byte> bytes() const { return {data_, size_}; }

  // Throws BadInput if the file has another size or time of change than when it was opened, or if
  // another file has taken its path. One that was deleted is still what was opened.
  void check_unchanged() const;

 private:
  std::string path_;
  int fd_ = -1;
  const std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  std::int64_t changed_ns_ = 0;
  std::uint64_t device_ = 0;
  std::uint64_t inode_ = 0;
  std::size_t slot_ = 0;  // among the mappings that the signal handler knows
};

// In a handler of SIGBUS: if the address belongs to a mapped file, says what became of the file and
// ends the process with exit code 2; returns otherwise. For whoever installs a handler after the
// first file was mapped.
void end_if_mapped_file_was_cut(const siginfo_t& info);

}  // namespace tp
