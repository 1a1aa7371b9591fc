#pragma once
// Patterns of module names, as the Python package peft has them in target_modules, exclude_modules,
// rank_pattern and alpha_pattern, and compressed-tensors in its lists of layers to ignore: Python's
// regular expressions, as far as std::regex means the same by them.

#include <optional>
#include <string>
#include <string_view>

namespace tp {

// Why a pattern is refused, in the words that end "the pattern X"; nothing: it is understood. Those
// are refused that are no regular expressions, that std::regex does not have or reads otherwise
// than Python does (look-behind, named groups, \Z), and that could take without end (back
// references, {n,m}, a look-ahead in another, or one of any length that could start in many
// places).
std::optional<std::string> not_understood(std::string_view pattern);

// Whether all of `module` matches (re.fullmatch). Of a pattern that is understood; false for names
// of more than kMaxModuleName characters.
inline constexpr std::size_t kMaxModuleName = 200;
bool matches_whole(std::string_view pattern, std::string_view module);

// Whether `module`, or its end after a dot, does (re.match of "(.*\.)?(PATTERN)$").
bool matches_end(std::string_view pattern, std::string_view module);

}  // namespace tp
