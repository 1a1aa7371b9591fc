#pragma once
// Members of configuration files that other programs write: what is there, or a sentence that names
// key and value. A null counts as left out.

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "harness/base/json.h"

namespace tp {

// nullptr: left out.
const Json* member(const Json& config, std::string_view key);

// Each is nothing where the key is left out, and throws BadInput where its value is of another
// kind.
std::optional<int> size_at(const Json& config, std::string_view key, int max);  // in 1..max
std::optional<bool> bool_at(const Json& config, std::string_view key);
std::optional<std::string> word_at(const Json& config, std::string_view key);
std::optional<double> real_at(const Json& config, std::string_view key);
std::vector<std::string> words_at(const Json& config, std::string_view key);  // empty: left out

// The first of `keys` that is there, in their order.
std::optional<int> first_size(const Json& config, std::initializer_list<std::string_view> keys,
                              int max);
// Whether any of `keys` says true.
bool any_flag(const Json& config, std::initializer_list<std::string_view> keys);

}  // namespace tp
