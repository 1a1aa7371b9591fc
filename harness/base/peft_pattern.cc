#include "harness/base/peft_pattern.h"

#include <algorithm>
#include <map>
#include <regex>
#include <vector>

namespace tp {

namespace {

// std::regex recurses as deep as they are long.
constexpr std::size_t kMaxPattern = 1000;

bool is_one_of(char c, std::string_view all) { return all.find(c) != all.npos; }
bool is_letter_or_digit(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9');
}

// Reads a pattern from left to right for what std::regex would take without complaint, and Python
// does not mean.
class Scan {
 public:
  explicit Scan(std::string_view pattern) : rest_(pattern) {}

  std::optional<std::string> objection() {
    while (!rest_.empty()) {
      if (auto why = next()) return why;
    }
    return std::nullopt;
  }

 private:
  static constexpr const char* kFar =
      "has a repetition in a look-ahead that is behind a repetition or in one, which is not known "
      "here";
  std::string_view rest_;
  struct Group {
    bool ahead = false;   // a look-ahead
    bool behind = false;  // behind something of any length: it starts in many places
    bool far = false;     // it has a look-ahead of any length in it, or is one
  };
  std::vector<Group> open_;
  bool repeated_ = false;  // there was a repetition outside of look-aheads

  char take() {
    const char c = rest_.front();
    rest_.remove_prefix(1);
    return c;
  }
  Group* look_ahead() {
    const auto found =
        std::find_if(open_.begin(), open_.end(), [](const Group& g) { return g.ahead; });
    return found == open_.end() ? nullptr : &*found;
  }
  bool looks_ahead() { return look_ahead() != nullptr; }

  std::optional<std::string> next() {
    switch (const char c = take(); c) {
      case '{':
      case '}':
        return "has {}, which is not known here";
      case '\\':
        return escape(false);
      case '[':
        return bracket();
      case '(':
        return group();
      case ')':
        return end_of_group();
      case '*':
      case '+':
      case '?':
        return repetition(c);
      case '^':
        // std::regex takes the place where it begins to look for the beginning.
        if (looks_ahead()) return "has ^ in a look-ahead, which is not known here";
        return std::nullopt;
      default:
        return std::nullopt;
    }
  }

  // A second one in a row is lazy (*?), possessive in newer Pythons (*+), or an error (**).
  // Each look-ahead of any length takes as long as what follows is: from many places, n^2 steps.
  std::optional<std::string> repetition(char c) {
    if (Group* ahead = look_ahead(); !ahead) {
      repeated_ = true;
    } else if (c != '?') {
      if (ahead->behind) return std::string(kFar);
      ahead->far = true;
    }
    if (rest_.starts_with('?')) take();
    if (!rest_.empty() && is_one_of(rest_.front(), "*+?"))
      return "has two repetitions in a row, which are not known here";
    return std::nullopt;
  }

  std::optional<std::string> end_of_group() {
    if (open_.empty()) return std::nullopt;  // std::regex refuses it
    const Group ended = open_.back();
    open_.pop_back();
    if (!ended.far) return std::nullopt;
    if (!rest_.empty() && is_one_of(rest_.front(), "*+?")) return std::string(kFar);
    if (!open_.empty()) open_.back().far = true;
    return std::nullopt;
  }

  std::optional<std::string> escape(bool in_bracket) {
    if (rest_.empty()) return "ends in a backslash";
    const char c = take();
    if (c >= '0' && c <= '9') return "has a back reference, which is not known here";
    if (!is_letter_or_digit(c) || is_one_of(c, "dDwWsSnrtfv")) return std::nullopt;
    if (is_one_of(c, "bB") && !in_bracket && !looks_ahead()) return std::nullopt;
    return std::string("has \\") + c + ", which is not known here";
  }

  std::optional<std::string> bracket() {
    if (rest_.starts_with('^')) take();
    if (rest_.starts_with(']'))
      return "has ] at the beginning of brackets, which is not known here";
    while (!rest_.empty()) {
      const char c = take();
      if (c == ']') return std::nullopt;
      if (c == '[') return "has brackets in brackets, which are not known here";
      if (c == '\\') {
        if (auto why = escape(true)) return why;
      }
    }
    return "has brackets without an end";
  }

