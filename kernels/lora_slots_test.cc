// What is in a slot, bit by bit, for every rank: of adapters as files have them, fused and not, of
// lower ranks than the slot's and of fewer matrices than the layer's; and what is refused.

#include "kernels/lora_slots.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "harness/base/check.h"
#include "harness/base/shape.h"
#include "harness/base/temp_folder_testing.h"
#include "harness/device/buffer.h"
#include "harness/device/testing.h"

namespace tp {
namespace {

// ---- Adapters.

template <typename T>
constexpr const char* kWord = "F32";
template <>
constexpr const char* kWord<f16> = "F16";
template <>
constexpr const char* kWord<bf16> = "BF16";

template <typename T>
T from_bits(std::uint32_t bits) {
  if constexpr (std::is_same_v<T, float>) {
    return std::bit_cast<float>(bits);
  } else {
    return T{std::uint16_t(bits)};
  }
}
template <typename T>
std::uint32_t bits_of(T value) {
  if constexpr (std::is_same_v<T, float>) {
    return std::bit_cast<std::uint32_t>(value);
  } else {
    return value.bits;
  }
}

// A finite number, not zero, and another one for (nearly) every element.
template <typename T>
T numbered(std::uint32_t i) {
  return from_bits<T>(0x0100 + i * 7919 % 0x7000);
}

// Tensors of a file, in one type.
template <typename Stored>
class File {
 public:
  struct Tensor {
    std::vector<std::int64_t> shape;
    std::vector<Stored> values;

    const Stored& at(std::int64_t i, std::int64_t j) const {
      return values[std::size_t(i * shape.back() + j)];
    }
  };

  // The A [rank, in] and B [out, rank] of a module, of numbers that no other module has.
  void add(const std::string& module, std::int64_t rank, std::int64_t in, std::int64_t out) {
    add_tensor(module + ".lora_A.weight", {rank, in});
    add_tensor(module + ".lora_B.weight", {out, rank});
    config.target_modules.push_back(module);
    config.rank_pattern.emplace_back(module, rank);
  }
  void add_bias(const std::string& module, std::int64_t out) {
    config.lora_bias = true;
    add_tensor(module + ".lora_B.bias", {out});
  }
  Tensor& tensor(const std::string& name) { return tensors.at(kPrefix + name); }
  const Tensor& a(const std::string& module) { return tensor(module + ".lora_A.weight"); }
  const Tensor& b(const std::string& module) { return tensor(module + ".lora_B.weight"); }
  std::string path() const { return folder_.at("adapter_model.safetensors"); }

  // Calls f with the adapter.
  template <typename F>
  void with(F f) const {
    std::vector<StoredTensor> stored;
    for (const auto& [name, t] : tensors) {
      stored.push_back({name, kWord<Stored>, t.shape,
                        reinterpret_cast<const std::byte*>(t.values.data()),
                        t.values.size() * sizeof(Stored)});
    }
    write_safetensors(path(), stored);
    const Checkpoint checkpoint(path());
    f(PeftAdapter(config, checkpoint));
  }

  PeftConfig config{.rank = 4, .alpha = 16};
  std::map<std::string, Tensor> tensors;

 private:
  static constexpr const char* kPrefix = "base_model.model.";

  void add_tensor(const std::string& name, const std::vector<std::int64_t>& shape) {
    Tensor t{shape, {}};
    std::int64_t elements = 1;
    for (const std::int64_t size : shape) elements *= size;
    for (std::int64_t i = 0; i < elements; ++i) t.values.push_back(numbered<Stored>(next_++));
    tensors[kPrefix + name] = t;
  }

