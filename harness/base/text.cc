#include "harness/base/text.h"

#include <algorithm>
#include <cstdint>
#include <utility>

namespace tp {

namespace {

// Levenshtein distance.
std::size_t distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  for (std::size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i);
    for (std::size_t j = 1; j <= b.size(); ++j) {
      const std::size_t change = diagonal + (a[i - 1] != b[j - 1]);
      diagonal = std::exchange(row[j], std::min({row[j] + 1, row[j - 1] + 1, change}));
    }
  }
  return row[b.size()];
}

}  // namespace

std::string printable(std::string_view text, std::size_t longest) {
  std::string s(text.substr(0, longest));
  for (char& c : s) {
    if (std::uint8_t(c) < 0x20 || std::uint8_t(c) > 0x7E) c = '?';
  }
  return s + (text.size() > longest ? "..." : "");
}

std::string shell_quoted(std::string_view text) {
  const auto plain = [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
           std::string_view("._/-+,:@%=").find(c) != std::string_view::npos;
  };
  if (!text.empty() && std::all_of(text.begin(), text.end(), plain)) return std::string(text);
  std::string quoted = "'";
  for (const char c : text) quoted += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return quoted + "'";
}

std::string lower(std::string_view text) {
  std::string s(text);
  for (char& c : s) {
    if (c >= 'A' && c <= 'Z') c = char(c - 'A' + 'a');
  }
  return s;
}

std::vector<std::string> near_misses(std::string_view word, const std::vector<std::string>& known) {
  constexpr std::size_t kShown = 5;
  constexpr std::size_t kLongest =
      100;  // nobody mistypes a longer one, and distance() is quadratic
  const std::string wanted = lower(word.substr(0, kLongest));
  std::vector<std::string> near;
  for (const std::string& k : known) {
    if (!wanted.empty() && lower(k).find(wanted) != std::string::npos) near.push_back(k);
  }
  if (near.empty()) {
    std::vector<std::pair<std::size_t, std::string>> ranked;
    for (const std::string& k : known) {
      // An id may be meant without the organisation before its slash.
      const std::size_t slash = k.find('/');
      const std::size_t whole = distance(wanted, lower(k));
      const std::size_t tail =
          slash == k.npos ? whole : distance(wanted, lower(k.substr(slash + 1)));
      const std::size_t d = std::min(whole, tail);
      if (d <= 1 + wanted.size() / 4) ranked.emplace_back(d, k);
    }
    std::stable_sort(ranked.begin(), ranked.end(),
                     [](const auto& a, const auto& b) { return a.first < b.first; });
    for (auto& [d, k] : ranked) near.push_back(std::move(k));
  }
  if (near.size() > kShown) near.resize(kShown);
  return near;
}

}  // namespace tp
