// The loader against checkpoints that are not what a layer expects, each refused with one sentence;
// and that a rank touches no byte of a file but its own.

#include "kernels/weight_loader.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "harness/base/check.h"
#include "harness/device/buffer.h"
#include "harness/device/testing.h"

namespace tp {
namespace {

namespace fs = std::filesystem;

// ---- Checkpoints.

struct Tensor {
  std::string dtype;
  std::vector<std::int64_t> shape;
  std::vector<std::byte> data;

  template <typename T>
  void set(std::int64_t i, T value) {
    std::memcpy(data.data() + i * std::int64_t(sizeof(T)), &value, sizeof(T));
  }
};

template <typename T>
Tensor all(const std::string& dtype, const std::vector<std::int64_t>& shape, T value) {
  std::int64_t elements = 1;
  for (const std::int64_t size : shape) elements *= size;
  Tensor t{dtype, shape, std::vector<std::byte>(std::size_t(elements) * sizeof(T))};
  for (std::int64_t i = 0; i < elements; ++i) t.set(i, value);
  return t;
}

using Tensors = std::map<std::string, Tensor>;

// Of e4m3 and of float.
constexpr std::uint8_t kOne = 0x38, kNan = 0x7F, kZero = 0x00, kMinusOne = 0xB8;
constexpr std::uint32_t kZeros = 0x77777777;

// What a checkpoint has of a matrix of so many rows and columns.
void add(Tensors& to, const QuantFormat& f, const std::string& prefix, std::int64_t rows,
         std::int64_t in) {
  const TensorNames names = tensor_names(f);
  const auto at = [&](const std::string& suffix) -> Tensor& { return to[prefix + "." + suffix]; };
  const auto ceil_div = [](std::int64_t a, std::int64_t b) { return (a + b - 1) / b; };
  switch (f.scheme) {
    case Scheme::none:
      at(names.weight) = all("BF16", {rows, in}, from_float<bf16>(1));
      break;
    case Scheme::fp8_tensor:
      at(names.weight) = all("F8_E4M3", {rows, in}, kOne);
      at(names.scale) = all("F32", {1}, 0.5f);
      break;
    case Scheme::fp8_channel:
      at(names.weight) = all("F8_E4M3", {rows, in}, kOne);
      at(names.scale) = all("F32", {rows, 1}, 0.5f);
      break;
    case Scheme::fp8_block:
      at(names.weight) = all("F8_E4M3", {rows, in}, kOne);
      at(names.scale) =
          all("F32", {ceil_div(rows, f.block_rows), ceil_div(in, f.block_cols)}, 0.5f);
      break;
    case Scheme::nvfp4:
      at(names.weight) = all("U8", {rows, in / 2}, std::uint8_t{0x22});
      at(names.scale) = all("F8_E4M3", {rows, in / 16}, kOne);
      at(names.global_scale) = all("F32", {}, 2.0f);
      break;
    case Scheme::gptq: {
      const std::int64_t groups = ceil_div(in, f.block_cols);
      at(names.weight) = all("I32", {in / 8, rows}, std::uint32_t{0x99999999});
      at(names.scale) = all("F16", {groups, rows}, from_float<f16>(0.5f));
      at(names.zeros) = all("I32", {groups, ceil_div(rows, 8)}, kZeros);
      Tensor& order = at(names.group_of_column) = all("I32", {in}, std::int32_t{0});
      for (std::int64_t k = 0; k < in; ++k) order.set(k, std::int32_t(k / f.block_cols));
      break;
    }
  }
  if (f.activations == Activations::fixed) at(names.input_scale) = all("F32", {1, 1}, 0.25f);
}

class File {
 public:
  explicit File(const Tensors& tensors)
      : path_((fs::path(testing::TempDir()) / fmt::format("weight_loader.{}", getpid())).string()) {
    std::vector<StoredTensor> stored;
    for (const auto& [name, t] : tensors)
      stored.push_back({name, t.dtype, t.shape, t.data.data(), t.data.size()});
    write_safetensors(path_, stored);
  }
  ~File() { fs::remove(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// ---- Layers.

// Matrices of `rows` rows each, cut by rows. Stored matrix by matrix, or fused one below the other.
StoredLinear cut_by_rows(const QuantFormat& f, std::vector<std::string> prefixes,
                         std::vector<std::int64_t> rows, std::int64_t in, int tp_size,
                         int tp_rank) {
  StoredLinear layer{.format = f,
                     .prefixes = std::move(prefixes),
                     .rows = {rows},
                     .in_features = in,
                     .columns = {{0, in}, tp_size, tp_rank}};
  for (const std::int64_t all_rows : rows) {
    const std::int64_t own = all_rows / tp_size;
    layer.taken.push_back({tp_rank * own, own});
    layer.first.push_back(layer.local_rows);
    layer.local_rows += own;
  }
  layer.bias_taken = layer.taken;
  return layer;
}

StoredLinear cut_by_columns(const QuantFormat& f, const std::string& prefix, std::int64_t rows,
                            std::int64_t in, int tp_size, int tp_rank) {
  StoredLinear layer = cut_by_rows(f, {prefix}, {rows}, in, 1, 0);
  const std::int64_t own = in / tp_size;
  layer.columns = {{tp_rank * own, own}, tp_size, tp_rank};
  return layer;
}

// Everything that the format has of the layer, as a rank loads it. The weight's bytes come back.
std::vector<std::byte> load(const Checkpoint& checkpoint, const StoredLinear& layer,
                            const ShardingRules& rules, Stream& stream) {
  const WeightLoader loader(checkpoint, layer, rules, stream);
  const std::int64_t rows = layer.local_rows, cols = layer.columns.own.size,
                     slots = std::int64_t(layer.rows.parts.size());
  const QuantFormat& f = layer.format;
  std::vector<Buffer> memory;
  const auto room = [&]<typename T>(T, std::int64_t height, std::int64_t width) -> View<T> {
    memory.emplace_back("room", std::size_t(height * width) * sizeof(T), std::uint8_t{0xFF});
    return memory.back().as<T>(height, width);
  };
  switch (f.scheme) {
    case Scheme::none:
      loader.weight(room(bf16{}, rows, cols));
      break;
    case Scheme::nvfp4:
      loader.weight(room(std::uint8_t{}, rows, (cols + 1) / 2));
      loader.group_scales(room(e4m3{}, rows, groups_touched(layer.columns, 16, sharding_rules())));
      break;
    case Scheme::gptq: {
      const std::int64_t groups =
          layer.act_order ? (layer.in_features + f.block_cols - 1) / f.block_cols
                          : groups_touched(layer.columns, f.block_cols, sharding_rules());
      loader.packed_columns(room(std::int32_t{}, cols / 8, rows));
      loader.group_scales(room(f16{}, groups, rows));
      loader.groups(room(std::int32_t{}, 1, cols));
      break;
    }
    default:
      loader.weight(room(e4m3{}, rows, cols));
      if (f.scheme == Scheme::fp8_channel) loader.row_scales(room(float{}, rows, 1));
      if (f.scheme == Scheme::fp8_block) {
        loader.row_scales(
            room(float{}, rows, groups_touched(layer.columns, f.block_cols, sharding_rules())));
      }
      break;
  }
  if (f.scheme == Scheme::fp8_tensor || f.scheme == Scheme::nvfp4)
    loader.slots(room(float{}, 1, slots));
  if (f.activations == Activations::fixed) loader.input_slots(room(float{}, 1, slots));
  return testing::download<std::byte>(stream, memory.front());
}

// What loading ends with: a sentence about the file without its path, a fault, or nothing.
std::string refusal(const Tensors& tensors, const StoredLinear& layer) {
  const File file(tensors);
  const Checkpoint checkpoint(file.path());
  std::string said;
  const Report report = testing::run_rank([&](Stream& stream) {
    try {
      load(checkpoint, layer, sharding_rules(), stream);
    } catch (const BadInput& e) {
      said = e.what();
    }
  });
  if (report.fault)
    return std::string(name_of(report.fault->outcome)) + ": " + report.fault->what;
  if (said.empty()) return "";
  EXPECT_EQ(said.find(file.path() + ": "), 0u) << said;
  return said.substr(std::min(said.size(), file.path().size() + 2));
}

constexpr QuantFormat kNone{}, kTensor{.scheme = Scheme::fp8_tensor},
    kFixed{.scheme = Scheme::fp8_tensor, .activations = Activations::fixed},
    kChannel{.scheme = Scheme::fp8_channel},
    kBlock{.scheme = Scheme::fp8_block, .block_rows = 16, .block_cols = 16},
    kNvfp4{.scheme = Scheme::nvfp4, .block_cols = 16},
    kGptq{.scheme = Scheme::gptq, .dialect = Dialect::native, .block_cols = 16};

// gate and up of 24 rows each, 32 columns, cut in two.
StoredLinear gate_up(const QuantFormat& f, int tp_rank) {
  return cut_by_rows(f, {"m.gate_proj", "m.up_proj"}, {24, 24}, 32, 2, tp_rank);
}
Tensors gate_up_tensors(const QuantFormat& f) {
  Tensors tensors;
  add(tensors, f, "m.gate_proj", 24, 32);
  add(tensors, f, "m.up_proj", 24, 32);
  return tensors;
}

TEST(WeightLoader, LoadsWhatIsThere) {
  for (const QuantFormat& f : {kNone, kTensor, kFixed, kChannel, kBlock, kNvfp4, kGptq}) {
    for (const int tp_rank : {0, 1})
      EXPECT_EQ(refusal(gate_up_tensors(f), gate_up(f, tp_rank)), "") << int(f.scheme);
  }
}

struct Bad {
  const char* what;
  QuantFormat format;
  std::function<void(Tensors&)> change;
  const char* sentence;
};

template <typename T>
std::function<void(Tensors&)> with(const char* name, std::int64_t i, T value) {
  return [=](Tensors& all) { all.at(name).set(i, value); };
}
std::function<void(Tensors&)> without(const char* name) {
  return [=](Tensors& all) { all.erase(name); };
}
std::function<void(Tensors&)> instead(const char* name, const Tensor& other) {
  return [=](Tensors& all) { all.at(name) = other; };
}

const float kInfinity = std::numeric_limits<float>::infinity(), kNoNumber = std::nanf("");

const Bad kBad[] = {
    {"no weight", kNone, without("m.up_proj.weight"), ""},
    {"no scale", kTensor, without("m.up_proj.weight_scale"), ""},
    {"no scale of activations", kFixed, without("m.gate_proj.input_scale"), ""},
    {"no zero points", kGptq, without("m.up_proj.qzeros"), ""},
    {"no order of columns", kGptq, without("m.gate_proj.g_idx"), ""},
    {"another type", kNone,
     instead("m.gate_proj.weight", all("F16", {24, 32}, from_float<f16>(1))), ""},
    {"another type of scales", kBlock,
     instead("m.gate_proj.weight_scale", all("BF16", {2, 2}, from_float<bf16>(1))), ""},
    {"a transposed weight", kNone,
     instead("m.up_proj.weight", all("BF16", {32, 24}, from_float<bf16>(1))), ""},
    {"scales of blocks of 128", kBlock,
     instead("m.up_proj.weight_scale", all("F32", {1, 1}, 0.5f)), ""},
    {"nvfp4 scales of groups of 32", kNvfp4,
     instead("m.up_proj.weight_scale", all("F8_E4M3", {24, 1}, kOne)), ""},
    {"a scale a row, where there is one", kTensor,
     instead("m.gate_proj.weight_scale", all("F32", {24, 1}, 0.5f)), ""},
    {"one scale, where there is one a row", kChannel,
     instead("m.gate_proj.weight_scale", all("F32", {1}, 0.5f)), ""},
    {"GPTQ packed by rows", kGptq,
     instead("m.gate_proj.qweight", all("I32", {24, 4}, std::int32_t{0})), ""},
    {"GPTQ groups of 32", kGptq,
     instead("m.up_proj.scales", all("F16", {1, 24}, from_float<f16>(1))), ""},

    {"scale zero", kTensor, with("m.up_proj.weight_scale", 0, 0.0f), ""},
    {"scale NaN", kTensor, with("m.gate_proj.weight_scale", 0, kNoNumber), ""},
    {"scale negative", kTensor, with("m.gate_proj.weight_scale", 0, -0.5f), ""},
    {"scale infinite", kTensor, with("m.gate_proj.weight_scale", 0, kInfinity), ""},
    {"input scale zero", kFixed, with("m.up_proj.input_scale", 0, 0.0f), ""},
    {"row scale zero", kChannel, with("m.up_proj.weight_scale", 5, 0.0f), ""},
    {"row scale NaN", kChannel, with("m.gate_proj.weight_scale", 11, kNoNumber), ""},
    {"row scale negative", kChannel, with("m.gate_proj.weight_scale", 0, -1.0f), ""},
    {"row scale infinite", kChannel, with("m.gate_proj.weight_scale", 7, kInfinity), ""},
    {"block scale zero", kBlock, with("m.gate_proj.weight_scale", 0, 0.0f), ""},
    {"block scale NaN", kBlock, with("m.up_proj.weight_scale", 1, kNoNumber), ""},
    {"block scale negative", kBlock, with("m.up_proj.weight_scale", 1, -1.0f), ""},
    {"block scale infinite", kBlock, with("m.up_proj.weight_scale", 1, kInfinity), ""},
    {"group scale NaN", kNvfp4, with("m.up_proj.weight_scale", 23, kNan), ""},
    {"group scale negative", kNvfp4, with("m.gate_proj.weight_scale", 3, kMinusOne), ""},
    {"group scale zero", kNvfp4, with("m.gate_proj.weight_scale", 3, kZero), ""},
    {"global scale zero", kNvfp4, with("m.up_proj.weight_global_scale", 0, 0.0f), ""},
    {"global scale infinite", kNvfp4, with("m.up_proj.weight_global_scale", 0, kInfinity), ""},
    {"GPTQ scale zero", kGptq, with("m.up_proj.scales", 25, from_float<f16>(0)), ""},
    {"GPTQ scale infinite", kGptq, with("m.up_proj.scales", 2, from_float<f16>(kInfinity)), ""},
    {"group of a column beyond", kGptq, with("m.gate_proj.g_idx", 31, std::int32_t{2}), ""},
    {"group of a column negative", kGptq, with("m.gate_proj.g_idx", 4, std::int32_t{-1}), ""},
    {"zero points", kGptq, with("m.up_proj.qzeros", 1, std::uint32_t{0x77777677}), ""},
    {"zero points of two kinds", kGptq, with("m.gate_proj.qzeros", 4, std::uint32_t{0x88888888}),
     ""},
};

TEST(WeightLoader, SaysWhatIsWrong) {
  for (const Bad& bad : kBad) {
    Tensors tensors = gate_up_tensors(bad.format);
    bad.change(tensors);
    EXPECT_EQ(refusal(tensors, gate_up(bad.format, 0)), bad.sentence) << bad.what;
  }
}
