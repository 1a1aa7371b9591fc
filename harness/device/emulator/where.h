#pragma once
// Where in a kernel's source something was called, as a default argument.

namespace tp {

// Like std::source_location, which clang 14 lacks.
struct Where {
  const char* file = "";
  int line = 0;

  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

}  // namespace tp
