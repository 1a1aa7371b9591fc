#include "harness/base/config_json.h"

#include <fmt/format.h>

#include "harness/base/check.h"

namespace tp {

const Json* member(const Json& config, std::string_view key) {
  const Json* value = config.find(key);
  return value == nullptr || value->as<std::nullptr_t>() ? nullptr : value;
}

std::optional<int> size_at(const Json& config, std::string_view key, int max) {
  const Json* value = member(config, key);
  if (value == nullptr) return std::nullopt;
  const std::int64_t* number = value->as<std::int64_t>();
  if (number == nullptr && !value->as<double>()) {
    throw BadInput(fmt::format("{} is {}, not a whole number", key, value->describe()));
  }
  if (number == nullptr || *number < 1 || *number > max) {
    throw BadInput(
        fmt::format("{}={} is not a whole number in 1..{}", key, value->describe(), max));
  }
  return int(*number);
}

std::optional<bool> bool_at(const Json& config, std::string_view key) {
  const Json* value = member(config, key);
  if (value == nullptr) return std::nullopt;
  if (const bool* flag = value->as<bool>()) return *flag;
  throw BadInput(fmt::format("{} is {}, neither true nor false", key, value->describe()));
}

std::optional<std::string> word_at(const Json& config, std::string_view key) {
  const Json* value = member(config, key);
  if (value == nullptr) return std::nullopt;
  if (const std::string* text = value->as<std::string>()) return *text;
  throw BadInput(fmt::format("{} is {}, not a text", key, value->describe()));
}

std::optional<double> real_at(const Json& config, std::string_view key) {
  const Json* value = member(config, key);
  if (value == nullptr) return std::nullopt;
  if (const double* real = value->as<double>()) return *real;
  if (const std::int64_t* whole = value->as<std::int64_t>()) return double(*whole);
  throw BadInput(fmt::format("{} is {}, not a number", key, value->describe()));
}

std::vector<std::string> words_at(const Json& config, std::string_view key) {
  const Json* value = member(config, key);
  if (value == nullptr) return {};
  const Json::Array* array = value->as<Json::Array>();
  if (!array) throw BadInput(fmt::format("{} is {}, not a list", key, value->describe()));
  std::vector<std::string> words;
  for (const Json& entry : *array) {
    const std::string* text = entry.as<std::string>();
    if (!text) throw BadInput(fmt::format("{} has {}, not a text", key, entry.describe()));
    words.push_back(*text);
  }
  return words;
}

std::optional<int> first_size(const Json& config, std::initializer_list<std::string_view> keys,
                              int max) {
  for (const std::string_view key : keys) {
    if (const auto size = size_at(config, key, max)) return size;
  }
  return std::nullopt;
}

bool any_flag(const Json& config, std::initializer_list<std::string_view> keys) {
  bool any = false;
  for (const std::string_view key : keys) any |= bool_at(config, key).value_or(false);
  return any;
}

}  // namespace tp
