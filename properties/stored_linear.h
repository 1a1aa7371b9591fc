#pragma once
// Linear layers whose weights come from a checkpoint, quantised or not: the stages before the
// product (load, prepare, quantise), what the product's own stage finds, and its reference.
//
//   load      a file's tensors become each rank's weights, scales, slots of scales and biases,
//             which are compared themselves, rank by rank and bit by bit
//   prepare   what engines make of these before the first call: one scale of several slots,
//             weights quantised anew to it, factors of rows, packed columns turned into rows
//   quantise  activations become codes and scales
//
// Of these functions, stored_keys.cc has those about keys, stored_checkpoint.cc those about the
// user's checkpoint, stored_differs.cc differs(), and stored_linear.cc the others.

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "harness/base/quantization.h"
#include "properties/file_linears.h"
#include "properties/linear.h"
#include "properties/run/stage.h"

namespace tp::stored_linear {

// One linear layer, or several that are fused on each rank.
struct Layer {
  std::string prefix;               // of its tensors' names: "model.layers.0.self_attn."
  std::vector<std::string> parts;   // "q_proj", "k_proj", "v_proj"
  std::vector<std::string> biases;  // what the product's stage calls their biases
  std::string fused;                // "qkv_proj"; empty: no checkpoint stores them as one
  LinearKind kind;                  // what it is in the user's checkpoint
  std::vector<std::int64_t> rows;   // of each part
  std::int64_t stripes = 1;         // of the layout `striped`
  std::int64_t in_features = 0;
  // Where each part begins in a rank's weight, and how many rows that has. Empty: one below the
  // other, without padding.
  std::vector<std::int64_t> first = {};
  std::int64_t local_rows = 0;
  // The rows of each part that a rank loads under these rules.
  std::function<std::vector<Shard>(const ShardingRules&, int tp_rank)> taken;
  // The same of the biases; empty: as the rows.
  std::function<std::vector<Shard>(const ShardingRules&, int tp_rank)> bias_taken = {};
  // Row-parallel: the columns of the input, and of the weight. Empty: all of them.
  std::function<Shard(const ShardingRules&, int tp_rank)> columns = {};

  bool cuts_columns() const { return bool(columns); }
};

// The keys `dialect`, `activations`, `act_order`, `block`, `files`, `layer`, `quant` and `weights`,
// of layers that may be fused on disk or not.
std::vector<Key> keys(bool can_be_fused);
// Says of all keys of an operator which of them the user's checkpoint decides (Key::of_checkpoint):
// those, and the shape's.
void mark_keys_of_checkpoint(std::vector<Key>& keys);
// Whether the weights come from a checkpoint (weights=...), or are just there.
bool is_loaded(const Case& c);
bool is_quantised(const Case& c);
// Whether ranks have a share of the tokens each, and gather what they quantised.
bool is_gathered(const Case& c);
QuantFormat format_of(const Case& c);
// Why the keys do not fit each other or the layer, in one sentence; nothing if they do.
std::optional<std::string> refuse(const Case& c, const Layer& layer);

// load, prepare and quantise, as far as the case has them. The input of the layer is a tensor `x`,
// which `x` describes: one of these stages' inputs where activations are quantised.
std::vector<Stage> stages(const Case& c, const Layer& layer, const TensorSpec& x,
                          const std::vector<TensorSpec>& biases, const ShardingRules& rules,
                          const Variation& variation);

// What the stage of the product reads, beside what only it knows: x, or its codes, and the weight.
std::vector<TensorSpec> product_inputs(const Case& c, const Layer& layer, const TensorSpec& x);
std::vector<LocalBuffer> product_buffers(const Case& c, const Layer& layer, int tp_rank);
std::vector<TensorSpec> bias_inputs(const Case& c, const Layer& layer);
LocalBuffer bias_buffer(const Case& c, const Layer& layer, int tp_rank);
// out [tokens, rows of the rank] = x weight^T + bias, of quantised weights.
template <typename T, typename Out>
void product(RankRun& run, const Case& c, const Layer& layer, View<const T> bias, View<Out> out,
             const ShardingRules& rules);

// The reference of what a rank with columns `cols` of the input makes of part `part`; all ranks of
// a layer that does not cut columns make the same. `is_last`: see scaled_product.
Budget product_reference(const Case& c, const Layer& layer, const WholeInputs& in, std::size_t part,
                         int tp_rank, const Matrix* bias, bool is_last);
// Whether the product's bits may be the executor's own: where the library makes it
// (Stage::own_bits). `depth`: columns of the input that a rank has.
// has_bias: on every rank, and so it is no library that makes the product.
bool product_has_own_bits(const Case& c, std::int64_t depth, bool has_bias);
// What a rank's product must read and write at least, in bytes of its weight.
double weight_bytes(const Case& c, const Layer& layer, int tp_rank);

// linear::work, and what comes before the product. `activations`: elements of the input on all
// ranks together.
double work(const Case& c, double cols, std::int64_t depth, double activations);

// What of an operator is in the user's checkpoint.
struct OfCheckpoint {
  std::string op;
  std::vector<LinearKind> kinds;  // in the order of the words of its key `module`, if it has one
  Layer (*layer)(const Case&);
  // Sets the shape's keys at the case's tp_size, of a linear of this kind, `width` being that
  // between up and down projection. Says why it cannot be cut, in one sentence.
  std::optional<std::string> (*set_shape)(Case&, const ModelShape&, LinearKind, std::int64_t width);
};
// Operator::checkpoint_cases and Operator::check_checkpoint.
CheckpointCases checkpoint_cases(const OfCheckpoint& of, int tp_size);
void check_checkpoint(const OfCheckpoint& of);

// Whether rules decide anything differently from the right ones in what these stages do, or do
// anything different to these data.
bool differs(const Case& c, const Layer& layer, const TensorSpec& x, const DataRegime& regime,
             const ShardingRules& rules);

// Laws: as those of all operators, but weights are no tokens, and what ranks quantise for
// themselves has no twin on one rank.
LawRun law_tokens();
// The files of a checkpoint, and the tensors in them, in another order: the same bits.
LawRun law_files();
// What a law about the number of ranks must leave out: adds it to law.twin. `prefix`: what the
// layer's tensors are called with, in an operator that has several. `output`: of a layer that cuts
// columns, what its product makes. Scales that ranks make of their own columns are others on one
// rank, and so are the codes, and whatever is made of these.
LawRun without_local_scales(LawRun law, const std::string& prefix = "",
                            const std::string& output = "");

}  // namespace tp::stored_linear
