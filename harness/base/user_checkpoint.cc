#include "harness/base/user_checkpoint.h"

#include <fmt/format.h>

#include <memory>
#include <mutex>

#include "harness/base/check.h"

namespace tp {

namespace {

struct Opened {
  Model model;
  Checkpoint checkpoint;
};

std::mutex mutex;
std::string wanted;
std::unique_ptr<Opened> opened;
std::uint64_t version = 0;

const Opened* open_wanted() {
  const std::lock_guard lock(mutex);
  if (wanted.empty()) return nullptr;
  if (!opened) {
    opened = std::make_unique<Opened>(Opened{checkpoint_model(wanted), Checkpoint(wanted)});
  }
  return opened.get();
}

}  // namespace

void set_user_checkpoint(const std::string& directory) {
  const std::lock_guard lock(mutex);
  wanted = directory;
  opened.reset();
  ++version;
}

std::uint64_t user_checkpoint_version() {
  const std::lock_guard lock(mutex);
  return version;
}

const Checkpoint* user_checkpoint() {
  const Opened* all = open_wanted();
  return all ? &all->checkpoint : nullptr;
}

const Model* user_model() {
  const Opened* all = open_wanted();
  return all ? &all->model : nullptr;
}

std::string user_checkpoint_text() {
  const Opened* all = open_wanted();
  TP_CHECK(all, "no checkpoint is set");
  const std::vector<Safetensors>& files = all->checkpoint.files();
  std::size_t tensors = 0;
  for (const Safetensors& file : files) tensors += file.tensors().size();
  return fmt::format("{}: {} file{}, {} tensor{}, {}", all->checkpoint.path(), files.size(),
                     files.size() == 1 ? "" : "s", tensors, tensors == 1 ? "" : "s",
                     to_text(all->model.quantization));
}

}  // namespace tp
