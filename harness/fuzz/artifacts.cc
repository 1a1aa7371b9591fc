#include "harness/fuzz/artifacts.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>

#include "harness/base/check.h"
#include "harness/base/philox.h"

namespace tp {

namespace fs = std::filesystem;

namespace {

void write_whole(const fs::path& path, const std::string& text) {
  const fs::path temporary = fmt::format("{}.{}.tmp", path.string(), getpid());
  std::ofstream out(temporary);
  out << text;
  out.close();
  std::error_code error;
  if (out) fs::rename(temporary, path, error);
  if (!out || error) {
    const std::string why = error ? error.message() : std::strerror(errno);
    fs::remove(temporary, error);
    throw BadInput(fmt::format("cannot write {}: {}", path.string(), why));
  }
}

void make_folder(const fs::path& folder) {
  std::error_code error;
  fs::create_directories(folder, error);
  if (error)
    throw BadInput(
        fmt::format("cannot make the artifacts folder {}: {}", folder.string(), error.message()));
}

}  // namespace

Artifacts::Artifacts(fs::path folder) : folder_(std::move(folder)) {
  fs::path existing = folder_;
  std::error_code ignored;
  while (!existing.empty() && !fs::exists(existing, ignored)) existing = existing.parent_path();
  const bool is_new = existing != folder_;
  make_folder(folder_);
  const fs::path probe = folder_ / fmt::format("probe.{}", getpid());
  try {
    write_whole(probe, "");
  } catch (const BadInput& e) {
    throw BadInput(
        fmt::format("cannot write to the artifacts folder {}: {}", folder_.string(), e.what()));
  }
  fs::remove(probe, ignored);
  for (fs::path made = folder_; is_new && made != existing && !made.empty();
       made = made.parent_path()) {
    fs::remove(made, ignored);
  }
}

fs::path Artifacts::write(const Case& c, const std::string& suffix, const std::string& text) const {
  make_folder(folder_);
  const fs::path path = folder_ / fmt::format("{}-{:016x}{}", c.op, stream_of(to_line(c)), suffix);
  write_whole(path, text);
  return path;
}

}  // namespace tp
