// rms_norm: every rank norms all rows of the residual stream by itself. No rank needs another one,
// and all of them must get the same bits.

#include "kernels/rms_norm.h"

#include <cmath>

#include "properties/run/stage.h"
#include "reference/rms_norm.h"

namespace tp {

namespace {

double eps_of(const Case& c, const Variation& v) {
  return double(c.options.at("eps") == 0 ? 1e-6f : 1e-5f) * std::ldexp(1.0, 2 * v.scale_log2);
}

std::vector<Stage> stages(const Case& c, const ShardingRules&, const Variation& variation) {
  const std::int64_t tokens = c.num_tokens, cols = c.model.hidden_size, pad = c.options.at("pad");
  const std::int64_t entity = std::max<std::int64_t>(1, cols / 8);
  const double eps = eps_of(c, variation);
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
      .reference = [=](const std::vector<Matrix>& in) -> std::vector<Budget> {
        return {reference::rms_norm(in[0], in[1], eps, rms_norm_profile(cols), double(cols))};
      },
      .blind_to = {},
  }};
}

}  // namespace

Operator make_rms_norm() {
  return make_operator({
      .name = "rms_norm",
      .what = "RMSNorm of rows that every rank holds whole",
      .keys = {shared_key("hidden_size"),
               shared_key("tp_size"),
               shared_key("num_tokens"),
               shared_key("dtype"),
               shared_key("fill"),
               shared_key("seed"),
               {.name = "eps",
                .help = "added to the mean square",
                .min = 0,
                .max = 1,
                .words = {"1e-6", "1e-5"}},
               {.name = "pad",
                .help = "elements between the rows of x and of out",
                .min = 0,
                .max = 64}},
      .laws = {law_tp1(), law_scale(), law_tokens()},
      .mutants = {},
      .refuse =
          [](const Case& c) {
            return too_large(c.num_tokens, c.model.hidden_size * std::int64_t{c.tp_size});
          },
      .regime = [](const Case& c, const Variation& v) -> DataRegime {
        return {c.fill, c.seed, eps_of(c, {}), v.scale_log2, v.rotate_rows};
      },
      .stages = stages,
  });
}

}  // namespace tp
