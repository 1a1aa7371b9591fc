// Where an operator has several kernels for one contract, the default mix draws cases of each.

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "harness/base/case.h"
#include "harness/fuzz/draw.h"
#include "kernels/lora.h"
#include "kernels/rms_norm.h"
#include "properties/lora_batch.h"
#include "properties/lora_call.h"
#include "properties/lora_layers.h"

namespace tp {
namespace {

constexpr int kCases = 20000;

// How many of kCases drawn cases have which variant.
template <typename F>
std::map<std::string, int> drawn(const std::string& op, F variant) {
  std::vector<int> sizes;
  for (int tp = 1; tp <= 16; ++tp) sizes.push_back(tp);
  Draw draw(make_domain({op}, sizes, {}, ""), 1);
  std::map<std::string, int> count;
  for (int i = 0; i < kCases; ++i) ++count[variant(draw.next())];
  return count;
}

void expect_all(const std::map<std::string, int>& count,
                std::initializer_list<std::string> variants) {
  for (const std::string& variant : variants) {
    const auto at = count.find(variant);
    EXPECT_GE(at == count.end() ? 0 : at->second, 5) << variant;
  }
}

TEST(Variants, OfRmsNormAreAllDrawn) {
  const auto count = drawn("rms_norm", [](const Case& c) {
    const std::int64_t cols = c.model.hidden_size, stride = cols + c.options.at("pad");
    const RowShare share = rms_norm_share(c.dtype, cols, stride * size_of(c.dtype) % 16 == 0);
    if (share.vectors == 0) return std::string("any");
    return fmt::format("{} {}", share.threads > 32 ? "block" : std::to_string(share.threads),
                       share.vectors);
  });
  expect_all(count, {"any", "8 1", "16 1", "32 1", "32 2", "32 4", "block 2", "block 4"});
}

TEST(Variants, OfLoraAreAllDrawn) {
  const auto name = [](LoraKernel kernel) {
    return kernel == LoraKernel::any ? "any" : kernel == LoraKernel::whole ? "whole" : "many";
  };
  const auto shrink = drawn("lora", [&](const Case& c) {
    const lora::Layer layer = lora::layer_of(c);
    const std::int64_t in = lora::columns_of_x(c, layer);
    const LoraPlan plan = lora_plan(lora::slot_of_token(c, 0), std::int32_t(lora::slots(c)));
    const bool aligned = (in + c.options.at("pad")) * size_of(c.dtype) % 16 == 0;
    return std::string(name(lora_shrink_kernel(
        c.dtype, in, aligned && in * size_of(c.dtype) % 16 == 0, std::int64_t(plan.tiles.size()),
        std::int64_t(layer.parts.size()), lora::max_rank(c, layer))));
  });
  expect_all(shrink, {"any", "whole", "many"});

  const auto expand = drawn("lora", [&](const Case& c) {
    const lora::Layer layer = lora::layer_of(c);
    LoraColumns columns{.parts = std::int32_t(layer.parts.size())};
    std::int64_t width = 0;
    for (std::size_t p = 0; p < layer.parts.size(); ++p) {
      columns.at[p] = width;
      columns.rows[p] = layer.own(0)[p].size;
      width += columns.rows[p];
    }
    const std::int64_t pad = layer.cuts_columns ? 0 : c.options.at("pad"),
                       room = lora::max_rank(c, layer);
    const bool aligned = (width + pad) * size_of(c.dtype) % 16 == 0 &&
                         room * size_of(c.dtype) % 16 == 0 &&
                         lora::layout(c) != lora::Layout::ranks;
    return std::string(
        name(lora_expand_kernel(c.dtype, columns, width, aligned, lora::has_bias(c), 1)));
  });
  expect_all(expand, {"any", "whole"});
}

}  // namespace
}  // namespace tp
