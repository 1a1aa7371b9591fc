#pragma once
// Where a fuzz job looks: operators, sizes of the group, models. And what is legal there.

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "harness/base/models.h"
#include "harness/base/operator.h"

namespace tp {

// How the KV heads meet the ranks. Most bugs of the zoo live in one of these alone.
enum class Relation {
  single,
  below,
  equal,
  above
};  // tp_size = 1; else kv_heads below/equal/above it

// The part of a shape that must fit together, and so is drawn and shrunk together.
struct HeadTriple {
  int num_heads = 1;
  int num_kv_heads = 1;
  int tp_size = 1;

  bool operator==(const HeadTriple&) const = default;
};
bool is_legal(const HeadTriple& t);
Relation relation_of(const HeadTriple& t);

// Whether the operator has the three keys of a HeadTriple.
bool has_heads(const Operator& op);
HeadTriple heads_of(const Case& c);
void set_heads(Case& c, const HeadTriple& t);

// What --adapter is told that has no base.
inline constexpr std::string_view kAdapterNeedsModel =
    "--adapter goes with one --model DIR, a folder with the config.json of the adapter's base";

struct Domain {
  std::vector<const Operator*> ops;
  std::vector<int> tp_sizes;  // ascending
  std::vector<Model> models;
  bool models_only = false;  // else half of the cases are random shapes
  std::string mutant;        // id; empty: none
  std::string checkpoint;    // of the one model that has one (Model::checkpoint); empty: none
  std::string adapter;       // the folder of one for the only model; empty: none
  // Of each of ops its cases on the tensors of the adapter, or else of the checkpoint, by tp_size;
  // empty: there are none.
  std::vector<std::map<int, std::vector<Case>>> on_checkpoint = {};
};

// Resolves names. Throws BadInput for unknown ones, for a mutant none of the operators has, where
// no model fits any tp_size, for a model in a quantisation that is not known, and for two
// checkpoints. With an adapter only operators that run one are in it; BadInput if others were asked
// for, or another number of models than one.
Domain make_domain(const std::vector<std::string>& ops, const std::vector<int>& tp_sizes,
                   const std::vector<std::string>& models, const std::string& mutant,
                   const std::string& adapter = "");

// Whether the case runs on tensors of the user's checkpoint or adapter.
bool on_checkpoint(const Case& c);

// The operator's cases on the tensors of user_adapter() or, where there is none, user_checkpoint().
CheckpointCases cases_on_files(const Operator& op, int tp_size);

// Adds them to the domain. Of operators that read checkpoints and have none it returns a sentence
// each. Throws BadInput where the tensors that they would read are not what they should be, and
// where nothing runs on the adapter.
std::vector<std::string> add_checkpoint_cases(Domain& domain);

// The operator's keys that a model decides at the case's tp_size, set from it; the others stay as
// they are.
void set_model(Case& c, const Model& model);

// One case for each model, tp_size at which the heads can be cut evenly, and operator (which varies
// fastest), all other keys being at their defaults. `refused` counts the pairs (model, tp_size)
// that the KV heads do not fit.
struct EachPair {
  std::vector<Case> cases;
  int legal = 0;
  int refused = 0;
};
EachPair each_pair(const Domain& domain);

}  // namespace tp
