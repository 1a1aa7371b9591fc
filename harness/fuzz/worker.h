#pragma once
// The processes that run cases. `tpcheck worker` is started by the supervisor, never by a person:
// process 0 reads requests (protocol.h) from standard input and answers on standard output, every
// process of the job runs every case, and the end of standard input ends the job.

#include <functional>
#include <string>

#include "harness/base/verdict.h"
#include "harness/fuzz/protocol.h"
#include "harness/group/place.h"

namespace tp {

class World;
using TraceLine = std::function<void(const std::string&)>;

// On process 0: has all processes run the request. A case line that cannot be meant is Refused, and
// so is an illegal case. `trace` gets the operator's lines. If the world has retired afterwards,
// this was the last one it can run.
Verdict run_everywhere(World& world, const Request& request, const TraceLine& trace);

// On process 0: ends serve() on the others.
void end_everywhere(World& world);

// On all processes but 0: runs what process 0 asks for, until it ends.
void serve(World& world);

// Takes its place (place.h) first, and says where that is, or why it cannot.
// The directory of user_checkpoint(), and those of user_adapter() and its base, which are opened at
// once; empty: none.
struct UserFiles {
  std::string checkpoint = {};
  std::string adapter = {};
  std::string base = {};
};
int worker_main(World& world, Link link, const UserFiles& files = {});

}  // namespace tp
