#include "harness/cli/list.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "harness/base/models.h"
#include "harness/base/operator.h"
#include "harness/cli/table.h"

namespace tp {

namespace {

std::string allowed(const Key& key) {
  if (!key.words.empty()) return fmt::format("{}", fmt::join(key.words, "|"));
  return fmt::format("{}..{}", key.min, key.max);
}

std::string list_ops() {
  std::string out;
  for (const Operator& op : operators()) {
    out += fmt::format("{}{}   {}\n", out.empty() ? "" : "\n", op.name, op.what);
    Table table{.header = {"  key", "values", "default", "meaning"}, .rows = {}};
    for (const Key& key : op.keys) {
      table.rows.push_back({"  " + key.name, allowed(key), key.print(key.fallback), key.help});
    }
    out += table.text();
  }
  return out;
}

std::string list_models() {
  constexpr int kMaxTp = 64;
  Table table{
      .header = {"model", "hidden", "H", "K", "D", "q/k norm", "TP sizes (r: KV heads replicated)"},
      .rows = {}};
  for (const Model& m : models()) {
    std::vector<std::string> sizes;
    for (int t = 1; t <= kMaxTp; ++t) {
      if (!partitionable(m.shape, t))
        sizes.push_back(fmt::format("{}{}", t, t > m.shape.num_kv_heads ? "r" : ""));
    }
    table.rows.push_back({m.id, std::to_string(m.shape.hidden_size),
                          std::to_string(m.shape.num_heads), std::to_string(m.shape.num_kv_heads),
                          std::to_string(m.shape.head_dim), m.qk_norm.empty() ? "?" : m.qk_norm,
                          fmt::format("{}", fmt::join(sizes, " "))});
  }
  return table.text();
}

std::string list_mutants() {
  // A mistake that several operators share is one mutant with one id.
  Table table{.header = {"mutant", "operators", "upstream", "mistake"}, .rows = {}};
  for (const Operator& op : operators()) {
    for (const Mutant& m : op.mutants) {
      const auto known = std::find_if(table.rows.begin(), table.rows.end(),
                                      [&](auto& row) { return row[0] == m.id; });
      if (known == table.rows.end())
        table.rows.push_back({m.id, op.name, m.upstream, m.what});
      else
        (*known)[1] += "," + op.name;
    }
  }
  return table.text();
}

std::string list_laws() {
  Table table{.header = {"law", "operators", "meaning"}, .rows = {}};
  for (const Operator& op : operators()) {
    for (const Law& law : op.laws) {
      const auto known = std::find_if(table.rows.begin(), table.rows.end(),
                                      [&](auto& row) { return row[0] == law.name; });
      if (known == table.rows.end())
        table.rows.push_back({law.name, op.name, law.what});
      else
        (*known)[1] += "," + op.name;
    }
  }
  return table.text();
}

}  // namespace

const std::vector<std::string>& list_subjects() {
  static const std::vector<std::string> subjects = {"ops", "models", "mutants", "laws"};
  return subjects;
}

std::string list_text(const std::string& subject) {
  if (subject == "ops") return list_ops();
  if (subject == "models") return list_models();
  if (subject == "mutants") return list_mutants();
  return list_laws();
}

}  // namespace tp
