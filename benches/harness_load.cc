// From a checkpoint's files to the ranks' memory: half a gigabyte of linears, on all ranks of a
// process. Beside it what the bytes take without a loader: a copy of each of them, from the same
// mapped files.

#include <benchmark/benchmark.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <memory>

#include "harness/base/safetensors.h"
#include "harness/device/buffer.h"
#include "harness/device/scheduler.h"
#include "kernels/weight_loader.h"

namespace tp {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kTpSize = 8;
constexpr std::int64_t kHidden = 4096, kHeads = 32, kKvHeads = 8, kHeadDim = 128, kWidth = 6144;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

// Rows of a rank of a column-parallel matrix, columns of a row-parallel one.
Shard part(std::int64_t all, int rank) { return {all / kTpSize * rank, all / kTpSize}; }

// The linears of a layer, as a rank loads them.
std::vector<StoredLinear> layer_of(const QuantFormat& format, const std::string& prefix, int rank) {
  const auto column_parallel = [&](std::vector<std::string> names, std::vector<std::int64_t> rows) {
    StoredLinear layer{.format = format, .rows = {rows, 1}, .in_features = kHidden};
    for (const std::string& name : names) layer.prefixes.push_back(prefix + name);
    for (const std::int64_t all : rows) {
      layer.taken.push_back(part(all, rank));
      layer.first.push_back(layer.local_rows);
      layer.local_rows += layer.taken.back().size;
    }
    layer.columns = {{0, kHidden}, kTpSize, rank};
    return layer;
  };
  const auto row_parallel = [&](const char* name, std::int64_t in) {
    return StoredLinear{.format = format,
                        .prefixes = {prefix + name},
                        .rows = {{kHidden}, 1},
                        .taken = {{0, kHidden}},
                        .first = {0},
                        .local_rows = kHidden,
                        .in_features = in,
                        .columns = {part(in, rank), kTpSize, rank}};
  };
  const std::int64_t kv = kKvHeads * kHeadDim;
  return {column_parallel({"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
                          {kHeads * kHeadDim, kv, kv}),
          row_parallel("self_attn.o_proj", kHeads * kHeadDim),
          column_parallel({"mlp.gate_proj", "mlp.up_proj"}, {kWidth, kWidth}),
          row_parallel("mlp.down_proj", kWidth)};
}

// Of some 120 MB each, or twice that.
int layers(const QuantFormat& format) { return format.scheme == Scheme::none ? 2 : 4; }

std::string prefix_of(int layer) { return "model.layers." + std::to_string(layer) + "."; }

// Files in the folder for temporary ones, for as long as it lives: one a layer.
class Files {
 public:
  explicit Files(const QuantFormat& format)
      : folder_(std::filesystem::temp_directory_path() /
                ("tpcheck_load_" + std::to_string(Clock::now().time_since_epoch().count()))) {
    std::filesystem::create_directory(folder_);
    const bool blocks = format.scheme == Scheme::fp8_block;
    const std::int64_t element = blocks ? 1 : 2;
    const std::vector<float> scales(std::size_t(kWidth * kHidden / 128 / 128), 0.5f);
    const std::vector<std::byte> codes(std::size_t(kWidth * kHidden * element), std::byte{0x38});
    std::vector<std::string> paths;
    for (int i = 0; i < layers(format); ++i) {
      std::vector<StoredTensor> tensors;
      for (const StoredLinear& linear : layer_of(format, prefix_of(i), 0)) {
        for (std::size_t m = 0; m < linear.prefixes.size(); ++m) {
          const std::int64_t rows = linear.rows.parts[m], cols = linear.in_features;
          tensors.push_back({linear.prefixes[m] + ".weight",
                             blocks ? "F8_E4M3" : "BF16",
                             {rows, cols},
                             codes.data(),
                             std::size_t(rows * cols * element)});
          bytes_ += double(tensors.back().bytes);
          if (!blocks) continue;
          tensors.push_back({linear.prefixes[m] + ".weight_scale_inv",
                             "F32",
                             {rows / 128, cols / 128},
                             reinterpret_cast<const std::byte*>(scales.data()),
                             std::size_t(rows / 128 * (cols / 128) * 4)});
        }
      }
      paths.push_back((folder_ / (std::to_string(i) + ".safetensors")).string());
      write_safetensors(paths.back(), tensors);
    }
    checkpoint_ = std::make_unique<Checkpoint>(paths);
  }
  ~Files() {
    checkpoint_.reset();
    std::error_code ignored;
    std::filesystem::remove_all(folder_, ignored);
  }
  Files(const Files&) = delete;
  Files& operator=(const Files&) = delete;

  const Checkpoint& checkpoint() const { return *checkpoint_; }
  double bytes() const { return bytes_; }

 private:
  std::filesystem::path folder_;
  std::unique_ptr<Checkpoint> checkpoint_;
  double bytes_ = 0;
};

// What a rank has of a linear; memory that is there before anything is timed.
struct Loaded {
  StoredLinear linear;
  Buffer weight, scales;
};

std::vector<Loaded> rooms_of(const QuantFormat& format, int rank) {
  std::vector<Loaded> all;
  const std::int64_t element = format.scheme == Scheme::fp8_block ? 1 : 2;
  for (int i = 0; i < layers(format); ++i) {
    for (StoredLinear& linear : layer_of(format, prefix_of(i), rank)) {
      const std::int64_t rows = linear.local_rows, cols = linear.columns.own.size,
                         groups = groups_touched(linear.columns, 128, sharding_rules());
      all.push_back({std::move(linear), Buffer("weight", std::size_t(rows * cols * element), 0xFF),
                     Buffer("scales", std::size_t(rows * groups * 4), 0xFF)});
    }
  }
  return all;
}

void load(const Checkpoint& checkpoint, const Loaded& room, Stream& stream) {
  const StoredLinear& linear = room.linear;
  const std::int64_t rows = linear.local_rows, cols = linear.columns.own.size;
  const WeightLoader loader(checkpoint, linear, sharding_rules(), stream);
  if (linear.format.scheme == Scheme::none) {
    loader.weight(room.weight.as<bf16>(rows, cols));
    return;
  }
  loader.weight(room.weight.as<e4m3>(rows, cols));
  loader.row_scales(
      room.scales.as<float>(rows, groups_touched(linear.columns, 128, sharding_rules())));
}

void load_all(benchmark::State& state, QuantFormat format) {
  const Files files(format);
  double seconds = 0;
  std::string wrong;
  for (auto _ : state) {
    Scheduler scheduler({.seed = 1});
    std::vector<std::vector<Loaded>> rooms;
    for (int rank = 0; rank < kTpSize; ++rank) rooms.push_back(rooms_of(format, rank));
    for (int rank = 0; rank < kTpSize; ++rank) {
      scheduler.add_rank(rank, [&, rank](Stream& stream) {
        for (const Loaded& room : rooms[std::size_t(rank)]) load(files.checkpoint(), room, stream);
        stream.synchronize();
      });
    }
    const auto begin = Clock::now();
    const Report report = scheduler.run();
    const double took = seconds_since(begin);
    if (report.fault) {
      state.SkipWithError(report.fault->what.c_str());
      return;
    }
    seconds += took;
    state.SetIterationTime(took);
  }
  // The same bytes, into memory that is there as well.
  std::vector<std::byte> room(std::size_t(kWidth * kHidden * 2), std::byte{1});
  double copying = 0;
  for (int repeat = 0; repeat < 3; ++repeat) {
    const auto begin = Clock::now();
    for (const Safetensors& file : files.checkpoint().files()) {
      for (const StoredTensor& t : file.tensors()) std::memcpy(room.data(), t.data, t.bytes);
      benchmark::ClobberMemory();
    }
    copying += seconds_since(begin) / 3;
  }
  state.SetBytesProcessed(std::int64_t(files.bytes()) * state.iterations());
  state.counters["memcpy_ratio"] = seconds / double(state.iterations()) / copying;
}
BENCHMARK_CAPTURE(load_all, bf16, {})
    ->Name("load/bf16")
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(load_all, fp8_block,
                  {.scheme = Scheme::fp8_block,
                   .dialect = Dialect::native,
                   .activations = Activations::token_groups})
    ->Name("load/fp8_block")
    ->UseManualTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace tp
