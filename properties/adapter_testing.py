#!/usr/bin/env python3
"""Our reading of LoRA adapters against Python's and the package peft's.

    adapter_testing.py patterns PROGRAM     which modules random configs mean, by Python's re
    adapter_testing.py peft FOLDER PROGRAM  adapters that peft writes now, against those committed
    adapter_testing.py write FOLDER         writes those anew

PROGRAM is harness/base/peft_testing.cc. The adapters are in harness/base/corpus/adapters: what peft
saved of tiny models, and beside it, in expected.json, what peft itself makes of them (base_test
compares). peft needs torch, which is not installed here for its size: where there is none (Debian:
python3-torch), "peft" is skipped; where there is, the rest goes into FOLDER/peft_venv.
Exit code: 0 they agree, 1 they do not, 77 the packages cannot be had.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ADAPTERS = Path(__file__).resolve().parents[1] / "harness" / "base" / "corpus" / "adapters"
# Pinned, and without what they would pull in: the last transformers that take Debian's torch 1.13.
PACKAGES = ["peft==0.21.2", "transformers==4.46.3", "accelerate==1.0.1", "tokenizers==0.20.3",
            "huggingface_hub==0.26.5", "safetensors==0.8.0", "regex==2024.11.6", "pyyaml==6.0.2",
            "tqdm==4.67.1", "filelock==3.16.1", "fsspec==2024.10.0", "packaging==24.2",
            "requests==2.32.3", "urllib3==2.2.3", "idna==3.10", "certifi==2024.8.30",
            "charset_normalizer==3.4.0", "psutil==6.1.0", "typing_extensions==4.12.2"]
SKIP = 77


def skip(why):
    print(f"skipped: {why}")
    sys.exit(SKIP)


# Patterns --------------------------------------------------------------------------------------

NAMES = ["model", "layers", "h", "0", "1", "12", "mlp", "self_attn", "q_proj", "up_proj", "experts"]


def module(dice):
    return ".".join(dice.choice(NAMES) for _ in range(dice.randint(1, 6)))


def pattern(dice, depth=0):
    """A regular expression, or something that looks like one."""
    text = "^" if dice.random() < 0.1 else ""
    for _ in range(dice.randint(1, 5)):
        what = dice.random()
        if what < 0.4:
            text += dice.choice(NAMES)
        elif what < 0.6:
            text += dice.choice([r"\.", ".", ".*", ".*?", ".+", r"\d", r"\d+", r"\w*", r"\S+"])
        elif what < 0.75:
            text += dice.choice(["[0-9]", "[0-9]+", "[^.]*", "[a-z_]+", r"[\d]", "[hq-u]"])
        elif what < 0.95 and depth < 2:
            inner = "|".join(pattern(dice, depth + 1) for _ in range(dice.randint(1, 3)))
            text += dice.choice(["(", "(?:", "(?:", "(?=", "(?!"]) + inner + ")"
            text += dice.choice(["", "", "?"])  # more would take Python without end
        else:
            text += dice.choice(["*", "+?", "??", "|", ")", "(", "$", r"\b", r"\Z", r"\1", "{2}", "[", "]",
                                 "(?P<n>a)", "(?<=a)", "(?i)", "\\"])
    return text + ("$" if dice.random() < 0.1 else "")


def name_or_end(entry, name):
    return name == entry or name.endswith("." + entry)


def layer_of(config, name):
    lists = config.get("layers_pattern") or []
    if not lists:
        found = re.match(r".*?\.[^.]*\.(\d+)\.", name)
        return int(found[1]) if found else None
    for each in lists:
        found = re.match(rf"(?:^|.*?\.){each}\.(\d+)\.", name)
        if found:
            return int(found[1])
    return None


def is_target(config, name):
    excluded, targets = config.get("exclude_modules"), config["target_modules"]
    if isinstance(excluded, str) and excluded and re.fullmatch(excluded, name):
        return False
    if isinstance(excluded, list) and any(name_or_end(e, name) for e in excluded):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    if name in targets:
        return True
    layers = config.get("layers_to_transform")
    return (any(name_or_end(t, name) for t in targets)
            and (not layers or layer_of(config, name) in layers))


def number_of(patterns, fallback, name):
    for key, number in patterns.items():
        if re.match(rf"(.*\.)?({key})$", name):
            return number
    return fallback


def random_config(dice):
    config = {"peft_type": "LORA", "r": dice.randint(1, 64), "lora_alpha": dice.choice([1, 16, 0.5])}
    if dice.random() < 0.5:
        config["target_modules"] = pattern(dice)
    else:
        config["target_modules"] = [dice.choice([dice.choice(NAMES), module(dice)])
                                    for _ in range(dice.randint(1, 3))]
        if dice.random() < 0.6:
            config["layers_to_transform"] = [dice.choice([0, 1, 12]) for _ in range(dice.randint(0, 2))]
            if config["layers_to_transform"] and dice.random() < 0.6:
                config["layers_pattern"] = [dice.choice(["layers", "h", "model.layers", "experts"])
                                            for _ in range(dice.randint(1, 2))]
    if dice.random() < 0.3:
        config["exclude_modules"] = pattern(dice) if dice.random() < 0.5 else [dice.choice(NAMES)]
    for key in ("rank_pattern", "alpha_pattern"):
        if dice.random() < 0.5:
            config[key] = {pattern(dice) if dice.random() < 0.6 else module(dice): dice.randint(1, 99)
                           for _ in range(dice.randint(1, 3))}
    return config


def check_patterns(program):
    dice = random.Random(20261122)
    asked = []
    for _ in range(4000):
        asked.append({"config": random_config(dice), "modules": [module(dice) for _ in range(20)]})
    done = subprocess.run([program, "ask"], input="\n".join(map(json.dumps, asked)) + "\n", text=True,
                          capture_output=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(asked), f"{len(answers)} answers to {len(asked)} configs"
    understood, targets, wrong = 0, 0, 0
    for question, answer in zip(asked, answers):
        config = question["config"]
        if "refused" in answer:
            continue
        understood += 1
        try:
            wanted = [[is_target(config, name),
                       number_of(config.get("rank_pattern", {}), config["r"], name),
                       number_of(config.get("alpha_pattern", {}), config["lora_alpha"], name)]
                      for name in question["modules"]]
        except re.error as e:
            print(f"accepted, and for Python it is an error ({e}): {config}")
            wrong += 1
            continue
        targets += sum(target for target, _, _ in wanted)
        for name, got, want in zip(question["modules"], answer["modules"], wanted):
            if got != want:
                print(f"{name}: {got}, and Python says {want}: {config}")
                wrong += 1
    print(f"{understood} of {len(asked)} configs are understood, {targets} modules targeted, {wrong} wrong")
    assert understood > len(asked) // 3 and targets > 1000, "too little was compared"
    return 1 if wrong else 0


# peft ------------------------------------------------------------------------------------------

def enter_venv(folder):
    """Goes on in a Python that has the packages, and the torch that this one has."""
    if subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode != 0:
        skip("there is no torch (Debian: python3-torch), which peft needs")
    venv = folder / "peft_venv"
    python, stamp, wanted = venv / "bin" / "python", venv / "installed", " ".join(PACKAGES)
    if not stamp.exists() or stamp.read_text() != wanted:
        shutil.rmtree(venv, ignore_errors=True)
        for command in (
            [sys.executable, "-m", "venv", "--system-site-packages", venv],
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps",
             "--timeout=10", "--retries=1", "--only-binary=:all:", *PACKAGES],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                said = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
                skip(f"peft cannot be installed: {said[-1]}")
        stamp.write_text(wanted)
    if Path(sys.prefix) != venv:
        # PYTHONPATH would come before the packages.
        before = os.environ.get("PYTHONPATH", "")
        own = str(next((venv / "lib").glob("python3*")) / "site-packages")
        os.environ.update(PYTHONPATH=own + (":" + before if before else ""), HF_HUB_OFFLINE="1",
                          TRANSFORMERS_VERBOSITY="error", PYTHONWARNINGS="ignore")
        os.execv(python, [python, *sys.argv])


def model_of(kind):
    import transformers as t

    sizes = dict(vocab_size=8, hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config, model = {"llama": (t.LlamaConfig, t.LlamaForCausalLM), "qwen2": (t.Qwen2Config, t.Qwen2ForCausalLM),
                     "phi3": (t.Phi3Config, t.Phi3ForCausalLM)}[kind]
    made = model(config(**sizes))
    made.name_or_path = made.config._name_or_path = f"tiny-{kind}"
    return made


# name: (model, type of the tensors, what the config says)
WANTED = {
    "split_qkv": ("llama", "float32", dict(r=4, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"])),
    "q_and_v": ("llama", "bfloat16", dict(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"])),
    "fused_qkv": ("phi3", "bfloat16", dict(r=4, lora_alpha=16, target_modules=["qkv_proj"])),
    "gate_up": ("phi3", "float16", dict(r=2, lora_alpha=4, target_modules=["gate_up_proj", "down_proj"])),
    "rslora": ("llama", "float32", dict(r=3, lora_alpha=5, use_rslora=True, target_modules=["o_proj"])),
    "patterns": ("llama", "float32", dict(
        r=2, lora_alpha=4, use_rslora=True, target_modules=["q_proj", "k_proj", "up_proj"],
        rank_pattern={"^model.layers.0.self_attn.q_proj": 1, "self_attn.q_proj": 5, r"layers\.[1-9]\.mlp\.(up|down)_proj": 3},
        alpha_pattern={"up_proj": 7, "k_proj|q_proj": 9, "model.layers.1.mlp.up_proj": 11})),
    "lora_bias": ("qwen2", "float32", dict(r=2, lora_alpha=2, lora_bias=True, target_modules=["q_proj", "v_proj"])),
    "all_linear": ("llama", "float16", dict(r=1, lora_alpha=2, target_modules="all-linear")),
    "regex": ("llama", "float32", dict(
        r=2, lora_alpha=1, target_modules=r"^model(?=\.)(?!.*visual).*\.1\..*\.(?:q|up)_proj$")),
    "layers": ("llama", "float32", dict(r=2, lora_alpha=4, target_modules=["q_proj", "down_proj"],
                                        layers_to_transform=[1], layers_pattern=["layers"])),
    "excluded": ("llama", "float32", dict(r=2, lora_alpha=4, target_modules=["q_proj", "gate_proj"],
                                          exclude_modules=["layers.0.mlp.gate_proj", "model.layers.1.self_attn.q_proj"])),
}


def lora_layers(model):
    import peft

    return {full.removeprefix("base_model.model."): layer for full, layer in sorted(model.named_modules())
            if isinstance(layer, peft.tuners.lora.LoraLayer)}


def tensors_of(layer):
    tensors = {"a": layer.lora_A["default"].weight, "b": layer.lora_B["default"].weight}
    if layer.lora_B["default"].bias is not None:
        tensors["bias"] = layer.lora_B["default"].bias
    return tensors


def write_adapter(folder, kind, dtype, said):
    """What peft saves, and expected.json: what peft makes of each module when it loads that (patterns
    are saved in another order, and the first that matches counts), and which it leaves alone."""
    import peft
    import torch

    model = peft.get_peft_model(model_of(kind), peft.LoraConfig(task_type="CAUSAL_LM", **said))
    model.to(getattr(torch, dtype))
    for number, layer in enumerate(lora_layers(model).values()):
        for place, tensor in enumerate(tensors_of(layer).values()):
            # The same in every version: no two tensors begin alike, and all types hold the numbers.
            first = 100 * number + 37 * place
            values = torch.arange(first, first + tensor.numel()) % 251 - 125
            tensor.data = (values.reshape(tensor.shape) / 64).to(tensor.dtype)
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    config = folder / "adapter_config.json"
    text = json.loads(config.read_text())
    for key in ("target_modules", "exclude_modules"):  # sets in the package: in another order each time
        if isinstance(text[key], list):
            text[key].sort()
    config.write_text(json.dumps(text, indent=1) + "\n")

    base = model_of(kind)
    others = [name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear)]
    modules = {}
    for name, layer in lora_layers(peft.PeftModel.from_pretrained(base, folder)).items():
        modules[name] = {"rank": layer.r["default"], "alpha": layer.lora_alpha["default"],
                         "scale": layer.scaling["default"]}
        for key, tensor in tensors_of(layer).items():
            modules[name][key] = {"shape": list(tensor.shape), "values": tensor.detach().float().flatten().tolist()}
        others.remove(name)
    word = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    (folder / "expected.json").write_text(
        f'{{"dtype": {json.dumps(word)}, "others": {json.dumps(others)}, "modules": {{\n'
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(m)}" for name, m in modules.items()) + "\n}}\n")


def write_all(folder):
    for name, (kind, dtype, said) in WANTED.items():
        write_adapter(folder / name, kind, dtype, said)


def check_peft(program):
    with tempfile.TemporaryDirectory() as temporary:
        write_all(Path(temporary))
        for name in WANTED:
            made, committed = Path(temporary) / name, ADAPTERS / name
            for folder in (made, committed):
                expected = json.loads((folder / "expected.json").read_text())
                done = subprocess.run([program, "read", folder], text=True, capture_output=True)
                assert done.returncode == 0, f"{folder}: {done.stderr}"
                assert json.loads(done.stdout) == expected["modules"], f"{folder}: {done.stdout}"
            assert (made / "expected.json").read_text() == (committed / "expected.json").read_text(), \
                f"{name}: peft says something else now"
            print(f"{name}: {len(expected['modules'])} modules agree")
    return 0


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "patterns":
        return check_patterns(sys.argv[2])
    if len(sys.argv) not in (3, 4) or sys.argv[1] not in ("peft", "write"):
        print(__doc__)
        return 2
    enter_venv(Path(sys.argv[2]).resolve())
    if sys.argv[1] == "write":
        write_all(ADAPTERS)
        return 0
    return check_peft(sys.argv[3])


if __name__ == "__main__":
    sys.exit(main())
