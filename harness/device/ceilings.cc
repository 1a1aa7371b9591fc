#include "harness/device/ceilings.h"

#include <algorithm>

namespace tp {

double Ceilings::floor_us(double bytes, double flops, double matrix_flops) const {
  return std::max(
      {launch_us, bytes / bytes_per_us, flops / flops_per_us, matrix_flops / matrix_flops_per_us});
}

}  // namespace tp
