#pragma once
// The flags of one command: declared first, filled by parse.cc, then made into values. Until then
// all of them are texts, so that every number is refused in the same words (arguments.h).

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

namespace tp {

struct FlagSpec {
  enum class Kind { text, list, on_off };
  std::string name;  // "--seed"; without dashes a positional, which takes what is left
  std::string what;  // stands for the value in the help
  std::string help;
  Kind kind = Kind::text;
};

class Flags {
 public:
  // A flag with one value; one that may be repeated; one without a value.
  void text(const char* name, const char* what, const char* help);
  void list(const char* name, const char* what, const char* help);
  void on_off(const char* name, const char* help);

  const std::vector<FlagSpec>& specs() const { return specs_; }
  // Where the values of a declared flag go. The places stay what they are.
  std::optional<std::string>& text_place(const std::string& name) { return texts_[name]; }
  std::vector<std::string>& list_place(const std::string& name) { return lists_[name]; }
  bool& on_off_place(const std::string& name) { return on_offs_[name]; }

  bool given(const std::string& name) const { return texts_.at(name).has_value(); }
  bool is_on(const std::string& name) const { return on_offs_.at(name); }
  const std::vector<std::string>& list_of(const std::string& name) const { return lists_.at(name); }
  // These throw BadInput for a value that cannot be meant; a flag that is not given has its
  // fallback.
  std::string name_or(const std::string& name, const std::string& fallback) const;  // not empty
  std::int64_t number(const std::string& name, std::int64_t min, std::int64_t max,
                      std::int64_t fallback) const;
  double seconds(const std::string& name, double fallback) const;
  // A number in the range of the case key `key`.
  int size(const std::string& name, const char* key, int fallback) const;

 private:
  std::vector<FlagSpec> specs_;
  std::map<std::string, std::optional<std::string>> texts_;
  std::map<std::string, std::vector<std::string>> lists_;
  std::map<std::string, bool> on_offs_;
};

}  // namespace tp