  std::uint32_t next_ = 0;
  TempFolder folder_;
};

// ---- Layers.

const std::string kAttention = "model.layers.3.self_attn.";

LoraLayer qkv_layer(const ModelShape& model, int tp_size, int tp_rank, std::int64_t max_rank) {
  const RankShape own = partition(model, tp_size, tp_rank);
  return {.base = {.rows = {std::int64_t{model.num_heads} * model.query_dim(),
                            std::int64_t{model.num_kv_heads} * model.head_dim,
                            std::int64_t{model.num_kv_heads} * model.value_head_dim()},
                   .own = {own.heads.times(model.query_dim()), own.kv_heads.times(model.head_dim),
                           own.kv_heads.times(model.value_head_dim())},
                   .replicas = {1, own.num_kv_head_replicas, own.num_kv_head_replicas},
                   .in_features = model.hidden_size,
                   .tp_size = tp_size,
                   .tp_rank = tp_rank},
          .max_rank = max_rank,
          .prefix = kAttention,
          .parts = {"q_proj", "k_proj", "v_proj"},
          .fused = "qkv_proj"};
}

// o_proj of 12 rows; its columns are cut.
LoraLayer row_layer(int tp_size, int tp_rank, std::int64_t max_rank, bool shares_out) {
  const Shard all{0, 12}, share{tp_rank * 12 / tp_size, 12 / tp_size};
  return {.base = {.rows = {12},
                   .own = {shares_out ? share : all},
                   .replicas = {1},
                   .in_features = 24,
                   .cuts_columns = true,
                   .tp_size = tp_size,
                   .tp_rank = tp_rank},
          .max_rank = max_rank,
          .shares_out_rank = shares_out,
          .prefix = kAttention,
          .parts = {"o_proj"}};
}

// gate and up of 8 rows each, 6 columns, cut in two.
LoraLayer gate_up_layer(int tp_rank, std::int64_t max_rank = 4) {
  return {.base = {.rows = {8, 8},
                   .own = {{tp_rank * 4, 4}, {tp_rank * 4, 4}},
                   .replicas = {1, 1},
                   .in_features = 6,
                   .tp_size = 2,
                   .tp_rank = tp_rank},
          .max_rank = max_rank,
          .prefix = "mlp.",
          .parts = {"gate_proj", "up_proj"},
          .fused = "gate_up_proj"};
}

constexpr std::uint32_t kPoison = 0xFFFFFFFF;

// The memory of slots, after `body` has loaded adapters into them.
template <typename T>
struct Memory {
  std::int64_t a_rows, a_cols, b_rows, max_rank;  // of a slot
  std::vector<T> a, b, bias;
  std::string said;  // how it was refused

  Memory(const LoraLayer& layer, int slots, bool has_bias,
         const std::function<void(LoraSlots<T>&)>& body,
         const ShardingRules& rules = sharding_rules(), std::int64_t pad = 0)
      : a_rows(std::int64_t(layer.parts.size()) * lora_a_rows(layer, rules)),
        a_cols(rules.lora.a_columns(layer.base).size),
        b_rows(lora_b_rows(layer, rules)),
        max_rank(layer.max_rank) {
    const Report report = testing::run_rank([&](Stream& stream) {
      const auto room = [&](std::int64_t rows, std::int64_t cols) {
        return Buffer("room", std::size_t(rows * cols) * sizeof(T), std::uint8_t{0xFF});
      };
      const Buffer a_room = room(slots * a_rows, a_cols + pad),
                   b_room = room(slots * b_rows, max_rank + pad),
                   bias_room = room(has_bias ? slots : 0, b_rows + pad);
      const auto view = [&](const Buffer& buffer, std::int64_t rows, std::int64_t cols) {
        return View<T>{buffer.as<T>(), rows, cols, cols + pad};
      };
      try {
        LoraSlots<T> all(layer, rules, view(a_room, slots * a_rows, a_cols),
                         view(b_room, slots * b_rows, max_rank),
                         view(bias_room, has_bias ? slots : 0, b_rows), stream);
        body(all);
      } catch (const BadInput& e) {
        said = e.what();
      }
      a = testing::download<T>(stream, a_room);
      b = testing::download<T>(stream, b_room);
      bias = testing::download<T>(stream, bias_room);
    });
    if (report.fault)
      said = std::string(name_of(report.fault->outcome)) + ": " + report.fault->what;
  }

