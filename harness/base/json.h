#pragma once
// Strict JSON as a small tree, for files a user hands us: parse_json refuses what nlohmann::json
// would take silently (a key given twice) or pay dearly for (deep nesting, millions of values).

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace tp {

struct Json {
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;  // in the order of the file
  // Numbers beyond int64 are double, as in 1e30.
  std::variant<std::nullptr_t, bool, std::int64_t, double, std::string, Array, Object> value =
      nullptr;

  template <typename T>
  const T* as() const {
    return std::get_if<T>(&value);
  }
  // The member `key` of an object; null if there is none, or if this is no object.
  const Json* find(std::string_view key) const;
  // The value as JSON would write it; for arrays and objects, and for long texts, what it is.
  std::string describe() const;
};

// One JSON document. Python's NaN and Infinity, which real config.json files contain, read as null.
// Throws BadInput with one sentence that says where: "line 3, column 7: ..."; or that there are
// more than max_values, which may cost some hundred bytes each.
Json parse_json(std::string_view text, std::size_t max_values = 1 << 20);

// `text` as a JSON string, quotes included. What is not UTF-8 becomes U+FFFD.
std::string json_quoted(std::string_view text);

}  // namespace tp
