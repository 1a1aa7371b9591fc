#pragma once
// Real models: the presets that travel inside the binary (models.json), and a user's own
// config.json.

#include <optional>
#include <string>
#include <vector>

#include "harness/base/dtype.h"
#include "harness/base/quantization_config.h"
#include "harness/base/shape.h"

namespace tp {

struct Model {
  std::string id;  // "MiniMaxAI/MiniMax-M2.5", or the path of a config.json
  ModelShape shape;
  // What norms q and k: none, per_head, full_width, weightless_after_rope, mla_latent; empty: not
  // known.
  std::string qk_norm;
  bool qk_norm_one_plus = false;  // the norm multiplies with 1 + w
  double eps = 0;                 // of the model's norms; 0: not known
  int rotary_dim = 0;             // columns of a head that rotate; 0: all
  int window = 0;                 // of the layers that have one; 0: none has
  bool attention_bias = false;    // of the projections
  // Width between up and down projection: of the dense layers, or of an expert where there are
  // none; 0: not known.
  int intermediate_size = 0;
  std::optional<DType> dtype;  // of what is not quantised; nothing: not known, or not one of ours
  Quantization quantization;   // presets: none
  bool sinks = false;          // a logit for each query head
  // Multi-head latent attention: k and v are expanded from one latent a token. The shape is that of
  // the expanded heads; the latent itself is on every rank.
  bool mla = false;
  // The directory, if the model was found as one that has safetensors, too; else empty.
  std::string checkpoint;
  std::string note;    // what is not as in other models, in one sentence; empty: nothing
  std::string source;  // repository@commit:path the numbers were read from, or the user's file
};

// The presets, in the order of models.json.
const std::vector<Model>& models();

// A preset, by its id, by the part of the id after '/', or by a beginning of either that only one
// preset has; upper and lower case are the same. Or the config.json of `name`: a .json file, or a
// directory with a config.json, which sets `checkpoint` where it has safetensors (*.safetensors or
// model.safetensors.index.json). Throws BadInput with the candidates or near misses.
Model find_model(const std::string& name);

// Throws BadInput where the model's attention is quantised in a way that is not known
// (Quantization::refusal): it is not to be run as if it were not quantised.
void check_known(const Model& model);

// The model of a directory that has a config.json and safetensors. Throws BadInput where it has not
// both, or not check_known().
Model checkpoint_model(const std::string& directory);

}  // namespace tp
