#include "harness/cli/flags.h"

#include <fmt/format.h>

#include "harness/base/case.h"
#include "harness/base/check.h"
#include "harness/cli/arguments.h"

namespace tp {

void Flags::text(const char* name, const char* what, const char* help) {
  specs_.push_back({name, what, help, FlagSpec::Kind::text});
  texts_[name];
}

void Flags::list(const char* name, const char* what, const char* help) {
  specs_.push_back({name, what, help, FlagSpec::Kind::list});
  lists_[name];
}

void Flags::on_off(const char* name, const char* help) {
  specs_.push_back({name, "", help, FlagSpec::Kind::on_off});
  on_offs_[name];
}

std::string Flags::name_or(const std::string& name, const std::string& fallback) const {
  const std::string text = texts_.at(name).value_or(fallback);
  if (given(name) && text.empty()) throw BadInput(fmt::format("{} is empty", name));
  return text;
}

std::int64_t Flags::number(const std::string& name, std::int64_t min, std::int64_t max,
                           std::int64_t fallback) const {
  return given(name) ? whole_number(name, *texts_.at(name), min, max) : fallback;
}

double Flags::seconds(const std::string& name, double fallback) const {
  return given(name) ? duration(name, *texts_.at(name)) : fallback;
}

int Flags::size(const std::string& name, const char* key, int fallback) const {
  const Key range = shared_key(key);
  return int(number(name, range.min, range.max, fallback));
}

}  // namespace tp
