#pragma once
// Words of the command line made into values. Every function throws BadInput with one sentence that
// names the flag, the text, and what would have been allowed.

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace tp {

// A whole number in min..max.
std::int64_t whole_number(std::string_view flag, std::string_view text, std::int64_t min,
                          std::int64_t max);

// Seconds of "10m", "90s", "500ms", "2h", "1h30m" or "60" (seconds); above zero, at most 1000 h.
double duration(std::string_view flag, std::string_view text);

// The words of lists with commas: {"a,b", "c"} are a, b, c. None may be empty.
std::vector<std::string> words(std::string_view flag, const std::vector<std::string>& lists);

// "1,2,8" or "1..16" or both: "1..4,8", in this order, each size once.
std::vector<int> tp_sizes(std::string_view flag, const std::vector<std::string>& lists);

// `text` itself, if it is one of `allowed`.
std::string one_of(std::string_view flag, const std::string& text,
                   const std::vector<std::string>& allowed);

}  // namespace tp
