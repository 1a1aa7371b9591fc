// rms_norm: every rank norms all rows of the residual stream by itself. No rank needs another one,
// and all of them must get the same bits.

#include "kernels/rms_norm.h"

#include "properties/norm.h"
#include "properties/run/stage.h"
#include "reference/rms_norm.h"

namespace tp {

namespace {

std::vector<Stage> stages(const Case& c, const ShardingRules&, const Variation& variation) {
  const std::int64_t tokens = c.num_tokens, cols = c.model.hidden_size, pad = c.options.at("pad");
  const std::int64_t entity = std::max<std::int64_t>(1, cols / 8);
  const double eps = norm::eps_of(c, variation);
  return {{
      .name = "rms_norm",
      .inputs = {{"x", c.dtype, tokens, cols, Role::activation, entity},
                 {"weight", c.dtype, 1, cols, Role::weight, entity}},
      .outputs = {{"out", c.dtype, tokens, cols, Role::activation, entity}},
      .buffers = [=](int) -> std::vector<LocalBuffer> {
        return {{"x", Use::input, c.dtype, tokens, cols + pad, {{"x", {0, cols}}}},
                {"weight", Use::input, c.dtype, 1, cols, {{"weight", {0, cols}}}},
                {"out", Use::output, c.dtype, tokens, cols + pad, {{"out", {0, cols}}}}};
      },
      .run =
          [=](RankRun& run) {
            dispatch(c.dtype, [&]<typename T>(T) {
              rms_norm<T>(run.view<T>("x").columns(0, cols), run.view<T>("weight"),
                          run.view<T>("out").columns(0, cols), float(eps), run.stream);
            });
          },
      .cost = [=](int) -> Cost {
        // x read and out written, and the weight; a square, an addition, two products each.
        return {.bytes = (2 * double(tokens) + 1) * double(cols) * double(size_of(c.dtype)),
                .flops = 4 * double(tokens) * double(cols)};
      },
      .reference = [=](const WholeInputs& in) -> std::vector<Budget> {
        return {
            reference::rms_norm(in["x"], in["weight"], eps, rms_norm_profile(cols), double(cols))};
      },
      .blind_to = {},
  }};
}

}  // namespace

Operator make_rms_norm() {
  return make_operator({
      .name = "rms_norm",
      .what = "RMSNorm of rows that every rank holds whole",
      .keys = {shared_key("hidden_size"), shared_key("tp_size"), shared_key("num_tokens"),
               shared_key("dtype"), shared_key("fill"), shared_key("seed"), norm::eps_key(),
               norm::pad_key("x and of out")},
      .laws = {law_tp1(), law_scale(), law_tokens()},
      .mutants = {},
      .refuse =
          [](const Case& c) {
            return too_large(c.num_tokens, c.model.hidden_size * std::int64_t{c.tp_size});
          },
      .regime = norm::regime,
      .stages = stages,
  });
}

}  // namespace tp
