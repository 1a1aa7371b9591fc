// tpcheck with the canary instead of operators: what the end-to-end tests of supervisor and
// commands run.

#include "harness/cli/cli.h"
#include "harness/fuzz/canary_testing.h"
#include "harness/group/world.h"

int main(int argc, char** argv) {
  tp::add_canaries();
  tp::World world(&argc, &argv);
  return tp::cli_main(world, argc, argv);
}
