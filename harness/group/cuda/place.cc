#include "harness/group/place.h"

#include "harness/group/device_link.h"

namespace tp {

std::string_view executor_name() { return "gpu"; }

DeviceLink* device_link() { return nullptr; }

std::string take_place(World&, Link) { return "gpu"; }

}  // namespace tp
