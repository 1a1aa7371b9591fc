#include "properties/lora_stages.h"

#include <cmath>

#include "properties/linear.h"
#include "properties/lora_tensors.h"

namespace tp::lora {

std::vector<Stage> stages(const Case& c, const Layer& layer, const TensorSpec& x, DType base_dtype,
                          const ShardingRules& rules, const Variation& variation) {
  return {load_stage(c, layer, rules, variation), shrink_stage(c, layer, x, rules, variation),
          expand_stage(c, layer, x, base_dtype, rules, variation)};
}

Delta first_delta(const Case& c, const Layer& layer, std::size_t part) {
  const Adapter adapter = adapters(c, layer).front();
  const Module& m = adapter.modules[part];
  Delta delta{.scale = adapter.use_rslora ? m.alpha / std::sqrt(double(m.rank))
                                          : m.alpha / double(m.rank)};
  for (const StoredSpec& t : stored_tensors(c, layer, {})) {
    if (t.spec.name == stored_name(0, layer.parts[part], kA)) delta.a = t.spec;
    if (t.spec.name == stored_name(0, layer.parts[part], kB)) delta.b = t.spec;
  }
  return delta;
}

double work(const Case& c, const Layer& layer) {
  double rows = 0;
  for (std::size_t p = 0; p < layer.parts.size(); ++p)
    rows += double(layer.rows[p]) * layer.replicas[p] * (layer.cuts_columns ? c.tp_size : 1);
  const double room = double(max_rank(c, layer)), parts = double(layer.parts.size()),
               in = double(layer.in_features) * (layer.cuts_columns ? 1 : c.tp_size);
  const double elements = double(slots(c) + 1) * room * (rows + parts * in);
  return linear::kProductsOfWeight * elements +
         2 * double(c.num_tokens) * room * (rows + parts * in);
}

}  // namespace tp::lora
