// A place (harness/group/place.h) for the canary that pretends to be a GPU's: linked in, it stands
// in for the build's own, and so defines whatever that does. Its name and its room are the test's:
//
//   TPCHECK_TEST_CANNOT=FILE   a worker cannot run once FILE exists; one line of FILE says why

#include <cstdlib>
#include <fstream>
#include <string>

#include "harness/base/check.h"
#include "harness/group/device_link.h"
#include "harness/group/place.h"
#include "harness/group/world.h"

namespace tp {

std::string_view executor_name() { return "gpu"; }

DeviceLink* device_link() { return nullptr; }

std::string take_place(World& world, Link link) {
  std::string why;
  const char* path = std::getenv("TPCHECK_TEST_CANNOT");
  if (world.is_root() && path) {
    std::ifstream in(path);
    std::getline(in, why);
  }
  why = world.broadcast(why);
  if (!why.empty()) throw Unavailable(why);
  return "Pretend GPU (--group " + std::string(kLinkWords[std::size_t(link)]) + ")";
}

}  // namespace tp
