#!/usr/bin/env python3
"""Our safetensors files against the reference implementation's.

    safetensors_testing.py FOLDER PROGRAM

Installs the package safetensors into FOLDER/venv (once), lets it write files, has PROGRAM
(safetensors_testing.cc) read them and write one, and lets the package read that. Then PROGRAM reads
files with random mistakes: those that it accepts the package must accept, with the same tensors.
Exit code: 0 they agree, 1 they do not, 77 the package cannot be had.
"""

import json
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

PACKAGE = "safetensors==0.8.0"
SKIP = 77


def enter_venv(folder):
    """Goes on in a Python that has the package."""
    python = folder / "venv" / "bin" / "python"
    stamp = folder / "venv" / "installed"
    if not stamp.exists() or stamp.read_text() != PACKAGE:
        shutil.rmtree(folder / "venv", ignore_errors=True)
        for command in (
            [sys.executable, "-m", "venv", folder / "venv"],
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
             "--timeout=10", "--retries=1", "--only-binary=:all:", PACKAGE],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                said = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
                print(f"skipped: {PACKAGE} cannot be installed: {said[-1]}")
                sys.exit(SKIP)
        stamp.write_text(PACKAGE)
    if Path(sys.prefix) != folder / "venv":
        os.execv(python, [python, *sys.argv])


def e4m3_values():
    """Value -> byte, by the definition of OCP's E4M3."""
    values = {}
    for byte in range(256):
        sign, exponent, fraction = -1 if byte & 128 else 1, byte >> 3 & 15, byte & 7
        if byte & 127 != 127:
            value = fraction / 8 * 2**-6 if exponent == 0 else (1 + fraction / 8) * 2 ** (exponent - 7)
            values.setdefault(sign * value, byte)
    return values


E4M3 = e4m3_values()
REALS = {  # dtype: a value as bytes
    "F32": lambda x: struct.pack("<f", x),
    "F16": lambda x: struct.pack("<e", x),
    "BF16": lambda x: struct.pack("<f", x)[2:],
    "F8_E4M3": lambda x: bytes([E4M3[x]]),
}
WHOLE = {
    "U8": lambda i: struct.pack("<B", (37 * i + 11) % 256),
    "I32": lambda i: struct.pack("<i", -65537 * i + 1),
    "I64": lambda i: struct.pack("<q", -(2**33) * i + 1),
    "BOOL": lambda i: struct.pack("<?", i % 3 == 0),
}
# What the package calls them where it writes.
WORDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn",
         "U8": "uint8", "I32": "int32", "I64": "int64", "BOOL": "bool"}


def known(dtype, shape):
    """The bytes of a tensor: both sides know what element i is."""
    size = 1
    for n in shape:
        size *= n
    if dtype in REALS:
        return b"".join(REALS[dtype]((i % 13 - 6) / 4) for i in range(size))
    return b"".join(WHOLE[dtype](i) for i in range(size))


def write(path, tensors, metadata=None):
    import ctypes

    from safetensors import TensorSpec, serialize_file

    buffers = {name: ctypes.create_string_buffer(known(*tensor), max(1, len(known(*tensor))))
               for name, tensor in tensors.items()}
    specs = {name: TensorSpec(dtype=WORDS[dtype], shape=list(shape),
                              data_ptr=ctypes.addressof(buffers[name]),
                              data_len=len(known(dtype, shape)))
             for name, (dtype, shape) in tensors.items()}
    serialize_file(specs, path, metadata)


def write_files(folder):
    write(folder / "types.safetensors", {dtype.lower(): (dtype, (3, 5)) for dtype in WORDS})
    write(folder / "shapes.safetensors",
          {"scalar": ("F32", ()), "one": ("F32", (1,)), "empty": ("BF16", (0, 4)),
           "odd": ("U8", (3,)), "four": ("F16", (1, 2, 3, 4)), "behind": ("I64", (2,))})
    write(folder / "metadata.safetensors", {"w": ("I32", (2,))},
          {"format": "pt", "\u00e9 \"quoted\"\n": "\\\u4e2d"})
    write(folder / "nothing.safetensors", {})
    sharded = folder / "sharded"
    sharded.mkdir()
    shards = [{"model.embed.weight": ("BF16", (7, 4)), "model.q.weight": ("F8_E4M3", (4, 4))},
              {"model.q.weight_scale": ("F32", ()), "lm_head.weight": ("BF16", (7, 4))}]
    weight_map = {}
    for i, tensors in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        write(sharded / name, tensors, {"format": "pt"})
        weight_map.update({tensor: name for tensor in tensors})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def read_ours(path):
    from safetensors import deserialize

    expected = {"b": ("BF16", (3, 5)), "a": ("F32", ()), "none": ("I64", (2, 0)), "odd": ("U8", (3,)),
                "\u00e9 \"q\"": ("F8_E4M3", (13,)), "half": ("F16", (2, 2)), "flag": ("BOOL", (4,)),
                "whole": ("I32", (5,)), "long": ("I64", (2,))}
    tensors = dict(deserialize(path.read_bytes()))
    assert tensors.keys() == expected.keys(), tensors.keys()
    for name, (dtype, shape) in expected.items():
        tensor = tensors[name]
        assert (tensor["dtype"], tuple(tensor["shape"])) == (dtype, shape), (name, tensor)
        assert bytes(tensor["data"]) == known(dtype, shape), (name, tensor)
    # The package shows metadata to those who have numpy only.
    file = path.read_bytes()
    header = json.loads(file[8:8 + int.from_bytes(file[:8], "little")])
    assert header["__metadata__"] == {"format": "pt", "\u00e9": "\"\\\n"}, header


