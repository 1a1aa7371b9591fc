// Stages that operators are made of. Those that load: from which of several checkpoints, by which
// name, and when they are renamed. Those of a row-parallel linear in two.

#include "properties/stages.h"

#include <gtest/gtest.h>

#include <array>
#include <memory>
#include <vector>

#include "harness/base/temp_folder_testing.h"
#include "harness/group/mpi_testing.h"
#include "properties/linear.h"
#include "properties/planted_testing.h"
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

// Of a case with this tp_size, fill and seed, as far as it is of no operator.
Verdict run(const Case& like, decltype(OperatorSpec::stages) stages,
            decltype(OperatorSpec::regime) regime, const Mutant* mutant = nullptr) {
  OperatorSpec spec{.name = "some_stages", .what = "a test's"};
  for (const char* k : {"tp_size", "fill", "seed"}) spec.keys.push_back(shared_key(k));
  spec.refuse = [](const Case&) { return std::nullopt; };
  spec.regime = std::move(regime);
  spec.stages = std::move(stages);
  const Operator op = make_operator(spec);
  Case c = op.blank();
  c.tp_size = like.tp_size;
  c.fill = like.fill;
  c.seed = like.seed;
  if (op.key("discriminate") != nullptr) c.options.at("discriminate") = c.fill == Fill::exact;
  return op.run(test_world(), c, {.mutant = mutant, .deadline = std::chrono::seconds(60)});
}

Verdict run(const std::vector<Stage>& stages) {
  Case c;
  c.tp_size = 2;
  c.fill = Fill::dense;
  c.seed = 3;
  return run(
      c, [&](const Case&, const ShardingRules&, const Variation&) { return stages; },
      [](const Case& of, const Variation&) -> DataRegime {
        return {.fill = of.fill, .seed = of.seed};
      });
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

// A case of row_linear in two stages, with the tensor between them called `name`.
Verdict run_halves(const std::string& line, const std::string& name = "partial",
                   const char* mutant = nullptr) {
  const Case row = case_from_line(test_world().broadcast(line));
  return run(
      row,
      [&](const Case&, const ShardingRules& rules, const Variation& v) -> std::vector<Stage> {
        const Names names{.tensors = {{"partial", name}}, .buffers = {{"partial", {name}}}};
        return {renamed(row_partial_stage(row, rules, v), "row_partial", names),
                row_reduce_stage(row, rules, name)};
      },
      [&](const Case&, const Variation& v) { return linear::regime(row, v); },
      mutant == nullptr ? nullptr : find_mutant(mutant).front().mutant);
}

constexpr const char* kRow =
    "v1 row_linear hidden_size=24 in_per_rank=16 num_tokens=5 bias=yes pad=3 seed=4 ";

TEST(RowHalves, AreARowParallelLinear) {
  for (const char* reduce : {"all_reduce", "reduce_scatter", "external"}) {
    for (const char* dtype : {"f32", "bf16 reduce_dtype=activation", "f16 reduce_dtype=f32"}) {
      for (const char* rest : {"tp_size=1 fill=dense", "tp_size=2 fill=dense",
                               "tp_size=3 fill=exact", "tp_size=7 fill=exact"}) {
        const std::string keys = std::string("reduce=") + reduce + " dtype=" + dtype + " " + rest;
        expect(run_halves(kRow + keys), Outcome::Pass);
        expect(run_halves(kRow + keys, "other"), Outcome::Pass);
        expect(tp::run(kRow + keys), Outcome::Pass);
      }
    }
  }
}

// Each half finds its own mistakes.
TEST(RowHalves, FindTheirMistakes) {
  const auto with = [](const char* mutant, const std::string& keys) {
    return run_halves(kRow + keys + " tp_size=2 fill=exact dtype=bf16", "partial", mutant);
  };
  const std::string partial = "stage row_partial, tp_rank 1, partial[5, 0]",
                    sum = "stage row_reduce, tp_rank 0, out[0, 0]";
  expect(with("own:row-bias-on-every-rank", ""), Outcome::WrongValue, partial);
  expect(with("own:row-columns-of-next-rank", ""), Outcome::WrongValue, "stage row_partial");
  expect(with("own:row-reduce-whole-batches-only", ""), Outcome::WrongValue, sum);
  expect(with("shared-expert-double-reduce:twice", ""), Outcome::WrongValue, sum);
  expect(with("shared-expert-double-reduce:twice", "reduce=reduce_scatter"), Outcome::WrongValue,
         sum);
  expect(with("shared-expert-double-reduce:not-at-all", "reduce=external"), Outcome::WrongValue,
         sum);
}

class Given : public WholeInputs {
 public:
  explicit Given(std::map<std::string, Matrix> all) : all_(std::move(all)) {}
  const Matrix& operator[](const std::string& name) const override { return all_.at(name); }

 private:
  std::map<std::string, Matrix> all_;
};

// Zeros show nothing of either half but who adds the bias.
TEST(RowHalves, KnowWhatTheirDataCannotShow) {
  const Case c = case_from_line(
      "v1 row_linear hidden_size=2 in_per_rank=3 num_tokens=3 bias=yes tp_size=2 dtype=f32 seed=1");
  Matrix x(3, 6), weight(2, 6), bias(1, 2), partial(6, 2);
  for (std::size_t i = 0; i < weight.values.size(); ++i) weight.values[i] = double(1 + i * i % 7);
  bias.values = {4, 9};
  const auto blind = [](const Stage& stage, const Given& in) {
    return stage.blind_to(in, stage.reference(in)).value_or("nothing");
  };
  const Stage product = row_partial_stage(c, sharding_rules(), {}),
              sum = row_reduce_stage(c, sharding_rules(), "p");
  const auto of_product = [&] {
    return blind(product, Given({{"x", x}, {"weight", weight}, {"bias", bias}}));
  };
  EXPECT_EQ(of_product(), "own:row-columns-of-next-rank");
  x.values[0] = 1;
  EXPECT_EQ(of_product(), "nothing");
  bias.values = {0, 0};
  EXPECT_EQ(of_product(), "own:row-bias-on-every-rank");
  EXPECT_EQ(blind(sum, Given({{"p", partial}})), "own:row-reduce-whole-batches-only");
  partial.row(1)[1] = 1;  // rank 0's sum of token 1
  EXPECT_EQ(blind(sum, Given({{"p", partial}})), "nothing");
}

}  // namespace
}  // namespace tp
