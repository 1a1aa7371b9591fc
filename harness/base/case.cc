#include "harness/base/case.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <set>

#include "harness/base/check.h"
#include "harness/base/operator.h"
#include "harness/base/text.h"

namespace tp {

namespace {

constexpr std::string_view kVersion = "v1";

// Words of a line: anything between spaces. Other white space or control characters are refused.
std::vector<std::string_view> words_of(std::string_view line) {
  std::vector<std::string_view> words;
  std::size_t at = 0;
  while (at < line.size()) {
    const std::size_t end = std::min(line.find(' ', at), line.size());
    if (end > at) words.push_back(line.substr(at, end - at));
    at = end + 1;
  }
  return words;
}

std::string quoted(std::string_view text) { return "'" + printable(text) + "'"; }

template <auto Field>
Key model_key(std::string name, std::string help, std::int64_t min, std::int64_t max,
              std::int64_t fallback) {
  return {.name = std::move(name),
          .help = std::move(help),
          .min = min,
          .max = max,
          .fallback = fallback,
          .always = true,
          .get_field = [](const Case& c) -> std::int64_t { return c.model.*Field; },
          .set_field = [](Case& c, std::int64_t v) { c.model.*Field = int(v); }};
}

}  // namespace

std::string Key::print(std::int64_t value) const {
  return words.empty() ? std::to_string(value) : words[std::size_t(value - min)];
}

std::int64_t Key::parse(std::string_view text) const {
  if (!words.empty()) {
    const auto it = std::find(words.begin(), words.end(), text);
    if (it == words.end()) {
      throw BadInput(
          fmt::format("{}={} is none of {}", name, quoted(text), fmt::join(words, ", ")));
    }
    return min + (it - words.begin());
  }
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool number = error != std::errc::invalid_argument && end == text.data() + text.size();
  if (!number) throw BadInput(fmt::format("{}={} is not a whole number", name, quoted(text)));
  if (error == std::errc::result_out_of_range || value < min || value > max) {
    throw BadInput(fmt::format("{}={} is outside {} .. {}", name, quoted(text), min, max));
  }
  return value;
}

Key shared_key(std::string_view name) {
  if (name == "hidden_size") {
    return model_key<&ModelShape::hidden_size>("hidden_size", "width of the residual stream", 1,
                                               1 << 20, 64);
  }
  if (name == "num_heads") {
    return model_key<&ModelShape::num_heads>("num_heads", "query heads of the model", 1, 4096, 2);
  }
  if (name == "num_kv_heads") {
    return model_key<&ModelShape::num_kv_heads>("num_kv_heads", "key/value heads of the model", 1,
                                                4096, 1);
  }
  if (name == "head_dim") {
    return model_key<&ModelShape::head_dim>("head_dim", "width of a head", 1, 1 << 16, 8);
  }
  if (name == "v_head_dim") {
    Key k = model_key<&ModelShape::v_head_dim>("v_head_dim", "width of a value head; 0: head_dim",
                                               0, 1 << 16, 0);
    k.always = false;
    return k;
  }
  if (name == "tp_size") {
    return {.name = "tp_size",
            .help = "ranks in the tensor-parallel group",
            .min = 1,
            .max = 1024,
            .fallback = 2,
            .always = true,
            .get_field = [](const Case& c) -> std::int64_t { return c.tp_size; },
            .set_field = [](Case& c, std::int64_t v) { c.tp_size = int(v); }};
  }
  if (name == "num_tokens") {
    return {.name = "num_tokens",
            .help = "tokens in the call",
            .min = 1,
            .max = 1 << 20,
            .fallback = 1,
            .always = true,
            .draw_max = 32,
            .get_field = [](const Case& c) -> std::int64_t { return c.num_tokens; },
            .set_field = [](Case& c, std::int64_t v) { c.num_tokens = int(v); }};
  }
  if (name == "dtype") {
    return {.name = "dtype",
            .help = "type of activations and weights",
            .min = 0,
            .max = 2,
            .fallback = std::int64_t(DType::bf16),
            .words = {"f32", "f16", "bf16"},
            .always = true,
            .shrink = Shrink::never,
            .get_field = [](const Case& c) -> std::int64_t { return std::int64_t(c.dtype); },
            .set_field = [](Case& c, std::int64_t v) { c.dtype = DType(v); }};
  }
  if (name == "fill") {
    return {.name = "fill",
            .help = "kind of data",
            .min = 0,
            .max = kPlainFills - 1,
            .fallback = std::int64_t(Fill::exact),
            .words = {kFillWords, kFillWords + kPlainFills},
            .shrink = Shrink::to_fallback,
            .weights = {50, 40, 4, 2, 2, 2},
            .get_field = [](const Case& c) -> std::int64_t { return std::int64_t(c.fill); },
            .set_field = [](Case& c, std::int64_t v) { c.fill = Fill(v); }};
  }
  TP_CHECK(name == "seed", "no shared key " + std::string(name));
  return {.name = "seed",
          .help = "of the data and of the emulator's schedule",
          .min = 0,
          .max = INT64_MAX,
          .fallback = 0,
          .always = true,
          .shrink = Shrink::never,
          .draw_max = 999999,
          .get_field = [](const Case& c) -> std::int64_t { return std::int64_t(c.seed); },
          .set_field = [](Case& c, std::int64_t v) { c.seed = std::uint64_t(v); }};
}

std::string to_line(const Case& c) {
  std::string line = fmt::format("{} {}", kVersion, c.op);
  for (const Key& key : find_operator(c.op).keys) {
    const std::int64_t value = key.get(c);
    if (key.always || value != key.fallback)
      line += fmt::format(" {}={}", key.name, key.print(value));
  }
  return line;
}

Case case_from_line(std::string_view line) {
  const std::vector<std::string_view> words = words_of(line);
  if (words.size() < 2)
    throw BadInput(
        fmt::format("{} is not a case line ('v1 OPERATOR KEY=VALUE ...')", quoted(line)));
  if (words[0] != kVersion) {
    throw BadInput(
        fmt::format("a case line starts with '{}', not with {}", kVersion, quoted(words[0])));
  }
  const std::string op_name = quoted(words[1]);
  const Operator& op = find_operator(std::string_view(op_name).substr(1, op_name.size() - 2));
  Case c = op.blank();
  std::set<std::string_view> seen;
  for (std::size_t i = 2; i < words.size(); ++i) {
    const std::size_t equals = words[i].find('=');
    if (equals == std::string_view::npos)
      throw BadInput(fmt::format("{} is not KEY=VALUE", quoted(words[i])));
    const std::string_view name = words[i].substr(0, equals);
    const Key* key = op.key(name);
    if (!key) {
      std::vector<std::string> names;
      for (const Key& k : op.keys) names.push_back(k.name);
      throw BadInput(fmt::format("{} has no key {} (it has: {})", op.name, quoted(name),
                                 fmt::join(names, ", ")));
    }
    if (!seen.insert(key->name).second)
      throw BadInput(fmt::format("key '{}' is given twice", key->name));
    key->set(c, key->parse(words[i].substr(equals + 1)));
  }
  for (const Key& key : op.keys) {
    if (key.always && !seen.contains(key.name))
      throw BadInput(fmt::format("key '{}' is missing", key.name));
  }
  if (auto reason = op.refuse(c)) throw BadInput(*reason);
  return c;
}

}  // namespace tp
