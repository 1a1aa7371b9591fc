#include "harness/cli/baseline.h"

#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <optional>

#include "harness/base/check.h"
#include "harness/base/json.h"
#include "harness/base/text.h"
#include "harness/cli/table.h"

namespace tp {

namespace {

std::optional<double> number(const Json* value) {
  if (value == nullptr) return std::nullopt;
  if (const auto* whole = value->as<std::int64_t>()) return double(*whole);
  if (const auto* real = value->as<double>()) return *real;
  return std::nullopt;
}

std::string text(const Json* value) {
  const auto* text = value == nullptr ? nullptr : value->as<std::string>();
  return text == nullptr ? "" : *text;
}

double us_of_unit(const std::string& unit) {
  if (unit == "ns") return 1e-3;
  if (unit == "us") return 1;
  if (unit == "ms") return 1e3;
  return unit == "s" ? 1e6 : 0;
}

}  // namespace

std::vector<BenchTime> read_baseline(const std::string& path) {
  const auto refuse = [&](const std::string& why) {
    throw BadInput(fmt::format("baseline {}: {}", printable(path), why));
  };
  std::ifstream in(path, std::ios::binary);
  const std::string content{std::istreambuf_iterator<char>(in), {}};
  if (!in.good() && content.empty()) refuse("cannot be read");
  Json document;
  try {
    document = parse_json(content);
  } catch (const BadInput& e) {
    refuse(fmt::format("is not Google Benchmark's JSON: {}", e.what()));
  }
  const Json* list = document.find("benchmarks");
  const auto* entries = list == nullptr ? nullptr : list->as<Json::Array>();
  if (entries == nullptr) refuse("is not Google Benchmark's JSON: it has no list 'benchmarks'");
  std::vector<BenchTime> times;
  for (const Json& entry : *entries) {
    const std::string name = text(entry.find("run_name"));
    if (entry.find("error_occurred") != nullptr || name.empty()) continue;
    if (text(entry.find("run_type")) == "aggregate") continue;
    const std::optional<double> time = number(entry.find("real_time"));
    const double unit = us_of_unit(text(entry.find("time_unit")));
    if (!time || !(*time > 0) || unit == 0) {
      refuse(fmt::format("is not Google Benchmark's JSON: '{}' has no real_time and time_unit",
                         printable(name)));
    }
    times.push_back({name, *time * unit});
  }
  if (times.empty()) refuse("has no times");
  return times;
}

std::string against_baseline(const std::vector<BenchTime>& baseline,
                             const std::vector<BenchTime>& now) {
  const auto fastest = [](const std::vector<BenchTime>& times) {
    std::map<std::string, double> us;
    for (const BenchTime& t : times) {
      const auto [it, is_new] = us.emplace(t.name, t.us);
      if (!is_new) it->second = std::min(it->second, t.us);
    }
    return us;
  };
  const std::map<std::string, double> was = fastest(baseline);
  std::map<std::string, double> is = fastest(now);
  Table table{{"benchmark", "baseline us", "now us", "now / baseline"}, {}};
  std::size_t unknown = 0;
  for (const BenchTime& t : now) {
    const auto found = is.extract(t.name);
    if (found.empty()) continue;  // said already
    const auto before = was.find(t.name);
    if (before == was.end()) {
      ++unknown;
      continue;
    }
    table.rows.push_back({t.name, fmt::format("{:.4g}", before->second),
                          fmt::format("{:.4g}", found.mapped()),
                          fmt::format("x{:.3f}", found.mapped() / before->second)});
  }
  const std::size_t both = table.rows.size();
  return (both > 0 ? table.text() : "") +
         fmt::format("{} compared; {} not in the baseline; {} of the baseline did not run\n", both,
                     unknown, was.size() - both);
}

}  // namespace tp
