#include <algorithm>

#include "harness/base/philox.h"
#include "kernels/lora_layer.h"
#include "kernels/row_linear.h"
#include "properties/linear.h"
#include "properties/lora_batch.h"
#include "properties/lora_stages.h"
#include "properties/lora_tensors.h"
#include "reference/checkpoint.h"
#include "reference/lora.h"

namespace tp::lora {

namespace {

// The base's output where no stage before makes it: of each rank's tokens, tokens being rotated; or
// the sum of what `ranks` ranks have.
TensorSpec base_tensor(const Case& c, const std::string& name, DType dtype, std::int64_t rows,
                       std::int64_t cols, std::int64_t ranks) {
  TensorSpec t{name, dtype, rows, cols, Role::activation};
  t.value = [=, is_exact = c.fill == Fill::exact, tokens = c.num_tokens](
                const DataRegime& g, std::int64_t row, std::int64_t col) {
    double sum = 0;
    for (std::int64_t rank = row / tokens; rank < row / tokens + ranks; ++rank) {
      const std::int64_t from = rank * tokens + (row % tokens + g.rotate_rows) % tokens;
      const Random4 bits = philox(g.seed, stream_of(name), std::uint64_t(from * cols + col));
      sum += drawn_value(is_exact, linear::kLargestBias, bits[0], from, col);
    }
    return sum;
  };
  return t;
}

// A bias of the delta joins a sum of the ranks once.
bool adds_bias(const Case& c, const Layer& layer, const ShardingRules& rules, int tp_rank) {
  const bool is_in_sum = joins(c, layer) == DeltaJoins::partial && !shares_out_rank(c);
  return has_bias(c) && (!is_in_sum || rules.linear.row_adds_bias(tp_rank));
}

// Shrunk activations that nothing but lora_expand sees.
constexpr const char* kShrunkAgain = "lora_h_again";

std::string of_lora(const std::string& base) { return base + "_lora"; }

std::vector<Budget> expand_reference(const Case& c, const Layer& layer, DType base_dtype,
                                     const Variation& v, const WholeInputs& in) {
  const std::int64_t tokens = c.num_tokens;
  const bool partial = joins(c, layer) == DeltaJoins::partial;
  const std::vector<std::int32_t> slot_of = tokens_of(c, v);
  std::vector<Budget> all;
  for (std::size_t p = 0; p < layer.parts.size(); ++p) {
    const Matrix& base = in[layer.outputs[p]];
    Budget whole(base.rows, base.cols);
    for (int rank = 0; rank < (partial ? c.tp_size : 1); ++rank) {
      // The columns that this part of the sum has a delta for.
      const Shard cols = lora_layer(c, layer, rank).base.own[p],
                  of_part = partial ? cols : Shard{0, base.cols};
      Matrix mine(tokens, of_part.size);
      for (std::int64_t t = 0; t < tokens; ++t) {
        const double* row = base.row(rank * tokens + t);
        std::copy_n(row + of_part.offset, of_part.size, mine.row(t));
        std::copy_n(row, base.cols, whole.r.data() + (rank * tokens + t) * base.cols);
      }
      std::vector<Matrix> b, biases;
      for (std::int64_t slot = 0; slot < slots(c); ++slot) {
        std::vector<std::int64_t> rows;
        for (std::int64_t row = of_part.offset; row < of_part.end(); ++row)
          rows.push_back(slot * layer.rows[p] + row);
        b.push_back(reference::columns(
            reference::taken_rows(in[slots_name("lora_b", layer.parts[p])], rows), 0,
            std::int64_t(in["lora_ranks"].row(slot)[p])));
        if (!has_bias(c)) continue;
        biases.push_back(reference::columns(
            reference::taken_rows(in[slots_name("lora_bias", layer.parts[p])], {slot}),
            of_part.offset, of_part.size));
      }
      std::vector<reference::LoraDelta> deltas;
      for (std::int64_t slot = 0; slot < slots(c); ++slot) {
        const auto s = std::size_t(slot);
        // Once in a sum of the ranks' parts, and wherever the delta is whole.
        const bool bias = has_bias(c) && (!partial || shares_out_rank(c) || rank == 0);
        deltas.push_back({.b = b[s].cols > 0 ? &b[s] : nullptr,
                          .bias = bias ? &biases[s] : nullptr,
                          .scale = float(in["lora_scales"].row(slot)[p]),
                          .accumulation = lora_expand_accumulation(c.dtype, b[s].cols)});
      }
      const Budget part = reference::lora_expand(mine, h_of_part(c, layer, in["lora_h"], p, rank),
                                                 deltas, slot_of, c.dtype, base_dtype);
      for (std::int64_t t = 0; t < tokens; ++t) {
        const std::size_t to = std::size_t((rank * tokens + t) * base.cols + of_part.offset),
                          from = std::size_t(t * of_part.size);
        std::copy_n(part.r.begin() + std::int64_t(from), of_part.size,
                    whole.r.begin() + std::int64_t(to));
        std::copy_n(part.rho.begin() + std::int64_t(from), of_part.size,
                    whole.rho.begin() + std::int64_t(to));
      }
    }
    all.push_back(std::move(whole));
  }
  return all;
}

}  // namespace

Stage expand_stage(const Case& c, const Layer& layer, const TensorSpec& x, DType base_dtype,
                   const ShardingRules& rules, const Variation& v) {
  const std::int64_t tokens = c.num_tokens;
  const bool partial = joins(c, layer) == DeltaJoins::partial, again = shrinks_again(c);
  Stage stage{.name = "lora_expand"};
  const SlotTensors slots_of = slot_tensors(c, layer);
  stage.inputs = slots_of.b;
  stage.inputs.insert(stage.inputs.end(), slots_of.bias.begin(), slots_of.bias.end());
  stage.inputs.insert(stage.inputs.end(), {slots_of.ranks, slots_of.scales, h_spec(c, layer)});
  if (again) {
    stage.inputs.insert(stage.inputs.end(), slots_of.a.begin(), slots_of.a.end());
    stage.inputs.push_back(x);
  }
  for (std::size_t p = 0; p < layer.parts.size(); ++p) {
    const std::int64_t rows = partial ? c.tp_size * tokens : tokens;
    const std::int64_t ranks = partial && v.law == "tp1" ? v.argument : 1;
    stage.inputs.push_back(
        base_tensor(c, layer.outputs[p], base_dtype, rows, layer.rows[p], ranks));
    stage.outputs.push_back({of_lora(layer.outputs[p]), base_dtype, rows, layer.rows[p]});
  }
  // The rows of the base, and of what they become.
  const auto rows_of = [=](int tp_rank, Use use) {
    const bool is_base = use == Use::input;
    LocalBuffer y{is_base ? layer.buffer : of_lora(layer.buffer), use, base_dtype, tokens, 0};
    const std::vector<Shard> own = layer.own(tp_rank);
    for (std::size_t p = 0; p < layer.parts.size(); ++p) {
      Piece piece{is_base ? layer.outputs[p] : of_lora(layer.outputs[p]), own[p], y.cols};
      if (partial) piece.rows = Shard{tp_rank * tokens, tokens};
      y.pieces.push_back(piece);
      y.cols += own[p].size;
    }
    if (!partial) y.cols += c.options.at("pad");
    return y;
  };
  stage.buffers = [=](int tp_rank) {
    std::vector<LocalBuffer> all = batch_buffers(c, v, rules);
    for (LocalBuffer& b : slot_buffers(c, layer, rules, Use::input, tp_rank)) {
      if (b.name != "lora_a" || again) all.push_back(std::move(b));
    }
    all.push_back(h_buffer(c, layer, Use::input, tp_rank));
    if (again) {
      for (LocalBuffer& b : shrink_buffers(c, layer, tp_rank)) all.push_back(std::move(b));
      LocalBuffer h = h_buffer(c, layer, Use::workspace, tp_rank);
      h.name = kShrunkAgain;
      h.pieces.clear();
      all.push_back(h);
    }
    all.push_back(rows_of(tp_rank, Use::input));
    all.push_back(rows_of(tp_rank, Use::output));
    return all;
  };
  stage.run = [=](RankRun& run) {
    const int tp_rank = run.group.tp_rank();
    const LoraLayer of_rank = lora_layer(c, layer, tp_rank);
    const bool is_fused = adapters(c, layer).front().is_fused;
    const std::vector<std::int64_t> b_rows = lora_b_parts(of_rank, rules, is_fused);
    LoraColumns columns{.parts = std::int32_t(layer.parts.size())};
    std::int64_t width = 0;
    for (std::size_t p = 0; p < layer.parts.size(); ++p) {
      columns.rows[p] = b_rows[p];
      // A share of the columns of a row-parallel layer begins within them.
      columns.at[p] = width + (layer.cuts_columns ? of_rank.base.own[p].offset : 0);
      width += layer.own(tp_rank)[p].size;
    }
    const bool bias = adds_bias(c, layer, rules, tp_rank), in_place = c.options.at("in_place") == 1;
    with_types(c, [&]<typename T, typename H>(T, H) {
      const auto expand = [&]<typename Out>(Out) {
        LoraIntermediate<const H> h =
            intermediate<const H>(run.view<H>(again ? kShrunkAgain : "lora_h"), c, layer);
        h.part_stride =
            rules.lora.slice_stride(h.part_stride, columns.parts * tokens * h.cols, columns.parts);
        const View<Out> base = run.view<Out>(layer.buffer).columns(0, width),
                        y = run.view<Out>(of_lora(layer.buffer)).columns(0, width);
        if (in_place) store_sums<Out, Out>(base, y, run.stream);
        // Nothing stands between the two, and so lora_expand begins while the other runs.
        if (again) run_shrink<T, H>(run, c, layer, rules, kShrunkAgain);
        lora_expand<T, H, Out>(
            h, first_rows<const T>(run.view<T>("lora_b"), slots(c) * lora_b_rows(of_rank, rules)),
            bias ? View<const T>(run.view<T>("lora_bias")) : View<const T>{},
            batch_of(run, c, layer), columns, in_place ? y : base, y, run.stream,
            again && collective_of(c, layer, rules) == ShrinkCollective::none ? LoraBefore::rest
                                                                              : LoraBefore::all);
      };
      if (base_dtype == c.dtype) {
        expand(T{});
      } else {
        expand(float{});
      }
    });
  };
  stage.cost = [=](int tp_rank) -> Cost {
    double rows = 0;
    for (const Shard& own : layer.own(tp_rank)) rows += double(own.size);
    const double ranks = double(max_rank(c, layer));
    return linear::cost(c, 2 * double(tokens) * rows + double(slots(c)) * ranks * rows,
                        double(tokens) * ranks * rows);
  };
  stage.reference = [=](const WholeInputs& in) {
    return expand_reference(c, layer, base_dtype, v, in);
  };
  return stage;
}

}  // namespace tp::lora
