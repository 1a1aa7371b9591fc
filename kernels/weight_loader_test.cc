// The loader against checkpoints that are not what a layer expects, each refused with one sentence;
// and that a rank touches no byte of a file but its own.

#include "kernels/weight_loader.h"

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "harness/base/check.h"
#include "harness/base/temp_folder_testing.h"
#include "harness/device/buffer.h"
#include "harness/device/testing.h"

namespace tp {
namespace {

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
  explicit File(const Tensors& tensors) {
    std::vector<StoredTensor> stored;
    for (const auto& [name, t] : tensors)
      stored.push_back({name, t.dtype, t.shape, t.data.data(), t.data.size()});
    write_safetensors(path_, stored);
  }
  const std::string& path() const { return path_; }

 private:
  TempFolder folder_;
  std::string path_ = folder_.at("model.safetensors");
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
  if (report.fault) return std::string(name_of(report.fault->outcome)) + ": " + report.fault->what;
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
    {"no weight", kNone, without("m.up_proj.weight"),
     "there is no tensor \"m.up_proj.weight\" (did you mean \"m.gate_proj.weight\"?)"},
    {"no scale", kTensor, without("m.up_proj.weight_scale"),
     "there is no tensor \"m.up_proj.weight_scale\" (did you mean \"m.gate_proj.weight_scale\", "
     "\"m.up_proj.weight\"?)"},
    {"no scale of activations", kFixed, without("m.gate_proj.input_scale"),
     "there is no tensor \"m.gate_proj.input_scale\" (did you mean \"m.up_proj.input_scale\", "
     "\"m.gate_proj.weight_scale\"?)"},
    {"no zero points", kGptq, without("m.up_proj.qzeros"),
     "there is no tensor \"m.up_proj.qzeros\" (did you mean \"m.gate_proj.qzeros\", "
     "\"m.up_proj.qweight\", \"m.up_proj.scales\"?)"},
    {"no order of columns", kGptq, without("m.gate_proj.g_idx"),
     "there is no tensor \"m.gate_proj.g_idx\" (did you mean \"m.up_proj.g_idx\"?)"},
    {"another type", kNone, instead("m.gate_proj.weight", all("F16", {24, 32}, from_float<f16>(1))),
     "tensor \"m.gate_proj.weight\" is F16 [24, 32], not BF16 [24, 32]"},
    {"another type of scales", kBlock,
     instead("m.gate_proj.weight_scale", all("BF16", {2, 2}, from_float<bf16>(1))),
     "tensor \"m.gate_proj.weight_scale\" is BF16 [2, 2], not F32 [2, 2]"},
    {"a transposed weight", kNone,
     instead("m.up_proj.weight", all("BF16", {32, 24}, from_float<bf16>(1))),
     "tensor \"m.up_proj.weight\" is BF16 [32, 24], not BF16 [24, 32]"},
    {"scales of blocks of 128", kBlock, instead("m.up_proj.weight_scale", all("F32", {1, 1}, 0.5f)),
     "tensor \"m.up_proj.weight_scale\" is F32 [1, 1], not F32 [2, 2]"},
    {"nvfp4 scales of groups of 32", kNvfp4,
     instead("m.up_proj.weight_scale", all("F8_E4M3", {24, 1}, kOne)),
     "tensor \"m.up_proj.weight_scale\" is F8_E4M3 [24, 1], not F8_E4M3 [24, 2]"},
    {"a scale a row, where there is one", kTensor,
     instead("m.gate_proj.weight_scale", all("F32", {24, 1}, 0.5f)),
     "tensor \"m.gate_proj.weight_scale\" is F32 [24, 1], not F32 []"},
    {"one scale, where there is one a row", kChannel,
     instead("m.gate_proj.weight_scale", all("F32", {1}, 0.5f)),
     "tensor \"m.gate_proj.weight_scale\" is F32 [1], not F32 [24]"},
    {"GPTQ packed by rows", kGptq,
     instead("m.gate_proj.qweight", all("I32", {24, 4}, std::int32_t{0})),
     "tensor \"m.gate_proj.qweight\" is I32 [24, 4], not I32 [4, 24]"},
    {"GPTQ groups of 32", kGptq,
     instead("m.up_proj.scales", all("F16", {1, 24}, from_float<f16>(1))),
     "tensor \"m.up_proj.scales\" is F16 [1, 24], not F16 [2, 24]"},

