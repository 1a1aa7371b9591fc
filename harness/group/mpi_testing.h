#pragma once
// GoogleTest under mpirun: every process runs the same tests in the same order, process 0 prints,
// and all of them return the same status. Test bodies record what is wrong (EXPECT_), never leave
// early between two collectives, and so never leave the others waiting.

#include "harness/group/world.h"

namespace tp {

// The processes of this test run.
World& test_world();

}  // namespace tp
