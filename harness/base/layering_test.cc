// The picture in README is true: #include arrows point down only.

#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <regex>
#include <set>
#include <string>

#include "harness/base/temp_folder_testing.h"

namespace {

namespace fs = std::filesystem;

// Layer of a file or of an include path: the longest folder that is in the table.
const std::map<std::string, std::set<std::string>>& arrows() {
  static const std::map<std::string, std::set<std::string>> table = {
      {"harness/base", {"harness/base"}},
      {"harness/device", {"harness/base", "harness/device"}},
      {"harness/group", {"harness/base", "harness/device", "harness/group"}},
      {"reference", {"harness/base", "reference"}},
      {"kernels", {"harness/base", "harness/device", "harness/group", "kernels"}},
      {"properties",
       {"harness/base", "harness/device", "harness/group", "reference", "kernels", "properties"}},
      {"benches",
       {"harness/base", "harness/device", "harness/group", "harness/fuzz", "reference", "kernels",
        "properties", "benches"}},
      {"harness/fuzz", {"harness/base", "harness/group", "harness/fuzz"}},
      {"harness/cli", {"harness/base", "harness/group", "harness/fuzz", "harness/cli"}},
      // main puts the operators into the registry: it must see who registers them.
      {"harness/cli/main",
       {"harness/base", "harness/group", "harness/fuzz", "harness/cli", "properties"}},
  };
  return table;
}

std::string layer_of(const std::string& path) {
  std::string best;
  for (const auto& [layer, allowed] : arrows()) {
    if (path.starts_with(layer + "/") && layer.size() > best.size()) best = layer;
  }
  return best;
}

std::vector<std::string> wrong_arrows(const fs::path& root) {
  std::vector<std::string> wrong;
  const std::regex include("^\\s*#\\s*include\\s+\"([^\"]+)\"");
  for (const char* top : {"harness", "kernels", "reference", "properties", "benches"}) {
    for (const auto& entry : fs::recursive_directory_iterator(root / top)) {
      const std::string extension = entry.path().extension();
      if (extension != ".h" && extension != ".cc" && extension != ".cu" && extension != ".cuh")
        continue;
      const std::string file = fs::relative(entry.path(), root);
      // Nothing depends on a test, so a test may see whatever it needs.
      if (std::regex_search(file, std::regex("_test(ing)?\\.[a-z]+$"))) continue;
      const std::string layer = layer_of(file);
      if (layer.empty()) wrong.push_back(file + " is in no layer");
      std::ifstream in(entry.path());
      std::smatch match;
      for (std::string line; std::getline(in, line);) {
        if (!std::regex_search(line, match, include)) continue;
        if (layer.empty() || !arrows().at(layer).contains(layer_of(match[1]))) {
          wrong.push_back(file + " includes " + match[1].str());
        }
      }
    }
  }
  return wrong;
}

TEST(Layering, ArrowsPointDownOnly) {
  for (const std::string& arrow : wrong_arrows(TP_SOURCE_DIR)) ADD_FAILURE() << arrow;
}

TEST(Layering, AWrongArrowIsSeen) {
  const tp::TempFolder folder;
  const fs::path& root = folder.path();
  for (const char* top : {"harness/base", "kernels", "reference", "properties", "benches"}) {
    fs::create_directories(root / top);
  }
  std::ofstream(root / "reference/norm.h")
      << "#include \"harness/base/shape.h\"\n#include \"kernels/norm.h\"\n";
  EXPECT_EQ(wrong_arrows(root),
            std::vector<std::string>{"reference/norm.h includes kernels/norm.h"});
}

}  // namespace
