// Our side of adapter_testing.py: says as JSON what PeftAdapter finds in a folder ("read FOLDER"),
// or, for each line {"config": ..., "modules": [...]} of standard input, which of those modules the
// config targets, and with which rank and alpha ("ask").

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cstdio>
#include <cstring>
#include <iostream>
#include <string_view>

#include "harness/base/check.h"
#include "harness/base/json.h"
#include "harness/base/lora_rules.h"
#include "harness/base/peft.h"

namespace {

using namespace tp;

std::string tensor_json(const StoredTensor& t) {
  const std::int64_t width = size_of(*t.type());
  std::vector<double> values;
  for (std::int64_t i = 0; i < t.elements(); ++i) {
    alignas(8) std::byte copy[8];  // as load wants it
    std::memcpy(copy, t.data + i * width, std::size_t(width));
    values.push_back(load(*t.type(), copy, 0));
  }
  return fmt::format(R"({{"shape": {}, "values": {}}})", t.shape, values);
}

void read(const std::string& folder) {
  const PeftAdapter adapter(folder);
  std::string text;
  for (const PeftModule& m : adapter.modules()) {
    const double scale =
        LoraRules().scale(m.alpha, m.rank, adapter.max_rank(), adapter.config().use_rslora);
    text += fmt::format(R"({}{}: {{"rank": {}, "alpha": {}, "scale": {}, "a": {}, "b": {}{}}})",
                        text.empty() ? "" : ",\n", json_quoted(m.name), m.rank, m.alpha, scale,
                        tensor_json(*m.a), tensor_json(*m.b),
                        m.bias ? ", \"bias\": " + tensor_json(*m.bias) : "");
  }
  fmt::print("{{{}}}\n", text);
}

// `line` begins with {"config": , whose text is cut out of it as it is.
std::string answer(const std::string& line) {
  const std::size_t at = line.find(", \"modules\": ");
  const std::string_view config = std::string_view(line).substr(11, at - 11);
  const Json question = parse_json(line);
  try {
    const PeftConfig read = parse_peft_config(config, "config");
    std::vector<std::string> modules;
    for (const Json& name : *question.find("modules")->as<Json::Array>()) {
      const std::string& module = *name.as<std::string>();
      const LoraScale scale = lora_scale(read, module);
      modules.push_back(
          fmt::format("[{}, {}, {}]", is_target(read, module), scale.rank, scale.alpha));
    }
    return fmt::format(R"({{"modules": [{}]}})", fmt::join(modules, ", "));
  } catch (const BadInput& e) {
    return fmt::format(R"({{"refused": {}}})", json_quoted(e.what()));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::string_view what = argc > 1 ? argv[1] : "";
  if (what == "read" && argc == 3) {
    try {
      read(argv[2]);
      return 0;
    } catch (const BadInput& e) {
      fmt::print(stderr, "{}\n", e.what());
      return 1;
    }
  }
  if (what == "ask" && argc == 2) {
    for (std::string line; std::getline(std::cin, line);) fmt::print("{}\n", answer(line));
    return 0;
  }
  fmt::print(stderr, "peft_testing read FOLDER | ask\n");
  return 2;
}