  // Row i of the slot's A, B or bias is wanted(i, column); `pad` columns behind are poison.
  using Wanted = std::function<std::uint32_t(std::int64_t, std::int64_t)>;
  static void expect(const std::vector<T>& memory, std::int64_t slot, std::int64_t rows,
                     std::int64_t cols, std::int64_t pad, const char* what, const Wanted& wanted) {
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t j = 0; j < cols + pad; ++j) {
        const std::uint32_t want = j < cols ? wanted(i, j) : kPoison;
        const auto at = std::size_t((slot * rows + i) * (cols + pad) + j);
        ASSERT_EQ(bits_of(memory[at]), bits_of(from_bits<T>(want)))
            << what << " of slot " << slot << ", row " << i << ", column " << j;
      }
    }
  }
  void expect_slot(std::int64_t slot, const Wanted& wanted_a, const Wanted& wanted_b,
                   std::int64_t pad = 0) const {
    ASSERT_EQ(said, "");
    expect(a, slot, a_rows, a_cols, pad, "A", wanted_a);
    expect(b, slot, b_rows, max_rank, pad, "B", wanted_b);
  }
  void expect_all(std::int64_t slot, std::uint32_t bits) const {
    const Wanted same = [bits](std::int64_t, std::int64_t) { return bits; };
    expect_slot(slot, same, same);
  }
};

// ---- What ranks have.

// Row i of a rank's q, k and v: which matrix, and which of its rows, head by head.
std::pair<int, std::int64_t> qkv_row(const ModelShape& model, int tp_size, int tp_rank,
                                     std::int64_t i) {
  const std::int64_t heads = model.num_heads / tp_size;
  const std::int64_t kv_heads = std::max(1, model.num_kv_heads / tp_size);
  const std::int64_t first_kv = std::int64_t{tp_rank} * model.num_kv_heads / tp_size;
  const std::int64_t dims[] = {model.query_dim(), model.head_dim, model.value_head_dim()};
  const std::int64_t counts[] = {heads, kv_heads, kv_heads};
  const std::int64_t firsts[] = {tp_rank * heads, first_kv, first_kv};
  for (int p = 0; p < 3; ++p) {
    if (i < counts[p] * dims[p]) return {p, firsts[p] * dims[p] + i};
    i -= counts[p] * dims[p];
  }
  return {-1, 0};
}

struct Served {
  const char* what;
  ModelShape model;
  int tp_size;
  std::int64_t rows;  // of a rank
};

const Served kServed[] = {
    {"alone", {.hidden_size = 10, .num_heads = 4, .num_kv_heads = 2, .head_dim = 3}, 1, 24},
    {"KV heads for each",
     {.hidden_size = 7, .num_heads = 8, .num_kv_heads = 4, .head_dim = 2},
     2,
     16},
    {"MiniMax-M2.5, replicated",
     {.hidden_size = 5, .num_heads = 48, .num_kv_heads = 8, .head_dim = 16},
     16,
     80},
    {"values of another size",
     {.hidden_size = 5, .num_heads = 8, .num_kv_heads = 2, .head_dim = 6, .v_head_dim = 4},
     4,
     22},
    // What an even split makes of it: 2304 and 1152 rows (sglang#24239).
    {"Qwen3.5-35B-A3B",
     {.hidden_size = 3,
      .num_heads = 16,
      .num_kv_heads = 2,
      .head_dim = 256,
      .attn_output_gate = true},
     4,
     2560},
    {"Qwen3.5-35B-A3B",
     {.hidden_size = 3,
      .num_heads = 16,
      .num_kv_heads = 2,
      .head_dim = 256,
      .attn_output_gate = true},
     8,
     1536},
};

