#include <algorithm>

#include "kernels/quantise.h"
#include "properties/stored_layout.h"
#include "properties/stored_stages.h"
#include "reference/checkpoint.h"
#include "reference/quantise.h"

namespace tp::stored_linear {

std::int64_t first_column(const Case& c, const Layer& layer, const ShardingRules& rules,
                          int tp_rank) {
  return rules.loader.first_group(columns_of(c, layer, tp_rank), format_of(c).block_cols).column;
}

reference::Factors x_factors(const Case& c, const Layer& layer, const Matrix& values, int tp_rank) {
  const QuantFormat f = format_of(c);
  if (f.activations != Activations::token_groups) return {.values = &values};
  return {.values = &values,
          .cols_per = f.block_cols,
          .first_col = columns_of(c, layer, tp_rank).own.offset % f.block_cols};
}

namespace {

// Ranks have some of the tokens each, quantise them, and gather the codes.
template <typename T>
void run_gathered(RankRun& run, const Case& c, View<const T> x, const ShardingRules& rules) {
  const View<e4m3> mine = run.view<e4m3>("own_codes");
  const View<float> scale = run.view<float>("x_scale");
  if (format_of(c).activations == Activations::token) {
    const View<float> own = run.view<float>("own_scales");
    quantise_token(x, mine, own.data, run.stream);
    run.group.all_gather(own.data, scale.data, own.rows, run.stream);
  } else {
    float* largest = run.view<float>("largest").data;
    absolute_maximum(x, largest, run.stream);
    if (rules.quant.gathered_scale == GatheredScale::of_all)
      run.group.all_reduce_max(largest, 1, run.stream);
    quantise_by_maximum(x, largest, mine, scale.data, run.stream);
    if (rules.quant.gathered_scale == GatheredScale::of_rank_0)
      run.group.broadcast(scale.data, 1, 0, run.stream);
  }
  run.group.all_gather(mine.data, run.view<e4m3>("x_codes").data, mine.rows * mine.cols,
                       run.stream);
}

void run_quantise(RankRun& run, const Case& c, const Layer& layer, const ShardingRules& rules) {
  const QuantFormat f = format_of(c);
  const View<e4m3> codes = run.view<e4m3>("x_codes");
  dispatch(c.dtype, [&]<typename T>(T) {
    const View<const T> x = run.view<T>("x").columns(0, codes.cols);
    if (is_gathered(c)) return run_gathered<T>(run, c, x, rules);
    switch (f.activations) {
      case Activations::fixed:
        quantise_fixed(x, run.view<float>("input_scale").data, codes, run.stream);
        break;
      case Activations::tensor: {
        const View<float> maximum = run.view<float>("largest");
        absolute_maximum(x, maximum.data, run.stream);
        quantise_by_maximum(x, maximum.data, codes, run.view<float>("x_scale").data, run.stream);
        break;
      }
      case Activations::token:
        quantise_token(x, codes, run.view<float>("x_scale").data, run.stream);
        break;
      default:
        quantise_token_groups(x, f.block_cols, first_column(c, layer, rules, run.group.tp_rank()),
                              codes, run.view<float>("x_scale"), run.stream);
        break;
    }
  });
}

// Puts `part` into columns [first, ...) of `whole`.
void put(const Budget& part, std::int64_t first, Budget& whole) {
  for (std::int64_t i = 0; i < part.rows; ++i) {
    for (std::int64_t j = 0; j < part.cols; ++j) {
      whole.r[std::size_t(i * whole.cols + first + j)] = part.r[std::size_t(i * part.cols + j)];
      whole.rho[std::size_t(i * whole.cols + first + j)] = part.rho[std::size_t(i * part.cols + j)];
    }
  }
}

Matrix matrix_of(const Budget& b) {
  Matrix m(b.rows, b.cols);
  m.values = b.r;
  return m;
}

std::vector<Budget> quantise_reference(const Case& c, const Layer& layer, const WholeInputs& in) {
  const QuantFormat f = format_of(c);
  const Matrix& x = in["x"];
  const ScaleColumns columns = scale_columns(c, layer);
  Budget codes(x.rows, x.cols), scales(columns.rows, std::max<std::int64_t>(1, columns.total));
  for (int rank = 0; rank < (layer.cuts_columns() ? c.tp_size : 1); ++rank) {
    const Shard own = columns_of(c, layer, rank).own;
    const Matrix part = reference::columns(x, own.offset, own.size);
    Matrix values(1, 1);
    if (f.activations == Activations::fixed) {
      values.values[0] = in["input_scale"].values[0];
    } else {
      Budget made(1, 1);
      if (f.activations == Activations::tensor) {
        made.r[0] = reference::scale_of(reference::absolute_maximum(part));
      } else {
        const bool groups = f.activations == Activations::token_groups;
        made = reference::token_scales(part, groups ? f.block_cols : part.cols,
                                       groups ? own.offset % f.block_cols : 0);
      }
      put(made, columns.of_rank[std::size_t(rank)].offset, scales);
      values = matrix_of(made);
    }
    put(reference::quantised(part, x_factors(c, layer, values, rank)), own.offset, codes);
  }
  std::vector<Budget> all = {codes};
  if (makes_scales(c)) all.push_back(scales);
  return all;
}

}  // namespace

Stage quantise_stage(const Case& c, const Layer& layer, const TensorSpec& x,
                     const ShardingRules& rules) {
  Stage stage{.name = "quantise"};
  stage.inputs = {x};
  if (has_fixed_scale(c)) stage.inputs.push_back(shared("input_scale", 1));
  stage.outputs = {codes_spec(x)};
  if (makes_scales(c)) stage.outputs.push_back(x_scale_spec(c, layer));
  stage.buffers = [=](int tp_rank) {
    std::vector<LocalBuffer> all = {x_buffer(c, layer, tp_rank),
                                    codes_buffer(c, layer, Use::output, tp_rank)};
    if (has_fixed_scale(c)) all.push_back(shared_buffer("input_scale", 1, Use::input));
    if (makes_scales(c)) all.push_back(x_scale_buffer(c, layer, Use::output, tp_rank));
    if (format_of(c).activations == Activations::tensor)
      all.push_back({"largest", Use::workspace, DType::f32, 1, 1});
    if (is_gathered(c)) {
      const std::int64_t share = own_tokens(c, tp_rank).size;
      all.push_back({"own_codes", Use::workspace, DType::e4m3, share, x.cols});
      all.push_back({"own_scales", Use::workspace, DType::f32, share, 1});
    }
    return all;
  };
  stage.run = [=](RankRun& run) { run_quantise(run, c, layer, rules); };
  stage.reference = [=](const WholeInputs& in) { return quantise_reference(c, layer, in); };
  return stage;
}

}  // namespace tp::stored_linear