def moved(header, draw):
    """The header with a tensor of bytes that lies elsewhere than one did: a hole, an overlap, both."""
    entries = json.loads(header)
    names = [name for name in entries if name != "__metadata__"]
    if names:
        name = draw.choice(names)
        begin, end = (max(0, n + draw.choice((-4, -1, 0, 0, 0, 1, 4))) for n in entries[name]["data_offsets"])
        if draw.random() < 0.2:
            begin = end = draw.choice((begin, end))
        entries[name] = {"dtype": "U8", "shape": [max(0, end - begin)], "data_offsets": [begin, end]}
    return json.dumps(entries, separators=(",", ":")).encode()


def mutated(original, draw):
    """The file with a mistake or two, mostly in its header."""
    length = int.from_bytes(original[:8], "little")
    header, data = original[8:8 + length], bytearray(original[8 + length:])
    if draw.random() < 0.3:
        header = moved(header, draw)
        return len(header).to_bytes(8, "little") + header + bytes(data)
    header = bytearray(header)
    for _ in range(draw.choice((1, 1, 2, 3))):
        at = draw.randrange(len(header))
        kind = draw.randrange(6)
        if kind == 0:
            header[at] = draw.choice(b'0123456789{}[]":, -.eEnul\\\xff\0')
        elif kind == 1:
            del header[at:at + draw.choice((1, 1, 2, 8))]
        elif kind == 2:
            header[at:at] = draw.choice((b"0", b"1", b" ", b",", b'"', b"[]", b"1e0", b"-0", b"null", b"NaN"))
        elif kind == 3:
            words = (b"U8", b"I8", b"F4", b"F16", b"I16", b"F32", b"I64", b"F6_E2M3", b"BOOL", b"F8_E5M2")
            word = draw.choice([w for w in words if w in header] or [b"{"])
            header[:] = header.replace(word, draw.choice(words), 1)
        elif kind == 4:
            data[len(data):] = bytes(draw.choice((1, 4, 8)))
        else:
            del data[len(data) - min(len(data), draw.choice((1, 4))):]
        if not header:
            header = bytearray(b"{}")
    if draw.random() < 0.1:
        length += draw.choice((-1, 1, 1000))
    else:
        length = len(header)
    return max(0, length).to_bytes(8, "little") + bytes(header) + bytes(data)


def compare_mutated(folder, program, draw, files=3000):
    """What we accept is what the package accepts, and the same."""
    from safetensors import SafetensorError, deserialize

    (folder / "mutated").mkdir()
    originals = [path.read_bytes() for path in sorted(folder.glob("*.safetensors"))]
    for i in range(files):
        (folder / "mutated" / f"{i}").write_bytes(mutated(draw.choice(originals), draw))
    said = subprocess.run([program, "describe", folder / "mutated"], check=True, capture_output=True)
    ours = json.loads(said.stdout)
    refused = 0
    for i in range(files):
        try:
            tensors = deserialize((folder / "mutated" / f"{i}").read_bytes())
            theirs = {name: [t["dtype"], list(t["shape"]), bytes(t["data"]).hex()] for name, t in tensors}
        except SafetensorError as e:
            theirs = str(e)
            refused += 1
        mine = ours.get(f"{i}")
        assert mine is None or mine == theirs, f"{folder}/mutated/{i}: {mine}, and the package: {theirs}"
    print(f"{files} files with mistakes: the package refuses {refused}, we refuse {files - len(ours)}")
    assert 0 < len(ours) < files  # else this compares nothing


def main():
    folder, program = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    enter_venv(folder)
    files = folder / "files"
    shutil.rmtree(files, ignore_errors=True)
    files.mkdir()
    write_files(files)
    subprocess.run([program, "read", files], check=True)
    subprocess.run([program, "write", files / "ours.safetensors"], check=True)
    read_ours(files / "ours.safetensors")
    compare_mutated(files, program, random.Random(7))


if __name__ == "__main__":
    main()