// One adapter, of one rank or of a rank for each matrix.
template <typename T>
void expect_qkv(bool is_fused) {
  constexpr std::int64_t kMaxRank = 4;
  const std::int64_t split_ranks[] = {3, 1, 4};
  for (const Served& s : kServed) {
    const LoraLayer first = qkv_layer(s.model, s.tp_size, 0, kMaxRank);
    const std::int64_t in = s.model.hidden_size;
    File<T> file;
    if (is_fused) {
      file.add(kAttention + "qkv_proj", 3, in, first.base.total_rows());
    } else {
      for (std::size_t p = 0; p < 3; ++p)
        file.add(kAttention + first.parts[p], split_ranks[p], in, first.base.rows[p]);
    }
    const auto module_of = [&](int part) {
      return kAttention + (is_fused ? "qkv_proj" : first.parts[std::size_t(part)]);
    };
    const auto rank_of = [&](int part) { return is_fused ? 3 : split_ranks[part]; };
    for (int tp_rank = 0; tp_rank < s.tp_size; ++tp_rank) {
      SCOPED_TRACE(::testing::Message() << s.what << ", rank " << tp_rank << " of " << s.tp_size);
      const LoraLayer layer = qkv_layer(s.model, s.tp_size, tp_rank, kMaxRank);
      ASSERT_EQ(lora_b_rows(layer, sharding_rules()), s.rows);
      LoraSlotState state;
      const Memory<T> memory(layer, 2, false, [&](LoraSlots<T>& slots) {
        file.with([&](const PeftAdapter& adapter) { state = slots.load(1, adapter); });
      });
      ASSERT_EQ(memory.said, "");
      for (int p = 0; p < 3; ++p) {
        EXPECT_EQ(state.ranks[std::size_t(p)], rank_of(p));
        EXPECT_EQ(state.scales[std::size_t(p)], float(16.0 / double(rank_of(p))));
      }
      memory.expect_all(0, kPoison);
      memory.expect_slot(
          1,
          [&](std::int64_t i, std::int64_t k) {
            const int part = int(i / kMaxRank);
            const std::int64_t j = i % kMaxRank;
            return j < rank_of(part) ? bits_of(file.a(module_of(part)).at(j, k)) : 0;
          },
          [&](std::int64_t i, std::int64_t j) {
            auto [part, row] = qkv_row(s.model, s.tp_size, tp_rank, i);
            if (j >= rank_of(part)) return std::uint32_t{0};
            for (int before = 0; is_fused && before < part; ++before)
              row += layer.base.rows[std::size_t(before)];
            return bits_of(file.b(module_of(part)).at(row, j));
          });
    }
  }
}

TEST(LoraSlots, HoldARanksRowsOfAFusedAdapter) {
  expect_qkv<bf16>(true);
  expect_qkv<float>(true);
}
TEST(LoraSlots, HoldARanksRowsOfAdaptersOfEachMatrix) {
  expect_qkv<bf16>(false);
  expect_qkv<f16>(false);
}

// "Fully sharded": rows of A, from the first of the slot's on, so that the last ranks may have
// none of the adapter's.
TEST(LoraSlots, ShareOutRowsOfA) {
  File<bf16> file;
  file.add("mlp.gate_up_proj", 5, 6, 16);
  for (const int tp_rank : {0, 1}) {
    LoraLayer layer = gate_up_layer(tp_rank, 8);
    layer.shares_out_rank = true;
    EXPECT_EQ(lora_a_rows(layer, sharding_rules()), 4);
    const Memory<bf16> memory(layer, 1, false, [&](LoraSlots<bf16>& slots) {
      file.with([&](const PeftAdapter& adapter) {
        EXPECT_EQ(slots.load(0, adapter).ranks, (std::vector<std::int32_t>{5, 5}));
      });
    });
    memory.expect_slot(
        0,
        [&](std::int64_t i, std::int64_t k) {
          const std::int64_t j = tp_rank * 4 + i % 4;
          return j < 5 ? file.a("mlp.gate_up_proj").at(j, k).bits : 0u;
        },
        [&](std::int64_t i, std::int64_t j) {
          return j < 5 ? file.b("mlp.gate_up_proj").at(i / 4 * 8 + tp_rank * 4 + i % 4, j).bits
                       : 0u;
        });
  }
}

