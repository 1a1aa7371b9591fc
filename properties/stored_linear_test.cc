// The mistakes on the way from a checkpoint to a rank's weights and scales: each planted at the
// smallest shape where it can show, found in the stage that makes it, or beside a buffer of that;
// and the laws of layers that were loaded, seen to hold in every format, and to fail.

#include <gtest/gtest.h>

#include <atomic>
#include <string>
#include <vector>

#include "harness/base/case.h"
#include "harness/base/sharding_rules.h"
#include "harness/group/mpi_testing.h"
#include "harness/group/tp_group.h"
#include "properties/planted_testing.h"

namespace tp {
namespace {

// Whether the operator's own mutant says that it decides something in this case.
bool decides(const std::string& id, const std::string& line) {
  const Case c = case_from_line(line);
  for (const Mutant& m : find_operator(c.op).mutants) {
    if (m.id == id) return m.shows(c);
  }
  ADD_FAILURE() << c.op << " has no " << id;
  return false;
}

struct Planted {
  const char* id;
  const char* line;  // after the version, but for num_tokens, seed and fill
  Outcome outcome;
  const char* where;  // in the verdict
  int num_tokens = 1;
};

constexpr auto kWrong = Outcome::WrongValue;
constexpr auto kUninitialised = Outcome::Uninitialised;

// In the order of stored_linear_mutants.cc: those first that nothing else would notice.
const Planted kPlanted[] = {
    // Both readings of a striped tensor are right of one row.
    {"interleaved-ba-midpoint-split:as-blocks",
     "qkv_linear hidden_size=8 num_heads=2 num_kv_heads=2 head_dim=1 tp_size=1 dtype=bf16 "
     "weights=striped",
     kWrong, "stage load, tp_rank 0, q_proj[1, "},
    {"interleaved-ba-midpoint-split:as-blocks",
     "qkv_linear hidden_size=8 num_heads=4 num_kv_heads=2 head_dim=1 tp_size=4 dtype=f16 "
     "weights=striped bias=yes quant=fp8_tensor activations=token",
     kWrong, "stage load, tp_rank 2, q_proj.codes[2, "},
    {"interleaved-ba-midpoint-split:as-blocks",
     "merged_linear hidden_size=8 intermediate_per_rank=2 tp_size=1 dtype=bf16 weights=striped",
     kWrong, "stage load, tp_rank 0, gate_proj[1, "},
    {"interleaved-ba-midpoint-split:as-blocks",
     "merged_linear hidden_size=8 intermediate_per_rank=1 tp_size=2 dtype=f16 weights=striped "
     "quant=gptq dialect=native block=16",
     kWrong, "stage load, tp_rank 1, gate_proj.qweight[0, 1]"},
    {"packed-concat-contiguous-colwise:stored",
     "qkv_linear hidden_size=8 num_heads=2 num_kv_heads=2 head_dim=1 tp_size=2 dtype=bf16 "
     "weights=fused",
     kWrong, "stage load, tp_rank 1, q_proj[1, "},
    {"packed-concat-contiguous-colwise:stored",
     "merged_linear hidden_size=8 intermediate_per_rank=1 tp_size=2 dtype=f32 weights=fused",
     kWrong, "stage load, tp_rank 1, gate_proj[1, "},
    {"packed-concat-contiguous-colwise:stored",
     "merged_linear hidden_size=16 intermediate_per_rank=3 tp_size=2 dtype=bf16 weights=fused "
     "quant=nvfp4 tile=16",
     kWrong, "stage load, tp_rank 1, gate_proj.packed[3, "},
    // Fewer ranks than stripes, and more; as many are right.
    {"striped-fused-qkv:chunk",
     "qkv_linear hidden_size=8 num_heads=2 num_kv_heads=2 head_dim=1 tp_size=1 dtype=bf16 "
     "weights=striped",
     kWrong, "stage load, tp_rank 0, q_proj[1, "},
    {"striped-fused-qkv:chunk",
     "qkv_linear hidden_size=8 num_heads=4 num_kv_heads=2 head_dim=1 tp_size=4 dtype=f16 "
     "weights=striped",
     kWrong, "stage load, tp_rank 1, q_proj[1, "},
    {"striped-fused-qkv:chunk",
     "merged_linear hidden_size=8 intermediate_per_rank=2 tp_size=1 dtype=bf16 weights=striped",
     kWrong, "stage load, tp_rank 0, gate_proj[1, "},
    // Stripes of a block and a half; of two rows.
    {"striped-fused-qkv:scale-floor",
     "qkv_linear hidden_size=8 num_heads=2 num_kv_heads=2 head_dim=8 tp_size=2 dtype=bf16 "
     "weights=striped quant=fp8_block block=16",
     kWrong, "stage load, tp_rank 1, k_proj.scales[8, 0]"},
    {"striped-fused-qkv:scale-floor",
     "merged_linear hidden_size=8 intermediate_per_rank=9 tp_size=1 dtype=f32 weights=striped "
     "quant=fp8_block block=16 activations=token_groups",
     kWrong, "stage load, tp_rank 0, gate_proj.scales[8, 0]"},
    // One row into the second block is enough.
    {"block-scale-ceil-ceil:ceil",
     "qkv_linear hidden_size=1 num_heads=2 num_kv_heads=2 head_dim=4 tp_size=1 dtype=bf16 "
     "weights=fused quant=fp8_block block=16",
     kWrong, "stage load, tp_rank 0, k_proj.scales[0, 0]"},
    {"block-scale-ceil-ceil:ceil",
     "merged_linear hidden_size=1 intermediate_per_rank=9 tp_size=2 dtype=bf16 weights=split "
     "quant=fp8_block block=16",
     kWrong, "stage load, tp_rank 1, gate_proj.scales[9, 0]"},
    {"block-scale-ceil-ceil:floor",
     "qkv_linear hidden_size=1 num_heads=1 num_kv_heads=1 head_dim=9 tp_size=1 dtype=f16 "
     "weights=fused quant=fp8_block block=16",
     kWrong, "stage load, tp_rank 0, k_proj.scales[7, 0]"},
    {"block-scale-ceil-ceil:floor",
     "qkv_linear hidden_size=1 num_heads=2 num_kv_heads=2 head_dim=9 tp_size=2 dtype=bf16 "
     "weights=split quant=fp8_block block=16",
     kWrong, "stage load, tp_rank 1, q_proj.scales[16, 0]"},
    {"block-scale-ceil-ceil:floor",
     "merged_linear hidden_size=1 intermediate_per_rank=9 tp_size=2 dtype=bf16 weights=split "
     "quant=fp8_block block=16",
     kWrong, "stage load, tp_rank 1, gate_proj.scales[16, 0]"},
    {"block-scale-ceil-ceil:local-row",
     "qkv_linear hidden_size=1 num_heads=2 num_kv_heads=2 head_dim=9 tp_size=2 dtype=bf16 "
     "weights=split quant=fp8_block block=16",
     kWrong, "stage load, tp_rank 1, q_proj.scales[16, 0]"},
    {"block-scale-ceil-ceil:local-row",
     "merged_linear hidden_size=1 intermediate_per_rank=16 tp_size=2 dtype=bf16 weights=split "
     "quant=fp8_block block=16",
     kWrong, "stage load, tp_rank 1, gate_proj.scales[16, 0]"},

    // Global scales of their own: nothing crashes, and a product is only some per cent off.
    {"fused-global-scale-max:max",
     "qkv_linear hidden_size=16 num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 dtype=bf16 "
     "weights=split quant=nvfp4",
     kWrong, "stage prepare, tp_rank 0, "},
    {"fused-global-scale-max:max",
     "merged_linear hidden_size=16 intermediate_per_rank=1 tp_size=1 dtype=f16 weights=split "
     "quant=nvfp4 dialect=modelopt",
     kWrong, "stage prepare, tp_rank 0, "},
    {"fused-global-scale-max:min",
     "qkv_linear hidden_size=16 num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 dtype=f16 "
     "weights=split quant=nvfp4 dialect=modelopt",
     kWrong, "stage prepare, tp_rank 0, "},
    {"fused-global-scale-max:min",
     "merged_linear hidden_size=16 intermediate_per_rank=1 tp_size=1 dtype=bf16 weights=split "
     "quant=nvfp4",
     kWrong, "stage prepare, tp_rank 0, "},
    {"fused-global-scale-max:first",
     "qkv_linear hidden_size=16 num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 dtype=bf16 "
     "weights=split quant=nvfp4",
     kWrong, "stage prepare, tp_rank 0, k_proj.factors[0, 0]"},
    {"fused-global-scale-max:first",
     "merged_linear hidden_size=16 intermediate_per_rank=1 tp_size=1 dtype=f16 weights=split "
     "quant=nvfp4 dialect=modelopt",
     kWrong, "stage prepare, tp_rank 0, up_proj.factors[0, 0]"},
    {"fused-global-scale-max:mean",
     "qkv_linear hidden_size=16 num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 dtype=f16 "
     "weights=split quant=nvfp4 dialect=modelopt",
     kWrong, "stage prepare, tp_rank 0, q_proj.factors[0, 0]"},
    {"fused-global-scale-max:mean",
     "merged_linear hidden_size=16 intermediate_per_rank=1 tp_size=1 dtype=bf16 weights=split "
     "quant=nvfp4",
     kWrong, "stage prepare, tp_rank 0, gate_proj.factors[0, 0]"},
    // A token each, one twice as large as the other.
    {"wrong-tensor-cast-fp8:own-scale",
     "qkv_linear hidden_size=1 num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 dtype=bf16 "
     "weights=split quant=fp8_tensor activations=tensor gather=1",
     kWrong, "stage quantise, tp_rank 0, x_codes[", 2},
    {"wrong-tensor-cast-fp8:own-scale",
     "merged_linear hidden_size=1 intermediate_per_rank=1 tp_size=2 dtype=f32 weights=fused "
     "quant=fp8_channel activations=tensor gather=1",
     kWrong, "stage quantise, tp_rank 0, x_codes[", 2},
    {"wrong-tensor-cast-fp8:scale-of-rank-0",
     "qkv_linear hidden_size=1 num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 dtype=f16 "
     "weights=fused quant=fp8_channel activations=tensor gather=1",
     kWrong, "stage quantise, tp_rank 0, x_codes[", 2},
    {"wrong-tensor-cast-fp8:scale-of-rank-0",
     "merged_linear hidden_size=1 intermediate_per_rank=1 tp_size=2 dtype=bf16 weights=striped "
     "quant=fp8_tensor activations=tensor gather=1",
     kWrong, "stage quantise, tp_rank 0, x_codes[", 2},
    {"own:global-scale-not-inverted",
     "qkv_linear hidden_size=16 num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 dtype=bf16 "
     "weights=split quant=nvfp4",
     kWrong, "stage load, tp_rank 0, slots[0, 0]"},
    {"own:global-scale-not-inverted",
     "merged_linear hidden_size=16 intermediate_per_rank=1 tp_size=1 dtype=f16 weights=fused "
     "quant=nvfp4",
     kWrong, "stage load, tp_rank 0, slots[0, 0]"},
    {"own:global-scale-not-inverted",
     "row_linear hidden_size=1 in_per_rank=2 tp_size=8 dtype=bf16 weights=split quant=nvfp4",
     kWrong, "stage load, tp_rank 0, slots[0, 0]"},

    // The third rank begins in the second group of 16; the scale is there, but of the first one.
    {"group-straddles-rank:floor",
     "row_linear hidden_size=1 in_per_rank=8 tp_size=3 dtype=bf16 weights=split quant=fp8_block "
     "block=16",
     kWrong, "stage load, tp_rank 2, down_proj.scales[0, 1]"},
    {"group-straddles-rank:floor",
     "row_linear hidden_size=1 in_per_rank=8 tp_size=4 dtype=f16 weights=split quant=nvfp4", kWrong,
     "stage load, tp_rank 2, down_proj.scales[0, 1]"},
    // The right scales, and the first one for eight columns too many.
    {"group-straddles-rank:floor",
     "row_linear hidden_size=1 in_per_rank=24 tp_size=2 dtype=bf16 weights=split quant=nvfp4",
     kWrong, "stage row_linear, tp_rank 0, out[0, 0]"},
    {"group-straddles-rank:ceil",
     "row_linear hidden_size=1 in_per_rank=24 tp_size=2 dtype=bf16 weights=split quant=fp8_block "
     "block=16",
     Outcome::OutOfBounds, "tp_rank 1, takes columns 2 .. 4 of model.layers.0.mlp.down_proj."},
    {"group-straddles-rank:ceil",
     "row_linear hidden_size=1 in_per_rank=8 tp_size=2 dtype=f16 weights=split quant=nvfp4",
     Outcome::OutOfBounds, "tp_rank 1, takes columns 1 .. 2 of model.layers.0.mlp.down_proj."},
    {"group-straddles-rank:whole-groups",
     "row_linear hidden_size=1 in_per_rank=24 tp_size=2 dtype=bf16 weights=split quant=fp8_block "
     "block=16",
     kWrong, "stage row_linear, tp_rank 0, out[0, 0]"},
    {"group-straddles-rank:whole-groups",
     "row_linear hidden_size=1 in_per_rank=24 tp_size=2 dtype=f16 weights=split quant=nvfp4",
     kWrong, "stage row_linear, tp_rank 0, out[0, 0]"},
    {"actorder-scale-inverted:global-index",
     "row_linear hidden_size=1 in_per_rank=24 tp_size=2 dtype=bf16 weights=split quant=gptq "
     "dialect=native block=16",
     kWrong, "stage load, tp_rank 1, groups[0, 24]"},
    {"actorder-scale-inverted:subtracted",
     "row_linear hidden_size=1 in_per_rank=16 tp_size=2 dtype=f16 weights=split quant=gptq "
     "dialect=native block=16 act_order=1",
     kWrong, "stage load, tp_rank 1, groups[0, 16]"},
    // The two that sizes give away.
    {"actorder-scale-inverted:table-cut",
     "row_linear hidden_size=1 in_per_rank=16 tp_size=2 dtype=bf16 weights=split quant=gptq "
     "dialect=native block=16 act_order=1",
     Outcome::BadLaunch,
     "1 groups of model.layers.0.mlp.down_proj are loaded, but the rank has room for 2"},
    {"actorder-scale-inverted:table-cut",
     "row_linear hidden_size=1 in_per_rank=16 tp_size=2 dtype=bf16 weights=split quant=gptq "
     "dialect=native block=16",
     Outcome::BadLaunch,
     "2 groups of model.layers.0.mlp.down_proj are loaded, but the rank has room for 1"},

    {"gated-end-padding:weight-not-scale",
     "merged_linear hidden_size=1 intermediate_per_rank=15 tp_size=1 dtype=bf16 weights=split "
     "quant=fp8_channel tile=16",
     kUninitialised, "tp_rank 0, scales.padding[0, 0] depends on what memory held before"},
    {"gated-end-padding:weight-not-scale",
     "merged_linear hidden_size=1 intermediate_per_rank=15 tp_size=2 dtype=f32 weights=striped "
     "quant=fp8_block block=16 activations=token_groups tile=16",
     kUninitialised, "tp_rank 0, scales.padding[0, 0] depends on what memory held before"},
    {"gated-end-padding:weight-not-scale",
     "merged_linear hidden_size=16 intermediate_per_rank=1 tp_size=1 dtype=f16 weights=fused "
     "quant=nvfp4 tile=16",
     kUninitialised, "tp_rank 0, scales.padding[0, 0] depends on what memory held before"},
    {"gated-end-padding:weight-not-scale",
     "merged_linear hidden_size=8 intermediate_per_rank=15 tp_size=1 dtype=bf16 weights=split "
     "quant=gptq dialect=native block=16 tile=16",
     kUninitialised, "tp_rank 0, scales.padding[0, 0] depends on what memory held before"},

    // In a block, whichever of its linears it is; the first ranks' part of a group lies in o_proj.
    {"interleaved-ba-midpoint-split:as-blocks",
     "attention_block hidden_size=8 num_heads=2 num_kv_heads=2 head_dim=2 tp_size=1 dtype=bf16 "
     "weights=striped",
     kWrong, "stage qkv_load, tp_rank 0, q_proj[2, "},
    {"packed-concat-contiguous-colwise:stored",
     "attention_block hidden_size=8 num_heads=2 num_kv_heads=2 head_dim=2 tp_size=2 dtype=f16 "
     "weights=fused quant=fp8_channel activations=token",
     kWrong, "stage qkv_load, tp_rank 1, q_proj.codes[2, "},
    {"striped-fused-qkv:chunk",
     "attention_block hidden_size=8 num_heads=4 num_kv_heads=2 head_dim=2 tp_size=4 dtype=f32 "
     "weights=striped",
     kWrong, "stage qkv_load, tp_rank 1, q_proj[2, "},
    {"striped-fused-qkv:scale-floor",
     "attention_block hidden_size=8 num_heads=2 num_kv_heads=2 head_dim=8 tp_size=2 dtype=bf16 "
     "weights=striped quant=fp8_block block=16",
     kWrong, "stage qkv_load, tp_rank 1, k_proj.scales[8, 0]"},
    {"block-scale-ceil-ceil:ceil",
     "attention_block hidden_size=1 num_heads=2 num_kv_heads=2 head_dim=4 tp_size=1 dtype=bf16 "
     "weights=fused quant=fp8_block block=16",
     kWrong, "stage qkv_load, tp_rank 0, k_proj.scales[0, 0]"},
    {"block-scale-ceil-ceil:floor",
     "attention_block hidden_size=1 num_heads=2 num_kv_heads=2 head_dim=10 tp_size=2 dtype=f16 "
     "weights=split quant=fp8_block block=16",
     kWrong, "stage qkv_load, tp_rank 1, q_proj.scales[16, 0]"},
    {"block-scale-ceil-ceil:local-row",
     "attention_block hidden_size=1 num_heads=2 num_kv_heads=2 head_dim=10 tp_size=2 dtype=bf16 "
     "weights=split quant=fp8_block block=16",
     kWrong, "stage qkv_load, tp_rank 1, q_proj.scales[16, 0]"},
    {"fused-global-scale-max:max",
     "attention_block hidden_size=16 num_heads=1 num_kv_heads=1 head_dim=2 tp_size=1 dtype=bf16 "
     "weights=split quant=nvfp4",
     kWrong, "stage qkv_prepare, tp_rank 0, k_proj.factors[0, 0]"},
    {"fused-global-scale-max:min",
     "attention_block hidden_size=16 num_heads=1 num_kv_heads=1 head_dim=2 tp_size=1 dtype=f16 "
     "weights=split quant=nvfp4 dialect=modelopt",
     kWrong, "stage qkv_prepare, tp_rank 0, q_proj.factors[0, 0]"},
    {"fused-global-scale-max:first",
     "attention_block hidden_size=16 num_heads=1 num_kv_heads=1 head_dim=2 tp_size=1 dtype=bf16 "
     "weights=split quant=nvfp4",
     kWrong, "stage qkv_prepare, tp_rank 0, k_proj.factors[0, 0]"},
    {"fused-global-scale-max:mean",
     "attention_block hidden_size=16 num_heads=1 num_kv_heads=1 head_dim=2 tp_size=1 dtype=f16 "
     "weights=split quant=nvfp4 dialect=modelopt",
     kWrong, "stage qkv_prepare, tp_rank 0, q_proj.factors[0, 0]"},
    {"own:global-scale-not-inverted",
     "attention_block hidden_size=16 num_heads=1 num_kv_heads=1 head_dim=2 tp_size=1 dtype=bf16 "
     "weights=split quant=nvfp4",
     kWrong, "stage qkv_load, tp_rank 0, qkv_slots[0, 0]"},
    {"own:global-scale-not-inverted",
     "attention_block hidden_size=16 num_heads=2 num_kv_heads=1 head_dim=2 tp_size=2 dtype=f16 "
     "weights=fused quant=nvfp4 stage=o_proj",
     kWrong, "stage o_load, tp_rank 0, o_slots[0, 0]"},
    {"group-straddles-rank:floor",
     "attention_block hidden_size=1 num_heads=3 num_kv_heads=3 head_dim=8 tp_size=3 dtype=bf16 "
     "weights=split quant=fp8_block block=16",
     kWrong, "stage o_load, tp_rank 2, o_proj.scales[0, 1]"},
    {"group-straddles-rank:floor",
     "attention_block hidden_size=2 num_heads=2 num_kv_heads=2 head_dim=24 tp_size=2 dtype=bf16 "
     "weights=fused quant=nvfp4 stage=o_proj",
     kWrong, "stage o_proj, tp_rank 0, out[0, 0]"},
    // What is wrong of columns that are cut is wrong of those that are not.
    {"group-straddles-rank:floor",
     "attention_block hidden_size=17 num_heads=2 num_kv_heads=2 head_dim=2 tp_size=2 dtype=bf16 "
     "weights=fused quant=fp8_block block=16",
     Outcome::OutOfBounds,
     "tp_rank 1, takes columns 1 .. 3 of model.layers.0.self_attn.qkv_proj.weight_scale"},
    {"group-straddles-rank:ceil",
     "attention_block hidden_size=2 num_heads=2 num_kv_heads=2 head_dim=8 tp_size=2 dtype=f16 "
     "weights=split quant=nvfp4 stage=o_proj",
     Outcome::OutOfBounds,
     "tp_rank 1, takes columns 1 .. 2 of model.layers.0.self_attn.o_proj.weight_scale"},
    {"group-straddles-rank:whole-groups",
     "attention_block hidden_size=2 num_heads=2 num_kv_heads=2 head_dim=24 tp_size=2 dtype=f16 "
     "weights=split quant=nvfp4",
     kWrong, "stage o_proj, tp_rank 0, out[0, 0]"},
    {"actorder-scale-inverted:global-index",
     "attention_block hidden_size=8 num_heads=2 num_kv_heads=2 head_dim=24 tp_size=2 dtype=bf16 "
     "weights=split quant=gptq dialect=native block=16",
     kWrong, "stage o_load, tp_rank 1, o_groups[0, 24]"},
    {"actorder-scale-inverted:subtracted",
     "attention_block hidden_size=8 num_heads=2 num_kv_heads=2 head_dim=16 tp_size=2 dtype=f16 "
     "weights=striped quant=gptq dialect=native block=16 act_order=1",
     kWrong, "stage o_load, tp_rank 1, o_groups[0, 16]"},
    {"actorder-scale-inverted:table-cut",
     "attention_block hidden_size=8 num_heads=2 num_kv_heads=2 head_dim=16 tp_size=2 dtype=bf16 "
     "weights=split quant=gptq dialect=native block=16 act_order=1",
     Outcome::BadLaunch,
     "1 groups of model.layers.0.self_attn.o_proj are loaded, but the rank has room for 2"},
};

const char* const kSlotMutants[] = {"fused-scale-slot-uninit:max", "fused-scale-slot-uninit:min",
                                    "fused-scale-slot-uninit:last"};

const bool kAreKnown = [] {
  for (const Planted& p : kPlanted) planted_mutants().insert(p.id);
  for (const char* id : kSlotMutants) planted_mutants().insert(id);
  return true;
}();

class StoredMutants : public testing::TestWithParam<Planted> {};

TEST_P(StoredMutants, AreFoundWhereTheyCanShow) {
  const Planted& p = GetParam();
  for (const char* fill : {"exact", "dense"}) {
    const std::string line = std::string("v1 ") + p.line +
                             " num_tokens=" + std::to_string(p.num_tokens) + " seed=3 fill=" + fill;
    EXPECT_TRUE(decides(p.id, line)) << line << " with " << p.id;
    const Verdict v = run(line, p.id);
    EXPECT_EQ(name_of(v.outcome), name_of(p.outcome))
        << line << " with " << p.id << "\n  " << to_line(v);
    EXPECT_NE(v.detail.find(p.where), std::string::npos)
        << line << " with " << p.id << "\n  " << to_line(v);
    EXPECT_EQ(run(line).outcome, Outcome::Pass) << line << "\n  " << to_line(run(line));
  }
}

INSTANTIATE_TEST_SUITE_P(Zoo, StoredMutants, testing::ValuesIn(kPlanted), [](const auto& info) {
  return test_name(std::to_string(info.index) + "_" + info.param.id);
});

// Whatever the layer makes of its slots, and whatever memory held: the largest of stale numbers is
// found as the smallest is, of weights and of activations.
TEST(ScaleSlots, ThatNobodyWroteAreFoundWhateverMemoryHeld) {
  const std::string layers[] = {
      "qkv_linear hidden_size=1 num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 weights=fused "
      "quant=fp8_tensor",
      "qkv_linear hidden_size=16 num_heads=2 num_kv_heads=1 head_dim=1 tp_size=2 weights=striped "
      "quant=nvfp4",
      "qkv_linear hidden_size=1 num_heads=1 num_kv_heads=1 head_dim=1 tp_size=1 weights=fused "
      "quant=fp8_channel activations=fixed",
      "merged_linear hidden_size=1 intermediate_per_rank=1 tp_size=1 weights=striped "
      "quant=fp8_tensor dialect=modelopt activations=tensor",
      "merged_linear hidden_size=16 intermediate_per_rank=1 tp_size=1 weights=fused quant=nvfp4 "
      "dialect=modelopt",
      "merged_linear hidden_size=1 intermediate_per_rank=1 tp_size=2 weights=fused "
      "quant=fp8_tensor dialect=native activations=fixed",
      "attention_block hidden_size=16 num_heads=2 num_kv_heads=1 head_dim=2 tp_size=2 "
      "weights=striped quant=nvfp4",
      "attention_block hidden_size=1 num_heads=1 num_kv_heads=1 head_dim=2 tp_size=1 weights=fused "
      "quant=fp8_channel activations=fixed"};
  for (const std::string& layer : layers) {
    const bool of_weights = layer.find("fp8_channel") == std::string::npos,
               in_block = layer.starts_with("attention_block");
    const std::string where = std::string("tp_rank 0, ") + (in_block ? "qkv_" : "") +
                              (of_weights ? "slots" : "input_slots") +
                              "[0, 1] depends on what memory held before";
    for (int seed = 1; seed <= 20; ++seed) {
      for (const std::string poison : {"finite", "nan"}) {
        const std::string line = "v1 " + layer + " num_tokens=1 dtype=bf16 poison=" + poison +
                                 " fill=" + (seed % 2 == 0 ? "exact" : "dense") +
                                 " seed=" + std::to_string(seed);
        for (const char* id : kSlotMutants) {
          const Verdict v = run(line, id);
          EXPECT_EQ(name_of(v.outcome), "Uninitialised")
              << line << " with " << id << "\n  " << to_line(v);
          EXPECT_NE(v.detail.find(where), std::string::npos) << line << "\n  " << to_line(v);
        }
        EXPECT_EQ(run(line).outcome, Outcome::Pass) << line;
      }
    }
  }
}

// ---- Laws.

const char* const kFormats[] = {
    "quant=none",
    "quant=fp8_tensor",
    "quant=fp8_tensor dialect=modelopt activations=fixed",
    "quant=fp8_tensor dialect=native activations=tensor",
    "quant=fp8_channel activations=fixed",
    "quant=fp8_channel dialect=modelopt activations=token",
    "quant=fp8_block",
    "quant=fp8_block dialect=native activations=token_groups",
    "quant=nvfp4",
    "quant=nvfp4 dialect=modelopt",
    "quant=gptq dialect=native",
    "quant=gptq dialect=native act_order=1",
};
const char* const kGathered[] = {"quant=fp8_tensor activations=tensor gather=1",
                                 "quant=fp8_channel activations=token gather=1"};

struct Loaded {
  const char* name;
  const char* start;
  std::vector<std::string> weights;
  const char* other_dtype = "f16";  // than bf16
};

// Replicated KV heads, rows and columns that are no multiples of the blocks of 16, padding.
const Loaded kLoaded[] = {
    {"qkv_linear",
     "v1 qkv_linear hidden_size=48 num_heads=4 num_kv_heads=2 head_dim=5 tp_size=4 num_tokens=4 "
     "bias=yes pad=3",
     {"split", "fused", "striped"}},
    {"merged_linear",
     "v1 merged_linear hidden_size=48 intermediate_per_rank=9 tp_size=2 num_tokens=4 tile=16 "
     "bias=yes",
     {"split", "fused", "striped"}},
    {"row_linear",
     "v1 row_linear hidden_size=5 in_per_rank=24 tp_size=2 num_tokens=3 bias=yes pad=1",
     {"split"}},
    {"attention_block",
     "v1 attention_block hidden_size=40 num_heads=4 num_kv_heads=2 head_dim=24 tp_size=4 "
     "num_tokens=3 bias=yes qk_norm=full_width gate=1 pad=3",
     {"split", "fused", "striped"},
     "bf16"}};  // whole numbers that were multiplied twice may overflow f16

class LoadedLaws : public testing::TestWithParam<Loaded> {
 protected:
  // But for those that are about adapters, which these layers have none of.
  static std::vector<Law> laws() {
    std::vector<Law> all = find_operator(GetParam().name).laws;
    std::erase_if(all, [](const Law& law) { return law.name == "merged" || law.name == "zero_b"; });
    return all;
  }
  static std::vector<std::string> formats() {
    std::vector<std::string> all(std::begin(kFormats), std::end(kFormats));
    // Of layers that do not cut the columns of x.
    if (find_operator(GetParam().name).key("gather") != nullptr)
      all.insert(all.end(), std::begin(kGathered), std::end(kGathered));
    return all;
  }
};

TEST_P(LoadedLaws, HoldInEveryFormat) {
  const Loaded& loaded = GetParam();
  int seed = 0;
  for (const Law& law : laws()) {
    for (const std::string& format : formats()) {
      for (const std::string& stored : loaded.weights) {
        for (const std::string fill : {"exact", "dense"}) {
          ++seed;
          const std::string files = find_operator(loaded.name).key("files") != nullptr
                                        ? " files=" + std::to_string(1 + seed % 4)
                                        : "";
          const std::string line = std::string(loaded.start) + " block=16" + files + " " + format +
                                   " weights=" + stored + " fill=" + fill +
                                   " dtype=" + (seed % 3 == 0 ? loaded.other_dtype : "bf16") +
                                   " seed=" + std::to_string(seed) + " law=" + law.name;
          const Verdict v = run(line);
          EXPECT_EQ(v.outcome, Outcome::Pass) << line << "\n  " << to_line(v);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Operators, LoadedLaws, testing::ValuesIn(kLoaded),
                         [](const auto& info) { return info.param.name; });

// Each law is seen to fail: here, of a loader that takes the right rows in the first run only.
TEST_P(LoadedLaws, FailWhereTheSecondRunLoadsOtherRows) {
  static std::atomic<long> asked, right;
  Mutant later{"own:other-rows-later", "", "", sharding_rules()};
  later.rules.loader.stored_row = [](const FusedRows& fused, const LocalRow& at) {
    const std::int64_t rows = fused.parts[std::size_t(at.part)];
    return fused.stored(at.part, asked++ < right ? at.row : (at.row + 1) % rows);
  };
  const auto verdict = [&](const std::string& line, long of_first_run) {
    asked = 0;
    right = of_first_run;
    return find_operator(GetParam().name)
        .run(test_world(), case_from_line(line),
             {.mutant = &later, .deadline = std::chrono::seconds(60)});
  };
  for (const Law& law : laws()) {
    for (const std::string& format : formats()) {
      for (const std::string fill : {"exact", "dense"}) {
        const std::string line = std::string(GetParam().start) + " block=16 dtype=bf16 seed=1 " +
                                 format + " weights=" + GetParam().weights.back() + " fill=" + fill;
        ASSERT_EQ(verdict(line, 1L << 40).outcome, Outcome::Pass);
        const long of_first_run = asked;
        const Verdict v = verdict(line + " law=" + law.name, of_first_run);
        EXPECT_EQ(v.outcome, Outcome::LawBroken) << line << "\n  " << to_line(v);
        EXPECT_NE(v.detail.find("law " + law.name + ": "), std::string::npos) << to_line(v);
      }
    }
  }
}

// One rank shows what as many ranks as stripes hide.
TEST(LawsOfLoaded, OneRankShowsACutThatIsRightForAsManyRanksAsStripes) {
  const std::string id = "striped-fused-qkv:chunk";
  for (const std::string layer :
       {"qkv_linear hidden_size=8 num_heads=4 num_kv_heads=2 head_dim=3 tp_size=2",
        "merged_linear hidden_size=8 intermediate_per_rank=1 tp_size=3"}) {
    for (const std::string fill : {"exact", "dense"}) {
      const std::string line = "v1 " + layer +
                               " weights=striped quant=fp8_tensor activations=token num_tokens=2 "
                               "dtype=bf16 seed=1 fill=" +
                               fill;
      EXPECT_FALSE(decides(id, line)) << line;
      EXPECT_EQ(run(line, id).outcome, Outcome::Pass) << line;
      EXPECT_EQ(run(line + " law=tp1").outcome, Outcome::Pass) << line;
      const Verdict v = run(line + " law=tp1", id);
      EXPECT_EQ(v.outcome, Outcome::LawBroken) << to_line(v);
      EXPECT_NE(v.detail.find("law tp1: "), std::string::npos) << v.detail;
    }
  }
}

// Ranks whose largest elements happen to be equal do not tell whose is taken; with the tokens
// shared out otherwise they do.
TEST(LawsOfLoaded, OtherSharesOfTheTokensShowWhoseScaleItIs) {
  for (const std::string id :
       {"wrong-tensor-cast-fp8:own-scale", "wrong-tensor-cast-fp8:scale-of-rank-0"}) {
    for (const std::string layer :
         {"qkv_linear hidden_size=1 num_heads=2 num_kv_heads=1 head_dim=1",
          "merged_linear hidden_size=1 intermediate_per_rank=1"}) {
      int hidden = 0, broken = 0;
      for (int seed = 1; seed <= 40; ++seed) {
        const std::string line = "v1 " + layer +
                                 " weights=split quant=fp8_tensor activations=tensor gather=1 "
                                 "tp_size=2 num_tokens=4 dtype=bf16 seed=" +
                                 std::to_string(seed);
        if (run(line, id).finding()) continue;
        ++hidden;
        EXPECT_EQ(run(line + " law=tokens").outcome, Outcome::Pass) << line;
        const Verdict v = run(line + " law=tokens", id);
        if (v.outcome == Outcome::Pass) continue;
        ++broken;
        EXPECT_EQ(v.outcome, Outcome::LawBroken) << to_line(v);
        EXPECT_NE(v.detail.find("law tokens: stage quantise, "), std::string::npos) << v.detail;
      }
      EXPECT_GT(broken, 0) << layer << " with " << id << ": " << hidden;
    }
  }
}

// A row without padding is right however padding is done, loaded or not.
TEST(LawsOfLoaded, AnotherTileShowsWhatThisOneHides) {
  for (const std::string format :
       {"quant=none", "quant=fp8_block block=16", "quant=gptq dialect=native block=16"}) {
    const std::string line =
        "v1 merged_linear hidden_size=8 intermediate_per_rank=16 tp_size=2 num_tokens=2 dtype=bf16 "
        "seed=1 tile=16 weights=fused " +
        format;
    for (const std::string id : {"gated-end-padding:weight-end", "gated-end-padding:gate-not-up"}) {
      EXPECT_EQ(run(line, id).outcome, Outcome::Pass) << line;
      const Verdict v = run(line + " law=tile", id);
      EXPECT_EQ(v.outcome, Outcome::LawBroken) << to_line(v);
      EXPECT_NE(v.detail.find("law tile: "), std::string::npos) << v.detail;
    }
  }
}

// Codes that may be off by nothing, of scales that every rank makes of its own columns: one rank
// has others, and is right, too.
TEST(LawsOfLoaded, OneRankHasOtherCodesWhereScalesAreMadeOfItsColumns) {
  const Verdict v =
      run("v1 attention_block hidden_size=16 num_heads=64 num_kv_heads=4 head_dim=2 tp_size=4 "
          "num_tokens=6 dtype=f16 seed=282146 weights=fused quant=fp8_tensor activations=tensor "
          "law=tp1");
  EXPECT_EQ(v.outcome, Outcome::Pass) << to_line(v);
}

// A stage alone is a linear with all that it has; of one that is not run, nothing can be wrong.
TEST(MutantsOfBlocks, ChangeNothingWhereTheStageIsAnother) {
  const std::string id = "group-straddles-rank:whole-groups";
  const std::string line =
      "v1 attention_block hidden_size=2 num_heads=2 num_kv_heads=2 head_dim=24 tp_size=2 "
      "num_tokens=1 dtype=f16 fill=dense seed=3 weights=split quant=nvfp4 stage=";
  EXPECT_FALSE(decides(id, line + "qkv_linear"));
  EXPECT_FALSE(decides(id, line + "attention"));
  EXPECT_EQ(run(line + "qkv_linear", id).digest, run(line + "qkv_linear").digest);
  EXPECT_TRUE(decides(id, line + "o_proj"));
  EXPECT_EQ(run(line + "o_proj", id).outcome, Outcome::WrongValue);
}

TEST(RefusalsOfBlocks, AreThoseOfEachOfTheLinears) {
  const auto refusal = [](const std::string& options) {
    try {
      case_from_line(
          "v1 attention_block num_heads=2 num_kv_heads=2 tp_size=2 num_tokens=1 seed=1 " + options);
    } catch (const BadInput& e) {
      return std::string(e.what());
    }
    return std::string("accepted");
  };
  const std::string gptq = "dtype=bf16 weights=split quant=gptq dialect=native ";
  EXPECT_EQ(refusal(gptq + "hidden_size=8 head_dim=8"), "accepted");
  EXPECT_EQ(refusal(gptq + "hidden_size=12 head_dim=8"),
            "gptq has 8 columns a word, and a rank 12 of them");
  EXPECT_EQ(refusal(gptq + "hidden_size=8 head_dim=8 v_head_dim=4"),
            "gptq has 8 columns a word, and a rank 4 of them");
  EXPECT_EQ(refusal("dtype=bf16 hidden_size=8 head_dim=8 quant=nvfp4"),
            "quantised weights come from a checkpoint: weights=given has none");
  EXPECT_EQ(refusal("dtype=bf16 hidden_size=8 head_dim=8 weights=split act_order=1"),
            "act_order=1 is gptq's, and the weights are not");
}

// Sums within the budget whose bits depend on who adds the bias: where a checkpoint's tensors lie
// is no reason for other bits.
TEST(LawsOfLoaded, OtherBitsBreakTheLawThoughTheyAreWithinTheBudget) {
  static std::atomic<int> asked;
  static int in_first_run;
  const World& world = test_world();
  in_first_run = 2 * int(ranks_of_process(4, world.processes(), world.process()).size);
  Mutant other_bits{"own:other-bits", "", "", sharding_rules()};
  other_bits.rules.linear.row_adds_bias = [](int tp_rank) {
    return tp_rank == (asked++ < in_first_run ? 0 : 3);
  };
  const auto verdict = [&](const std::string& line) {
    asked = 0;
    return find_operator("row_linear")
        .run(test_world(), case_from_line(line),
             {.mutant = &other_bits, .deadline = std::chrono::seconds(60)});
  };
  const std::string line =
      "v1 row_linear hidden_size=24 in_per_rank=8 tp_size=4 num_tokens=6 dtype=f32 fill=dense "
      "seed=1 bias=yes weights=split quant=fp8_channel activations=token";
  EXPECT_EQ(run(line + " law=files").outcome, Outcome::Pass);
  EXPECT_EQ(verdict(line).outcome, Outcome::Pass);
  const Verdict v = verdict(line + " law=files");
  EXPECT_EQ(v.outcome, Outcome::LawBroken) << to_line(v);
  EXPECT_NE(v.detail.find("law files: out["), std::string::npos) << v.detail;
}

// Ranks whose columns are all of one group find its scale wherever they think that it begins.
TEST(MutantsOfGroups, ChangeNothingWhereEachRankHasOne) {
  const std::string id = "group-straddles-rank:whole-groups";
  const std::string line =
      "v1 row_linear hidden_size=3 tp_size=2 num_tokens=2 dtype=bf16 fill=dense seed=1 "
      "weights=split quant=nvfp4 in_per_rank=";
  EXPECT_FALSE(decides(id, line + "8"));
  EXPECT_EQ(run(line + "8", id).digest, run(line + "8").digest);
  EXPECT_TRUE(decides(id, line + "24"));
  EXPECT_EQ(run(line + "24", id).outcome, Outcome::WrongValue);
}

}  // namespace
}  // namespace tp
