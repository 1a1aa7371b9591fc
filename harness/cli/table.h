#pragma once
// Columns of text, as wide as they need to be.

#include <string>
#include <vector>

namespace tp {

struct Table {
  std::vector<std::string> header;
  std::vector<std::vector<std::string>> rows;  // each as long as the header

  std::string text() const;
};

}  // namespace tp
