// libFuzzer: a case line. What is accepted prints as a line that means the same case.

#include <cstdint>
#include <cstdlib>

#include "harness/base/case.h"
#include "harness/base/check.h"
#include "properties/operators.h"

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  tp::register_operators();
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  tp::Case c;
  try {
    c = tp::case_from_line({reinterpret_cast<const char*>(data), size});
  } catch (const tp::BadInput&) {
    return 0;
  }
  const std::string line = tp::to_line(c);
  const tp::Case again = tp::case_from_line(line);  // no BadInput is right here
  if (!(again == c) || tp::to_line(again) != line) std::abort();
  return 0;
}
