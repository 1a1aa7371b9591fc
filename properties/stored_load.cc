#include <algorithm>

#include "harness/base/user_checkpoint.h"
#include "harness/device/fault.h"
#include "kernels/weight_loader.h"
#include "properties/stored_layout.h"
#include "properties/stored_stages.h"
#include "properties/stored_tensors.h"
#include "reference/checkpoint.h"

namespace tp::stored_linear {

namespace {

void run_load(RankRun& run, const Case& c, const Layer& layer, bool bias,
              const ShardingRules& rules) {
  const StoredLinear stored = stored_linear(c, layer, rules, run.group.tp_rank());
  try {
    run.checkpoint().check_unchanged();
    const WeightLoader loader(run.checkpoint(), stored, rules, run.stream);
    switch (stored.format.scheme) {
      case Scheme::none:
        dispatch(c.dtype, [&]<typename T>(T) { loader.weight(run.view<T>("weight")); });
        break;
      case Scheme::nvfp4:
        loader.weight(run.view<std::uint8_t>("weight"));
        loader.group_scales(run.view<e4m3>("scales"));
        break;
      case Scheme::gptq:
        loader.packed_columns(run.view<std::int32_t>("weight"));
        loader.group_scales(run.view<f16>("scales"));
        loader.groups(run.view<std::int32_t>("groups"));
        break;
      default:
        loader.weight(run.view<e4m3>("weight"));
        if (stored.format.scheme != Scheme::fp8_tensor)
          loader.row_scales(run.view<float>("scales"));
        break;
    }
    if (has_slots(c)) loader.slots(run.view<float>("slots"));
    if (has_fixed_scale(c)) loader.input_slots(run.view<float>("input_slots"));
    if (bias) dispatch(c.dtype, [&]<typename T>(T) { loader.bias(run.view<T>("bias")); });
    run.stream.synchronize();
    run.checkpoint().check_unchanged();  // while it was read
  } catch (const BadInput& e) {
    // A file that was made for the case is legal, so it is the loader that is wrong.
    const bool is_users = c.options.at("layer") > 0;
    throw Fault{is_users ? Outcome::Refused : Outcome::BadLaunch, e.what(), run.group.tp_rank()};
  }
}

// What is right, from the tensors as they are stored.
class LoadReference {
 public:
  LoadReference(const Case& c, const Layer& layer, const WholeInputs& in)
      : c_(c),
        layer_(layer),
        in_(in),
        names_(tensor_names(format_of(c))),
        prefixes_(prefixes(c, layer)) {}

  std::vector<Budget> budgets(bool bias) const {
    const QuantFormat f = format_of(c_);
    std::vector<Budget> all;
    const auto of_parts = [&](const std::string& suffix, bool by_columns, std::int64_t per = 1) {
      for (std::size_t p = 0; p < layer_.parts.size(); ++p) {
        const Matrix& stored = in_[prefix(p) + "." + suffix];
        all.push_back(reference::exactly(by_columns ? reference::taken_columns(stored, rows(p))
                                                    : reference::taken_rows(stored, rows(p), per)));
      }
      if (const std::int64_t rows = padding_rows(c_, layer_); rows > 0)
        all.push_back(by_columns ? Budget(all.back().rows, rows) : Budget(rows, all.back().cols));
    };
    const bool is_columns = f.scheme == Scheme::gptq;
    of_parts(names_.weight, is_columns);
    if (f.scheme != Scheme::none && f.scheme != Scheme::fp8_tensor)
      of_parts(names_.scale, is_columns, f.scheme == Scheme::fp8_block ? f.block_rows : 1);
    if (bias) of_parts("bias", true);
    if (has_slots(c_)) {
      const bool global = f.scheme == Scheme::nvfp4;
      all.push_back(
          slots(global ? names_.global_scale : names_.scale, global && names_.global_is_inverse));
    }
    if (has_fixed_scale(c_)) all.push_back(slots(names_.input_scale, names_.global_is_inverse));
    if (is_columns) all.push_back(groups());
    return all;
  }

 private:
  std::string prefix(std::size_t part) const { return prefixes_[is_fused(c_, layer_) ? 0 : part]; }
  // The stored rows of a part.
  std::vector<std::int64_t> rows(std::size_t part) const {
    if (is_fused(c_, layer_))
      return reference::rows_of_matrix(layer_.rows, fused_rows(c_, layer_).stripes, part);
    return reference::rows_of_matrix({layer_.rows[part]}, 1, 0);
  }
  Budget slots(const std::string& suffix, bool is_inverse) const {
    Budget all(1, std::int64_t(layer_.parts.size()));
    for (std::size_t p = 0; p < layer_.parts.size(); ++p) {
      const double stored = in_[prefix(p) + "." + suffix].values[0];
      all.r[p] = is_inverse ? double(1.0f / float(stored)) : stored;
    }
    return all;
  }
  // A rank counts its groups from the first that it has.
  Budget groups() const {
    Budget all = reference::exactly(in_[prefix(0) + "." + names_.group_of_column]);
    if (c_.options.at("act_order") == 1) return all;
    const std::int64_t width =
        layer_.cuts_columns() ? layer_.in_features / c_.tp_size : layer_.in_features;
    for (std::int64_t k = 0; k < layer_.in_features; ++k)
      all.r[std::size_t(k)] -= double(k / width * width / format_of(c_).block_cols);
    return all;
  }

  const Case& c_;
  const Layer& layer_;
  const WholeInputs& in_;
  TensorNames names_;
  std::vector<std::string> prefixes_;
};

}  // namespace

Stage load_stage(const Case& c, const Layer& layer, const std::vector<TensorSpec>& biases,
                 const ShardingRules& rules, const Variation& variation) {
  const bool bias = !biases.empty();
  Stage stage{.name = "load"};
  // Which file has which tensor, and where in it, is nothing to any rank.
  const bool other_order = variation.law == "files";
  const std::int64_t files = other_order ? 5 - c.options.at("files") : c.options.at("files");
  const bool from_file = layer_in_file(c).has_value();
  if (from_file) stage.checkpoints = {user_checkpoint()};
  std::vector<InFile> all =
      from_file ? tensors_in_file(c, layer, bias) : checkpoint_of(c, layer, bias);
  if (other_order) std::reverse(all.begin(), all.end());
  for (std::size_t i = 0; i < all.size(); ++i) {
    stage.stored.push_back({all[i].spec.name, all[i].shape,
                            int(std::min<std::int64_t>(files, std::int64_t(all.size())) *
                                std::int64_t(i) / std::int64_t(all.size()))});
    stage.inputs.push_back(std::move(all[i].spec));
  }
  stage.outputs = loaded(c, layer, bias, Use::output, 0).specs;
  stage.buffers = [=](int tp_rank) { return loaded(c, layer, bias, Use::output, tp_rank).buffers; };
  stage.run = [=](RankRun& run) { run_load(run, c, layer, bias, rules); };
  stage.reference = [=](const WholeInputs& in) {
    return LoadReference(c, layer, in).budgets(bias);
  };
  return stage;
}

}  // namespace tp::stored_linear
