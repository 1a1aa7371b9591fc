#include "harness/base/quantization.h"

#include <gtest/gtest.h>

#include <set>

namespace tp {
namespace {

using enum Scheme;
using enum Dialect;
using enum Activations;

QuantFormat format(Scheme scheme, Dialect dialect, Activations activations) {
  return {scheme, dialect, activations, 128, scheme == nvfp4 ? 16 : 128};
}

// The table of ecosystem.md 1.5, as it stands there.
TEST(Quantization, NamesOfStoredTensors) {
  const struct {
    QuantFormat format;
    TensorNames names;
  } table[] = {
      {format(none, compressed_tensors, plain), {.weight = "weight"}},
      {format(fp8_tensor, compressed_tensors, fixed),
       {.weight = "weight", .scale = "weight_scale", .input_scale = "input_scale"}},
      {format(fp8_tensor, compressed_tensors, tensor),
       {.weight = "weight", .scale = "weight_scale"}},
      {format(fp8_tensor, modelopt, fixed),
       {.weight = "weight", .scale = "weight_scale", .input_scale = "input_scale"}},
      {format(fp8_tensor, native, fixed),
       {.weight = "weight", .scale = "weight_scale", .input_scale = "input_scale"}},
      {format(fp8_channel, compressed_tensors, token),
       {.weight = "weight", .scale = "weight_scale"}},
      {format(fp8_channel, modelopt, token), {.weight = "weight", .scale = "weight_scale"}},
      {format(fp8_block, compressed_tensors, token_groups),
       {.weight = "weight", .scale = "weight_scale"}},
      // A multiplier all the same: global_is_inverse stays false.
      {format(fp8_block, native, token_groups), {.weight = "weight", .scale = "weight_scale_inv"}},
      {format(nvfp4, compressed_tensors, token_groups),
       {.weight = "weight_packed",
        .scale = "weight_scale",
        .global_scale = "weight_global_scale",
        .input_scale = "input_global_scale",
        .global_is_inverse = true}},
      {format(nvfp4, compressed_tensors, plain),
       {.weight = "weight_packed",
        .scale = "weight_scale",
        .global_scale = "weight_global_scale",
        .global_is_inverse = true}},
      {format(nvfp4, modelopt, token_groups),
       {.weight = "weight",
        .scale = "weight_scale",
        .global_scale = "weight_scale_2",
        .input_scale = "input_scale"}},
      {format(gptq, native, plain),
       {.weight = "qweight", .scale = "scales", .zeros = "qzeros", .group_of_column = "g_idx"}},
  };
  for (const auto& row : table) {
    const auto shown = testing::Message() << int(row.format.scheme) << int(row.format.dialect)
                                          << int(row.format.activations);
    EXPECT_EQ(illegal(row.format), std::nullopt) << shown;
    EXPECT_EQ(tensor_names(row.format), row.names) << shown;
  }
}

// All combinations: the legal ones are these, and every other says why not in a sentence.
TEST(Quantization, WhatNobodyWrites) {
  const std::set<std::pair<Scheme, Dialect>> written = {
      {none, compressed_tensors},
      {none, modelopt},
      {none, native},
      {fp8_tensor, compressed_tensors},
      {fp8_tensor, modelopt},
      {fp8_tensor, native},
      {fp8_channel, compressed_tensors},
      {fp8_channel, modelopt},
      {fp8_block, compressed_tensors},
      {fp8_block, native},
      {nvfp4, compressed_tensors},
      {nvfp4, modelopt},
      {gptq, native},
  };
  int legal = 0;
  for (const Scheme scheme : {none, fp8_tensor, fp8_channel, fp8_block, nvfp4, gptq}) {
    for (const Dialect dialect : {compressed_tensors, modelopt, native}) {
      for (const Activations activations : {plain, fixed, tensor, token, token_groups}) {
        const QuantFormat f = format(scheme, dialect, activations);
        const auto why = illegal(f);
        legal += !why;
        if (activations == plain) {
          EXPECT_EQ(!why, written.contains({scheme, dialect})) << why.value_or("");
        }
        if (why) {
          EXPECT_GT(why->size(), 20u);
          EXPECT_EQ(why->find('\n'), why->npos);
        } else {
          EXPECT_FALSE(tensor_names(f).weight.empty());
        }
      }
    }
  }
  // none 3; tensor 3 x 4; channel 4 and 2; block 2 x 2; nvfp4 2 x 2; gptq 1.
  EXPECT_EQ(legal, 3 + 12 + 6 + 4 + 4 + 1);

  EXPECT_TRUE(illegal({gptq, modelopt, plain}));
  EXPECT_TRUE(illegal({fp8_tensor, native, token_groups}));
  EXPECT_TRUE(illegal({fp8_channel, modelopt, fixed}));
  EXPECT_FALSE(illegal({fp8_channel, compressed_tensors, fixed}));
}

TEST(Quantization, BlocksThatAreNone) {
  EXPECT_TRUE(illegal({nvfp4, modelopt, plain, 128, 32}));
  EXPECT_TRUE(illegal({fp8_block, native, plain, 0, 128}));
  EXPECT_TRUE(illegal({fp8_block, native, plain, 128, -1}));
  EXPECT_FALSE(illegal({fp8_block, native, plain, 1, 64}));
  EXPECT_TRUE(illegal({gptq, native, plain, 128, -1}));
  EXPECT_TRUE(illegal({gptq, native, plain, 128, 12}));
  EXPECT_FALSE(illegal({gptq, native, plain, 128, 32}));
  // Formats without blocks do not look at them.
  EXPECT_FALSE(illegal({fp8_tensor, native, fixed, 0, 0}));
}

}  // namespace
}  // namespace tp
