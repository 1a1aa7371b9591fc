#!/usr/bin/env python3
"""PyTorch peers for the tensor-parallel operators, to be timed beside the project's own kernels.

    python3 peers.py --out peers.json --ceilings ceilings.json
    torchrun --nproc-per-node=2 peers.py --out peers.json --append --ceilings ceilings.json

The first form runs every operator that needs one GPU, the second only those that need two.
Writes Google-Benchmark-style JSON to --out and a table to stderr. real_time: microseconds, the median of 21 replays of a CUDA graph of up to 50
copies; floor_us: the least that the ceilings allow; check: against float64 on rows at both ends.
A peer that fails is reported (error_occurred) and does not stop the others.
"""
import os

# NVLink multicast stays off, whatever the caller's environment says. Before torch is imported.
os.environ.update(NCCL_NVLS_ENABLE="0", TORCH_SYMM_MEM_DISABLE_MULTICAST="1", NVSHMEM_DISABLE_NVLS="1")

import argparse
import collections
import contextlib
import datetime
import inspect
import json
import math
import re
import sys
import time

try:
    import torch
    import torch._dynamo
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
except ImportError as e:
    sys.exit(f"peers.py: there is no PyTorch to compare with here ({e})")
if not torch.cuda.is_available():
    sys.exit("peers.py: PyTorch sees no GPU")

BF16, F32, F8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
EPS = 1e-6
RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

# Used only where --ceilings is not given: one H100 80GB HBM3 pair. Measure your own.
DEFAULT_CEILINGS = {
    "t0_rw16_1block_us": 1.10, "tx_volatile_16B_us": 0.61,
    "bw_copy_GBps": 3030.0, "bw_read_GBps": 3230.0, "l2_read_16MB_GBps": 7820.0, "l2_copy_16MB_GBps": 7210.0,
    "matmul_bf16_TFLOPs": 812.0, "matmul_fp8_fast_TFLOPs": 1544.0, "peer_store_GBps": 370.0,
}


class Ceilings:
    def __init__(self, path):
        values = dict(DEFAULT_CEILINGS)
        self.source = "built-in defaults"
        if path:
            try:
                with open(path) as f:
                    measured = json.load(f)
                values.update({k: v for k, v in measured.items() if isinstance(v, (int, float))})
                missing = [k for k in DEFAULT_CEILINGS if k not in measured]
                self.source = "measured" + (f", defaults for {', '.join(missing)}" if missing else "")
            except (OSError, ValueError) as e:
                self.source += f" ({path}: {first_line(e)})"
        self.used = {k: values[k] for k in DEFAULT_CEILINGS}
        self.t0 = values["t0_rw16_1block_us"]
        self.tx = values["tx_volatile_16B_us"]
        self.copy, self.read = values["bw_copy_GBps"] * 1e3, values["bw_read_GBps"] * 1e3  # bytes per us
        self.l2_copy, self.l2_read = values["l2_copy_16MB_GBps"] * 1e3, values["l2_read_16MB_GBps"] * 1e3
        self.bf16, self.fp8 = (values[k] * 1e6 for k in ("matmul_bf16_TFLOPs", "matmul_fp8_fast_TFLOPs"))
        self.link = values["peer_store_GBps"] * 1e3

    def bytes_us(self, read, written, cache, l2_bytes):
        """Microseconds to move the bytes: within L2 if warm and no larger, else at the fitting memory rate."""
        mostly_read = written < 0.2 * read
        if cache == "warm" and read + written <= l2_bytes:
            return (read + written) / (self.l2_read if mostly_read else self.l2_copy)
        return (read + written) / (self.read if mostly_read else self.copy)


# ---------------------------------------------------------------- timing

