#pragma once
// The limits of this process's device, as far as anybody measured them: what a kernel's time is
// compared with.

#include <optional>

namespace tp {

struct Ceilings {
  double launch_us = 0;          // the smallest kernel that reads and writes something
  double bytes_per_us = 0;       // of device memory, a copy's bytes read plus bytes written
  double read_bytes_per_us = 0;  // of device memory, where almost nothing is written
  double l2_bytes = 0;
  double l2_bytes_per_us = 0;  // read again and again
  double flops_per_us = 0;     // fp32, outside the tensor cores; by the device's own figures
  double matrix_flops_per_us =
      0;  // f16 or bf16 on tensor cores, dense; by the device's own figures

  // The least time that this device could take.
  double floor_us(double bytes, double flops, double matrix_flops = 0) const;
};

// Measured once, in the first call, which should come before anything else runs. Nothing on the
// emulator, or where they could not be measured.
const std::optional<Ceilings>& ceilings();

}  // namespace tp
