#pragma once
// Division by a number that many threads share: a product instead of a hundred cycles.

#include <bit>
#include <cstdint>

namespace tp {

// n / d for 0 <= n < 2^31 and 1 <= d < 2^31, exactly (Granlund and Montgomery, PLDI 1994): with 2^s
// >= d and m = ceil(2^(31 + s) / d), the error n (m d - 2^(31 + s)) is below 2^(31 + s).
class Divisor {
 public:
  Divisor() = default;
  explicit Divisor(std::int64_t d) : shift_(31 + std::bit_width(std::uint64_t(d - 1))) {
    factor_ =
        std::uint32_t(((std::uint64_t{1} << shift_) + std::uint64_t(d) - 1) / std::uint64_t(d));
  }
  // Of n.
  constexpr int quotient(int n) const {
    return int(std::uint64_t(std::uint32_t(n)) * factor_ >> shift_);
  }

 private:
  std::uint32_t factor_ = 0;
  int shift_ = 0;
};

}  // namespace tp
