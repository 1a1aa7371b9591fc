#pragma once
// From a checkpoint to one rank's weights, biases and scales, in device memory: copied straight
// from the mapped file, only the rows and columns that the rank has. It is here, beside the
// kernels, because it is tested as they are: most mistakes of tensor parallelism sit between the
// file and the first kernel.

#include <cstdint>
#include <string>
#include <vector>

#include "harness/base/checkpoint.h"
#include "harness/base/quantization.h"
#include "harness/base/sharding_rules.h"
#include "harness/base/tensor.h"
#include "harness/device/stream.h"

namespace tp {

// A linear layer of a checkpoint, and what a rank takes of it.
struct StoredLinear {
  QuantFormat format;
  // The prefixes of its tensors ("model.layers.0.self_attn.qkv_proj"): of one that all matrices are
  // fused in, or of one for each matrix.
  std::vector<std::string> prefixes;
  FusedRows rows;                 // of the matrices; the stripes count where they are fused
  std::vector<Shard> taken;       // rows of each matrix that the rank has
  std::vector<Shard> bias_taken;  // as many elements of each bias
  // Where they begin in the rank's weight, of so many rows. The rows of no matrix are zeros.
  std::vector<std::int64_t> first;
  std::int64_t local_rows = 0;
  std::int64_t in_features = 0;
  LocalColumns columns;    // of the input; in an act-order row-parallel layer, too
  bool act_order = false;  // gptq: the groups of the columns are anywhere

  bool is_fused() const { return prefixes.size() == 1 && rows.parts.size() > 1; }
};

// How the rows of the stored tensor `tensor` (an index of prefixes) are those of matrices: of all
// of them, or of its own one.
FusedRows stored_rows(const StoredLinear& layer, std::size_t tensor);
// Row `row` of a matrix, of the rows `taken`, as the rank asks for it.
LocalRow local_row(const StoredLinear& layer, std::size_t matrix, std::int64_t row, Shard taken);
// The rows of a rank's weight that are of no matrix.
std::vector<Shard> padding_of(const StoredLinear& layer);

// Everything is a copy on the stream, which reads the checkpoint when it gets there: that must
// outlive the stream's work. Throws BadInput naming file, tensor and numbers where the checkpoint
// lacks a tensor, has it in another type or shape, has a scale that is none (zero, negative, not
// finite) or zero points that are not symmetric; Fault(BadLaunch) where the rank's memory does not
// fit what it takes, Fault(OutOfBounds) where it takes rows or columns that a tensor does not have.
class WeightLoader {
 public:
  WeightLoader(const Checkpoint& checkpoint, const StoredLinear& layer, const ShardingRules& rules,
               Stream& stream);

  // [rows, columns]; of nvfp4 [rows, columns / 2].
  template <typename T>
  void weight(View<T> out) const;
  // gptq's, as it is stored: [columns / 8, rows].
  void packed_columns(View<std::int32_t> out) const;
  // [1, rows].
  template <typename T>
  void bias(View<T> out) const;
  // fp8_channel and fp8_block: [rows, 1 or the blocks that the rank's columns touch]: each row has
  // the scales of its block.
  void row_scales(View<float> out) const;
  // nvfp4: [rows, the groups of 16 that the rank's columns touch].
  void group_scales(View<e4m3> out) const;
  // gptq: [the groups that the rank loads, rows], and for each column [1, columns] which of them.
  void group_scales(View<f16> out) const;
  void groups(View<std::int32_t> out) const;
  // [1, matrices]: the scale of each as a factor. Of fp8_tensor its own, of nvfp4 the global one.
  void slots(View<float> out) const;
  // [1, matrices]: the same for activations.
  void input_slots(View<float> out) const;

 private:
  // Rows of the rank's weight that follow each other in a stored tensor.
  struct Run {
    std::size_t tensor;
    std::int64_t stored, local, size;
  };
  std::string name(std::size_t tensor, const std::string& suffix) const;
  std::vector<Run> runs(const std::vector<Shard>& taken) const;
  template <typename Shape, typename F>
  void for_each_run(const std::vector<Run>& runs, const std::string& suffix, DType type,
                    Shape shape, F f) const;
  void copy(void* to, const std::byte* from, std::int64_t bytes) const;
  void copy_block(const StoredTensor& from, std::int64_t rows, Shard columns, std::int64_t element,
                  const Run& run, std::byte* to, std::int64_t stride) const;
  void require_rows(std::int64_t rows, const char* what) const;
  void zero_rows(void* data, std::int64_t row_bytes, std::int64_t stride) const;
  void zero_columns(void* data, std::int64_t rows, std::int64_t row_stride,
                    std::int64_t element) const;
  void check_zeros(Shard loaded, std::int64_t groups) const;
  void fill_slots(const std::string& suffix, bool is_inverse, View<float> out) const;

  const Checkpoint& checkpoint_;
  const StoredLinear layer_;
  const ShardingRules rules_;
  Stream& stream_;
  TensorNames names_;
  std::vector<Run> runs_;
};

// Elements `taken` of a stored vector, such as the weight of a norm, to out [1, as many]; the copy
// is as those of WeightLoader, and so are the errors.
template <typename T>
void load_vector(const Checkpoint& checkpoint, const std::string& name, Shard taken, View<T> out,
                 Stream& stream);

// The blocks of `group` columns that a rank's columns touch: how many scales a row of it has.
std::int64_t groups_touched(const LocalColumns& columns, std::int64_t group,
                            const ShardingRules& rules);

}  // namespace tp
