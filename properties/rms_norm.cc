// rms_norm: every rank norms all rows of the residual stream by itself. No rank needs another one,
// and all of them must get the same bits.

#include "kernels/rms_norm.h"

#include "harness/base/philox.h"
#include "properties/norm.h"
#include "properties/run/stage.h"
#include "reference/rms_norm.h"

namespace tp {

namespace {

// Whether a rounding on the way changes anything: exact data need none, on purpose.
bool rounds(const Case& c) { return c.dtype != DType::f32 && c.fill != Fill::exact; }
bool adds(const Case& c) { return c.options.at("residual") == 1; }

Mutant mutant(std::string id, std::string what, std::string upstream,
              void (*change)(ShardingRules&), bool (*decides)(const Case&)) {
  Mutant m{std::move(id), std::move(what), std::move(upstream), sharding_rules(), decides};
  change(m.rules);
  return m;
}

const std::vector<Mutant>& mutants() {
  const std::string precision = "norm-weight-multiply-precision:";
  static const std::vector<Mutant> all = {
      mutant(
          "synthetic-residual-uninit:empty",
          "a norm without a residual adds one all the same, from memory that nobody wrote",
          "vllm-project/vllm#41972",
          [](ShardingRules& r) { r.norm.adds = [](bool) { return true; }; },
          [](const Case& c) { return !adds(c); }),
      mutant(
          precision + "sum-not-rounded",
          "x + residual is normed as it is in fp32, not as residual_out has it", "ROCm/aiter#2586",
          [](ShardingRules& r) { r.norm.rounding.sum = false; },
          [](const Case& c) { return adds(c) && rounds(c); }),
      mutant(
          precision + "two-roundings",
          "the normed value is rounded before it is multiplied with the weight, and again after",
          "vllm-project/vllm#42379", [](ShardingRules& r) { r.norm.rounding.before_weight = true; },
          rounds),
  };
  return all;
}

// Exact data for a sum: x is a small whole number, and residual what is missing to +-64 or +-128,
// one of them in a row, so that all sums of a row have one square and everything is exact again.
struct Summands {
  double x;
  double sum;
};
Summands exact_summands(const DataRegime& g, const TensorSpec& t, std::int64_t row,
                        std::int64_t col) {
  constexpr std::uint64_t kStream = stream_of("x + residual"), kRows = stream_of("rows of sums");
  const auto source = std::uint64_t((row + g.rotate_rows) % t.rows);
  const Random4 bits = philox(g.seed, kStream, source * std::uint64_t(t.cols) + std::uint64_t(col));
  const double scale =
      std::ldexp(1.0, g.scale_log2 + 6 + int(philox(g.seed, kRows, source)[0] % 2));
  return {std::ldexp(double(bits[0] % 63) - 31, g.scale_log2), bits[1] >> 31 ? -scale : scale};
}

// The two summands of a residual norm, [tokens, cols].
std::vector<TensorSpec> summands(const Case& c, TensorSpec x) {
  TensorSpec residual = x;
  residual.name = "residual";
  if (c.fill == Fill::exact) {
    const TensorSpec shape = x;
    x.value = [shape](const DataRegime& g, std::int64_t row, std::int64_t col) {
      return exact_summands(g, shape, row, col).x;
    };
    residual.value = [shape](const DataRegime& g, std::int64_t row, std::int64_t col) {
      const Summands s = exact_summands(g, shape, row, col);
      return s.sum - s.x;
    };
  }
  return {x, residual};
}

// A buffer of rows of `cols` columns with padding behind them.
LocalBuffer padded(const std::string& name, Use use, const Case& c, bool has_piece = true) {
  const std::int64_t cols = c.model.hidden_size;
  LocalBuffer buffer{name, use, c.dtype, c.num_tokens, cols + c.options.at("pad")};
  if (has_piece) buffer.pieces = {{name, {0, cols}}};
  return buffer;
}

// Buffers begin at multiples of 16 bytes, and the weight has no more than a row.
Profile profile_of(const Case& c) {
  const std::int64_t cols = c.model.hidden_size, stride = cols + c.options.at("pad");
  return rms_norm_profile(c.dtype, cols, stride * size_of(c.dtype) % 16 == 0);
}

// Asks of the mistakes of rounding: would these data have shown them?
std::optional<std::string> blind_to(const Case& c, double eps, const WholeInputs& in,
                                    const Budget& right) {
  const Matrix &x = in["x"], &weight = in["weight"];
  const Profile profile = profile_of(c);
  const Shard cols = {0, x.cols};
  for (const Mutant& m : mutants()) {
    if (!m.shows(c) || m.rules.norm.adds(adds(c)) != adds(c)) continue;
    Matrix normed = x;
    if (adds(c)) {
      const DType sum = m.rules.norm.rounding.sum ? c.dtype : DType::f32;
      normed = reference::rounded_sum(sum, x, in["residual"]);
    }
    Budget altered = reference::rms_norm(normed, weight, eps, profile, double(x.cols));
    if (m.rules.norm.rounding.before_weight) {
      for (std::size_t at = 0; at < altered.r.size(); ++at) {
        const double w = weight.values[at % weight.values.size()];
        altered.r[at] = w == 0 ? altered.r[at] : round_to(c.dtype, altered.r[at] / w) * w;
      }
    }
    if (!norm::tells_apart(c.dtype, right, altered, cols)) return m.id;
  }
  return std::nullopt;
}

std::vector<Stage> stages(const Case& c, const ShardingRules& rules, const Variation& variation) {
  const std::int64_t tokens = c.num_tokens, cols = c.model.hidden_size;
  const std::int64_t entity = std::max<std::int64_t>(1, cols / 8);
  const double eps = norm::eps_of(c, variation);
  const bool has_residual = adds(c), kernel_adds = rules.norm.adds(has_residual);
  const TensorSpec x{"x", c.dtype, tokens, cols, Role::activation, entity};
  TensorSpec residual_out = x, out = x;
  residual_out.name = "residual_out";
  out.name = "out";
  Stage stage{
      .name = has_residual ? "add_rms_norm" : "rms_norm",
      .inputs = has_residual ? summands(c, x) : std::vector{x},
      .outputs = has_residual ? std::vector{residual_out, out} : std::vector{out},
      .buffers = [=](int) -> std::vector<LocalBuffer> {
        std::vector<LocalBuffer> all = {
            padded("x", Use::input, c),
            {"weight", Use::input, c.dtype, 1, cols, {{"weight", {0, cols}}}},
            padded("out", Use::output, c)};
        // A kernel that adds what nobody gave it adds what memory held.
        if (has_residual || kernel_adds) {
          all.push_back(
              padded("residual", has_residual ? Use::input : Use::workspace, c, has_residual));
          all.push_back(
              padded("residual_out", has_residual ? Use::output : Use::workspace, c, has_residual));
        }
        return all;
      },
      .run =
          [=](RankRun& run) {
            dispatch(c.dtype, [&]<typename T>(T) {
              const auto view = [&](const char* name) {
                return run.view<T>(name).columns(0, cols);
              };
              if (kernel_adds) {
                add_rms_norm<T>(view("x"), view("residual"), run.view<T>("weight"),
                                view("residual_out"), view("out"), float(eps), rules.norm.rounding,
                                run.stream);
              } else {
                rms_norm<T>(view("x"), run.view<T>("weight"), view("out"), float(eps),
                            rules.norm.rounding, run.stream);
              }
            });
          },
      .cost = [=](int) -> Cost {
        // Two or four tensors of tokens, and the weight; a square, an addition, two products each,
        // and the sum.
        const double tensors = has_residual ? 4 : 2;
        return {.bytes = (tensors * double(tokens) + 1) * double(cols) * double(size_of(c.dtype)),
                .flops = (has_residual ? 5 : 4) * double(tokens) * double(cols)};
      },
      .reference = [=](const WholeInputs& in) -> std::vector<Budget> {
        const Profile profile = profile_of(c);
        const Matrix& weight = in["weight"];
        if (!has_residual)
          return {reference::rms_norm(in["x"], weight, eps, profile, double(cols))};
        const Matrix sum = reference::rounded_sum(c.dtype, in["x"], in["residual"]);
        Budget written(tokens, cols);
        written.r = sum.values;
        return {written, reference::rms_norm(sum, weight, eps, profile, double(cols))};
      },
      .blind_to =
          [=](const WholeInputs& in, const std::vector<Budget>& budgets) {
            return blind_to(c, eps, in, budgets.back());
          },
  };
  stage.inputs.push_back({"weight", c.dtype, 1, cols, Role::weight, entity});
  return {std::move(stage)};
}

// A scaled sum is another one; its norm is not.
LawRun scale_of_out() {
  LawRun law = law_scale();
  law.twin = [](const Case&, const Variation&, const TensorSpec& tensor, std::int64_t row,
                std::int64_t col) -> std::optional<Place> {
    if (tensor.name == "residual_out") return std::nullopt;
    return Place{row, col};
  };
  return law;
}

}  // namespace

Operator make_rms_norm() {
  return make_operator({
      .name = "rms_norm",
      .what = "RMSNorm of rows that every rank holds whole, or of their sum with a residual",
      .keys = {shared_key("hidden_size"),
               shared_key("tp_size"),
               shared_key("num_tokens"),
               shared_key("dtype"),
               shared_key("fill"),
               shared_key("seed"),
               norm::eps_key(),
               pad_key("x, residual and of the outputs"),
               {.name = "residual",
                .help = "add: x + residual is rounded, written and normed",
                .min = 0,
                .max = 1,
                .words = {"none", "add"},
                .shrink = Shrink::to_fallback}},
      .laws = {law_tp1(), scale_of_out(), law_tokens()},
      .mutants = mutants(),
      .refuse =
          [](const Case& c) {
            return too_large(c.num_tokens, c.model.hidden_size * std::int64_t{c.tp_size});
          },
      .regime = norm::regime,
      .stages = stages,
  });
}

}  // namespace tp
