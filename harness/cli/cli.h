#pragma once
// The command line of tpcheck, from arguments to exit code (design.md section 6 says what each
// means).

namespace tp {

class World;

// Runs the command. Never throws; whatever is wrong becomes one sentence on standard error, printed
// by process 0 alone, and the same exit code on all processes of the world.
int cli_main(World& world, int argc, char** argv);

}  // namespace tp
