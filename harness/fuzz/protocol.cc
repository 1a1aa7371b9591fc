#include "harness/fuzz/protocol.h"

#include <fmt/format.h>

#include <charconv>

#include "harness/base/check.h"

namespace tp {

std::string to_line(const Request& r) {
  return fmt::format("run {} {} {:d} {:d} {:d} {}", r.deadline.count(),
                     r.mutant.empty() ? "-" : r.mutant, r.trace, r.poison, r.serial, r.line);
}

Request request_from_line(std::string_view line) {
  const std::string_view whole = line;
  const auto word = [&] {
    const std::size_t end = line.find(' ');
    if (end == std::string_view::npos) throw BadInput(fmt::format("not a request: '{}'", whole));
    const std::string_view w = line.substr(0, end);
    line.remove_prefix(end + 1);
    return w;
  };
  const std::string_view verb = word(), deadline = word(), mutant = word(), trace = word(),
                         poison = word(), serial = word();
  std::int64_t ms = -1;
  const auto [end, error] = std::from_chars(deadline.data(), deadline.data() + deadline.size(), ms);
  const bool number = error == std::errc{} && end == deadline.data() + deadline.size() && ms >= 0;
  const auto flag = [](std::string_view w) { return w == "0" || w == "1"; };
  if (verb != "run" || !number || !flag(trace) || !flag(poison) || !flag(serial)) {
    throw BadInput(fmt::format("not a request: '{}'", whole));
  }
  return {.line = std::string(line),
          .mutant = mutant == "-" ? "" : std::string(mutant),
          .deadline = std::chrono::milliseconds(ms),
          .trace = trace == "1",
          .poison = poison == "1",
          .serial = serial == "1"};
}

}  // namespace tp