    {"scale zero", kTensor, with("m.up_proj.weight_scale", 0, 0.0f),
     "m.up_proj.weight_scale, element 0 is 0, but a scale is positive and finite"},
    {"scale NaN", kTensor, with("m.gate_proj.weight_scale", 0, kNoNumber),
     "m.gate_proj.weight_scale, element 0 is nan, but a scale is positive and finite"},
    {"scale negative", kTensor, with("m.gate_proj.weight_scale", 0, -0.5f),
     "m.gate_proj.weight_scale, element 0 is -0.5, but a scale is positive and finite"},
    {"scale infinite", kTensor, with("m.gate_proj.weight_scale", 0, kInfinity),
     "m.gate_proj.weight_scale, element 0 is inf, but a scale is positive and finite"},
    {"input scale zero", kFixed, with("m.up_proj.input_scale", 0, 0.0f),
     "m.up_proj.input_scale, element 0 is 0, but a scale is positive and finite"},
    {"row scale zero", kChannel, with("m.up_proj.weight_scale", 5, 0.0f),
     "m.up_proj.weight_scale, element 5 is 0, but a scale is positive and finite"},
    {"row scale NaN", kChannel, with("m.gate_proj.weight_scale", 11, kNoNumber),
     "m.gate_proj.weight_scale, element 11 is nan, but a scale is positive and finite"},
    {"row scale negative", kChannel, with("m.gate_proj.weight_scale", 0, -1.0f),
     "m.gate_proj.weight_scale, element 0 is -1, but a scale is positive and finite"},
    {"row scale infinite", kChannel, with("m.gate_proj.weight_scale", 7, kInfinity),
     "m.gate_proj.weight_scale, element 7 is inf, but a scale is positive and finite"},
    {"block scale zero", kBlock, with("m.gate_proj.weight_scale", 0, 0.0f),
     "m.gate_proj.weight_scale, element 0 is 0, but a scale is positive and finite"},
    {"block scale NaN", kBlock, with("m.up_proj.weight_scale", 1, kNoNumber),
     "m.up_proj.weight_scale, element 1 is nan, but a scale is positive and finite"},
    {"block scale negative", kBlock, with("m.up_proj.weight_scale", 1, -1.0f),
     "m.up_proj.weight_scale, element 1 is -1, but a scale is positive and finite"},
    {"block scale infinite", kBlock, with("m.up_proj.weight_scale", 1, kInfinity),
     "m.up_proj.weight_scale, element 1 is inf, but a scale is positive and finite"},
    {"group scale NaN", kNvfp4, with("m.up_proj.weight_scale", 23, kNan),
     "m.up_proj.weight_scale, element 23 is nan, but a scale is positive and finite"},
    {"group scale negative", kNvfp4, with("m.gate_proj.weight_scale", 3, kMinusOne),
     "m.gate_proj.weight_scale, element 3 is -1, but a scale is positive and finite"},
    {"global scale zero", kNvfp4, with("m.up_proj.weight_global_scale", 0, 0.0f),
     "m.up_proj.weight_global_scale, element 0 is 0, but a scale is positive and finite"},
    {"global scale infinite", kNvfp4, with("m.up_proj.weight_global_scale", 0, kInfinity),
     "m.up_proj.weight_global_scale, element 0 is inf, but a scale is positive and finite"},
    {"GPTQ scale zero", kGptq, with("m.up_proj.scales", 25, from_float<f16>(0)),
     "m.up_proj.scales, element 25 is 0, but a scale is positive and finite"},
    {"GPTQ scale infinite", kGptq, with("m.up_proj.scales", 2, from_float<f16>(kInfinity)),
     "m.up_proj.scales, element 2 is inf, but a scale is positive and finite"},
    {"group of a column beyond", kGptq, with("m.gate_proj.g_idx", 31, std::int32_t{2}),
     "m.gate_proj.g_idx, element 31 is 2, but there are 2 groups"},
    {"group of a column negative", kGptq, with("m.gate_proj.g_idx", 4, std::int32_t{-1}),
     "m.gate_proj.g_idx, element 4 is -1, but there are 2 groups"},
    {"zero points", kGptq, with("m.up_proj.qzeros", 1, std::uint32_t{0x77777677}),
     "m.up_proj.qzeros, element 1 is 0x77777677, but only symmetric codes are supported, whose "
     "zero "
     "points are all 0x77777777"},
    {"zero points of GPTQ's second format", kGptq,
     with("m.gate_proj.qzeros", 4, std::uint32_t{0x88888888}),
     "m.gate_proj.qzeros, element 4 is 0x88888888, but only symmetric codes are supported, whose "
     "zero points are all 0x77777777"},
};

TEST(WeightLoader, SaysWhatIsWrong) {
  for (const Bad& bad : kBad) {
    Tensors tensors = gate_up_tensors(bad.format);
    bad.change(tensors);
    EXPECT_EQ(refusal(tensors, gate_up(bad.format, 0)), bad.sentence) << bad.what;
  }
}

// A rank is told of its own scales only.
TEST(WeightLoader, LeavesOtherRanksScalesToThem) {
  Tensors tensors = gate_up_tensors(kChannel);
  tensors.at("m.up_proj.weight_scale").set(12, kNoNumber);
  EXPECT_EQ(refusal(tensors, gate_up(kChannel, 0)), "");
  EXPECT_NE(refusal(tensors, gate_up(kChannel, 1)), "");
  tensors = gate_up_tensors(kGptq);
  tensors.at("m.gate_proj.qzeros").set(2, std::uint32_t{0});  // of rows 16 .. 24
  EXPECT_EQ(refusal(tensors, gate_up(kGptq, 0)), "");
  EXPECT_NE(refusal(tensors, gate_up(kGptq, 1)), "");
}

TEST(WeightLoader, TakesWhatWritersHaveInMoreThanOneWay) {
  Tensors tensors = gate_up_tensors(kTensor);
  for (const std::vector<std::int64_t>& shape :
       std::vector<std::vector<std::int64_t>>{{}, {1}, {1, 1}}) {
    tensors.at("m.up_proj.weight_scale").shape = shape;
    EXPECT_EQ(refusal(tensors, gate_up(kTensor, 0)), "");
  }
  tensors = gate_up_tensors(kChannel);
  tensors.at("m.up_proj.weight_scale").shape = {24};
  EXPECT_EQ(refusal(tensors, gate_up(kChannel, 1)), "");
  // Zero is a scale where blocks of zeros get one.
  tensors = gate_up_tensors(kNvfp4);
  tensors.at("m.up_proj.weight_scale").set(0, kZero);
  EXPECT_EQ(refusal(tensors, gate_up(kNvfp4, 0)), "");
}

TEST(WeightLoader, SaysThatMatricesAreStoredOtherwise) {
  Tensors fused;
  add(fused, kNone, "m.gate_up_proj", 48, 32);
  EXPECT_EQ(refusal(fused, gate_up(kNone, 0)),
            "there is no tensor \"m.gate_proj.weight\" (did you mean \"m.gate_up_proj.weight\"?)");
  StoredLinear layer = gate_up(kNone, 0);
  layer.prefixes = {"m.gate_up_proj"};
  EXPECT_EQ(refusal(fused, layer), "");
  EXPECT_EQ(refusal(gate_up_tensors(kNone), layer),
            "there is no tensor \"m.gate_up_proj.weight\" (did you mean \"m.gate_proj.weight\", "
            "\"m.up_proj.weight\"?)");
  // Fused of other matrices.
  fused.clear();
  add(fused, kNone, "m.gate_up_proj", 40, 32);
  EXPECT_EQ(refusal(fused, layer),
            "tensor \"m.gate_up_proj.weight\" is BF16 [40, 32], not BF16 [48, 32]");
}

// Whoever asks for columns that are no whole bytes or words of a file is mistaken, not the file.
TEST(WeightLoader, CutsNoByteAndNoWord) {
  Tensors tensors;
  add(tensors, kNvfp4, "m.down_proj", 4, 48);
  StoredLinear layer = cut_by_columns(kNvfp4, "m.down_proj", 4, 48, 2, 1);
  EXPECT_EQ(refusal(tensors, layer), "");
  layer.columns.own = {15, 33};
  EXPECT_EQ(refusal(tensors, layer),
            "BadLaunch: columns 15 .. 48 of m.down_proj begin or end within a byte");
  layer.columns.own = {16, 15};
  EXPECT_EQ(refusal(tensors, layer),
            "BadLaunch: columns 16 .. 31 of m.down_proj begin or end within a byte");

  tensors.clear();
  add(tensors, kGptq, "m.down_proj", 4, 48);
  layer = cut_by_columns(kGptq, "m.down_proj", 4, 48, 2, 1);
  EXPECT_EQ(refusal(tensors, layer), "");
  layer.columns.own = {20, 8};
  EXPECT_EQ(refusal(tensors, layer),
            "BadLaunch: columns 20 .. 28 of m.down_proj are not whole words of 8");
  layer.columns.own = {16, 12};
  EXPECT_EQ(refusal(tensors, layer),
            "BadLaunch: columns 16 .. 28 of m.down_proj are not whole words of 8");
}

// ---- What a rank reads of a file.

// Bytes [first, first + size) of each of these rows of a tensor.
struct Part {
  std::string tensor;
  Shard rows;
  std::int64_t row_bytes;
  Shard bytes;
};

bool is_readable(const std::byte* at) {
  int ends[2];
  EXPECT_EQ(pipe(ends), 0);
  const bool read = write(ends[1], at, 1) == 1;
  close(ends[0]);
  close(ends[1]);
  return read;
}

// Takes from this process every page of a checkpoint's tensors that has nothing of these parts.
class Guarded {
 public:
  Guarded(const Checkpoint& checkpoint, const std::vector<Part>& parts) {
    std::set<std::uintptr_t> wanted;
    for (const Part& p : parts) {
      const auto data = std::uintptr_t(checkpoint.at(p.tensor).data);
      for (std::int64_t row = p.rows.offset; row < p.rows.end(); ++row) {
        const std::uintptr_t first = data + std::uintptr_t(row * p.row_bytes + p.bytes.offset);
        for (std::uintptr_t page = first / kPage;
             page * kPage < first + std::uintptr_t(p.bytes.size); ++page)
          wanted.insert(page);
      }
    }
    const std::vector<StoredTensor>& tensors = checkpoint.files().front().tensors();
    const auto first = std::uintptr_t(tensors.front().data),
               end = std::uintptr_t(tensors.back().data + tensors.back().bytes);
    for (std::uintptr_t page = first / kPage + 1; page * kPage < end; ++page) {
      ++pages_;
      if (wanted.contains(page)) continue;
      void* const at = reinterpret_cast<void*>(page * kPage);
      EXPECT_EQ(mprotect(at, kPage, PROT_NONE), 0);
      EXPECT_FALSE(is_readable(static_cast<const std::byte*>(at)));
      ++taken_;
    }
  }
  double share_taken() const { return double(taken_) / double(pages_); }