TEST(LoraSlots, OfARowParallelLayerHaveColumnsOfA) {
  const std::string module = kAttention + "o_proj";
  File<f16> file;
  file.add(module, 4, 24, 12);
  for (const bool shares_out : {false, true}) {
    for (int tp_rank = 0; tp_rank < 4; ++tp_rank) {
      SCOPED_TRACE(::testing::Message() << "rank " << tp_rank << (shares_out ? ", shares" : ""));
      const LoraLayer layer = row_layer(4, tp_rank, 4, shares_out);
      EXPECT_EQ(lora_a_rows(layer, sharding_rules()), 4);
      EXPECT_EQ(lora_b_rows(layer, sharding_rules()), shares_out ? 3 : 12);
      const Memory<f16> memory(layer, 1, false, [&](LoraSlots<f16>& slots) {
        file.with([&](const PeftAdapter& adapter) { slots.load(0, adapter); });
      });
      memory.expect_slot(
          0,
          [&](std::int64_t j, std::int64_t k) {
            return file.a(module).at(j, tp_rank * 6 + k).bits;
          },
          [&](std::int64_t i, std::int64_t j) {
            return file.b(module).at(shares_out ? tp_rank * 3 + i : i, j).bits;
          });
    }
  }
}

// ---- One after another.

// First all of the slot, then one of less: a lower rank, and one matrix of two.
TEST(LoraSlots, KeepNothingOfTheOneBefore) {
  for (const bool zeroes : {true, false}) {
    File<bf16> before, after;
    before.add("mlp.gate_up_proj", 4, 6, 16);
    after.add("mlp.up_proj", 2, 6, 8);
    after.tensor("mlp.up_proj.lora_A.weight").values[0] = from_float<bf16>(-1);
    ShardingRules rules;
    rules.lora.zeroes_slots = zeroes;
    const Memory<bf16> memory(
        gate_up_layer(1), 2, false,
        [&](LoraSlots<bf16>& slots) {
          before.with([&](const PeftAdapter& adapter) { slots.load(0, adapter); });
          after.with([&](const PeftAdapter& adapter) {
            const LoraSlotState state = slots.load(0, adapter);
            EXPECT_EQ(state.ranks, (std::vector<std::int32_t>{0, 2}));
            EXPECT_EQ(state.scales[1], 8);
          });
        },
        rules);
    memory.expect_slot(
        0,
        [&](std::int64_t i, std::int64_t k) {
          if (i >= 4 && i < 6) return std::uint32_t{after.a("mlp.up_proj").at(i - 4, k).bits};
          return zeroes ? 0u : std::uint32_t{before.a("mlp.gate_up_proj").at(i % 4, k).bits};
        },
        [&](std::int64_t i, std::int64_t j) {
          if (i >= 4 && j < 2) return std::uint32_t{after.b("mlp.up_proj").at(i, j).bits};
          return zeroes ? 0u
                        : std::uint32_t{
                              before.b("mlp.gate_up_proj").at(i / 4 * 8 + 4 + i % 4, j).bits};
        });
    memory.expect_all(1, kPoison);
  }
}

TEST(LoraSlots, AreZerosWithoutAnAdapter) {
  File<f16> file, of_others;
  file.add("mlp.gate_up_proj", 4, 6, 16);
  of_others.add("mlp.down_proj", 2, 8, 6);
  const Memory<f16> memory(gate_up_layer(0), 4, true, [&](LoraSlots<f16>& slots) {
    file.with([&](const PeftAdapter& adapter) {
      slots.load(0, adapter);
      slots.load(2, adapter);
    });
    slots.unload(0);
    of_others.with([&](const PeftAdapter& adapter) {
      const LoraSlotState state = slots.load(2, adapter);
      EXPECT_EQ(state.ranks, (std::vector<std::int32_t>{0, 0}));
    });
    slots.unload(3);
  });
  for (const std::int64_t slot : {0, 2, 3}) {
    memory.expect_all(slot, 0);
    Memory<f16>::expect(memory.bias, slot, 1, 8, 0, "bias", [](auto, auto) { return 0u; });
  }
  memory.expect_all(1, kPoison);
  Memory<f16>::expect(memory.bias, 1, 1, 8, 0, "bias", [](auto, auto) { return kPoison; });
}