  std::optional<std::string> group() {
    bool ahead = false;
    if (rest_.starts_with('?')) {
      ahead = rest_.starts_with("?=") || rest_.starts_with("?!");
      if (!ahead && !rest_.starts_with("?:"))
        return "has a group that is neither (?:...), (?=...) nor (?!...)";
      // Each would look at all that follows from wherever the one around it is: n^depth steps.
      if (ahead && looks_ahead()) return "has a look-ahead in another, which is not known here";
      rest_.remove_prefix(2);
    }
    open_.push_back({.ahead = ahead, .behind = repeated_});
    return std::nullopt;
  }
};

// A pattern that is understood. Most are plain: names in which a dot is any character, as there are
// hundreds of in a rank_pattern. The others take std::regex, in polynomial time (libstdc++'s flag).
struct Compiled {
  std::string objection = {};  // empty: none
  bool is_plain = false;
  bool from_start = false;  // it began with ^
  std::string plain = {};   // '\0' is any character
  std::optional<std::regex> whole = {}, end = {};
};

constexpr char kAny = '\0';

// Names, dots, escaped dots, ^ before and $ behind them; nothing for others.
std::optional<Compiled> plain_of(std::string_view pattern) {
  Compiled made{.is_plain = true};
  if (pattern.starts_with('^')) {
    made.from_start = true;
    pattern.remove_prefix(1);
  }
  if (pattern.ends_with('$') && !pattern.ends_with("\\$")) pattern.remove_suffix(1);
  for (std::size_t i = 0; i < pattern.size(); ++i) {
    if (pattern[i] == '.') {
      made.plain += kAny;
    } else if (pattern.substr(i).starts_with("\\.")) {
      made.plain += '.';
      ++i;
    } else if (is_letter_or_digit(pattern[i]) || pattern[i] == '_' || pattern[i] == '-') {
      made.plain += pattern[i];
    } else {
      return std::nullopt;
    }
  }
  return made;
}

Compiled compile(std::string_view pattern) {
  if (pattern.size() > kMaxPattern)
    return {.objection = "has " + std::to_string(pattern.size()) + " characters, and " +
                         std::to_string(kMaxPattern) + " are known here"};
  if (auto plain = plain_of(pattern)) return *plain;
  if (auto why = Scan(pattern).objection()) return {.objection = *why};
  const auto flags =
      std::regex::ECMAScript | std::regex::nosubs | std::regex_constants::__polynomial;
  try {
    Compiled made;
    const std::string text(pattern);
    made.whole.emplace(text, flags);
    made.end.emplace("(?:.*\\.)?(?:" + text + ")", flags);
    return made;
  } catch (const std::regex_error&) {
    return {.objection = "is no regular expression"};
  }
}

// Compiled once: thousands of modules are asked about.
const Compiled& compiled(std::string_view pattern) {
  constexpr std::size_t kKept = 4000, kKeptRegexes = 500;  // which may have some 100 KB each
  thread_local std::map<std::string, Compiled, std::less<>> all;
  thread_local std::size_t regexes = 0;
  if (const auto known = all.find(pattern); known != all.end()) return known->second;
  if (all.size() >= kKept || regexes >= kKeptRegexes) {
    all.clear();
    regexes = 0;
  }
  const Compiled& made = all.emplace(std::string(pattern), compile(pattern)).first->second;
  regexes += made.whole.has_value();
  return made;
}

bool is_plain_at(const std::string& plain, std::string_view text) {
  return std::equal(plain.begin(), plain.end(), text.begin(), text.end(),
                    [](char p, char t) { return p == kAny || p == t; });
}

}  // namespace

std::optional<std::string> not_understood(std::string_view pattern) {
  const std::string& why = compiled(pattern).objection;
  return why.empty() ? std::nullopt : std::optional(why);
}

bool matches_whole(std::string_view pattern, std::string_view module) {
  const Compiled& c = compiled(pattern);
  if (module.size() > kMaxModuleName) return false;
  if (c.is_plain) return is_plain_at(c.plain, module);
  return c.whole && std::regex_match(module.begin(), module.end(), *c.whole);
}

bool matches_end(std::string_view pattern, std::string_view module) {
  const Compiled& c = compiled(pattern);
  if (module.size() > kMaxModuleName) return false;
  if (!c.is_plain) return c.end && std::regex_match(module.begin(), module.end(), *c.end);
  if (c.plain.size() > module.size()) return false;
  const std::size_t start = module.size() - c.plain.size();
  return (start == 0 || (!c.from_start && module[start - 1] == '.')) &&
         is_plain_at(c.plain, module.substr(start));
}

}  // namespace tp
