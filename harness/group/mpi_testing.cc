#include "harness/group/mpi_testing.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdio>

#include "harness/base/check.h"
#include "harness/base/exit_codes.h"
#include "harness/group/place.h"

namespace tp {

namespace {

World* world = nullptr;

// What a process other than 0 has to say: only its failures, with its number.
class FailuresOnly : public testing::EmptyTestEventListener {
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    const std::string text = fmt::format("process {}: {}:{}: {}\n", world->process(),
                                         result.file_name() ? result.file_name() : "?",
                                         result.line_number(), result.message());
    std::fputs(text.c_str(), stderr);
  }
};

}  // namespace

World& test_world() { return *world; }

}  // namespace tp

// On a GPU of its own if there are enough, else with the others on one.
void take_any_place(tp::World& world) {
  std::string where;
  try {
    where = tp::take_place(world, tp::Link::best);
  } catch (const tp::Unavailable& e) {
    if (world.processes() == 1) throw;
    where = tp::take_place(world, tp::Link::mpi);
  }
  if (world.is_root()) fmt::print("{}\n", where);
}

int main(int argc, char** argv) {
  tp::World world(&argc, &argv);
  tp::world = &world;
  try {
    take_any_place(world);
  } catch (const tp::Unavailable& e) {
    fmt::print(stderr, "{}\n", e.what());
    return tp::kExitUnavailable;
  }
  testing::InitGoogleTest(&argc, argv);
  if (!world.is_root()) {
    auto& listeners = testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    delete listeners.Release(listeners.default_xml_generator());
    listeners.Append(new tp::FailuresOnly);
  }
  const int status = RUN_ALL_TESTS();
  // An empty run proves nothing: a filter that matches no test is a failure, too.
  const bool empty = testing::UnitTest::GetInstance()->test_to_run_count() == 0;
  return world.max(empty ? 1 : status);
}
