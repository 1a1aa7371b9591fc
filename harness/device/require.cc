#include "harness/device/require.h"

#include <string>

#include "harness/device/scheduler.h"

namespace tp {

void require(bool ok, std::string_view op, std::string_view format,
             std::initializer_list<std::int64_t> numbers) {
  if (ok) return;
  std::string text = std::string(op) + ": ";
  auto number = numbers.begin();
  for (std::size_t i = 0; i < format.size(); ++i) {
    if (format.substr(i, 2) == "{}" && number != numbers.end()) {
      text += std::to_string(*number++);
      ++i;
    } else {
      text += format[i];
    }
  }
  throw Fault{Outcome::BadLaunch, text, -1};
}

}  // namespace tp
