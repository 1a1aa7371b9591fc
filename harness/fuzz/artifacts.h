#pragma once
// The folder in which findings are kept, one file with one case line each.

#include <filesystem>
#include <string>

#include "harness/base/case.h"

namespace tp {

class Artifacts {
 public:
  // Throws BadInput, naming the folder, if nothing can be written there. Leaves no trace otherwise:
  // the folder is made when the first finding is.
  explicit Artifacts(std::filesystem::path folder);

  // Writes <op>-<hash of the line><suffix>, whole or not at all, and returns its path.
  std::filesystem::path write(const Case& c, const std::string& suffix,
                              const std::string& text) const;
  std::filesystem::path write(const Case& c) const { return write(c, ".case", to_line(c) + "\n"); }

 private:
  std::filesystem::path folder_;
};

}  // namespace tp