def percentile(values, p):
    values = sorted(values)
    at = p * (len(values) - 1)
    low = int(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def relative_error(out, ref):
    out, ref = out.double(), ref.double()
    return ((out - ref).norm() / ref.norm()).item()


class Bench:
    """Times peers by graph replay and collects one JSON entry per peer and cache state."""

    def __init__(self, args, ceilings):
        self.args, self.c = args, ceilings
        self.samples = 7 if args.quick else 21
        self.copies = 10 if args.quick else 50
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.l2 = torch.cuda.get_device_properties(self.device).L2_cache_size
        self.stream = torch.cuda.Stream()
        torch.cuda.set_stream(self.stream)  # everything runs here, captures too
        self.flush_buffer = torch.randn(self.l2, device=self.device)  # floats: 4 x L2 bytes
        self.flush_sink = torch.empty((), device=self.device)
        self.align_buffer = torch.zeros(2, device=self.device)
        self.entries, self.deferred = [], []

    # -- one graph of many copies, replayed

    def capture(self, body, sets, copies, keep):
        graph = torch.cuda.CUDAGraph()
        kept = collections.deque(maxlen=keep)  # outputs stay alive, so that they rotate as the inputs do
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            for i in range(copies):
                kept.append(body(*sets[i % len(sets)]))
        return graph.replay

    def replay_us(self, replay, copies, cold, paced):
        """Per-copy microseconds of each sample, on this rank."""
        pairs = []
        for i in range(self.samples + 2):
            a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if paced:  # let the power average fall, so that its limit does not lower the clocks
                torch.cuda.synchronize()
                time.sleep(self.args.pause_ms / 1e3)
            if cold:  # clean lines only, so that no write-back falls into the timed region
                torch.sum(self.flush_buffer, dim=0, out=self.flush_sink)
            if RANKS > 1:
                dist.all_reduce(self.align_buffer)
            torch.cuda._sleep(200_000)  # about 100 us: hides the launch of the graph
            a.record()
            replay()
            b.record()
            pairs.append((a, b))
        torch.cuda.synchronize()
        return [a.elapsed_time(b) * 1e3 / copies for a, b in pairs[2:]]

    def measure(self, body, sets, cold, paced=False, before=None, late_rank=None):
        """Median, p10, p90 of one copy of body(*set). What before(*set) costs is taken off.

        Several GPUs: the slowest rank of each sample, or late_rank's time alone.
        """
        full = (lambda *s: (before(*s), body(*s))[1]) if before else body
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for i in range(6):  # warm-up, the second half of it timed
            if i == 3:
                a.record()
            full(*sets[i % len(sets)])
        b.record()
        torch.cuda.synchronize()
        estimate = torch.tensor(a.elapsed_time(b) * 1e3 / 3, device=self.device)
        if RANKS > 1:
            dist.all_reduce(estimate, op=dist.ReduceOp.MAX)
        estimate = estimate.item()
        copies = max(4, min(self.copies, int((10_000 if paced else 20_000) / estimate)))
        how = "graph"
        try:
            replay = self.capture(full, sets, copies, len(sets) if cold else 1)
        except Exception as e:  # not capturable: plain launches, the host's overhead included
            torch.cuda.synchronize()
            how = f"stream (capture failed: {first_line(e)})"

            def replay():
                for i in range(copies):
                    full(*sets[i % len(sets)])
        us = self.replay_us(replay, copies, cold, paced)
        if before:
            base = percentile(self.replay_us(self.capture(before, sets, copies, 1), copies, cold, paced), 0.5)
            us = [t - base for t in us]
        if RANKS > 1:
            ranks = [torch.empty(len(us), device=self.device) for _ in range(RANKS)]
            dist.all_gather(ranks, torch.tensor(us, device=self.device))
            us = (ranks[late_rank] if late_rank is not None else torch.stack(ranks).amax(0)).tolist()
        return percentile(us, 0.5), percentile(us, 0.1), percentile(us, 0.9), copies, how

    # -- a group: one operator at one size, several peers over the same inputs

    def group(self, op, params, make, peers, check, read, written, flops=0, peak=None, floor=None,
              tolerance=1e-2, before=None, caches=("cold", "warm"), late_rank=None):
        """make() -> fresh inputs; peers: name -> function of them; check(inputs, output) -> relative error;
        floor(bytes_us) -> microseconds, by default max(t0, bytes, flops)."""
        if self.args.only and not any(op.startswith(o) for o in self.args.only.split(",")):
            return
        label = "/".join([op] + [f"{k}:{v}" for k, v in params.items()])
        if self.args.filter and not re.search(self.args.filter, label):
            return
        set_bytes = read + written
        try:
            count = min(self.copies, max(2, math.ceil(4 * self.l2 / set_bytes)))
            sets = [make() for _ in range(count)]
        except Exception as e:
            return self.failed(label, "all", e)
        if set_bytes > 4 * self.l2:
            caches = [c for c in caches if c == "cold"]  # nothing of it would survive until its next use
        compute_us = flops / peak if peak else 0
        paced = self.args.pause_ms > 0 and compute_us > self.c.bytes_us(read, written, "cold", self.l2)
        for peer, body in peers.items():
            entries = []
            try:
                if before:
                    before(*sets[0])
                error = check(sets[0], body(*sets[0]))
                torch.cuda.synchronize()
            except Exception as e:
                self.failed(label, peer, e)
                continue
            for cache in caches:
                try:
                    us, p10, p90, copies, how = self.measure(body, sets if cache == "cold" else sets[:1],
                                                             cache == "cold", paced, before, late_rank)
                except Exception as e:
                    self.failed(f"{label}/peer:{peer}/cache:{cache}", None, e)
                    continue
                bytes_us = self.c.bytes_us(read, written, cache, self.l2)
                least = floor(bytes_us) if floor else max(self.c.t0, bytes_us, compute_us)
                name = f"{label}/peer:{peer}/cache:{cache}"
                entry = {
                    "name": name, "run_name": name, "run_type": "iteration", "repetitions": self.samples,
                    "iterations": copies, "real_time": us, "cpu_time": us, "time_unit": "us",
                    "p10_us": p10, "p90_us": p90, "bytes_per_second": set_bytes / us * 1e6,
                    "floor_us": least, "ratio_to_floor": us / least, "fraction_of_floor": least / us,
                    "time_over_t0": us / self.c.t0, "relative_error": error if math.isfinite(error) else None,
                    "check": "ok" if error < tolerance else "FAILED", "input_sets": len(sets) if cache == "cold" else 1,
                    "timing": how + (f", {self.args.pause_ms:g} ms pause before each sample" if paced else ""),
                }
                if flops:
                    entry["flops_per_second"] = flops / us * 1e6
                entries.append(entry)
                self.entries.append(entry)
                rate = f"{flops / us / 1e6:7.1f} TFLOP/s" if flops else f"{set_bytes / us / 1e3:7.1f} GB/s   "
                say(f"{name:<112} {us:9.2f} us  {rate}  floor {least:8.2f}  x{us / least:5.2f}  err {error:.1e}"
                    + ("" if entry["check"] == "ok" else "  CHECK FAILED") + ("" if how == "graph" else f"  {how}"))
            self.deferred.append((entries, make, body, before))
        del sets

    def failed(self, label, peer, e):
        name = f"{label}/peer:{peer}" if peer else label
        self.entries.append({"name": name, "run_name": name, "run_type": "iteration", "error_occurred": True,
                             "error_message": first_line(e)})
        say(f"{name:<112} FAILED: {type(e).__name__}: {first_line(e)}")
        with contextlib.suppress(Exception):
            torch.cuda.synchronize()

    def name_kernels(self):
        """Which kernels each peer really launches. Last, so that the profiler touches no timing."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile
        for entries, make, body, before in self.deferred:
            try:
                inputs = make()
                if before:
                    before(*inputs)
                torch.cuda.synchronize()
                with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as p:
                    body(*inputs)
                    torch.cuda.synchronize()
                names = [e.name[:80] for e in p.events() if e.device_type == DeviceType.CUDA]
                for entry in entries:
                    entry["kernel_count"], entry["kernels"] = len(names), dict(collections.Counter(names))
            except Exception as e:
                say(f"no kernel names: {first_line(e)}")
                return

    def write(self, path, append):
        document = {"context": context(self), "benchmarks": self.entries}
        if append and os.path.exists(path):
            with open(path) as f:
                earlier = json.load(f)
            document = {"context": earlier["context"], "benchmarks": earlier["benchmarks"] + self.entries}
            document["context"]["appended"] = context(self)
        with open(path, "w") as f:
            json.dump(rounded(document), f, indent=1)
            f.write("\n")


def rounded(value):
    """The same with floats cut to six digits."""
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [rounded(v) for v in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def first_line(e):
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]


def say(text):
    if RANK == 0:
        print(text, file=sys.stderr, flush=True)


def context(bench):
    import triton
    p = torch.cuda.get_device_properties(bench.device)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "executable": "peers.py", "library_build_type": "release", "device": p.name, "gpus": RANKS,
        "sm_count": p.multi_processor_count, "l2_bytes": bench.l2, "torch": torch.__version__,
        "triton": triton.__version__, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())), "seed": bench.args.seed, "nvlink_multicast": False,
        "timing": f"graph of {bench.copies} copies (fewer of a long one: see iterations), median of {bench.samples} replays",
        "ceilings_source": bench.c.source, "ceilings": bench.c.used,
    }


# ---------------------------------------------------------------- inputs

def randn(*shape, dtype=BF16, scale=1.0):
    return (torch.randn(*shape, device="cuda", dtype=F32) * scale).to(dtype)


def weight(*shape):
    return (1 + 0.1 * torch.randn(*shape, device="cuda")).to(BF16)


def compiled(f):
    return torch.compile(f, dynamic=False, fullgraph=True)


def ends(n, k=4):
    """A few indices at both ends."""
    return sorted(set(list(range(min(k, n))) + list(range(max(0, n - k), n))))


# ---------------------------------------------------------------- 1. RMSNorm

def norm64(x, w):
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * w.double()


def bench_rms_norm(b):
    def norm(x, w):
        return F.rms_norm(x, (x.shape[-1],), w, EPS)

    def add_norm(x, residual, w):
        total = x + residual
        return F.rms_norm(total, (x.shape[-1],), w, EPS), total

    def norm_fp8(x, w, inverse_scale):
        return (F.rms_norm(x, (x.shape[-1],), w, EPS).float() * inverse_scale).clamp(-448, 448).to(F8)

    def rows_check(inputs, out):
        x, w = inputs[0], inputs[-1]
        x, out = x.flatten(0, -2), out.flatten(0, -2)
        i = ends(x.shape[0])
        return relative_error(out[i], norm64(x[i], w))

    def case(tokens, hidden):
        n = tokens * hidden
        b.group("rms_norm", dict(tokens=tokens, hidden=hidden, dtype="bf16"),
                lambda: (randn(tokens, hidden), weight(hidden)),
                {"torch-eager": norm, "torch-compile": compiled(norm)}, rows_check, 2 * n + 2 * hidden, 2 * n)

    def head_case(tokens, heads):
        n = tokens * heads * 128
        b.group("rms_norm_head", dict(tokens=tokens, heads=heads, dim=128, dtype="bf16"),
                lambda: (randn(tokens, heads, 128), weight(128)),
                {"torch-eager": norm, "torch-compile": compiled(norm)}, rows_check, 2 * n + 256, 2 * n)

    def fused_case(tokens, hidden):
        n = tokens * hidden
        i = ends(tokens)

        def add_check(inputs, out):
            x, residual, w = inputs
            total = x[i].double() + residual[i].double()
            return max(relative_error(out[0][i], norm64(total.to(BF16), w)), relative_error(out[1][i], total))

        def fp8_check(inputs, out):
            x, w, inverse_scale = inputs
            return relative_error(out.float()[i] / inverse_scale, norm64(x[i], w))

        b.group("add_rms_norm", dict(tokens=tokens, hidden=hidden, dtype="bf16"),
                lambda: (randn(tokens, hidden), randn(tokens, hidden), weight(hidden)),
                {"torch-eager": add_norm, "torch-compile": compiled(add_norm)}, add_check, 4 * n + 2 * hidden, 4 * n)
        b.group("rms_norm_fp8", dict(tokens=tokens, hidden=hidden, scale="static"),
                lambda: (randn(tokens, hidden), weight(hidden), torch.tensor(16.0, device="cuda")),
                {"torch-eager": norm_fp8, "torch-compile": compiled(norm_fp8)}, fp8_check, 2 * n + 2 * hidden, n,
                tolerance=4e-2)

    sizes = [(1, 8192), (64, 4096), (64, 8192), (512, 4096), (2048, 3072), (4096, 4096), (4096, 8192), (4096, 16384), (16384, 8192)]
    for size in [sizes[0], sizes[5]] if b.args.quick else sizes:
        case(*size)
    for size in [(4096, 48)] if b.args.quick else [(64, 48), (4096, 48), (27030, 24)]:
        head_case(*size)
    for size in [(64, 8192)] if b.args.quick else [(64, 8192), (2048, 3072), (4096, 8192)]:
        fused_case(*size)


# ---------------------------------------------------------------- 2. QK-norm over the whole Q and K width

def qk_split(qkv, heads_q, heads_kv, dim):
    return qkv.split([heads_q * dim, heads_kv * dim, heads_kv * dim], dim=-1)[:2]


def qk_check(inputs, out, heads_q, heads_kv, dim):
    qkv, wq, wk = inputs[:3]
    i = ends(qkv.shape[0])
    q, k = qk_split(qkv[i], heads_q, heads_kv, dim)
    return max(relative_error(out[0][i], norm64(q, wq)), relative_error(out[1][i], norm64(k, wk)))


def bench_qk_norm(b):
    heads_q, heads_kv, dim = 48, 8, 128

    def composed(qkv, wq, wk):  # as a model's Python code has it
        def norm(x, w):
            x32 = x.float()
            return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + EPS)).to(BF16) * w
        q, k = qk_split(qkv, heads_q, heads_kv, dim)
        return norm(q, wq), norm(k, wk)

    def two_norms(qkv, wq, wk):
        q, k = qk_split(qkv, heads_q, heads_kv, dim)
        return F.rms_norm(q, (heads_q * dim,), wq, EPS), F.rms_norm(k, (heads_kv * dim,), wk, EPS)

    def case(tokens):
        n = tokens * (heads_q + heads_kv) * dim
        b.group("qk_norm", dict(tokens=tokens, q_heads=heads_q, kv_heads=heads_kv, dim=dim, tp=1, dtype="bf16"),
                lambda: (randn(tokens, (heads_q + 2 * heads_kv) * dim), weight(heads_q * dim), weight(heads_kv * dim)),
                {"torch-eager": composed, "torch-eager-rms_norm": two_norms, "torch-compile": compiled(composed)},
                lambda i, o: qk_check(i, o, heads_q, heads_kv, dim), 2 * n, 2 * n)

    for tokens in (64,) if b.args.quick else (1, 16, 64, 256, 1024, 2048, 8192):
        case(tokens)


# ---------------------------------------------------------------- 4. and 5. attention

def sdpa(backend, causal):
    def run(q, k, v):
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return run


def varlen(causal, seq_q, seq_kv, batch):
    """torch.nn.attention.varlen over the same memory: [B,H,S,D] views of [B,S,H,D] storage."""
    from torch.nn.attention.varlen import varlen_attn
    keywords = inspect.signature(varlen_attn).parameters
    extra = {"enable_gqa": True} if "enable_gqa" in keywords else {}
    if causal:
        extra |= {"is_causal": True} if "is_causal" in keywords else {"window_size": (-1, 0)}
    at_q = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * seq_q
    at_kv = torch.arange(batch + 1, device="cuda", dtype=torch.int32) * seq_kv

    def run(q, k, v):
        packed = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
        out = varlen_attn(*packed, at_q, at_kv, seq_q, seq_kv, **extra)
        return out.unflatten(0, (batch, seq_q)).transpose(1, 2)
    return run


def flex(seq_kv):
    """FlexAttention with a block mask that hides nothing: without one it does not split the KV length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    mask = create_block_mask(lambda b, h, q, kv: kv >= 0, None, None, 1, seq_kv, device="cuda")
    return compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=mask, enable_gqa=True))


