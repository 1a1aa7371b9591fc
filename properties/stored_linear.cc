#include "properties/stored_linear.h"

#include <fmt/format.h>

#include <algorithm>

#include "harness/base/check.h"
#include "harness/device/library_product.h"
#include "kernels/quantised_linear.h"
#include "properties/stored_layout.h"
#include "properties/stored_stages.h"
#include "properties/stored_tensors.h"
#include "reference/checkpoint.h"
#include "reference/quantise.h"
#include "reference/scaled_product.h"

namespace tp::stored_linear {

std::vector<Stage> stages(const Case& c, const Layer& layer, const TensorSpec& x,
                          const std::vector<TensorSpec>& biases, const ShardingRules& rules,
                          const Variation& variation) {
  std::vector<Stage> all;
  if (!is_loaded(c)) return all;
  all.push_back(load_stage(c, layer, biases, rules, variation));
  if (is_prepared(c, layer)) all.push_back(prepare_stage(c, layer, !biases.empty(), rules));
  if (quantises(c)) all.push_back(quantise_stage(c, layer, x, rules));
  return all;
}

namespace {

// What the product reads of each part: the weight as it was loaded, unless codes were made of it,
// and the scales that go with it.
std::vector<Kind> product_kinds(const Case& c, const Layer& layer, int tp_rank) {
  std::vector<Kind> all;
  const auto prepared = prepared_kind(c, layer, tp_rank);
  if (!prepared || prepared->buffer != "codes") all.push_back(weight_kind(c, layer, tp_rank));
  if (prepared) all.push_back(*prepared);
  if (const auto kind = scales_kind(c, layer, tp_rank)) all.push_back(*kind);
  return all;
}

}  // namespace

std::vector<TensorSpec> product_inputs(const Case& c, const Layer& layer, const TensorSpec& x) {
  std::vector<TensorSpec> all = {quantises(c) ? codes_spec(x) : x};
  for (const Kind& kind : product_kinds(c, layer, 0)) {
    for (TensorSpec& t : tensors(c, layer, kind)) all.push_back(std::move(t));
  }
  if (has_weight_scale(c)) all.push_back(shared("weight_scale", 1));
  if (has_fixed_scale(c)) all.push_back(shared("input_scale", 1));
  if (makes_scales(c)) all.push_back(x_scale_spec(c, layer));
  if (is_gptq(c)) all.push_back(groups_spec(layer));
  return all;
}

std::vector<LocalBuffer> product_buffers(const Case& c, const Layer& layer, int tp_rank) {
  std::vector<LocalBuffer> all = {quantises(c) ? codes_buffer(c, layer, Use::input, tp_rank)
                                               : x_buffer(c, layer, tp_rank)};
  for (const Kind& kind : product_kinds(c, layer, tp_rank))
    all.push_back(buffer(layer, kind, Use::input, tp_rank));
  if (has_weight_scale(c)) all.push_back(shared_buffer("weight_scale", 1, Use::input));
  if (has_fixed_scale(c)) all.push_back(shared_buffer("input_scale", 1, Use::input));
  if (makes_scales(c)) all.push_back(x_scale_buffer(c, layer, Use::input, tp_rank));
  if (is_gptq(c)) all.push_back(groups_buffer(c, layer, Use::input, tp_rank));
  return all;
}

std::vector<TensorSpec> bias_inputs(const Case& c, const Layer& layer) {
  return tensors(c, layer, bias_kind(c));
}
LocalBuffer bias_buffer(const Case& c, const Layer& layer, int tp_rank) {
  return buffer(layer, bias_kind(c), Use::input, tp_rank);
}

template <typename T, typename Out>
void product(RankRun& run, const Case& c, const Layer& layer, View<const T> bias, View<Out> out,
             const ShardingRules& rules) {
  const int tp_rank = run.group.tp_rank();
  const std::int64_t width = columns_of(c, layer, tp_rank).own.size;
  QuantisedWeight w{.format = format_of(c), .cols = width};
  w.first_col = first_column(c, layer, rules, tp_rank);
  switch (w.format.scheme) {
    case Scheme::fp8_tensor:
      w.codes = run.view<e4m3>("codes");
      w.factors = run.view<float>("weight_scale");
      break;
    case Scheme::nvfp4:
      w.packed = run.view<std::uint8_t>("weight");
      w.group_scales = run.view<e4m3>("scales");
      w.factors = run.view<float>("factors");
      break;
    case Scheme::gptq:
      w.words = run.view<std::int32_t>("codes");
      w.table = run.view<f16>("scales");
      w.groups = run.view<std::int32_t>("groups").data;
      break;
    default:
      w.codes = run.view<e4m3>("weight");
      w.factors = run.view<float>("scales");
      break;
  }
  if (!quantises(c)) {
    if constexpr (std::is_same_v<T, float>) {
      TP_CHECK(false, "refuse() lets no dequantised f32 pass");
    } else {
      quantised_product<T, Out>(run.view<T>("x").columns(0, width), w, bias, out, run.stream);
    }
    return;
  }
  Scales scales;
  if (has_fixed_scale(c)) {
    scales.data = run.view<float>("input_scale").data;
  } else {
    const View<float> made = run.view<float>("x_scale");
    scales.data = made.data;
    if (w.format.activations != Activations::tensor) scales.row_stride = made.row_stride;
    if (w.format.activations == Activations::token_groups) {
      scales.cols_per = w.format.block_cols;
      scales.first_col = w.first_col;
    }
  }
  quantised_product<T, Out>(run.view<e4m3>("x_codes"), scales, w, bias, out, run.stream);
}

template void product(RankRun&, const Case&, const Layer&, View<const float>, View<float>,
                      const ShardingRules&);
template void product(RankRun&, const Case&, const Layer&, View<const f16>, View<f16>,
                      const ShardingRules&);
template void product(RankRun&, const Case&, const Layer&, View<const f16>, View<float>,
                      const ShardingRules&);
template void product(RankRun&, const Case&, const Layer&, View<const bf16>, View<bf16>,
                      const ShardingRules&);
template void product(RankRun&, const Case&, const Layer&, View<const bf16>, View<float>,
                      const ShardingRules&);

namespace {

// A weight before it meets activations, and what its products are multiplied with then.
struct Dequantised {
  Matrix values;
  Matrix scales{1, 1};
  reference::Factors factors;
};

// Whether codes are multiplied with codes, and with one scale each.
bool is_scaled_by_tensor(const Case& c) {
  const QuantFormat f = format_of(c);
  return f.scheme == Scheme::fp8_tensor &&
         (f.activations == Activations::fixed || f.activations == Activations::tensor);
}

}  // namespace

Budget product_reference(const Case& c, const Layer& layer, const WholeInputs& in, std::size_t part,
                         int tp_rank, const Matrix* bias, bool is_last) {
  const QuantFormat f = format_of(c);
  const Shard own = columns_of(c, layer, tp_rank).own;
  const std::string& name = layer.parts[part];
  const auto cut = [&](const Matrix& m) { return reference::columns(m, own.offset, own.size); };
  Dequantised w{.values = Matrix(1, 1)};
  switch (f.scheme) {
    case Scheme::fp8_tensor:
      w.values = cut(in[name + ".requantised"]);
      w.scales = in["weight_scale"];
      w.factors = {.values = &w.scales};
      break;
    case Scheme::fp8_channel:
      w.values = cut(in[name + ".codes"]);
      w.scales = in[name + ".scales"];
      w.factors = {.values = &w.scales};
      break;
    case Scheme::fp8_block: {
      const Shard blocks = touched(columns_of(c, layer, tp_rank), f.block_cols);
      w.values = cut(in[name + ".codes"]);
      w.scales = reference::columns(in[name + ".scales"], blocks.offset, blocks.size);
      w.factors = {
          .values = &w.scales, .cols_per = f.block_cols, .first_col = own.offset % f.block_cols};
      break;
    }
    case Scheme::nvfp4: {
      const Matrix codes = reference::unpacked_e2m1(in[name + ".packed"], layer.in_features);
      const reference::Factors groups{.values = &in[name + ".scales"], .cols_per = kNvfp4Group};
      w.values = cut(reference::dequantised(c.dtype, codes, groups));
      w.scales = in[name + ".factors"];
      w.factors = {.values = &w.scales};
      break;
    }
    case Scheme::gptq: {
      const Matrix codes = reference::unpacked_int4(in[name + ".rows"]);
      // Which scale a column has, as the checkpoint has it: the rank's own count of groups was
      // judged where it was loaded.
      Matrix scales(layer.rows[part], layer.in_features);
      const Matrix& table = in[name + ".scales"];
      const std::vector<std::int64_t> group_of = groups_of_columns(c, layer);
      for (std::int64_t k = 0; k < layer.in_features; ++k) {
        const double* of_rows = table.row(group_of[std::size_t(k)]);
        for (std::int64_t j = 0; j < scales.rows; ++j) scales.row(j)[k] = of_rows[j];
      }
      w.values = cut(reference::dequantised(c.dtype, codes, {.values = &scales, .cols_per = 1}));
      break;
    }
    case Scheme::none:
      TP_CHECK(false, "weights that are not quantised have a reference of their own");
  }
  const DType x_type = quantises(c) ? DType::e4m3 : c.dtype;
  Matrix x = cut(in[quantises(c) ? "x_codes" : "x"]), scales(1, 1);
  reference::Factors of_x;
  if (has_fixed_scale(c)) {
    scales = in["input_scale"];
  } else if (makes_scales(c)) {
    const Shard mine = scale_columns(c, layer).of_rank[std::size_t(tp_rank)];
    scales = reference::columns(in["x_scale"], mine.offset, mine.size);
  }
  if (quantises(c)) of_x = x_factors(c, layer, scales, tp_rank);
  const std::int64_t longest =
      f.scheme == Scheme::fp8_block ? std::min<std::int64_t>(own.size, f.block_cols) : own.size;
  return reference::scaled_product(x, of_x, w.values, w.factors, {0, own.size}, bias,
                                   is_scaled_by_tensor(c) && bias == nullptr
                                       ? tensor_scaled_accumulation(x.rows, longest)
                                       : scaled_accumulation(x_type, longest),
                                   is_last);
}

bool product_has_own_bits(const Case& c, std::int64_t depth, bool has_bias) {
  if (has_bias) return false;
  if (is_quantised(c))
    return is_scaled_by_tensor(c) && library_takes(DType::e4m3, c.num_tokens, depth);
  return c.dtype != DType::f32 && library_takes(c.dtype, c.num_tokens, depth);
}

double weight_bytes(const Case& c, const Layer& layer, int tp_rank) {
  const LoadOutputs all = loaded(c, layer, false, Use::input, tp_rank);
  double bytes = 0;
  for (const LocalBuffer& b : all.buffers) bytes += double(b.rows * b.cols) * size_of(b.dtype);
  return bytes;
}

double work(const Case& c, double cols, std::int64_t depth, double activations) {
  // As many products as a stored element (written, read by ranks, compared) and one that becomes a
  // code count for.
  constexpr double kProductsOfStored = 16, kProductsOfCode = 32;
  Case product = c;
  // Whatever they were made of, codes are multiplied by tensor cores.
  if (quantises(c)) product.dtype = DType::bf16;
  return linear::work(product, cols, depth) +
         (is_loaded(c) ? kProductsOfStored * cols * double(depth) : 0) +
         (quantises(c) ? kProductsOfCode * activations : 0);
}

LawRun law_tokens() {
  LawRun law = tp::law_tokens();
  law.twin = [](const Case&, const Variation& v, const TensorSpec& t, std::int64_t row,
                std::int64_t col) -> std::optional<Place> {
    if (t.role == Role::weight) return Place{row, col};
    return Place{(row + v.rotate_rows) % t.rows, col};
  };
  return law;
}

LawRun law_files() {
  return {
      .law = {"files", "a checkpoint's tensors in other files and another order: the same bits"},
      .vary =
          [](const Case& c) {
            return std::pair{c, Variation{.law = "files"}};
          },
      .refuse = [](const Case& c) -> std::optional<std::string> {
        if (!layer_in_file(c)) return std::nullopt;
        return fmt::format("law=files spreads tensors over other files: layer={} has its own",
                           c.options.at("layer"));
      }};
}

LawRun without_local_scales(LawRun law, const std::string& prefix, const std::string& output) {
  law.twin = [twin = law.twin, prefix, output](const Case& c, const Variation& v,
                                               const TensorSpec& t, std::int64_t row,
                                               std::int64_t col) -> std::optional<Place> {
    if (t.name == prefix + "x_scale" || t.name == prefix + "groups") return std::nullopt;
    const bool is_of_scales = t.name == prefix + "x_codes" || t.name == output;
    if (!output.empty() && is_of_scales && makes_scales(c)) return std::nullopt;
    if (twin) return twin(c, v, t, row, col);
    return Place{row, col};
  };
  return law;
}

}  // namespace tp::stored_linear
