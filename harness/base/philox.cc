#include "harness/base/philox.h"

#include <Random123/philox.h>

namespace tp {

Random4 philox(std::uint64_t seed, std::uint64_t stream, std::uint64_t index) {
  const r123::Philox4x32::ctr_type counter{{std::uint32_t(index), std::uint32_t(index >> 32),
                                            std::uint32_t(stream), std::uint32_t(stream >> 32)}};
  const r123::Philox4x32::key_type key{{std::uint32_t(seed), std::uint32_t(seed >> 32)}};
  const auto r = r123::Philox4x32{}(counter, key);
  return {r[0], r[1], r[2], r[3]};
}

}  // namespace tp
