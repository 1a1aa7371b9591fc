// Stages that load: from which of several checkpoints, by which name, and when they are renamed.

#include "properties/stages.h"

#include <gtest/gtest.h>

#include <array>
#include <memory>
#include <vector>

#include "harness/base/temp_folder_testing.h"
#include "harness/group/mpi_testing.h"
#include "reference/checkpoint.h"

namespace tp {
namespace {

constexpr std::int64_t kRows = 2, kCols = 3, kElements = kRows * kCols;

TensorSpec matrix(const std::string& name) {
  return {name, DType::f32, kRows, kCols, Role::weight, kCols};
}

// y0 = first and y1 = second, of two checkpoints that both call it w; a third one has nothing.
// `of`: the checkpoints that the ranks take them from.
Stage load_stage(std::array<std::size_t, 2> of = {0, 1}) {
  Stage stage{.name = "load",
              .inputs = {matrix("first"), matrix("second")},
              .outputs = {matrix("y0"), matrix("y1")},
              .stored = {{"first", {kRows, kCols}, 0, "w", 0},
                         {"second", {kElements}, 0, "w", 1},
                         {"second", {kElements}, 1, "second", 1}},
              .checkpoints = {nullptr, nullptr, nullptr}};
  stage.buffers = [](int) -> std::vector<LocalBuffer> {
    std::vector<LocalBuffer> all;
    for (const char* y : {"y0", "y1"})
      all.push_back({y, Use::output, DType::f32, kRows, kCols, {{y, {0, kCols}}}});
    return all;
  };
  stage.run = [of](RankRun& run) {
    EXPECT_EQ(run.checkpoint(2).find("w"), nullptr);
    for (std::size_t i = 0; i < of.size(); ++i) {
      const StoredTensor& w = run.checkpoint(of[i]).at("w");
      EXPECT_EQ(w.shape.size(), of[i] == 0 ? 2u : 1u);
      from_host(run.stream, run.view<float>("y" + std::to_string(i)).data, w.data, w.bytes);
    }
  };
  stage.reference = [](const WholeInputs& in) -> std::vector<Budget> {
    return {reference::exactly(in["first"]), reference::exactly(in["second"])};
  };
  return stage;
}

Verdict run(const std::vector<Stage>& stages) {
  OperatorSpec spec{.name = "loading", .what = "two matrices of files", .laws = {law_tp1()}};
  for (const char* k : {"tp_size", "fill", "seed"}) spec.keys.push_back(shared_key(k));
  spec.refuse = [](const Case&) { return std::nullopt; };
  spec.regime = [](const Case& c, const Variation&) -> DataRegime {
    return {.fill = c.fill, .seed = c.seed};
  };
  spec.stages = [&](const Case&, const ShardingRules&, const Variation&) { return stages; };
  const Operator op = make_operator(spec);
  Case c = op.blank();
  c.tp_size = 2;
  c.fill = Fill::dense;
  c.seed = 3;
  return op.run(test_world(), c, {.deadline = std::chrono::seconds(10)});
}

void expect(const Verdict& v, Outcome outcome, const std::string& detail = "") {
  EXPECT_EQ(name_of(v.outcome), name_of(outcome)) << v.detail;
  EXPECT_NE(v.detail.find(detail), std::string::npos) << v.detail;
}

TEST(StoredInputs, AreInTheCheckpointThatTheStageSays) {
  expect(run({load_stage()}), Outcome::Pass);
  expect(run({load_stage({1, 0})}), Outcome::WrongValue, "y0[0, 0]");
  expect(run({load_stage({0, 0})}), Outcome::WrongValue, "y1[0, 0]");
}

// Of two stages that load the same names, each has its own; and the files keep theirs.
TEST(StoredInputs, KeepTheirNamesInTheFilesOfRenamedStages) {
  const auto with_prefix = [](const Stage& stage, const std::string& prefix) {
    Names names;
    for (const char* t : {"first", "second", "y0", "y1"}) names.tensors[t] = prefix + t;
    for (const char* b : {"y0", "y1"}) names.buffers[b] = {prefix + b};
    return renamed(stage, prefix + "load", names);
  };
  expect(run({with_prefix(load_stage(), "a."), with_prefix(load_stage(), "b.")}), Outcome::Pass);
  expect(run({with_prefix(load_stage(), "a."), with_prefix(load_stage({0, 0}), "b.")}),
         Outcome::WrongValue, "stage b.load, tp_rank 0, b.y1[0, 0]");
  const Stage once = with_prefix(load_stage(), "a.");
  EXPECT_EQ(once.stored[0].tensor, "a.first");
  EXPECT_EQ(once.stored[0].name, "w");
  EXPECT_EQ(with_prefix(once, "c.").stored[2].name, "second");
  Stage named_alike = load_stage();
  named_alike.stored[0].name = {};
  EXPECT_EQ(with_prefix(named_alike, "a.").stored[0].name, "first");
  EXPECT_EQ(once.checkpoints.size(), 3u);
}

// One checkpoint is there already, and only the other one is made.
TEST(StoredInputs, MayBeInACheckpointThatIsThere) {
  const TempFolder temp;
  std::vector<float> values(kElements);
  for (std::size_t i = 0; i < values.size(); ++i) values[i] = float(i) + 0.5f;
  write_safetensors(temp.at("given.safetensors"),
                    {{"w",
                      "F32",
                      {kElements},
                      reinterpret_cast<const std::byte*>(values.data()),
                      sizeof(float) * values.size()}});
  const Checkpoint given(temp.at("given.safetensors"));
  Stage stage = load_stage();
  stage.inputs[1].value = [](const DataRegime&, std::int64_t row, std::int64_t col) {
    return double(row * kCols + col) + 0.5;
  };
  stage.checkpoints[1] = &given;
  expect(run({stage}), Outcome::Pass);
  Stage swapped = stage;
  swapped.checkpoints = {&given, nullptr, nullptr};
  swapped.run = [](RankRun& run) {
    for (std::size_t i = 0; i < 2; ++i) {
      const StoredTensor& w = run.checkpoint(i).at("w");
      from_host(run.stream, run.view<float>("y" + std::to_string(i)).data, w.data, w.bytes);
    }
  };
  expect(run({swapped}), Outcome::WrongValue, "y0[0, 0]");
}

}  // namespace
}  // namespace tp
