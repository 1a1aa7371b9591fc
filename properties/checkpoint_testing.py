#!/usr/bin/env python3
"""tpcheck on the tensors of checkpoints that the package safetensors wrote.

    checkpoint_testing.py FOLDER TPCHECK

FOLDER is that of harness/base/safetensors_testing.py, whose venv this uses. Small models with the
names, shapes and configs of real ones are fuzzed (which must pass), fuzzed with a mistake in the
loader (which must be found, and be found again by the replay line), and damaged (which must be said
before anything runs). Exit code: 0 all was as it should be, 1 something was not, 77 the package
cannot be had.
"""

import ctypes
import json
import random
import re
import shlex
import shutil
import struct
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "harness" / "base"))
import safetensors_testing as reference  # noqa: E402

OPS = "qkv_linear,merged_linear,row_linear"


def write(path, tensors):
    from safetensors import TensorSpec, serialize_file

    buffers = {name: ctypes.create_string_buffer(data, len(data)) for name, (_, _, data) in tensors.items()}
    specs = {name: TensorSpec(dtype=reference.WORDS[dtype], shape=list(shape),
                              data_ptr=ctypes.addressof(buffers[name]), data_len=len(data))
             for name, (dtype, shape, data) in tensors.items()}
    serialize_file(specs, path, {"format": "pt"})


