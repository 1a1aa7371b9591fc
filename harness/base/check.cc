#include "harness/base/check.h"

#include <cstdio>
#include <cstdlib>

namespace tp {

void die(const char* file, int line, const std::string& message) {
  std::fprintf(stderr, "tpcheck: %s:%d: %s\n", file, line, message.c_str());
  std::fflush(nullptr);
  std::abort();  // under mpirun an abort of one process ends the job, so nobody waits for us
}

}  // namespace tp
