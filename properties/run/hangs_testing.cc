#include "properties/run/hangs_testing.h"

#include <fmt/format.h>

#include <csignal>

#include "properties/run/stage.h"

namespace tp {

namespace {

struct Sizes {
  std::int64_t tokens = 0;
  std::int64_t hidden = 0;
  std::int64_t tp_size = 0;

  std::int64_t local() const { return hidden / tp_size; }
  Shard columns_of(int tp_rank) const { return {tp_rank * local(), local()}; }
};

TensorSpec tensor(const std::string& name, std::int64_t rows, std::int64_t cols) {
  // As weights are filled: integers of at most 127, of either sign.
  return {name, DType::f32, rows, cols, Role::weight, cols};
}

LocalBuffer whole(const std::string& name, Use use, const TensorSpec& t) {
  return {name, use, DType::f32, t.rows, t.cols, {{t.name, {0, t.cols}}}};
}

// y = x + the sum of x's row, each rank its own columns; the ranks' sums meet in an all-reduce.
Stage reduce_stage(const Sizes& n, const std::function<HangFault(int)>& fault_of) {
  const TensorSpec x = tensor("x", n.tokens, n.hidden), sums = tensor("sums", 1, n.tokens),
                   y = tensor("y", n.tokens, n.hidden);
  Stage stage{.name = "reduce", .inputs = {x}, .outputs = {sums, y}};
  stage.buffers = [=](int tp_rank) -> std::vector<LocalBuffer> {
    const Shard mine = n.columns_of(tp_rank);
    return {{"x", Use::input, DType::f32, n.tokens, mine.size, {{"x", mine}}},
            {"flag", Use::workspace, DType::f32, 1, 1},
            whole("sums", Use::output, sums),
            {"y", Use::output, DType::f32, n.tokens, mine.size, {{"y", mine}}}};
  };
  stage.run = [=](RankRun& run) {
    const HangFault fault = fault_of(run.group.tp_rank());
    float* const total = run.view<float>("sums").data;
    hang_row_sums(run.view<float>("x"), total, run.stream);
    if (fault == HangFault::killed) {
      run.stream.synchronize();
      std::raise(SIGKILL);
    }
    if (fault == HangFault::spins) {
      const float never = 0;
      float* const flag = run.view<float>("flag").data;
      from_host(run.stream, flag, &never, sizeof(never));
      hang_until_set(flag, run.stream);
    }
    if (fault == HangFault::crashes) hang_write(nullptr, run.stream);
    if (fault == HangFault::dtype) {
      run.group.all_reduce_sum(reinterpret_cast<bf16*>(total), n.tokens, run.stream);
    } else if (fault == HangFault::communicator) {
      run.group.on(1).all_reduce_sum(total, n.tokens, run.stream);
    } else if (fault != HangFault::skips) {
      run.group.all_reduce_sum(total, n.tokens, run.stream);
    }
    hang_add_to_rows(run.view<float>("x"), total, run.view<float>("y"), run.stream);
  };
  stage.reference = [=](const WholeInputs& in) -> std::vector<Budget> {
    Budget total(1, n.tokens), out(n.tokens, n.hidden);
    for (std::int64_t i = 0; i < n.tokens; ++i) {
      const double* row = in["x"].row(i);
      double& sum = total.r[std::size_t(i)];
      for (std::int64_t j = 0; j < n.hidden; ++j) sum += row[j];
      for (std::int64_t j = 0; j < n.hidden; ++j) {
        out.r[std::size_t(i * n.hidden + j)] = row[j] + sum;
      }
    }
    return {total, out};
  };
  return stage;
}

// z = y, on every rank.
Stage gather_stage(const Sizes& n, const std::function<HangFault(int)>& fault_of) {
  const TensorSpec y = tensor("y", n.tokens, n.hidden), z = tensor("z", n.tokens, n.hidden);
  Stage stage{.name = "gather", .inputs = {y}, .outputs = {z}};
  stage.buffers = [=](int tp_rank) -> std::vector<LocalBuffer> {
    const Shard mine = n.columns_of(tp_rank);
    return {{"y", Use::input, DType::f32, n.tokens, mine.size, {{"y", mine}}},
            {"blocks", Use::workspace, DType::f32, n.tokens, n.hidden},
            whole("z", Use::output, z)};
  };
  stage.run = [=](RankRun& run) {
    const HangFault fault = fault_of(run.group.tp_rank());
    float* const blocks = run.view<float>("blocks").data;
    const std::int64_t count = n.tokens * n.local() - (fault == HangFault::count ? 1 : 0);
    if (fault == HangFault::order) run.group.barrier(run.stream);
    run.group.all_gather(run.view<float>("y").data, blocks, count, run.stream);
    if (fault == HangFault::lost_event) run.stream.wait(Event());
    hang_join_columns(blocks, n.tp_size, run.view<float>("z"), run.stream);
    if (fault != HangFault::order) run.group.barrier(run.stream);
  };
  stage.reference = [=](const WholeInputs& in) -> std::vector<Budget> {
    Budget out(n.tokens, n.hidden);
    out.r = in["y"].values;
    return {out};
  };
  return stage;
}

std::vector<Stage> stages(const Case& c, const ShardingRules&, const Variation&) {
  const Sizes n{c.num_tokens, c.model.hidden_size, c.tp_size};
  const auto fault_of = [fault = HangFault(c.options.at("fault")),
                         rank = c.options.at("fault_rank") % c.tp_size](int tp_rank) {
    return tp_rank == rank ? fault : HangFault::none;
  };
  return {reduce_stage(n, fault_of), gather_stage(n, fault_of)};
}

std::optional<std::string> refuse(const Case& c) {
  if (c.model.hidden_size % c.tp_size != 0) {
    return fmt::format("hidden_size={} cannot be cut into {} equal parts", c.model.hidden_size,
                       c.tp_size);
  }
  // Beyond it a sum of integers of up to 127 is no longer exact in f32.
  if (c.model.hidden_size > 1 << 16) {
    return fmt::format("hidden_size={} is more than {}", c.model.hidden_size, 1 << 16);
  }
  return too_large(c.num_tokens, c.model.hidden_size * c.tp_size);
}

}  // namespace

void add_hang_operator() {
  Key fault{.name = "fault", .help = "what a rank does instead of going on"};
  fault.max = std::int64_t(kHangFaults.size()) - 1;
  fault.words = kHangFaults;
  fault.shrink = Shrink::to_fallback;
  Key rank{.name = "fault_rank", .help = "the rank, modulo tp_size"};
  rank.max = 1023;
  rank.draw_max = 15;
  add_operator(make_operator({
      .name = "hang",
      .what = "a layer of which one rank does not go on",
      .keys = {shared_key("hidden_size"), shared_key("tp_size"), shared_key("num_tokens"),
               shared_key("seed"), fault, rank},
      .laws = {law_tp1()},
      .mutants = {},
      .refuse = refuse,
      .regime = [](const Case& c, const Variation&) -> DataRegime {
        return {.fill = Fill::exact, .seed = c.seed};
      },
      .stages = stages,
  }));
}

}  // namespace tp
