// tpcheck: a differential fuzzer for tensor-parallel kernels. See README.md, or tpcheck --help.

#include "harness/cli/cli.h"
#include "harness/group/world.h"
#include "properties/operators.h"

int main(int argc, char** argv) {
  tp::register_operators();
  tp::World world(&argc, &argv);
  return tp::cli_main(world, argc, argv);
}