 private:
  const std::uintptr_t kPage = std::uintptr_t(sysconf(_SC_PAGESIZE));
  std::int64_t pages_ = 0, taken_ = 0;
};

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// What a rank has of a matrix [rows, in] whose rows `own` are its own, and whose columns `cols`.
std::vector<Part> parts_of(const QuantFormat& f, const std::string& prefix, std::int64_t rows,
                           Shard own, std::int64_t in, Shard cols, bool act_order) {
  const TensorNames names = tensor_names(f);
  const std::string weight = prefix + "." + names.weight, scale = prefix + "." + names.scale;
  const auto touched = [](Shard of, std::int64_t block) {
    return Shard{of.offset / block, ceil_div(of.end(), block) - of.offset / block};
  };
  switch (f.scheme) {
    case Scheme::none:
      return {{weight, own, 2 * in, cols.times(2)}};
    case Scheme::fp8_tensor:
      return {{weight, own, in, cols}, {scale, {0, 1}, 4, {0, 4}}};
    case Scheme::fp8_channel:
      return {{weight, own, in, cols}, {scale, own, 4, {0, 4}}};
    case Scheme::fp8_block:
      return {{weight, own, in, cols},
              {scale, touched(own, f.block_rows), 4 * ceil_div(in, f.block_cols),
               touched(cols, f.block_cols).times(4)}};
    case Scheme::nvfp4:
      return {{weight, own, in / 2, touched(cols, 2)},
              {scale, own, in / 16, touched(cols, 16)},
              {prefix + "." + names.global_scale, {0, 1}, 4, {0, 4}}};
    case Scheme::gptq: {
      const std::int64_t groups = ceil_div(in, f.block_cols);
      const Shard of_rank = act_order ? Shard{0, groups} : touched(cols, f.block_cols);
      return {
          {weight, touched(cols, 8), 4 * rows, own.times(4)},
          {scale, of_rank, 2 * rows, own.times(2)},
          {prefix + "." + names.zeros, of_rank, 4 * ceil_div(rows, 8), touched(own, 8).times(4)},
          {prefix + "." + names.group_of_column, {0, 1}, 4 * in, cols.times(4)}};
    }
  }
  return {};
}

// Loads a layer with nothing else of the file in reach; `share` of its pages are not.
void load_guarded(const Tensors& tensors, const StoredLinear& layer, const std::vector<Part>& parts,
                  double share, const ShardingRules& rules = sharding_rules()) {
  const File file(tensors);
  const Checkpoint checkpoint(file.path());
  const Guarded guarded(checkpoint, parts);
  EXPECT_GT(guarded.share_taken(), share);
  const Report report =
      testing::run_rank([&](Stream& stream) { load(checkpoint, layer, rules, stream); });
  EXPECT_FALSE(report.fault) << report.fault->what;
}

constexpr int kRanks = 4;

TEST(WeightLoader, ReadsOnlyTheRowsOfItsRank) {
  constexpr std::int64_t kRows = 8192, kIn = 16;
  for (const QuantFormat& f : {kNone, kTensor, kChannel, kBlock, kNvfp4, kGptq}) {
    for (const bool fused : {false, true}) {
      Tensors tensors;
      const std::vector<std::string> prefixes =
          fused ? std::vector<std::string>{"m.gate_up_proj"}
                : std::vector<std::string>{"m.gate_proj", "m.up_proj"};
      for (const std::string& prefix : prefixes)
        add(tensors, f, prefix, fused ? 2 * kRows : kRows, kIn);
      for (int rank = 0; rank < kRanks; ++rank) {
        const StoredLinear layer = cut_by_rows(f, prefixes, {kRows, kRows}, kIn, kRanks, rank);
        std::vector<Part> parts;
        for (std::int64_t matrix = 0; matrix < 2; ++matrix) {
          const std::string& prefix = prefixes[fused ? 0 : std::size_t(matrix)];
          Shard own = layer.taken[std::size_t(matrix)];
          if (fused) own.offset += matrix * kRows;
          for (Part& p : parts_of(f, prefix, fused ? 2 * kRows : kRows, own, kIn, {0, kIn}, false))
            parts.push_back(std::move(p));
        }
        load_guarded(tensors, layer, parts, 0.5);
      }
    }
  }
}

// Ranks begin within a block, and share its scale.
TEST(WeightLoader, ReadsOnlyTheColumnsOfItsRank) {
  constexpr std::int64_t kRows = 3, kIn = kRanks * (1 << 14) + 32;
  for (const QuantFormat& f : {kNone, kTensor, kChannel, kBlock, kNvfp4, kGptq}) {
    Tensors tensors;
    add(tensors, f, "m.down_proj", kRows, kIn);
    for (int rank = 0; rank < kRanks; ++rank) {
      StoredLinear layer = cut_by_columns(f, "m.down_proj", kRows, kIn, kRanks, rank);
      load_guarded(tensors, layer,
                   parts_of(f, "m.down_proj", kRows, {0, kRows}, kIn, layer.columns.own, false),
                   0.5);
    }
  }
}

// In act-order a rank reads all scales, and still its own columns only.
TEST(WeightLoader, ReadsAllScalesInActOrder) {
  constexpr std::int64_t kRows = 3, kIn = kRanks * (1 << 14);
  Tensors tensors;
  add(tensors, kGptq, "m.down_proj", kRows, kIn);
  for (int rank = 0; rank < kRanks; ++rank) {
    StoredLinear layer = cut_by_columns(kGptq, "m.down_proj", kRows, kIn, kRanks, rank);
    layer.act_order = true;
    load_guarded(tensors, layer,
                 parts_of(kGptq, "m.down_proj", kRows, {0, kRows}, kIn, layer.columns.own, true),
                 0.5);
  }
}

// The guard can fail: what takes one row too many ends the process.
TEST(WeightLoaderDeathTest, AnotherRanksRowIsNotInReach) {
  Tensors tensors;
  add(tensors, kNone, "m.gate_proj", 8192, 16);
  const StoredLinear layer = cut_by_rows(kNone, {"m.gate_proj"}, {8192}, 16, kRanks, 1);
  ShardingRules rules = sharding_rules();
  rules.loader.stored_row = [](const FusedRows&, const LocalRow& at) {
    // A page of rows behind its own ones.
    return at.local == at.own.size - 1 ? at.own.end() + 4096 / 32 : at.row;
  };
  EXPECT_DEATH(
      load_guarded(tensors, layer,
                   parts_of(kNone, "m.gate_proj", 8192, layer.taken[0], 16, {0, 16}, false), 0.5,
                   rules),
      "");
}

}  // namespace
}  // namespace tp