class Tensors(dict):
    """name: (dtype, shape, bytes), made from a seed."""

    def __init__(self, seed):
        super().__init__()
        self.random = random.Random(seed)

    def reals(self, name, dtype, shape, draw):
        count = 1
        for n in shape:
            count *= n
        pack = {"F32": lambda x: struct.pack("<f", x), "BF16": lambda x: struct.pack("<f", x)[2:]}[dtype]
        self[name] = (dtype, shape, b"".join(pack(draw()) for _ in range(count)))

    def bf16(self, name, *shape):
        self.reals(name, "BF16", shape, lambda: self.random.gauss(0, 0.05))

    def scale(self, name, shape, size):
        self.reals(name, "F32", shape, lambda: size * self.random.uniform(0.5, 2))

    def codes(self, name, *shape):
        """e4m3 of either sign within eleven binades, none of them NaN."""
        magnitude = self.random.choices(range(0x20, 0x78), k=shape[0] * shape[1])
        self[name] = ("F8_E4M3", shape, bytes(m | self.random.choice((0, 0x80)) for m in magnitude))

    def pairs(self, name, rows, cols):
        """Two e2m1 a byte: every byte is one."""
        self[name] = ("U8", (rows, cols // 2), self.random.randbytes(rows * cols // 2))

    def decoder(self, layers, hidden, vocabulary=32):
        self.bf16("model.embed_tokens.weight", vocabulary, hidden)
        self.bf16("model.norm.weight", hidden)
        self.bf16("lm_head.weight", vocabulary, hidden)
        for i in range(layers):
            self.bf16(f"model.layers.{i}.input_layernorm.weight", hidden)
            self.bf16(f"model.layers.{i}.post_attention_layernorm.weight", hidden)


def config(**more):
    return {"hidden_size": 128, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 8,
            "intermediate_size": 256, "num_hidden_layers": 2, "torch_dtype": "bfloat16",
            "rms_norm_eps": 1e-6, **more}


def phi3(dialect):
    """Fused on disk, one scale a fused tensor."""
    tensors = Tensors(f"phi3 {dialect}")
    tensors.decoder(2, 128)
    scalar = () if dialect == "fp8" else (1,)
    for i in range(2):
        for module, rows, cols in (("self_attn.qkv_proj", (16 + 8) * 8, 128), ("self_attn.o_proj", 128, 128),
                                   ("mlp.gate_up_proj", 512, 128), ("mlp.down_proj", 128, 256)):
            name = f"model.layers.{i}.{module}"
            tensors.codes(f"{name}.weight", rows, cols)
            tensors.scale(f"{name}.weight_scale", scalar, 0.01)
            tensors.scale(f"{name}.input_scale", scalar, 0.02)
    said = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
    if dialect != "fp8":
        numbers = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
        said = {"quant_method": "compressed-tensors", "format": "float-quantized", "ignore": ["lm_head"],
                "quantization_status": "compressed",
                "config_groups": {"group_0": {"targets": ["Linear"], "weights": numbers,
                                              "input_activations": numbers}}}
    return tensors, {"config.json": config(model_type="phi3", quantization_config=said)}


def minimax():
    """Blocks of 128 x 128 that fit neither the matrices nor the ranks' parts of them; experts."""
    tensors, hidden, width = Tensors("minimax"), 320, 192
    tensors.decoder(2, hidden)

    def linear(name, rows, cols):
        tensors.codes(f"{name}.weight", rows, cols)
        tensors.scale(f"{name}.weight_scale_inv", (-(-rows // 128), -(-cols // 128)), 0.01)

    for i in range(2):
        attention, moe = f"model.layers.{i}.self_attn", f"model.layers.{i}.block_sparse_moe"
        linear(f"{attention}.q_proj", 16 * 24, hidden)
        linear(f"{attention}.k_proj", 4 * 24, hidden)
        linear(f"{attention}.v_proj", 4 * 24, hidden)
        linear(f"{attention}.o_proj", hidden, 16 * 24)
        tensors.bf16(f"{attention}.q_norm.weight", 16 * 24)
        tensors.bf16(f"{attention}.k_norm.weight", 4 * 24)
        tensors.bf16(f"{moe}.gate.weight", 2, hidden)
        tensors.reals(f"{moe}.e_score_correction_bias", "F32", (2,), lambda: 0.5)
        for expert in range(2):
            linear(f"{moe}.experts.{expert}.w1", width, hidden)
            linear(f"{moe}.experts.{expert}.w3", width, hidden)
            linear(f"{moe}.experts.{expert}.w2", hidden, width)
    said = {"quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"]}
    return tensors, {"config.json": config(
        model_type="minimax_m2", architectures=["MiniMaxM2ForCausalLM"], hidden_size=hidden, head_dim=24,
        intermediate_size=width, num_local_experts=2, use_qk_norm=True, quantization_config=said)}


def nvfp4(dialect):
    tensors = Tensors(f"nvfp4 {dialect}")
    tensors.decoder(2, 128)
    for i in range(2):
        for module, rows, cols in (("self_attn.q_proj", 128, 128), ("self_attn.k_proj", 32, 128),
                                   ("self_attn.v_proj", 32, 128), ("self_attn.o_proj", 128, 128),
                                   ("mlp.gate_proj", 256, 128), ("mlp.up_proj", 256, 128),
                                   ("mlp.down_proj", 128, 256)):
            name = f"model.layers.{i}.{module}"
            tensors.pairs(f"{name}.weight" if dialect == "modelopt" else f"{name}.weight_packed", rows, cols)
            tensors.codes(f"{name}.weight_scale", rows, cols // 16)
            dtype, shape, data = tensors[f"{name}.weight_scale"]
            tensors[f"{name}.weight_scale"] = (dtype, shape, bytes(byte & 0x7F for byte in data))
            if dialect == "modelopt":
                tensors.scale(f"{name}.weight_scale_2", (), 0.001)
                tensors.scale(f"{name}.input_scale", (), 0.001)
            else:
                tensors.scale(f"{name}.weight_global_scale", (1,), 1000)
                tensors.scale(f"{name}.input_global_scale", (1,), 1000)
            if module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
                tensors.bf16(f"{name}.bias", rows)
    if dialect == "modelopt":
        beside = {"producer": {"name": "modelopt"},
                  "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "group_size": 16,
                                   "exclude_modules": ["lm_head"]}}
        return tensors, {"config.json": config(model_type="qwen2"), "hf_quant_config.json": beside}
    numbers = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    said = {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized", "ignore": ["lm_head"],
            "quantization_status": "compressed",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": {**numbers, "dynamic": False},
                                          "input_activations": {**numbers, "dynamic": "local"}}}}
    return tensors, {"config.json": config(model_type="qwen2", quantization_config=said)}


def vision(dtype):
    """Not quantised, each query with a gate behind it; nested beside a vision tower of as many layers."""
    tensors = Tensors("vision")
    for i in range(2):
        decoder, tower = f"model.language_model.layers.{i}", f"model.visual.blocks.{i}"
        for module, rows, cols in (("self_attn.q_proj", 256, 128), ("self_attn.k_proj", 32, 128),
                                   ("self_attn.v_proj", 32, 128), ("self_attn.o_proj", 128, 128),
                                   ("mlp.gate_proj", 256, 128), ("mlp.up_proj", 256, 128),
                                   ("mlp.down_proj", 128, 256)):
            tensors.reals(f"{decoder}.{module}.weight", dtype, (rows, cols), lambda: tensors.random.gauss(0, 0.05))
        for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors.bf16(f"{tower}.self_attn.{module}.weight", 48, 48)
    return tensors, {"config.json": {"model_type": "qwen3_5", "text_config": config(
        model_type="qwen3_5_text", attn_output_gate=True)}}


def gptq(act_order):
    """A fused q, k and v in stripes of KV heads; four bits."""
    tensors, group = Tensors(f"gptq {act_order}"), 32
    tensors.decoder(2, 128)
    for i in range(2):
        order = [k // group for k in range(256)]
        if act_order:
            tensors.random.shuffle(order)
        for module, rows, cols in (("attention.query_key_value", 192, 128), ("attention.dense", 128, 128),
                                   ("mlp.gate_proj", 256, 128), ("mlp.up_proj", 256, 128),
                                   ("mlp.down_proj", 128, 256)):
            name = f"transformer.h.{i}.{module}"
            of_column = [g % (cols // group) for g in order[:cols]]
            tensors[f"{name}.qweight"] = ("I32", (cols // 8, rows), tensors.random.randbytes(cols // 8 * rows * 4))
            tensors[f"{name}.qzeros"] = ("I32", (cols // group, rows // 8), b"\x77" * (cols // group * rows // 2))
            tensors[f"{name}.g_idx"] = ("I32", (cols,), struct.pack(f"<{cols}i", *of_column))
            tensors[f"{name}.scales"] = ("F16", (cols // group, rows), b"".join(
                struct.pack("<e", tensors.random.uniform(0.01, 0.03)) for _ in range(cols // group * rows)))
    said = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": True, "desc_act": act_order}
    return tensors, {"config.json": config(model_type="llama", torch_dtype="float16", quantization_config=said)}


def write_model(folder, tensors, texts):
    """In two files and an index, as large models are."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in texts.items():
        (folder / name).write_text(json.dumps(content, indent=2))
    weight_map = {}
    for part in range(2):
        file = f"model-{part + 1:05}-of-00002.safetensors"
        names = [name for i, name in enumerate(sorted(tensors)) if i % 2 == part]
        write(folder / file, {name: tensors[name] for name in names})
        weight_map.update({name: file for name in names})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


class Tpcheck:
    def __init__(self, program, folder):
        self.program, self.folder = program, folder

    def __call__(self, *arguments):
        done = subprocess.run([self.program, *map(str, arguments)], cwd=self.folder, capture_output=True, text=True)
        self.said = f"tpcheck {shlex.join(map(str, arguments))}\nexit code {done.returncode}\n{done.stdout}{done.stderr}"
        return done.returncode, done.stdout, done.stderr

    def expect(self, code, *arguments):
        got, out, err = self(*arguments)
        assert got == code, f"exit code {code} was expected of {self.said}"
        return out, err


def fuzz(model, *more, ops=OPS):
    return ("fuzz", "--model", model, "--ops", ops, "--cases", 60, "--seed", 5, "--artifacts", "artifacts",
            *more)


def passes(tpcheck, model):
    """All cases pass, and most of them are on the file's tensors."""
    out, err = tpcheck.expect(0, *fuzz(model))
    assert "runs on none of its tensors" not in err, err
    own = re.search(r"(\d+) of 60 cases ran on its tensors", out)
    assert own and int(own[1]) >= 36, out
    print(f"{model.name}: {own[0]}")


def found(tpcheck, model, mutant, ops=OPS):
    out, _ = tpcheck.expect(1, *fuzz(model, "--mutant", mutant, ops=ops))
    command = re.search(r"replay +\./tpcheck (replay .*)", out)
    assert command, out
    replay = shlex.split(command[1])
    assert " layer=" in replay[1] and "--model" in replay, f"not a file's tensors: {out}"
    again, _ = tpcheck.expect(1, *replay)
    assert mutant in again, again
    at = replay.index("--mutant")
    tpcheck.expect(0, *replay[:at], *replay[at + 2:])  # the loader without the mistake
    # The line alone does not say whose tensors they were.
    at = replay.index("--model")
    _, err = tpcheck.expect(2, *replay[:at], *replay[at + 2:])
    assert "--model DIR" in err, err
    print(f"{model.name}: {mutant} found: {replay[1]}")


def refused_line(tpcheck, model, changes, words):
    """A case that is not what the files have."""
    line = {"hidden_size": 128, "num_heads": 16, "num_kv_heads": 4, "head_dim": 8, "tp_size": 2, "num_tokens": 1,
            "dtype": "bf16", "fill": "dense", "seed": 1, "dialect": "native", "activations": "fixed",
            "weights": "fused", "quant": "fp8_tensor", "layer": 1}
    text = "v1 qkv_linear " + " ".join(f"{key}={value}" for key, value in (line | changes).items())
    code = 0 if not words else 2
    _, err = tpcheck.expect(code, "replay", text, "--model", model)
    for word in words:
        assert word in err, f"no '{word}' in {tpcheck.said}"


def refused(tpcheck, folder, tensors, texts, words):
    write_model(folder, tensors, texts)
    _, err = tpcheck.expect(2, *fuzz(folder))
    for word in words:
        assert word in err, f"no '{word}' in {tpcheck.said}"
    print(f"refused: {err.strip().splitlines()[-1]}")


def damaged(tensors, name, change):
    other = dict(tensors)
    dtype, shape, data = other.pop(name)
    if change is not None:
        other[name] = change(dtype, shape, data)
    return other


def main():
    folder, program = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    reference.enter_venv(folder)
    folder = folder / "models"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    models = {"phi3-fp8": phi3("fp8"), "phi3-compressed": phi3("compressed-tensors"), "minimax": minimax(),
              "nvfp4-modelopt": nvfp4("modelopt"), "nvfp4-compressed": nvfp4("compressed-tensors"),
              "vision": vision("BF16"), "gptq": gptq(False), "gptq-act-order": gptq(True)}
    for name, model in models.items():
        write_model(folder / name, *model)
    tpcheck = Tpcheck(program, folder)
    for name in models:
        passes(tpcheck, folder / name)
    tpcheck.expect(0, "fuzz", "--model", folder / "minimax", "--ops", OPS, "--each", "--tp", "1..16")
    found(tpcheck, folder / "phi3-fp8", "fused-scale-slot-uninit:max")
    found(tpcheck, folder / "minimax", "block-scale-ceil-ceil:ceil")
    found(tpcheck, folder / "nvfp4-compressed", "own:global-scale-not-inverted")
    found(tpcheck, folder / "gptq", "interleaved-ba-midpoint-split:as-blocks")
    found(tpcheck, folder / "gptq-act-order", "actorder-scale-inverted:table-cut")
    found(tpcheck, folder / "nvfp4-modelopt", "own:gated-up-of-next-rank", "merged_linear")
    found(tpcheck, folder / "minimax", "group-straddles-rank:floor", "row_linear")

    for changes, words in (
            ({}, []),
            ({"activations": "plain"}, []),
            ({"layer": 3}, ["layer=3", "has no q_proj, k_proj and v_proj in its layer 2"]),
            ({"hidden_size": 64}, ["layer=1", "qkv_proj.weight", "is F8_E4M3 [192, 128], not F8_E4M3 [192, 64]"]),
            ({"num_heads": 8}, ["is F8_E4M3 [192, 128], not F8_E4M3 [128, 128]"]),
            ({"weights": "split"}, ["which weights=split is not"]),
            ({"quant": "none", "activations": "plain"}, ["qkv_proj is fp8_tensor, and the case has quant=none"]),
            ({"dialect": "modelopt"}, ["qkv_proj is native, and the case has dialect=modelopt"]),
            ({"activations": "token"}, ["activations fixed, and the case has activations=token"]),
            ({"bias": "yes"}, ['there is no tensor "model.layers.0.self_attn.qkv_proj.bias"']),
            ({"files": 2}, ["files=1"]),
            ({"law": "files"}, ["law=files"])):
        refused_line(tpcheck, folder / "phi3-fp8", changes, words)

    bad, nothing = folder / "bad", lambda dtype, shape, data: (dtype, shape, bytes(len(data)))
    tensors, texts = models["phi3-fp8"]
    name = "model.layers.1.self_attn.qkv_proj.weight_scale"
    refused(tpcheck, bad, damaged(tensors, name, nothing), texts, ["model-0000", name, "element 0 is 0"])
    refused(tpcheck, bad, damaged(tensors, name, None), texts, [f'there is no tensor "{name}"'])
    name = "model.layers.1.mlp.down_proj.weight"
    refused(tpcheck, bad, damaged(tensors, name, lambda dtype, shape, data: (dtype, (256, 128), data)), texts,
            [f'tensor "{name}" is F8_E4M3 [256, 128], not F8_E4M3 [128, 256]'])
    tensors, texts = models["minimax"]
    name = "model.layers.1.self_attn.v_proj.weight_scale_inv"
    refused(tpcheck, bad, damaged(tensors, name, lambda dtype, shape, data: (
        dtype, shape, data[:-4] + struct.pack("<f", float("nan")))), texts, [name, "element 2 is nan"])
    name = "model.layers.1.block_sparse_moe.experts.0.w3.weight"
    refused(tpcheck, bad, damaged(tensors, name, None), texts, [f'there is no tensor "{name}"'])
    tensors, texts = models["gptq"]
    name = "transformer.h.1.mlp.up_proj.g_idx"
    refused(tpcheck, bad, damaged(tensors, name, lambda dtype, shape, data: (
        dtype, shape, data[-4:] + data[4:])), texts, [name, "element 0 is 3, and of"])
    name = "transformer.h.0.attention.dense.qzeros"
    refused(tpcheck, bad, damaged(tensors, name, nothing), texts, [name, "element 0 is 0, but known is"])


main()
