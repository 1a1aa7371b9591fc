#include "harness/device/ceilings.h"

namespace tp {

const std::optional<Ceilings>& ceilings() {
  static const std::optional<Ceilings> none;
  return none;
}

}  // namespace tp
