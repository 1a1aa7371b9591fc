// libFuzzer: a model.safetensors.index.json.

#include <cstdint>
#include <cstdlib>

#include "harness/base/check.h"
#include "harness/base/checkpoint.h"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const auto file_of =
        tp::parse_safetensors_index({reinterpret_cast<const char*>(data), size}, "index");
    // Nothing that leads out of the checkpoint's folder.
    for (const auto& [tensor, file] : file_of) {
      if (file.empty() || file == ".." || file.find('/') != file.npos) std::abort();
    }
  } catch (const tp::BadInput&) {
  }
  return 0;
}
