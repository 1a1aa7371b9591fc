#include "harness/fuzz/where.h"

#include <fmt/format.h>

#include <algorithm>
#include <thread>

namespace tp {

int default_processes(std::string_view executor) {
  return executor == kGpu ? 1 : std::clamp(int(std::thread::hardware_concurrency()), 1, 4);
}

int default_jobs(std::string_view executor, int processes) {
  if (executor == kGpu) return 1;
  const int filling = std::max(1, int(std::thread::hardware_concurrency()) / processes);
  // The processes of a job wait for each other: they have unequal shares of the ranks, or none, and
  // one of them judges. A job more takes the cores while they do.
  return processes > 1 ? filling + 1 : filling;
}

Where settled(Where where) {
  if (where.on == kBoth) return where;
  if (where.processes == 0) where.processes = default_processes(where.on);
  if (where.jobs == 0) where.jobs = default_jobs(where.on, where.processes);
  return where;
}

std::string place_phrase(std::string_view executor, std::string_view place) {
  return place == executor ? std::string(executor) : fmt::format("{}: {}", executor, place);
}

std::string replay_flags(const Where& where) {
  std::string flags;
  // The launcher's own tpcheck is the emulator's.
  if (where.on != kEmulator) flags += fmt::format(" --on {}", where.on);
  if (where.link != Link::best)
    flags += fmt::format(" --group {}", kLinkWords[std::size_t(where.link)]);
  const int usual = where.on == kBoth ? 0 : default_processes(where.on);
  if (where.processes != usual) flags += fmt::format(" -n {}", where.processes);
  return flags;
}

}  // namespace tp