TEST(LoraSlots, LieInAnyMemory) {
  File<f16> file;
  file.add("mlp.gate_up_proj", 3, 6, 16);
  file.add_bias("mlp.gate_up_proj", 16);
  const Memory<f16> memory(
      gate_up_layer(1), 2, true,
      [&](LoraSlots<f16>& slots) {
        file.with([&](const PeftAdapter& adapter) { slots.load(1, adapter); });
      },
      sharding_rules(), 5);
  memory.expect_slot(
      1,
      [&](std::int64_t i, std::int64_t k) {
        return i % 4 < 3 ? file.a("mlp.gate_up_proj").at(i % 4, k).bits : 0u;
      },
      [&](std::int64_t i, std::int64_t j) {
        return j < 3 ? file.b("mlp.gate_up_proj").at(i / 4 * 8 + 4 + i % 4, j).bits : 0u;
      },
      5);
  Memory<f16>::expect(memory.bias, 1, 1, 8, 5, "bias", [&](std::int64_t, std::int64_t i) {
    return file.tensor("mlp.gate_up_proj.lora_B.bias")
        .values[std::size_t(i / 4 * 8 + 4 + i % 4)]
        .bits;
  });
}

// ---- Numbers.

TEST(LoraSlots, RoundWhatIsStored) {
  File<float> file;
  file.add("mlp.gate_up_proj", 4, 6, 16);
  const Memory<bf16> memory(gate_up_layer(0), 1, false, [&](LoraSlots<bf16>& slots) {
    for (auto& [name, tensor] : file.tensors)
      for (std::size_t i = 0; i < tensor.values.size(); ++i)
        tensor.values[i] = 1.0f + float(i + 1) * 0x1p-9f * (i % 2 ? 1 : -1);
    file.with([&](const PeftAdapter& adapter) { slots.load(0, adapter); });
  });
  memory.expect_slot(
      0,
      [&](std::int64_t i, std::int64_t k) {
        return from_float<bf16>(file.a("mlp.gate_up_proj").at(i % 4, k)).bits;
      },
      [&](std::int64_t i, std::int64_t j) {
        return from_float<bf16>(file.b("mlp.gate_up_proj").at(i / 4 * 8 + i % 4, j)).bits;
      });

  File<f16> halves;
  halves.add("mlp.gate_up_proj", 4, 6, 16);
  const Memory<float> floats(gate_up_layer(0), 1, false, [&](LoraSlots<float>& slots) {
    halves.with([&](const PeftAdapter& adapter) { slots.load(0, adapter); });
  });
  floats.expect_slot(
      0,
      [&](std::int64_t i, std::int64_t k) {
        return bits_of(to_float(halves.a("mlp.gate_up_proj").at(i % 4, k)));
      },
      [&](std::int64_t i, std::int64_t j) {
        return bits_of(to_float(halves.b("mlp.gate_up_proj").at(i / 4 * 8 + i % 4, j)));
      });
}

