#pragma once
// What the fuzzer knows of an operator: its keys, laws and mutants, and how to run one case of it.
// properties/<op>.cc fills one in; CMake's OPERATORS list says which exist.

#include <chrono>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "harness/base/case.h"
#include "harness/base/sharding_rules.h"
#include "harness/base/verdict.h"

namespace tp {

struct Model;  // harness/base/models.h
class World;   // the processes of this job (harness/group/world.h)

// An operator with one upstream mistake put back. Its id is <bug-zoo id>:<variant>.
struct Mutant {
  std::string id;
  std::string what;      // the mistake, in one sentence
  std::string upstream;  // repository#number
  ShardingRules rules;
  // Whether the mistake decides anything differently from the right rules in this case; empty: it
  // does in every case.
  std::function<bool(const Case&)> decides = {};

  bool shows(const Case& c) const { return !decides || decides(c); }
};

struct Law {
  std::string name;  // the word of the case line's key `law`
  std::string what;
};

// Where the seconds of a case went on the driving process, of all of its runs.
struct CaseTimes {
  double data = 0;        // making the inputs
  double kernels = 0;     // passes over the ranks: copies, kernels, collectives, guards
  double reference = 0;   // on one rank, with its budgets
  double comparison = 0;  // of the gathered outputs with that, replicas and digest included
};

struct RunOptions {
  const Mutant* mutant = nullptr;
  std::chrono::milliseconds deadline{0};  // 0: none
  // false: memory is neither poisoned nor guarded, so that compute-sanitizer sees it as it is. One
  // run instead of two, and what depends on poison or guards is not checked.
  bool poison = true;
  // One kernel at a time, so that the one that breaks a device is known.
  bool serial = false;
  std::function<void(const std::string&)> trace;  // if set: a line for each value and collective
  CaseTimes* times = nullptr;                     // if set: added to
};

struct CheckpointCases {
  std::vector<Case> cases;  // legal ones
  std::string left_out;     // why another one is none, in one sentence; empty: there are no others
};

struct Operator {
  std::string name;
  std::string what;
  std::vector<Key> keys;
  std::vector<Law> laws;
  std::vector<Mutant> mutants;
  // Why a case whose keys are all in range is illegal (an impossible shape); nothing if it is
  // legal.
  std::function<std::optional<std::string>(const Case&)> refuse;
  // Multiply-adds of the reference, so that what is drawn takes milliseconds; empty: the elements
  // of the widest tensor say enough.
  std::function<double(const Case&)> work = {};
  // Takes the keys that a model's config decides, beyond the shape, at the case's tp_size; empty:
  // there are none.
  std::function<void(Case&, const Model&)> adopt = {};
  // Cases on the tensors of user_checkpoint(), each with the keys that the files decide; the others
  // are at their defaults. Empty: the operator reads no checkpoint.
  std::function<CheckpointCases(int tp_size)> checkpoint_cases = {};
  // The same on the modules of user_adapter(), for the shape of user_adapter_base(). Empty: the
  // operator runs no adapter, and is not drawn where there is one.
  std::function<CheckpointCases(int tp_size)> adapter_cases = {};
  // Whether the checkpoint's tensors are what they should be, in all layers, whatever it is that is
  // drawn. Throws BadInput naming file, tensor and numbers.
  std::function<void()> check_checkpoint = {};
  // Runs a legal case on all processes of the world and returns the same verdict on each of them.
  std::function<Verdict(World&, const Case&, const RunOptions&)> run;

  const Key* key(std::string_view name) const;
  // A case with every key at its default.
  Case blank() const;
};

// The registry. Operators are added once at start-up, before anything is looked up.
void add_operator(Operator op);
const std::vector<Operator>& operators();
// Throws BadInput naming the operators there are.
const Operator& find_operator(std::string_view name);

struct FoundMutant {
  const Operator* op;
  const Mutant* mutant;
};
// Every operator that has a mutant of this id. Throws BadInput if none has.
std::vector<FoundMutant> find_mutant(std::string_view id);

}  // namespace tp
