#pragma once
// What properties/<op>.cc says of an operator: a list of named stages. A stage says which global
// tensors it reads and writes, where the parts of them lie in a rank's buffers, what a rank runs,
// and what the reference makes of the same inputs. Everything else (data, poison, guards,
// gathering, judging) is common to all operators and lives beside this file.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "harness/base/case.h"
#include "harness/base/check.h"
#include "harness/base/checkpoint.h"
#include "harness/base/compare.h"
#include "harness/base/fill.h"
#include "harness/base/operator.h"
#include "harness/base/sharding_rules.h"
#include "harness/base/tensor.h"
#include "harness/device/buffer.h"
#include "harness/device/stream.h"
#include "harness/group/tp_group.h"

namespace tp {

enum class Use : std::uint8_t { input, output, workspace };

// Columns `cols` of a global tensor, found from column `at` on in a rank's buffer: of all rows, or
// of `rows` only, found from row `at_row` on: a column-parallel weight's rows, or the tokens of an
// output that is scattered.
struct Piece {
  std::string tensor;
  Shard cols;
  std::int64_t at = 0;
  std::optional<Shard> rows = std::nullopt;
  std::int64_t at_row = 0;
};

// A matrix in a rank's device memory. Columns that no piece covers are padding: poisoned, and
// nobody's.
struct LocalBuffer {
  std::string name;
  Use use = Use::input;
  DType dtype = DType::f32;
  std::int64_t rows = 1;
  std::int64_t cols = 1;
  std::vector<Piece> pieces = {};
  // Of an input that is no part of a global tensor: page tables, lengths. Exactly rows x cols
  // elements of dtype, or as many 32-bit integers where dtype is f32.
  std::vector<std::byte> content = {};
};

// A rank's own 32-bit integers (or floats) as an input; at least one, since buffers are not empty.
template <typename T>
LocalBuffer local_values(std::string name, const std::vector<T>& values) {
  static_assert(sizeof(T) == 4);
  TP_CHECK(!values.empty(), "an empty buffer: " + name);
  LocalBuffer buffer{.name = std::move(name), .cols = std::int64_t(values.size())};
  buffer.content.resize(values.size() * sizeof(T));
  std::memcpy(buffer.content.data(), values.data(), buffer.content.size());
  return buffer;
}

struct Resident {
  LocalBuffer local;
  Buffer buffer;
};

// What a stage calls a buffer is, in an operator made of several stages, another one: all of it, or
// the columns from `at` on of one that is `width` wide.
struct BufferAlias {
  std::string name;
  std::int64_t at = 0;
  std::int64_t width = 0;  // 0: all of it
};
using BufferAliases = std::map<std::string, BufferAlias>;

// What a rank has at hand when it runs a stage.
class RankRun {
 public:
  RankRun(TpGroup& group, Stream& stream, const std::map<std::string, Resident>& buffers,
          std::vector<const Checkpoint*> checkpoints)
      : group(group), stream(stream), buffers_(buffers), checkpoints_(std::move(checkpoints)) {}
  // The same, with some buffers called by other names.
  RankRun(const RankRun& other, const BufferAliases& aliases)
      : group(other.group),
        stream(other.stream),
        buffers_(other.buffers_),
        checkpoints_(other.checkpoints_),
        aliases_(&aliases) {}

  TpGroup& group;
  Stream& stream;

  // The stage's buffer of this name, with its padding.
  template <typename T>
  View<T> view(const std::string& name) const {
    const BufferAlias* alias = alias_of(name);
    const auto& [local, buffer] = buffers_.at(alias ? alias->name : name);
    TP_CHECK(local.dtype == dtype_of<T>::value, "view of another type: " + name);
    const View<T> whole = buffer.as<T>(local.rows, local.cols);
    return alias ? whole.columns(alias->at, local.cols - alias->at) : whole;
  }
  // What Stage::stored is stored in, by number. It outlives the stream's work.
  const Checkpoint& checkpoint(std::size_t which = 0) const { return *checkpoints_.at(which); }
  // What local_values() put there.
  const std::int32_t* integers(const std::string& name) const {
    const BufferAlias* alias = alias_of(name);
    return buffers_.at(alias ? alias->name : name).buffer.as<const std::int32_t>();
  }

 private:
  const BufferAlias* alias_of(const std::string& name) const {
    if (aliases_ == nullptr) return nullptr;
    const auto alias = aliases_->find(name);
    return alias == aliases_->end() ? nullptr : &alias->second;
  }

