#pragma once
// Real models: the presets that travel inside the binary (models.json), and a user's own
// config.json.

#include <string>
#include <string_view>
#include <vector>

#include "harness/base/shape.h"

namespace tp {

struct Model {
  std::string id;  // "MiniMaxAI/MiniMax-M2.5", or the path of a config.json
  ModelShape shape;
  // What norms q and k: none, per_head, full_width, weightless_after_rope, mla_latent; empty: not
  // known.
  std::string qk_norm;
  double eps = 0;  // of the model's norms; 0: not known
  // Multi-head latent attention: k and v are expanded from one latent a token. The shape is that of
  // the expanded heads; the latent itself is on every rank.
  bool mla = false;
  std::string source;  // repository@commit:path the numbers were read from, or the user's file
};

// The presets, in the order of models.json.
const std::vector<Model>& models();

// A preset, by its id, by the part of the id after '/', or by a beginning of either that only one
// preset has; upper and lower case are the same. Or the config.json of `name`: a .json file, or a
// directory with a config.json. Throws BadInput with the candidates or near misses.
Model find_model(const std::string& name);

}  // namespace tp
