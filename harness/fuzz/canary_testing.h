#pragma once
// An operator that is meant to fail: its case line says how, and on which rank. Only test binaries
// register it, to show that every kind of failure is caught, blamed and survived.
//
//   v1 canary num_heads=2 num_kv_heads=1 head_dim=8 tp_size=2 num_tokens=1 dtype=bf16 seed=7
//   fault=segv fault_rank=1
//
// `canary` draws no fault. `canary_<fault>` is the same operator, and about half of the cases that
// it draws have that fault. `wrong` is the decision of the mutant "0:unique_shards", and so shows
// only where tp_size > num_kv_heads; `once` fails the first time only; `noise` prints a word
// without a newline and passes; `endless` never stops printing; `wrong_on_gpu` and
// `wrong_in_emulator` are wrong there only, the latter on one rank nowhere; `other_bits` passes
// with bits of its own on a GPU with several ranks; `needs_poison` shows only in poisoned memory;
// `gone` dies on a GPU and takes that along (place_testing.cc); `loop_in_emulator` loops there and
// is wrong on a GPU; `wrong_more_on_gpu` is wrong as `wrong` is, and on a GPU everywhere;
// `segv_serial` dies only in serial runs, and `segv_parallel` only in others. `wrong_in_file` is
// wrong where the user's checkpoint has a tensor "wrong"; `wrong_in_adapter`, which alone runs
// adapters, on those with a module "model.layers.0.wrong"; none of its cases is on one called
// "unfit".

#include <numeric>
#include <vector>

namespace tp {

void add_canaries();

// The group sizes 1 .. n.
inline std::vector<int> up_to(int n) {
  std::vector<int> sizes(static_cast<std::size_t>(n));
  std::iota(sizes.begin(), sizes.end(), 1);
  return sizes;
}

}  // namespace tp