  const std::map<std::string, Resident>& buffers_;
  std::vector<const Checkpoint*> checkpoints_;
  const BufferAliases* aliases_ = nullptr;
};

// The whole input tensors of a stage, as the reference takes them. A tensor that nobody asks for (v
// of a q/k norm) is never made.
class WholeInputs {
 public:
  virtual ~WholeInputs() = default;
  virtual const Matrix& operator[](const std::string& name) const = 0;
};

// The least that a rank's kernels must do: each input read once, each output written once.
struct Cost {
  double bytes = 0;
  double flops = 0;         // outside matrix steps
  double matrix_flops = 0;  // in them
};

// An input tensor that ranks load from a file.
struct StoredInput {
  std::string tensor;
  std::vector<std::int64_t> shape;  // as many elements as the tensor
  int file = 0;                     // of the checkpoint
  std::string name = {};            // what the file calls it; empty: the tensor's own
  // Which one of several, that may have tensors of the same names: the base model's, an adapter's.
  int checkpoint = 0;
};

struct Stage {
  std::string name;
  std::vector<TensorSpec> inputs;   // global; filled from the case, or an earlier stage's outputs
  std::vector<TensorSpec> outputs;  // global; gathered from the ranks
  // The inputs that come as checkpoints, in the order in which their files hold them.
  std::vector<StoredInput> stored = {};
  // By number, those that have them already, and outlive the stage; null, or none of that number:
  // it is made of the inputs.
  std::vector<const Checkpoint*> checkpoints = {};
  std::function<std::vector<LocalBuffer>(int tp_rank)> buffers;
  std::function<void(RankRun&)> run;
  std::function<Cost(int tp_rank)> cost;
  // Its kernels call functions of the executor's own (exp, log, tanh, a library's products), whose
  // bits differ between a GPU and the emulator where the result is not exact.
  bool own_bits = false;
  // A library makes its products, each size in a way of its own: laws that change a size compare
  // what is not exact within budgets.
  bool bits_by_size = false;
  // Budgets of the outputs, in their order.
  std::function<std::vector<Budget>(const WholeInputs& inputs)> reference;
  // Names a mistake that this shape allows and that these data could not have shown; nothing if
  // they could have shown all. Not called for the adversarial kinds of data.
  std::function<std::optional<std::string>(const WholeInputs& inputs,
                                           const std::vector<Budget>& budgets)>
      blind_to;
};

// How a law changes the data of a case.
struct Variation {
  int scale_log2 = 0;   // activations times 2^k, and eps times 4^k
  int rotate_rows = 0;  // tokens in another order
  // A law that only the operator itself understands, and what it needs to know.
  std::string law = {};
  std::int64_t argument = 0;
};

// Where in the original run's output an element of the varied run lies.
struct Place {
  std::int64_t row = 0;
  std::int64_t col = 0;
};

// A metamorphic law, as the engine runs it: another case, or other data, and what must come out.
struct LawRun {
  Law law;
  std::function<std::pair<Case, Variation>(const Case&)> vary;
  // Bit-equal outputs for all data; otherwise where both are exact (rho is 0), and within the
  // varied case's own budget else.
  bool always_bitwise = true;
  bool keeps_sizes = false;  // of all products: those of a library keep their bits (bits_by_size)
  // The twin of an element of the varied run's output `tensor`; nothing: it has none. Empty: rows
  // rotated as the tokens were. Outputs that only one of the runs has are not compared.
  std::function<std::optional<Place>(const Case&, const Variation&, const TensorSpec& tensor,
                                     std::int64_t row, std::int64_t col)>
      twin = {};
  // The original's output that has the twins of output `tensor`. Empty: the one of the same name.
  std::function<std::string(const std::string& tensor)> counterpart = {};
  // Why the law has nothing to say of a case, in one sentence; empty: it has of every case.
  std::function<std::optional<std::string>(const Case&)> refuse = {};
};

struct OperatorSpec {
  std::string name;
  std::string what;
  std::vector<Key> keys;  // `law`, `poison`, `graph`, `delays` and, if a stage says what its data
                          // are blind to, `discriminate` are added
  std::vector<LawRun> laws;
  std::vector<Mutant> mutants;
  std::function<std::optional<std::string>(const Case&)> refuse;
  std::function<double(const Case&)> work = {};                       // see Operator
  std::function<void(Case&, const Model&)> adopt = {};                // see Operator
  std::function<CheckpointCases(int tp_size)> checkpoint_cases = {};  // see Operator
  std::function<CheckpointCases(int tp_size)> adapter_cases = {};     // see Operator
  std::function<void()> check_checkpoint = {};                        // see Operator
  std::function<DataRegime(const Case&, const Variation&)> regime;
  std::function<std::vector<Stage>(const Case&, const ShardingRules&, const Variation&)> stages;
};

// The operator for the registry: the spec with the common machinery around it.
Operator make_operator(OperatorSpec spec);

// Laws that many operators share.
LawRun law_tp1();     // one rank computes what tp_size ranks do
LawRun law_scale();   // x times 2^k with eps times 4^k changes nothing
LawRun law_tokens();  // tokens in another order are the same tokens

// Why rows x cols is too large to be a case; nothing if it is not.
std::optional<std::string> too_large(std::int64_t rows, std::int64_t cols);

// At least the columns of q, k and v on all ranks together, replicas counted.
std::int64_t widest_qkv(const Case& c);

// The key `pad` of operators whose rows may lie apart.
Key pad_key(const std::string& of_what);

}  // namespace tp
