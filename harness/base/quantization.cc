#include "harness/base/quantization.h"

#include <fmt/format.h>

#include "harness/base/check.h"

namespace tp {

namespace {

std::string_view word(Scheme s) { return kSchemeWords[std::size_t(s)]; }
std::string_view word(Activations a) { return kActivationsWords[std::size_t(a)]; }

// Scales of activations that the kernels of the scheme know what to do with.
bool takes(Scheme scheme, Activations activations) {
  if (activations == Activations::plain) return true;
  switch (scheme) {
    case Scheme::none:
    case Scheme::gptq:
      return false;
    case Scheme::fp8_tensor:
    case Scheme::fp8_channel:
      return activations != Activations::token_groups;
    case Scheme::fp8_block:
    case Scheme::nvfp4:
      return activations == Activations::token_groups;
  }
  return false;
}

std::string why_not(Scheme scheme, Activations activations) {
  switch (scheme) {
    case Scheme::none:
    case Scheme::gptq:
      return fmt::format("weights of quant={} are multiplied with activations as they are, not with "
                         "activations={}",
                         word(scheme), word(activations));
    case Scheme::fp8_tensor:
    case Scheme::fp8_channel:
      return fmt::format("{} weights have no blocks that groups of activations could go with",
                         word(scheme));
    case Scheme::fp8_block:
    case Scheme::nvfp4:
      return fmt::format("{} weights go with activations scaled in token_groups, not by {}",
                         word(scheme), word(activations));
  }
  return "";
}

std::optional<std::string> illegal_dialect(const QuantFormat& f) {
  if (f.scheme == Scheme::none) return std::nullopt;  // nothing to have a dialect of
  switch (f.dialect) {
    case Dialect::compressed_tensors:
      if (f.scheme == Scheme::gptq)
        return "compressed-tensors packs int4 weights as rows of outputs, GPTQ as columns";
      return std::nullopt;
    case Dialect::modelopt:
      if (f.scheme == Scheme::gptq) return "ModelOpt has no GPTQ: its int4 is AWQ";
      if (f.scheme == Scheme::fp8_block)
        return "ModelOpt's blocks (FP8_PB_WO) have scales of four dimensions, another format";
      if (f.scheme == Scheme::fp8_channel && f.activations != Activations::plain &&
          f.activations != Activations::token)
        return "ModelOpt's scales a channel go with scales a token (FP8_PER_CHANNEL_PER_TOKEN)";
      return std::nullopt;
    case Dialect::native:
      if (f.scheme == Scheme::fp8_channel)
        return "AutoFP8 has one scale a tensor, DeepSeek's files one a block, and none one a "
               "channel";
      if (f.scheme == Scheme::nvfp4)
        return "nvfp4 is written by ModelOpt and by compressed-tensors, and has no names of its "
               "own";
      return std::nullopt;
  }
  return std::nullopt;
}

}  // namespace

std::optional<std::string> illegal(const QuantFormat& f) {
  if (const auto why = illegal_dialect(f)) return why;
  if (!takes(f.scheme, f.activations)) return why_not(f.scheme, f.activations);
  if (f.scheme == Scheme::fp8_block && (f.block_rows < 1 || f.block_cols < 1))
    return fmt::format("a block of {} x {} weights is empty", f.block_rows, f.block_cols);
  if (f.scheme == Scheme::nvfp4 && f.block_cols != 16)
    return fmt::format("nvfp4 has a scale for 16 columns, not for {}", f.block_cols);
  if (f.scheme == Scheme::gptq && (f.block_cols < 8 || f.block_cols % 8 != 0))
    return fmt::format("a GPTQ group of {} columns is not made of whole i32 of eight",
                       f.block_cols);
  return std::nullopt;
}

TensorNames tensor_names(const QuantFormat& f) {
  const auto why = illegal(f);
  TP_CHECK(!why, *why);
  const bool fixed = f.activations == Activations::fixed;
  const bool groups = f.activations == Activations::token_groups;
  switch (f.scheme) {
    case Scheme::none:
      return {.weight = "weight"};
    case Scheme::fp8_tensor:
    case Scheme::fp8_channel:
      return {
          .weight = "weight", .scale = "weight_scale", .input_scale = fixed ? "input_scale" : ""};
    case Scheme::fp8_block:
      // A multiplier in both dialects: what DeepSeek's name inverts is 448 / max.
      return {.weight = "weight",
              .scale = f.dialect == Dialect::native ? "weight_scale_inv" : "weight_scale"};
    case Scheme::nvfp4:
      if (f.dialect == Dialect::compressed_tensors) {
        return {.weight = "weight_packed",
                .scale = "weight_scale",
                .global_scale = "weight_global_scale",
                .input_scale = groups ? "input_global_scale" : "",
                .global_is_inverse = true};
      }
      return {.weight = "weight",
              .scale = "weight_scale",
              .global_scale = "weight_scale_2",
              .input_scale = groups ? "input_scale" : ""};
    case Scheme::gptq:
      return {
          .weight = "qweight", .scale = "scales", .zeros = "qzeros", .group_of_column = "g_idx"};
  }
  TP_CHECK(false, "a scheme without names");
}

}  // namespace tp