// Merged: B and its bias are rounded, multiplied and rounded again; A is as it is.
TEST(LoraSlots, MergeTheScaleIfAsked) {
  for (const bool merges : {false, true}) {
    for (const bool use_rslora : {false, true}) {
      File<float> file;
      file.add("mlp.gate_up_proj", 3, 6, 16);
      file.add_bias("mlp.gate_up_proj", 16);
      file.config.alpha = 7;
      file.config.use_rslora = use_rslora;
      for (auto& [name, tensor] : file.tensors)
        for (std::size_t i = 0; i < tensor.values.size(); ++i)
          tensor.values[i] = 1.0f + float(i * i + 1) * 0x1p-12f;
      LoraLayer layer = gate_up_layer(0);
      layer.merges_scale = merges;
      LoraSlotState state;
      const Memory<bf16> memory(layer, 1, true, [&](LoraSlots<bf16>& slots) {
        file.with([&](const PeftAdapter& adapter) { state = slots.load(0, adapter); });
      });
      const auto factor = float(use_rslora ? 7 / std::sqrt(3.0) : 7 / 3.0);
      const auto scaled = [&](float stored) {
        const bf16 rounded = from_float<bf16>(stored);
        return merges ? from_float<bf16>(to_float(rounded) * factor).bits : rounded.bits;
      };
      EXPECT_EQ(state.scales, std::vector<float>(2, merges ? 1.0f : factor));
      memory.expect_slot(
          0,
          [&](std::int64_t i, std::int64_t k) {
            return i % 4 < 3 ? from_float<bf16>(file.a("mlp.gate_up_proj").at(i % 4, k)).bits : 0u;
          },
          [&](std::int64_t i, std::int64_t j) {
            return j < 3 ? scaled(file.b("mlp.gate_up_proj").at(i / 4 * 8 + i % 4, j)) : 0u;
          });
      Memory<bf16>::expect(memory.bias, 0, 1, 8, 0, "bias", [&](std::int64_t, std::int64_t i) {
        const auto& bias = file.tensor("mlp.gate_up_proj.lora_B.bias").values;
        return scaled(bias[std::size_t(i / 4 * 8 + i % 4)]);
      });
    }
  }
}

// Rules are told all that there is to know.
TEST(LoraSlots, ScaleAsTheRulesSay) {
  File<bf16> file;
  file.add("mlp.up_proj", 2, 6, 8);
  ShardingRules rules;
  rules.lora.scale = [](double alpha, std::int64_t rank, std::int64_t max_rank, bool use_rslora) {
    return alpha * 1000 + double(rank * 100 + max_rank * 10 + (use_rslora ? 1 : 0));
  };
  LoraSlotState state;
  const Memory<bf16> memory(
      gate_up_layer(0), 1, false,
      [&](LoraSlots<bf16>& slots) {
        file.with([&](const PeftAdapter& adapter) { state = slots.load(0, adapter); });
      },
      rules);
  EXPECT_EQ(memory.said, "");
  EXPECT_EQ(state.scales, (std::vector<float>{1, 16240}));
}

// ---- Refused.

struct Bad {
  const char* what;
  std::function<void(File<bf16>&)> make;
  std::string sentence;  // behind the file's path
};

const Bad kBad[] = {
    {"a LoRA rank above the slots'", [](File<bf16>& f) { f.add("mlp.gate_up_proj", 5, 6, 16); },
     "mlp.gate_up_proj has LoRA rank 5, but slots have 4"},
    {"columns of another layer", [](File<bf16>& f) { f.add("mlp.up_proj", 4, 8, 8); },
     "base_model.model.mlp.up_proj.lora_A.weight is [4, 8], but the layer's is [4, 6]"},
    {"rows of another layer", [](File<bf16>& f) { f.add("mlp.up_proj", 4, 6, 16); },
     "base_model.model.mlp.up_proj.lora_B.weight is [16, 4], but the layer's is [8, 4]"},
    {"rows of one matrix for both", [](File<bf16>& f) { f.add("mlp.gate_up_proj", 4, 6, 8); },
     "base_model.model.mlp.gate_up_proj.lora_B.weight is [8, 4], but the layer's is [16, 4]"},
    {"both",
     [](File<bf16>& f) {
       f.add("mlp.gate_up_proj", 4, 6, 16);
       f.add("mlp.up_proj", 4, 6, 8);
     },
     "mlp.gate_up_proj and mlp.up_proj are adapters of the same weights"},
    {"a bias without room",
     [](File<bf16>& f) {
       f.add("mlp.gate_up_proj", 4, 6, 16);
       f.add_bias("mlp.gate_up_proj", 16);
     },
     "base_model.model.mlp.gate_up_proj.lora_B.bias, but slots have no room for biases"},
};

