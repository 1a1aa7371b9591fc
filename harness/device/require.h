#pragma once
// How an operator's host code refuses sizes that do not fit each other: as an engine's shape check
// would.

#include <cstdint>
#include <initializer_list>
#include <string_view>

namespace tp {

// Throws Fault(BadLaunch) "<op>: <format>" with each {} replaced by the next number, unless ok.
// Not a template over fmt: kernel files are compiled by nvcc, too, and should stay quick to
// compile.
void require(bool ok, std::string_view op, std::string_view format,
             std::initializer_list<std::int64_t> numbers);

}  // namespace tp
