// sample.cases leaves nothing out: no operator, no type, kind of data, law or poison of it.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <string>
#include <vector>

#include "harness/base/case.h"
#include "harness/base/operator.h"
#include "properties/operators.h"

namespace tp {
namespace {

const bool kRegistered = (register_operators(), true);

// A tool that makes a kernel a hundred times slower still gets through these.
constexpr int kMostTokens = 17, kMostCases = 124;

std::vector<Case> cases_of(const std::string& path) {
  std::vector<Case> cases;
  std::ifstream in(path);
  EXPECT_TRUE(in) << path;
  for (std::string line; std::getline(in, line);) {
    if (!line.empty() && line[0] != '#') cases.push_back(case_from_line(line));
  }
  return cases;
}

// What of `op` no case has, as key=word.
std::vector<std::string> missing(const Operator& op, const std::vector<Case>& cases) {
  std::vector<std::string> all;
  for (const Key& key : op.keys) {
    if (key.name == "tp_size") {
      for (const std::int64_t size : {1, 2, 16}) all.push_back(fmt::format("tp_size={}", size));
    }
    for (const std::string& word : key.words) all.push_back(key.name + "=" + word);
  }
  std::erase_if(all, [&](const std::string& wanted) {
    return std::any_of(cases.begin(), cases.end(), [&](const Case& c) {
      const auto has = [&](const Key& key) {
        return key.name + "=" + key.print(key.get(c)) == wanted;
      };
      return c.op == op.name && std::any_of(op.keys.begin(), op.keys.end(), has);
    });
  });
  return all;
}

TEST(Sample, HasEveryWordOfEveryOperator) {
  const std::vector<Case> cases = cases_of(TP_SAMPLE);
  for (const Operator& op : operators()) {
    for (const std::string& what : missing(op, cases)) {
      ADD_FAILURE() << "properties/sample.cases has no " << op.name << " with " << what;
    }
  }
}

TEST(Sample, WouldMissAnOperatorThatIsLeftOut) {
  EXPECT_FALSE(missing(operators().front(), {}).empty());
}

TEST(Sample, IsSmall) {
  const std::vector<Case> cases = cases_of(TP_SAMPLE);
  EXPECT_LE(cases.size(), std::size_t(kMostCases));
  for (const Case& c : cases) EXPECT_LE(c.num_tokens, kMostTokens) << to_line(c);
}

}  // namespace
}  // namespace tp
