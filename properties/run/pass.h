#pragma once
// One pass of a case over the ranks of this process: data into device memory, every stage on every
// rank, results out, and the memory oracles on the way.

#include <chrono>
#include <cstddef>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "harness/base/case.h"
#include "harness/base/checkpoint.h"
#include "harness/device/scheduler.h"
#include "harness/group/world.h"
#include "properties/run/image.h"
#include "properties/run/stage.h"

namespace tp {

struct PassOptions {
  // Nothing: memory is left as it is, and has no guards.
  std::optional<Poison> poison = Poison::large;
  // The kernels are recorded over other data first, and launched again over the case's (CUDA
  // graphs).
  bool graph = false;
  bool delays = false;  // seeded ones, before kernels
  bool serial = false;  // one kernel at a time
  bool timed = false;
  std::optional<std::chrono::steady_clock::time_point> deadline;
  std::function<void(const std::string&)> trace;
};

struct PassResult {
  std::optional<Fault> fault;
  std::uint64_t threads = 0;
  // Pieces of outputs, dense, in the order of local ranks, stages, buffers, pieces.
  std::vector<std::byte> outputs;
  std::map<int, DeviceTime> times;  // of each local rank, if the device could tell
  bool broken = false;              // this job cannot run another case: processes parted within an
                                    // exchange, or the device is lost
};

class MemoryFile;

// The filled input tensors of a case. Each block is made once, for all passes and all
// ranks of this process that ask for the very same one.
class InputData {
 public:
  // `whole`: the reference will ask for whole tensors here, so parts are cut out of those.
  explicit InputData(const DataRegime& regime, bool whole = false)
      : regime_(regime), whole_(whole) {}
  // These rows and columns, dense.
  const std::vector<std::byte>& block(const TensorSpec& tensor, Shard rows, Shard cols);
  // The checkpoints that a stage loads its weights from, by number, with these data; none if it
  // loads nothing. Made by the first call, which must come from the process's own stack.
  std::vector<const Checkpoint*> checkpoints(const Stage& stage);
  const DataRegime& regime() const { return regime_; }
  double seconds() const { return seconds_; }  // that it took to make them

 private:
  DataRegime regime_;
  bool whole_;
  using Block = std::tuple<std::string, std::int64_t, std::int64_t, std::int64_t, std::int64_t>;
  std::map<Block, std::vector<std::byte>> made_;
  // Their files, open: a path must not become another's while somebody may look at it again.
  std::vector<std::shared_ptr<MemoryFile>> files_;
  std::map<std::pair<std::string, int>, Checkpoint> checkpoints_;  // by stage and number
  double seconds_ = 0;

  const Checkpoint& made_checkpoint(const Stage& stage, int which);
};

// Every process of the world calls it; those without a rank of this case return at once.
PassResult run_pass(World& world, const Case& c, const std::vector<Stage>& stages, InputData& data,
                    const PassOptions& options);

// Which element byte `at` of PassResult::outputs belongs to: "tp_rank 1, y[0, 3]", in global
// coordinates.
std::string place_of(std::size_t at, const std::vector<Stage>& stages, Shard local_ranks);

// Bytes of one piece in `outputs`.
std::size_t piece_bytes(const LocalBuffer& buffer, const Piece& piece);

// The rows of the tensor that a piece is of.
Shard rows_of(const Stage& stage, const Piece& piece);

// The spec of a tensor a stage reads or writes.
const TensorSpec& tensor_of(const Stage& stage, const std::string& name);

}  // namespace tp
