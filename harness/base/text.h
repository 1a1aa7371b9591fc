#pragma once
// The user's own text, in messages to the user.

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace tp {

// A short piece of foreign text that is safe to print: at most `longest` characters, the control
// characters and everything beyond ASCII replaced by '?'.
std::string printable(std::string_view text, std::size_t longest = 60);

// Upper-case ASCII letters made small.
std::string lower(std::string_view text);

// `text` as one word of a shell, as it is where nothing in it means anything there.
std::string shell_quoted(std::string_view text);

// Which of `known` a mistyped word may have meant, best first, at most five: those that contain it,
// else those that are a few letters away. Upper and lower case are the same.
std::vector<std::string> near_misses(std::string_view word, const std::vector<std::string>& known);

}  // namespace tp
