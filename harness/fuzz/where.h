#pragma once
// Where cases run: what --on, --group, -n and --jobs ask for, and how a replay line says it.

#include <string>
#include <string_view>

#include "harness/group/place.h"

namespace tp {

inline constexpr std::string_view kEmulator = "emulator";
inline constexpr std::string_view kGpu = "gpu";
inline constexpr std::string_view kBoth = "both";

struct Where {
  std::string on{executor_name()};  // kEmulator, kGpu or kBoth
  Link link = Link::best;
  int processes = 0;            // of one worker job; 0: the executor's default
  int jobs = 0;                 // 0: the executor's default
  std::string checkpoint = {};  // what workers have as user_checkpoint(); empty: none
  std::string adapter = {};     // and as user_adapter(), whose base is in the folder `base`
  std::string base = {};
};

// The processes of a job where none are asked for, and the jobs. The emulator fills the cores, with
// at most 4 processes a job, and keeps them full with one job more where there are several. The
// ranks of a case share a GPU, and so one process has it to itself.
int default_processes(std::string_view executor);
int default_jobs(std::string_view executor, int processes);

// With the defaults filled in. kBoth keeps its zeros: each side has its own.
Where settled(Where where);

// "gpu: NVIDIA H100 80GB HBM3 (sm_90), CUDA 13.0, driver for 13.0: GPU 0" or, where there is
// nothing to add, "emulator". `place` is what take_place() returned.
std::string place_phrase(std::string_view executor, std::string_view place);

// " --on gpu -n 2": what the plain `./tpcheck replay` of any machine has to be told to run a case
// there, too. The checkpoint and the adapter are not in it: they say what is run, not where.
std::string replay_flags(const Where& where);

}  // namespace tp
