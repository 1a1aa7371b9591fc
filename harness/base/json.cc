#include "harness/base/json.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "harness/base/check.h"
#include "harness/base/text.h"

namespace tp {

namespace {

constexpr std::size_t kMaxDepth = 64;

std::string where(std::string_view text, std::size_t position) {
  const std::string_view before = text.substr(0, position);
  const std::size_t line = 1 + std::size_t(std::count(before.begin(), before.end(), '\n'));
  const std::size_t start = before.rfind('\n') == before.npos ? 0 : before.rfind('\n') + 1;
  return fmt::format("line {}, column {}: ", line, before.size() - start + 1);
}

// The text with NaN, Infinity and -Infinity outside strings replaced by null.
std::string without_python_floats(std::string_view text) {
  std::string out;
  out.reserve(text.size() + 16);
  bool in_string = false;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (in_string && text[i] == '\\' && i + 1 < text.size()) {
      out += text[i++];
    } else if (text[i] == '"') {
      in_string = !in_string;
    } else if (!in_string && (text[i] == '-' || text[i] == 'I' || text[i] == 'N')) {
      const std::string_view rest = text.substr(i);
      const std::size_t length = rest.starts_with("-Infinity")  ? 9
                                 : rest.starts_with("Infinity") ? 8
                                 : rest.starts_with("NaN")      ? 3
                                                                : 0;
      if (length > 0) {
        out += "null";
        out.append(length > 4 ? length - 4 : 0, ' ');  // keeps the columns of what follows
        i += length - 1;
        continue;
      }
    }
    out += text[i];
  }
  return out;
}

// Builds the tree from nlohmann's events. The parser behind them keeps its own stack, and so do we,
// so no input can make anything recurse deeper than kMaxDepth.
class Builder : public nlohmann::json_sax<nlohmann::json> {
 public:
  Json root;
  std::string error;
  std::size_t error_at = std::string::npos;  // known for syntax errors only

  explicit Builder(std::size_t max_values) : max_values_(max_values) {}

  bool null() override { return put({}); }
  bool boolean(bool v) override { return put({v}); }
  bool number_integer(number_integer_t v) override { return put({std::int64_t{v}}); }
  bool number_unsigned(number_unsigned_t v) override {
    if (v > std::uint64_t(INT64_MAX)) return put({double(v)});
    return put({std::int64_t(v)});
  }
  bool number_float(number_float_t v, const string_t&) override { return put({v}); }
  bool string(string_t& v) override { return put({std::move(v)}); }
  bool binary(binary_t&) override { return fail("binary data"); }
  bool start_object(std::size_t) override { return open({Json::Object{}}); }
  bool start_array(std::size_t) override { return open({Json::Array{}}); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }

  bool key(string_t& name) override {
    if (!open_.back().keys.insert(name).second) {
      return fail(fmt::format("the key \"{}\" is given twice", printable(name)));
    }
    open_.back().name = std::move(name);
    return true;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& e) override {
    // what(): "[json.exception.parse_error.101] parse error at line 1, column 2: syntax error while
    // parsing value - invalid literal; last read: '...'". Only the reason is worth a user's time.
    std::string_view reason = e.what();
    if (const auto dash = reason.find(" - "); dash != reason.npos)
      reason.remove_prefix(dash + 3);
    else if (const auto bracket = reason.find("] "); bracket != reason.npos)
      reason.remove_prefix(bracket + 2);
    reason = reason.substr(0, reason.find(';'));
    error_at = position > 0 ? position - 1 : 0;
    return fail(printable(reason));
  }

 private:
  struct Level {
    Json* node;
    std::string name;            // of the member that comes next
    std::set<std::string> keys;  // seen in this object
  };
  std::vector<Level> open_;
  std::size_t values_ = 0;
  const std::size_t max_values_;

  bool fail(std::string why) {
    error = std::move(why);
    return false;
  }

  Json* attach(Json value) {
    if (open_.empty()) return &(root = std::move(value));
    Level& top = open_.back();
    if (auto* array = std::get_if<Json::Array>(&top.node->value))
      return &array->emplace_back(std::move(value));
    auto& object = std::get<Json::Object>(top.node->value);
    return &object.emplace_back(std::move(top.name), std::move(value)).second;
  }

  bool put(Json value) {
    if (++values_ > max_values_) return fail(fmt::format("more than {} values", max_values_));
    attach(std::move(value));
    return true;
  }

  bool open(Json value) {
    if (open_.size() == kMaxDepth)
      return fail(fmt::format("nested deeper than {} levels", kMaxDepth));
    if (++values_ > max_values_) return fail(fmt::format("more than {} values", max_values_));
    // The address stays good: its parent gets no further element before this one is closed.
    open_.push_back({attach(std::move(value)), {}, {}});
    return true;
  }

  bool close() {
    open_.pop_back();
    return true;
  }
};

}  // namespace

const Json* Json::find(std::string_view key) const {
  const Object* object = as<Object>();
  if (object == nullptr) return nullptr;
  for (const auto& [name, member] : *object) {
    if (name == key) return &member;
  }
  return nullptr;
}

std::string Json::describe() const {
  if (const bool* b = as<bool>()) return *b ? "true" : "false";
  if (const std::int64_t* i = as<std::int64_t>()) return std::to_string(*i);
  if (const double* d = as<double>()) {
    const std::string text = fmt::format("{}", *d);
    const bool looks_whole = text.find_first_not_of("-0123456789") == text.npos;
    return text + (looks_whole ? ".0" : "");
  }
  if (const std::string* s = as<std::string>()) return '"' + printable(*s) + '"';
  if (as<Array>()) return "an array";
  if (as<Object>()) return "an object";
  return "null";
}

Json parse_json(std::string_view text, std::size_t max_values) {
  // The parser would take one outside a text for the end, whatever follows.
  if (const auto nul = text.find('\0'); nul != text.npos) {
    throw BadInput(where(text, nul) + "a NUL byte");
  }
  const std::string clean = without_python_floats(text);
  Builder builder(max_values);
  if (nlohmann::json::sax_parse(clean, &builder)) return std::move(builder.root);
  if (builder.error_at == std::string::npos) throw BadInput(builder.error);
  if (builder.error_at >= clean.size()) {
    throw BadInput(
        fmt::format("{}the text ends in the middle of a value", where(clean, clean.size())));
  }
  throw BadInput(where(clean, builder.error_at) + builder.error);
}

std::string json_quoted(std::string_view text) {
  using nlohmann::json;
  return json(text).dump(-1, ' ', false, json::error_handler_t::replace);
}

}  // namespace tp
