// A case's tensors as files, for stages that load them as an engine does: written by the writer,
// read by the reader, in memory that is a file all the same.

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>

#include "harness/base/check.h"
#include "properties/run/pass.h"

namespace tp {

// An anonymous file, for as long as it is open; whoever mapped it keeps its content.
class MemoryFile {
 public:
  explicit MemoryFile(const std::vector<std::byte>& bytes)
      : fd_(memfd_create("tpcheck", MFD_CLOEXEC)) {
    TP_CHECK(fd_ >= 0, std::string("no memory for a file: ") + std::strerror(errno));
    for (std::size_t at = 0; at < bytes.size();) {
      const ssize_t n = write(fd_, bytes.data() + at, bytes.size() - at);
      if (n < 0 && errno == EINTR) continue;
      TP_CHECK(n > 0, std::string("no memory for a file: ") + std::strerror(errno));
      at += std::size_t(n);
    }
  }
  ~MemoryFile() { close(fd_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

std::vector<const Checkpoint*> InputData::checkpoints(const Stage& stage) {
  std::vector<const Checkpoint*> all = stage.checkpoints;
  for (const StoredInput& input : stage.stored)
    all.resize(std::max(all.size(), std::size_t(input.checkpoint) + 1));
  for (std::size_t which = 0; which < all.size(); ++which) {
    if (all[which] == nullptr) all[which] = &made_checkpoint(stage, int(which));
  }
  return all;
}

const Checkpoint& InputData::made_checkpoint(const Stage& stage, int which) {
  const std::pair key{stage.name, which};
  if (const auto made = checkpoints_.find(key); made != checkpoints_.end()) return made->second;
  std::vector<std::vector<StoredTensor>> files(1);
  for (const StoredInput& input : stage.stored) {
    if (input.checkpoint != which) continue;
    const TensorSpec& t = tensor_of(stage, input.tensor);
    const std::vector<std::byte>& bytes = block(t, {0, t.rows}, {0, t.cols});
    files.resize(std::max(files.size(), std::size_t(input.file) + 1));
    files[std::size_t(input.file)].push_back({input.name.empty() ? t.name : input.name,
                                              std::string(safetensors_word(t.dtype)), input.shape,
                                              bytes.data(), bytes.size()});
  }
  std::vector<std::string> paths;
  for (const std::vector<StoredTensor>& tensors : files) {
    files_.push_back(std::make_shared<MemoryFile>(safetensors_bytes(tensors)));
    paths.push_back(files_.back()->path());
  }
  return checkpoints_.emplace(key, Checkpoint(paths)).first->second;
}

}  // namespace tp
