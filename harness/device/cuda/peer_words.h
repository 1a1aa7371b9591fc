#pragma once
// Words between ranks on GPUs: through device memory, NVLink or PCIe. A vector's elements are
// single-copy atomic each (PTX memory model), which is all that is promised.

#include "harness/device/peer_words.h"

namespace tp {

__device__ inline void send_words(PeerWords* address, PeerWords words, Where = {}) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(words.first),
               "l"(words.second)
               : "memory");
}
__device__ inline PeerWords poll_words(const PeerWords* address, Where = {}) {
  PeerWords words;
  asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];"
               : "=l"(words.first), "=l"(words.second)
               : "l"(address)
               : "memory");
  return words;
}

// A kernel that polls for ever takes the GPU with it: about a second is enough for every rank that
// comes at all.
class SpinLimit {
 public:
  __device__ SpinLimit() : begin_(now()) {}
  __device__ bool is_over() const { return now() - begin_ > (1ll << 31); }

 private:
  __device__ static long long now() {
    long long cycles;
    asm volatile("mov.u64 %0, %%clock64;" : "=l"(cycles));
    return cycles;
  }

  long long begin_;
};

}  // namespace tp
