#pragma once
// An operator that stops going on where its case line says so: the ways in which a layer's ranks
// come to wait for ever for each other, each done by one rank. Only test binaries register it.
//
//   v1 hang hidden_size=128 tp_size=8 num_tokens=3 seed=7 fault=skips fault_rank=5
//
// Without a fault it is what a tensor-parallel layer does: a kernel over the rank's own columns, an
// all-reduce, a kernel that uses the sum, an all-gather of what each rank has, a kernel that puts
// it into rows, a barrier. All data are small integers and every sum of them is exact, so that its
// values have no budget at all.

#include <cstdint>
#include <string>
#include <vector>

#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

// In the order of the enumeration, as the key `fault` has them.
enum class HangFault : std::uint8_t {
  none,
  skips,         // leaves out the all-reduce
  order,         // is at the barrier before the all-gather
  count,         // gathers one element less
  dtype,         // reduces the same count in another type
  spins,         // a kernel waits for a flag in device memory that nobody sets
  lost_event,    // a stream waits for an event that nobody records
  killed,        // the process dies of SIGKILL in the rank's host code
  communicator,  // reduces on another communicator
  crashes,       // a kernel writes to where there is no memory: no hang, but the job ends, too
};
inline const std::vector<std::string> kHangFaults = {
    "none",  "skips",      "order",  "count",        "dtype",
    "spins", "lost_event", "killed", "communicator", "crashes"};

void add_hang_operator();

// The kernels of it.

// sums[i]: the sum of row i of x.
void hang_row_sums(View<const float> x, float* sums, Stream& stream);
// out = x + sums[row]
void hang_add_to_rows(View<const float> x, const float* sums, View<float> out, Stream& stream);
// blocks: a matrix of rows x cols of each rank, one behind another. out[i] is their rows i in a
// row, so that out has ranks * cols columns.
void hang_join_columns(const float* blocks, std::int64_t ranks, View<float> out, Stream& stream);
// Ends when somebody writes anything but 0 to *flag.
void hang_until_set(const float* flag, Stream& stream);
void hang_write(float* address, Stream& stream);

}  // namespace tp
