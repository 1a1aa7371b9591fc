#include "harness/base/operator.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "harness/base/check.h"

namespace tp {

namespace {

std::vector<Operator>& registry() {
  static std::vector<Operator> all;
  return all;
}

}  // namespace

const Key* Operator::key(std::string_view wanted) const {
  for (const Key& k : keys) {
    if (k.name == wanted) return &k;
  }
  return nullptr;
}

Case Operator::blank() const {
  Case c;
  c.op = name;
  for (const Key& k : keys) k.set(c, k.fallback);
  return c;
}

void add_operator(Operator op) { registry().push_back(std::move(op)); }

const std::vector<Operator>& operators() { return registry(); }

const Operator& find_operator(std::string_view name) {
  std::vector<std::string> names;
  for (const Operator& op : operators()) {
    if (op.name == name) return op;
    names.push_back(op.name);
  }
  throw BadInput(
      fmt::format("unknown operator '{}' (there are: {})", name, fmt::join(names, ", ")));
}

std::vector<FoundMutant> find_mutant(std::string_view id) {
  std::vector<FoundMutant> found;
  for (const Operator& op : operators()) {
    for (const Mutant& m : op.mutants) {
      if (m.id == id) found.push_back({&op, &m});
    }
  }
  if (found.empty())
    throw BadInput(fmt::format("unknown mutant '{}' (see tpcheck list mutants)", id));
  return found;
}

}  // namespace tp
