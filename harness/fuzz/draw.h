#pragma once
// Drawing and shrinking by RapidCheck. This is the only file that knows it (its headers cost 12 s
// of compiling); the loops around it are ours, because they have budgets of time and many jobs.

#include <cstdint>
#include <memory>
#include <optional>

#include "harness/fuzz/domain.h"

namespace tp {

// An endless row of legal cases, the same for the same domain and seed. Cases are built to be
// legal, never drawn and discarded.
class Draw {
 public:
  Draw(const Domain& domain, std::uint64_t seed);
  ~Draw();
  Case next();
  // The case with every key drawn that is not its shape: tokens, type, data, options. Those give
  // way where it would be much work; the shape does not.
  Case rest(const Case& shape);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// The way down from a failing case: RapidCheck's tree of smaller and smaller ones, as shrinks()
// (shrink.h) spans it.
class Descent {
 public:
  explicit Descent(const Case& failing);
  ~Descent();
  // The next smaller case to try; nothing when there is none left.
  std::optional<Case> next();
  // The case that next() returned last fails as well: go on below it.
  void accept();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace tp
