// libFuzzer: a config.json. What is accepted is a shape that a case line can hold.

#include <cstdint>
#include <cstdlib>

#include "harness/base/case.h"
#include "harness/base/check.h"
#include "harness/base/model_config.h"

namespace {

void require_in_range(const char* key, int value) {
  const tp::Key k = tp::shared_key(key);
  if (value < k.min || value > k.max) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  try {
    const tp::Model model =
        tp::model_from_config({reinterpret_cast<const char*>(data), size}, "config.json");
    require_in_range("hidden_size", model.shape.hidden_size);
    require_in_range("num_heads", model.shape.num_heads);
    require_in_range("num_kv_heads", model.shape.num_kv_heads);
    require_in_range("head_dim", model.shape.head_dim);
    require_in_range("v_head_dim", model.shape.v_head_dim);
    if (model.shape.num_heads % model.shape.num_kv_heads != 0) std::abort();
    if (!(model.eps >= 0 && model.eps < 1)) std::abort();
  } catch (const tp::BadInput&) {
  }
  return 0;
}