def attention_check(inputs, out, causal):
    q, k, v = inputs
    group = q.shape[1] // k.shape[1]
    rows = ends(q.shape[2], 16) if q.shape[2] > 1 else [0]
    worst = 0.0
    for batch, head in {(0, 0), (q.shape[0] - 1, q.shape[1] - 1)}:
        kk, vv = k[batch, head // group].double(), v[batch, head // group].double()
        scores = q[batch, head, rows].double() @ kk.T / math.sqrt(q.shape[-1])
        if causal:
            later = torch.arange(kk.shape[0], device="cuda")[None] > torch.tensor(rows, device="cuda")[:, None]
            scores = scores.masked_fill(later, -math.inf)
        worst = max(worst, relative_error(out[batch, head, rows], scores.softmax(-1) @ vv))
    return worst


def attention_inputs(batch, heads_q, heads_kv, seq_q, seq_kv, dim=128):
    return tuple(randn(batch, s, h, dim).transpose(1, 2)
                 for s, h in ((seq_q, heads_q), (seq_kv, heads_kv), (seq_kv, heads_kv)))


def optional(peers, name, build):
    """Adds a peer whose set-up itself may fail; the failure then shows as this peer's."""
    try:
        peers[name] = build()
    except Exception as e:
        def run(*_, e=e):
            raise e
        peers[name] = run


def bench_prefill(b):
    def case(batch, hq, hkv, seq):
        peers = {"sdpa-default": sdpa(None, True), "sdpa-flash": sdpa(SDPBackend.FLASH_ATTENTION, True),
                 "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, True)}
        optional(peers, "varlen_attn", lambda: varlen(True, seq, seq, batch))
        b.group("gqa_prefill", dict(batch=batch, q_heads=hq, kv_heads=hkv, dim=128, seq=seq, causal=1, dtype="bf16"),
                lambda: attention_inputs(batch, hq, hkv, seq, seq), peers,
                lambda i, o: attention_check(i, o, True),
                read=2 * batch * seq * (hq + 2 * hkv) * 128, written=2 * batch * seq * hq * 128,
                flops=2 * batch * hq * 128 * seq * seq, peak=b.c.bf16)

    sizes = [(8, 24, 4, 1024), (4, 24, 4, 2048), (1, 24, 4, 4096), (1, 24, 4, 8192), (1, 24, 4, 16384), (1, 48, 8, 4096),
             (1, 8, 1, 8192)]
    for size in sizes[2:3] if b.args.quick else sizes:
        case(*size)


def bench_decode(b):
    def case(batch, hq, hkv, seq, with_flex):
        peers = {"sdpa-default": sdpa(None, False), "sdpa-flash": sdpa(SDPBackend.FLASH_ATTENTION, False),
                 "sdpa-cudnn": sdpa(SDPBackend.CUDNN_ATTENTION, False)}
        optional(peers, "varlen_attn", lambda: varlen(False, 1, seq, batch))
        if with_flex:
            optional(peers, "flex-compile", lambda: flex(seq))
        b.group("gqa_decode", dict(batch=batch, q_heads=hq, kv_heads=hkv, dim=128, kv=seq, dtype="bf16"),
                lambda: attention_inputs(batch, hq, hkv, 1, seq), peers,
                lambda i, o: attention_check(i, o, False),
                read=2 * batch * (2 * seq * hkv + hq) * 128, written=2 * batch * hq * 128)

    sizes = [(1, 24, 4, 1024, 0), (1, 24, 4, 4096, 0), (1, 24, 4, 16384, 0), (8, 24, 4, 4096, 1), (32, 24, 4, 1024, 0),
             (32, 24, 4, 4096, 0), (32, 24, 4, 16384, 0), (1, 8, 1, 4096, 1), (32, 8, 1, 4096, 1), (128, 8, 1, 4096, 0)]
    for size in sizes[3:4] if b.args.quick else sizes:
        case(*size)


# ---------------------------------------------------------------- 6. LoRA shrink + expand

def bench_lora(b):
    """y + B[adapter] (A[adapter] x): one slice, tokens sorted by adapter, adapter i from token T (i/n)^2 on."""
    k_dim, n_dim = 3072, 4096
    grouped_mm = getattr(F, "grouped_mm", None) or torch._grouped_mm
    def case(tokens, rank, adapters):
        cuts = [tokens * i * i // adapters ** 2 for i in range(adapters + 1)]
        bounds = list(zip(cuts, cuts[1:]))
        distinct = sum(hi > lo for lo, hi in bounds)
        owner = torch.tensor([a for a, (lo, hi) in enumerate(bounds) for _ in range(lo, hi)], device="cuda")
        ends_at = torch.tensor([hi for _, hi in bounds], device="cuda", dtype=torch.int32)

        def loop(x, a, bb, y):
            out = torch.empty_like(y)
            for i, (lo, hi) in enumerate(bounds):
                if hi > lo:
                    torch.addmm(y[lo:hi], x[lo:hi] @ a[i].T, bb[i].T, out=out[lo:hi])
            return out

        def gathered(x, a, bb, y):
            middle = torch.bmm(a[owner], x.unsqueeze(-1))
            return torch.baddbmm(y.unsqueeze(-1), bb[owner], middle).squeeze(-1)

        def grouped(x, a, bb, y):
            middle = grouped_mm(x, a.transpose(1, 2), offs=ends_at)
            return y + grouped_mm(middle, bb.transpose(1, 2), offs=ends_at)

        def single(x, a, bb, y):
            return torch.addmm(y, x @ a[0].T, bb[0].T)

        def check(inputs, out):
            x, a, bb, y = inputs
            i = ends(tokens)
            middle = torch.einsum("tk,trk->tr", x[i].double(), a[owner[i]].double())
            return relative_error(out[i], y[i].double() + torch.einsum("tr,tnr->tn", middle, bb[owner[i]].double()))

        peers = {"torch-loop": loop, "torch-grouped_mm": grouped}
        if tokens <= 64:
            peers["torch-bmm-gather"] = gathered
        if adapters == 1:
            peers["torch-2-matmuls"] = single
        b.group("lora", dict(tokens=tokens, k=k_dim, n=n_dim, rank=rank, adapters=adapters, dtype="bf16"),
                lambda: (randn(tokens, k_dim), randn(adapters, rank, k_dim, scale=k_dim ** -0.5),
                         randn(adapters, n_dim, rank, scale=rank ** -0.5), randn(tokens, n_dim)),
                peers, check,
                read=2 * (tokens * k_dim + distinct * rank * (k_dim + n_dim) + tokens * n_dim) + 4 * tokens * rank,
                written=2 * tokens * n_dim + 4 * tokens * rank, floor=lambda bytes_us: 2 * b.c.t0 + bytes_us)

    sizes = [(1, 16, 1), (16, 16, 1), (16, 16, 8), (64, 16, 1), (64, 16, 8), (64, 64, 8), (512, 16, 8),
             (8192, 16, 1), (8192, 16, 8), (8192, 64, 8)]
    for size in sizes[4:5] if b.args.quick else sizes:
        case(*size)


# ---------------------------------------------------------------- 7. linear, fp8 per-tensor and bf16

def bench_linear(b):
    scale_x, scale_w, inverse_x = (torch.tensor(v, device="cuda") for v in (0.25, 0.5, 4.0))

    def scaled_mm(fast):
        def run(x, w):
            return torch._scaled_mm(x, w.T, scale_x, scale_w, out_dtype=BF16, use_fast_accum=fast)
        return run

    def quantize_then_mm(x, w):
        return torch._scaled_mm((x * inverse_x).clamp(-448, 448).to(F8), w.T, scale_x, scale_w, out_dtype=BF16,
                                use_fast_accum=True)

    def case(n_dim, k_dim, tokens, unquantized_input):
        params = dict(tokens=tokens, n=n_dim, k=k_dim)
        flops = 2 * tokens * n_dim * k_dim

        def check(inputs, out, scale):
            x, w = inputs
            i, j = ends(tokens), ends(n_dim, 64)
            return relative_error(out[i][:, j], x.float()[i].double() @ w.float()[j].double().T * scale)

        b.group("linear", params | {"dtype": "fp8"},
                lambda: (randn(tokens, k_dim, dtype=F8), randn(n_dim, k_dim, dtype=F8)),
                {"scaled_mm-fast": scaled_mm(True), "scaled_mm-slow": scaled_mm(False)},
                lambda i, o: check(i, o, 0.125), read=(tokens + n_dim) * k_dim, written=2 * tokens * n_dim,
                flops=flops, peak=b.c.fp8)
        if unquantized_input:
            b.group("linear", params | {"dtype": "fp8", "input": "bf16"},
                    lambda: (randn(tokens, k_dim), randn(n_dim, k_dim, dtype=F8)),
                    {"eager-quantize+scaled_mm-fast": quantize_then_mm,
                     "compile-quantize+scaled_mm-fast": compiled(quantize_then_mm)},
                    lambda i, o: check(i, o, 0.5), read=2 * tokens * k_dim + n_dim * k_dim,
                    written=2 * tokens * n_dim, flops=flops, peak=b.c.fp8, tolerance=4e-2)
        b.group("linear", params | {"dtype": "bf16"}, lambda: (randn(tokens, k_dim), randn(n_dim, k_dim)),
                {"torch-matmul": lambda x, w: x @ w.T}, lambda i, o: check(i, o, 1.0),
                read=2 * (tokens + n_dim) * k_dim, written=2 * tokens * n_dim, flops=flops, peak=b.c.bf16)

    if not b.args.quick:
        case(8192, 8192, 8192, False)  # the shape of the matmul ceilings
    sizes = [(12288, 5376, True), (8192, 3072, True), (4096, 3072, False), (1280, 8192, False)]
    for n_dim, k_dim, unquantized_input in sizes[1:2] if b.args.quick else sizes:
        for tokens in (64, 8192) if b.args.quick else (1, 16, 64, 1024, 4096, 8192):
            case(n_dim, k_dim, tokens, unquantized_input)


# ---------------------------------------------------------------- two GPUs: 2. QK-norm, 3. all-reduce, 8. all-reduce + norm

def symmetric(shape, dtype):
    import torch.distributed._symmetric_memory as symm_mem
    t = symm_mem.empty(shape, dtype=dtype, device="cuda")
    handle = symm_mem.rendezvous(t, dist.group.WORLD)
    if getattr(handle, "multicast_ptr", 0):
        raise RuntimeError("symmetric memory came with a multicast address; it must be off")
    t.zero_()
    torch.cuda.synchronize()
    dist.barrier()
    return t


window_pools = []


def windowed(shape, dtype):
    """A tensor in an NCCL symmetric window, so that dist.all_reduce takes NCCL's peer-memory kernels."""
    backend = dist.group.WORLD._get_backend(torch.device("cuda"))
    pool = torch.cuda.MemPool(backend.mem_allocator)
    with torch.cuda.use_mem_pool(pool):
        t = torch.zeros(shape, dtype=dtype, device="cuda")
    backend.register_mem_pool(pool, symm=True)
    window_pools.append((pool, t))  # stays registered
    return t


def one_shot(t):
    return torch.ops.symm_mem.one_shot_all_reduce(t, "sum", dist.group.WORLD.group_name)


def two_shot_(t):
    return torch.ops.symm_mem.two_shot_all_reduce_(t, "sum", dist.group.WORLD.group_name)


def nccl_(t):
    dist.all_reduce(t)
    return t


def gathered_sum(t):
    parts = [torch.empty_like(t) for _ in range(RANKS)]
    dist.all_gather(parts, t.contiguous())
    return torch.stack([p.double() for p in parts]).sum(0)


def bench_all_reduce(b):
    def case(size):
        count = size // 4
        params = {"bytes": size, "dtype": "fp32", "tp": RANKS}
        common = dict(check=lambda inputs, out: relative_error(out, gathered_sum(inputs[1])), read=size, written=size,
                      floor=lambda _: b.c.t0 + b.c.tx + size * (RANKS - 1) / b.c.link, tolerance=1e-5, caches=("warm",),
                      before=lambda t, source: t.copy_(source))  # fresh values, and the spacer between repeats
        b.group("all_reduce", params, lambda: (randn(count, dtype=F32), randn(count, dtype=F32)),
                {"nccl": lambda t, source: nccl_(t)}, **common)
        try:
            window = windowed((count,), F32)
            b.group("all_reduce", params, lambda: (window, randn(count, dtype=F32)),
                    {"nccl-window": lambda t, source: nccl_(t)}, **common)
        except Exception as e:
            b.failed("all_reduce", "nccl-window", e)
        try:
            shared = symmetric((count,), F32)
        except Exception as e:
            return b.failed("all_reduce", "symm_mem", e)
        b.group("all_reduce", params, lambda: (shared, randn(count, dtype=F32)),
                {"symm_mem-one-shot": lambda t, source: one_shot(t),
                 "symm_mem-two-shot": lambda t, source: two_shot_(t)}, **common)

    for size in (512,) if b.args.quick else (8, 512, 8 << 10, 64 << 10, 512 << 10, 4 << 20):
        case(size)


def bench_qk_norm_tp(b):
    heads_q, heads_kv, dim = 48 // RANKS, 8 // RANKS, 128

    def sums(qkv):
        q, k = qk_split(qkv, heads_q, heads_kv, dim)
        return torch.stack([q.float().square().sum(-1), k.float().square().sum(-1)], -1)

    def apply(qkv, total, wq, wk):
        q, k = qk_split(qkv, heads_q, heads_kv, dim)
        sq = torch.rsqrt(total[:, :1] / (RANKS * heads_q * dim) + EPS)
        sk = torch.rsqrt(total[:, 1:] / (RANKS * heads_kv * dim) + EPS)
        return (q.float() * sq).to(BF16) * wq, (k.float() * sk).to(BF16) * wk

    def sums_into(qkv, target):
        target.copy_(sums(qkv))

    sums_c, apply_c, sums_into_c = compiled(sums), compiled(apply), compiled(sums_into)

    def check(inputs, out):
        qkv, wq, wk = inputs
        i = ends(qkv.shape[0])
        q, k = (t.double() for t in qk_split(qkv[i], heads_q, heads_kv, dim))
        total = gathered_sum(torch.stack([q.square().sum(-1), k.square().sum(-1)], -1))
        ref_q = q * torch.rsqrt(total[:, :1] / (RANKS * heads_q * dim) + EPS) * wq.double()
        ref_k = k * torch.rsqrt(total[:, 1:] / (RANKS * heads_kv * dim) + EPS) * wk.double()
        return max(relative_error(out[0][i], ref_q), relative_error(out[1][i], ref_k))

    def case(tokens):
        def eager_nccl(qkv, wq, wk):
            return apply(qkv, nccl_(sums(qkv)), wq, wk)

        def compiled_nccl(qkv, wq, wk):
            return apply_c(qkv, nccl_(sums_c(qkv)), wq, wk)

        peers = {"torch-eager+nccl": eager_nccl, "torch-compile+nccl": compiled_nccl}

        def through(allocate, reduce):
            shared = allocate((tokens, 2), F32)

            def run(qkv, wq, wk):
                sums_into_c(qkv, shared)
                return apply_c(qkv, reduce(shared), wq, wk)
            return run

        optional(peers, "torch-compile+nccl-window", lambda: through(windowed, nccl_))
        optional(peers, "torch-compile+symm_mem-one-shot", lambda: through(symmetric, one_shot))
        n = tokens * (heads_q + heads_kv) * dim
        params = dict(tokens=tokens, q_heads=heads_q, kv_heads=heads_kv, dim=dim, tp=RANKS, dtype="bf16")
        make = lambda: (randn(tokens, (heads_q + 2 * heads_kv) * dim), weight(heads_q * dim), weight(heads_kv * dim))
        floor = lambda bytes_us: max(b.c.t0 + b.c.tx, bytes_us)
        b.group("qk_norm", params, make, peers, check, 2 * n, 2 * n, floor=floor)
        if tokens == 64:
            delay = lambda *_: torch.cuda._sleep(9000 if RANK == RANKS - 1 else 1)
            b.group("qk_norm", params | {"late_us": 5}, make, peers, check, 2 * n, 2 * n, floor=floor, before=delay,
                    caches=("warm",), late_rank=RANKS - 1)

    for tokens in (64,) if b.args.quick else (1, 16, 63, 64, 256, 1024, 2048, 8192):
        case(tokens)


def bench_all_reduce_norm(b):
    hidden = 8192

    def add_norm(x, residual, w):
        total = x + residual
        return F.rms_norm(total, (hidden,), w, EPS), total

    add_norm_c = compiled(add_norm)

    def check(inputs, out):
        _, source, residual, w = inputs
        i = ends(source.shape[0])
        total = gathered_sum(source[i]) + residual[i].double()
        return max(relative_error(out[0][i], norm64(total, w)), relative_error(out[1][i], total))

    def case(tokens):
        n = tokens * hidden
        peers = {"nccl+torch-eager": lambda x, source, residual, w: add_norm(nccl_(x), residual, w),
                 "nccl+torch-compile": lambda x, source, residual, w: add_norm_c(nccl_(x), residual, w)}
        params = dict(tokens=tokens, hidden=hidden, tp=RANKS, dtype="bf16")
        rest = lambda: (randn(tokens, hidden), randn(tokens, hidden), weight(hidden))
        common = dict(check=check, read=4 * n, written=4 * n, before=lambda x, source, *_: x.copy_(source), caches=("warm",),
                      floor=lambda bytes_us: b.c.t0 + b.c.tx + 2 * n * (RANKS - 1) / b.c.link + bytes_us)
        b.group("all_reduce_add_rms_norm", params, lambda: (randn(tokens, hidden), *rest()), peers, **common)
        try:
            window = windowed((tokens, hidden), BF16)
            b.group("all_reduce_add_rms_norm", params, lambda: (window, *rest()),
                    {"nccl-window+torch-compile": lambda x, source, residual, w: add_norm_c(nccl_(x), residual, w)}, **common)
        except Exception as e:
            b.failed("all_reduce_add_rms_norm", "nccl-window", e)
        try:
            shared = symmetric((tokens, hidden), BF16)
        except Exception as e:
            return b.failed("all_reduce_add_rms_norm", "symm_mem", e)
        b.group("all_reduce_add_rms_norm", params, lambda: (shared, *rest()),
                {"symm_mem-one-shot+torch-compile": lambda x, source, residual, w: add_norm_c(one_shot(x), residual, w)}, **common)

    for tokens in (32,) if b.args.quick else (1, 32, 64, 128, 512, 2048):
        case(tokens)


# ---------------------------------------------------------------- main

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, help="JSON file to write")
    parser.add_argument("--append", action="store_true", help="add to the benchmarks already in --out")
    parser.add_argument("--ceilings", help="JSON of the ceilings program, for the floors")
    parser.add_argument("--only", help="comma-separated operator prefixes, e.g. rms_norm,linear")
    parser.add_argument("--filter", help="only names that match this regular expression")
    parser.add_argument("--quick", action="store_true", help="one or two sizes per operator, short timing")
    parser.add_argument("--no-kernels", action="store_true", help="do not list each peer's kernels")
    parser.add_argument("--pause-ms", type=float, default=50, help="idle time before each sample of a compute-bound case; 0: none")
    parser.add_argument("--seed", type=int, default=int(time.time()) & 0x7FFFFFFF, help="fresh by default")
    args = parser.parse_args()

    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if RANKS > 1:
        dist.init_process_group("nccl", timeout=datetime.timedelta(seconds=120),
                                device_id=torch.device("cuda", torch.cuda.current_device()))
        seed = torch.tensor(args.seed, device="cuda")
        dist.broadcast(seed, 0)
        args.seed = int(seed.item())
    torch.manual_seed(args.seed + RANK)
    torch.set_grad_enabled(False)
    for name in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit", "accumulated_cache_size_limit"):
        if hasattr(torch._dynamo.config, name):  # static shapes: one compilation per size
            setattr(torch._dynamo.config, name, 1024)

    bench = Bench(args, Ceilings(args.ceilings))
    say(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {RANKS} GPU(s), ceilings: {bench.c.source}, seed {args.seed}")
    one_gpu = (bench_rms_norm, bench_qk_norm, bench_decode, bench_lora, bench_linear, bench_prefill)
    two_gpus = (bench_all_reduce, bench_qk_norm_tp, bench_all_reduce_norm)
    for part in one_gpu if RANKS == 1 else two_gpus:
        start = time.time()
        try:
            part(bench)
        except Exception as e:
            bench.failed(part.__name__, None, e)
        say(f"-- {part.__name__}: {time.time() - start:.1f} s")
        if RANK == 0:
            bench.write(args.out + ".partial", False)
    if not args.no_kernels:
        start = time.time()
        bench.name_kernels()
        say(f"-- kernel names: {time.time() - start:.1f} s")
    if RANK == 0:
        bench.write(args.out, args.append)
        os.unlink(args.out + ".partial")
    failures = sum("error_occurred" in e or e.get("check") == "FAILED" for e in bench.entries)
    say(f"{len(bench.entries)} entries, {failures} failed")
    if RANKS > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
