#pragma once
// Kernels that meet their peers', and twins of them with one mistake each.

#include <cstdint>

#include "harness/device/stream.h"
#include "harness/group/peers.h"

namespace tp {

enum class Twin : std::uint8_t {
  right,
  polls_one_word,  // and takes the other one to be there, too
  two_places,      // although exchanges overlap
  numbers_again,   // from 1 on, in each launch
};

// Runs `exchanges` of them on each of `channels` and adds to *wrong the values that were not what
// the other rank sent in this launch.
void launch_exchanges(const Peers& peers, Twin twin, int channels, int exchanges, int launch,
                      unsigned* wrong, Stream& stream);

}  // namespace tp
