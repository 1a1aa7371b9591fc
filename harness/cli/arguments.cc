#include "harness/cli/arguments.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>

#include "harness/base/case.h"
#include "harness/base/check.h"
#include "harness/base/text.h"

namespace tp {

std::int64_t whole_number(std::string_view flag, std::string_view text, std::int64_t min,
                          std::int64_t max) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error == std::errc::invalid_argument || end != text.data() + text.size()) {
    throw BadInput(fmt::format("{} '{}' is not a whole number", flag, printable(text)));
  }
  if (error == std::errc::result_out_of_range || value < min || value > max) {
    throw BadInput(fmt::format("{} {} is outside {}..{}", flag, printable(text), min, max));
  }
  return value;
}

double duration(std::string_view flag, std::string_view text) {
  constexpr double kLongest = 3.6e6;
  const auto bad = [&] {
    return BadInput(
        fmt::format("{} '{}' is not a duration like 500ms, 90s, 10m or 2h", flag, printable(text)));
  };
  double seconds = 0;
  std::string_view rest = text;
  do {
    double number = 0;
    // from_chars would take "inf" and "nan" too.
    if (rest.empty() || rest[0] < '0' || rest[0] > '9') throw bad();
    const auto [end, error] =
        std::from_chars(rest.data(), rest.data() + rest.size(), number, std::chars_format::fixed);
    if (error != std::errc()) throw bad();
    rest.remove_prefix(std::size_t(end - rest.data()));
    const std::size_t length = std::min(rest.find_first_not_of("hms"), rest.size());
    const std::string_view unit = rest.substr(0, length);
    rest.remove_prefix(length);
    if (unit == "h")
      seconds += 3600 * number;
    else if (unit == "m")
      seconds += 60 * number;
    else if (unit == "s" || unit.empty())
      seconds += number;
    else if (unit == "ms")
      seconds += number / 1000;
    else
      throw bad();
  } while (!rest.empty());
  if (!(seconds > 0 && seconds <= kLongest)) {
    throw BadInput(fmt::format("{} {} is not above zero and at most 1000h", flag, printable(text)));
  }
  return seconds;
}

std::vector<std::string> words(std::string_view flag, const std::vector<std::string>& lists) {
  std::vector<std::string> all;
  for (const std::string& list : lists) {
    for (std::size_t at = 0; at <= list.size();) {
      const std::size_t comma = std::min(list.find(',', at), list.size());
      if (comma == at)
        throw BadInput(fmt::format("{} '{}' has an empty entry", flag, printable(list)));
      all.push_back(list.substr(at, comma - at));
      at = comma + 1;
    }
  }
  return all;
}

std::vector<int> tp_sizes(std::string_view flag, const std::vector<std::string>& lists) {
  const Key key = shared_key("tp_size");
  std::vector<int> sizes;
  for (const std::string& word : words(flag, lists)) {
    const std::size_t dots = word.find("..");
    const std::int64_t first = whole_number(flag, word.substr(0, dots), key.min, key.max);
    const std::int64_t last =
        dots == word.npos ? first : whole_number(flag, word.substr(dots + 2), key.min, key.max);
    if (last < first) throw BadInput(fmt::format("{} {} is an empty range", flag, printable(word)));
    for (std::int64_t size = first; size <= last; ++size) {
      if (std::find(sizes.begin(), sizes.end(), size) == sizes.end()) sizes.push_back(int(size));
    }
  }
  return sizes;
}

std::string one_of(std::string_view flag, const std::string& text,
                   const std::vector<std::string>& allowed) {
  if (std::find(allowed.begin(), allowed.end(), text) != allowed.end()) return text;
  throw BadInput(
      fmt::format("{} '{}' is none of {}", flag, printable(text), fmt::join(allowed, ", ")));
}

}  // namespace tp
