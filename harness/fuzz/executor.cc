#include "harness/fuzz/executor.h"

#include <fmt/format.h>
#include <unistd.h>

#include <cstdlib>

#include "harness/base/check.h"

namespace tp {

namespace fs = std::filesystem;

namespace {

// What an executor is called elsewhere.
struct Names {
  const char* variable;
  const char* preset;  // of CMake, and the folder of its build
};
Names names_of(std::string_view executor) {
  return executor == kGpu ? Names{"TPCHECK_GPU", "cuda"} : Names{"TPCHECK_EMULATOR", "emulator"};
}

bool runs(const fs::path& path) {
  std::error_code ignored;
  return fs::is_regular_file(path, ignored) && access(path.c_str(), X_OK) == 0;
}

}  // namespace

Executor this_executor(Link link) {
  std::error_code error;
  fs::path path = fs::read_symlink("/proc/self/exe", error);
  if (error || !fs::exists(path, error)) path = fmt::format("/proc/{}/exe", getpid());
  return {std::string(executor_name()), path, link};
}

Executor find_executor(std::string_view name, Link link) {
  const Names names = names_of(name);
  if (const char* path = std::getenv(names.variable)) {
    if (runs(path)) return {std::string(name), fs::absolute(path), link};
    throw Unavailable(fmt::format("{}={} is no program that could run cases on the {}",
                                  names.variable, path, name));
  }
  if (name == executor_name()) return this_executor(link);
  std::error_code error;
  const fs::path own = fs::read_symlink("/proc/self/exe", error);
  const fs::path sibling = own.parent_path().parent_path() / names.preset / "tpcheck";
  if (runs(sibling)) return {std::string(name), sibling, link};
  throw Unavailable(
      fmt::format("no tpcheck of the {}: there is no {} ({} makes it; {} names another)", name,
                  sibling.string(), build_command(name), names.variable));
}

Executor executor_of(const Where& where) {
  Executor executor = find_executor(where.on, where.link);
  executor.checkpoint = where.checkpoint;
  executor.adapter = where.adapter;
  executor.base = where.base;
  return executor;
}

std::string build_command(std::string_view name) {
  return fmt::format("TPCHECK_PRESET={} ./tpcheck build tpcheck", names_of(name).preset);
}

}  // namespace tp