TEST(LoraSlots, RefuseFilesThatDoNotFit) {
  for (const Bad& bad : kBad) {
    SCOPED_TRACE(bad.what);
    File<bf16> file;
    bad.make(file);
    const Memory<bf16> memory(gate_up_layer(0), 1, false, [&](LoraSlots<bf16>& slots) {
      file.with([&](const PeftAdapter& adapter) { slots.load(0, adapter); });
    });
    EXPECT_EQ(memory.said, file.path() + ": " + bad.sentence);
  }
}

// What a mistake in a decision ends with.
std::string fault_with(const ShardingRules& rules, const LoraLayer& layer) {
  File<bf16> file;
  std::int64_t rows = 0;
  for (const std::int64_t r : layer.base.rows) rows += r;
  file.add(layer.prefix + layer.fused, 2, layer.base.in_features, rows);
  return Memory<bf16>(
             layer, 1, false,
             [&](LoraSlots<bf16>& slots) {
               file.with([&](const PeftAdapter& adapter) { slots.load(0, adapter); });
             },
             rules)
      .said;
}

TEST(LoraSlots, AreFilledByAsManyRowsAsTheyHave) {
  ShardingRules rules;
  rules.lora.slot_rows = [](const LoraBase& base) { return base.total_rows() / base.tp_size; };
  const LoraLayer qwen = qkv_layer(kServed[5].model, 8, 3, 32);
  EXPECT_EQ(fault_with(rules, qwen),
            "BadLaunch: B of model.layers.3.self_attn.qkv_proj is loaded as [1536, 32] into a slot "
            "of [1152, 32]");
  EXPECT_EQ(fault_with(sharding_rules(), qwen), "");
}

TEST(LoraSlots, TakeOnlyWhatATensorHas) {
  const LoraLayer layer = gate_up_layer(1);
  ShardingRules rules;
  rules.lora.b_rows = [](const LoraBase& base, int part, bool) {
    return Shard{base.own[std::size_t(part)].offset + part * 12, 4};
  };
  EXPECT_EQ(fault_with(rules, layer),
            "OutOfBounds: takes rows 16 .. 20 of base_model.model.mlp.gate_up_proj.lora_B.weight, "
            "which has 16");
  rules = {};
  rules.lora.a_columns = [](const LoraBase& base) {
    return Shard{base.tp_rank * base.in_features, base.in_features};
  };
  EXPECT_EQ(fault_with(rules, layer),
            "OutOfBounds: takes columns 6 .. 12 of "
            "base_model.model.mlp.gate_up_proj.lora_A.weight, which has 6");
}

TEST(LoraSlots, RefuseMemoryAndSlotsThatAreNone) {
  const auto fault = [](std::int64_t a_rows, std::int64_t b_rows, int slot) {
    return testing::fault_of([=](Stream& stream) {
      const Buffer some("room", 4096, std::uint8_t{0xFF});
      LoraSlots<bf16> slots(gate_up_layer(0), sharding_rules(), some.as<bf16>(a_rows, 6),
                            some.as<bf16>(b_rows, 4), {}, stream);
      slots.unload(slot);
    });
  };
  EXPECT_EQ(fault(16, 16, 1), "");
  EXPECT_EQ(fault(16, 16, 2), "BadLaunch: slot 2 of 2");
  EXPECT_EQ(fault(16, 16, -1), "BadLaunch: slot -1 of 2");
  EXPECT_EQ(fault(16, 15, 0),
            "BadLaunch: slots of A [8, 6] and of B [8, 4] do not fill [16, 6] and [15, 4], or the "
            "bias [0, 0]");
  EXPECT_EQ(fault(15, 16, 0),
            "BadLaunch: slots of A [8, 6] and of B [8, 4] do not fill [15, 6] and [16, 4], or the "
            "bias [0, 0]");
}

}  // namespace
}  // namespace tp
