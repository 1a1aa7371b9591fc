#pragma once
// Which tpcheck runs kernels where: each executor is a build tree and a binary of its own, and a
// supervisor starts workers of either.

#include <filesystem>
#include <string>
#include <string_view>

#include "harness/fuzz/where.h"

namespace tp {

struct Executor {
  std::string name;  // kEmulator or kGpu
  std::filesystem::path binary;
  Link link = Link::best;
  std::string checkpoint = {}, adapter = {}, base = {};  // Where's
};

// This very binary, even if it was built anew since it started.
Executor this_executor(Link link = Link::best);

// The binary of the executor `name`: the one that TPCHECK_EMULATOR or TPCHECK_GPU names, else this
// very binary if it is of that executor, else the one of the build tree beside this one. Throws
// Unavailable if there is none.
Executor find_executor(std::string_view name, Link link);

// The executor `where` asks for, with the rest of what its workers are told. Throws likewise.
Executor executor_of(const Where& where);

// "TPCHECK_PRESET=cuda ./tpcheck build tpcheck": what builds the binary of the executor `name`.
std::string build_command(std::string_view name);

}  // namespace tp
