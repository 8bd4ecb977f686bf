"""Answer-targeted flow: exact first, then its time and memory beside the attention forward of the same layers.

    python -P benchmarks/flow.py                    # on a GPU
    python -P benchmarks/flow.py --cpu --small      # a try without one: the same steps at small shapes

Writes `benchmarks/results/flow.json` (with --small: prints it). Every figure comes from one run on one device. `map` is
gathering the mean map of five layers, `solve` both triangular solves, `attention` the causal forward of those layers
by torch's SDPA, `cudnn` the same by cuDNN where it is there.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from rlattn.kernels import FlowMap, FlowOptions

RESULTS = Path(__file__).parent / "results" / "flow.json"
HEADS, KV_HEADS, DIM, LAYERS = 32, 8, 128, 5  # the captured layers of Qwen3-4B
SHAPES = ((1, 1024), (8, 1024), (1, 8192), (2, 8192))  # sequences of tokens
SMALL = ((1, 200), (3, 150))
EXACT, ROUNDED = 1e-5, 0.02  # largest error over largest flow: fp32 map, bf16 map rounded once a layer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    device = torch.device("cpu" if args.cpu else "cuda")
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "command": "python -P benchmarks/flow.py",
        "device": platform.processor() or "cpu" if args.cpu else torch.cuda.get_device_name(),
        "versions": {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, transformers)},
        "layers": {"layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM, "dtype": "bfloat16"},
        "errors": check(device, [130, 5, 257, 64] if args.small else [700, 5, 1300, 64, 1025]),
    }
    shapes, repeats = SMALL if args.small else SHAPES, 3 if args.cpu else 20
    result["shapes"] = [measure(device, *shape, repeats) for shape in shapes]
    if args.small:
        print(json.dumps(result, indent=1))
    else:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def inputs(tokens: int, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """q [T, Hq, D] and k [T, Hkv, D] of every layer: peaked enough that attention is far from uniform."""
    return [
        tuple(torch.randn(tokens, h, DIM, device=device).to(torch.bfloat16) for h in (HEADS, KV_HEADS))
        for _ in range(LAYERS)
    ]  # type: ignore[misc]


def gather(layers: list[tuple[Tensor, Tensor]], offsets: list[int], options: FlowOptions, *, solve: bool) -> FlowMap:
    """The map of all layers, with its flow where `solve` is set: a map that waits for one more layer is not solved."""
    gathered = FlowMap(offsets, *places(offsets), layers=len(layers) + (not solve), options=options)
    for q, k in layers:
        gathered.add(q, k, scale=DIM**-0.5)
    return gathered


def places(offsets: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
    """A quarter of each sequence prompt; an answer of up to 20 tokens, 3 before the end."""
    starts = [a + (b - a) // 4 for a, b in pairwise(offsets)]
    ends = [max(start, end - 3) for start, end in zip(starts, offsets[1:], strict=True)]
    return starts, [(max(start, end - 20), end) for start, end in zip(starts, ends, strict=True)]


def check(device: torch.device, lengths: list[int]) -> dict[str, float]:
    """Worst error over the largest flow of a ragged batch, against dense float64; raises above the bounds."""
    offsets = [0, *accumulate(lengths)]
    layers = inputs(offsets[-1], device)
    where = zip(pairwise(offsets), *places(offsets), strict=True)
    expected = torch.cat([dense(layers, *bounds, start, *answer) for bounds, start, answer in where])
    errors = {}
    for storage, bound in (("float32", EXACT), ("bfloat16", ROUNDED)):
        actual = gather(layers, offsets, FlowOptions(storage=storage), solve=True).flow
        errors[storage] = ((actual - expected).abs().max() / expected.max()).item()
        print(f"largest error over largest flow, {storage} map: {errors[storage]:.1e}", flush=True)
        if not errors[storage] <= bound:
            raise SystemExit(f"not within {bound}; nothing was timed")
    return errors


def dense(layers: list[tuple[Tensor, Tensor]], begin: int, end: int, start: int, first: int, last: int) -> Tensor:
    """[n] float64: the flow of one sequence from whole maps, by the definitions."""
    n = end - begin
    causal = torch.ones(n, n, dtype=torch.bool, device=layers[0][0].device).tril()
    mean = torch.zeros(n, n, dtype=torch.float64, device=causal.device)
    for q, k in layers:
        for head in range(HEADS):
            logits = q[begin:end, head].double() @ k[begin:end, head * KV_HEADS // HEADS].double().T * DIM**-0.5
            mean += logits.masked_fill(~causal, -torch.inf).softmax(-1)
    lower = (mean / (len(layers) * HEADS)).tril(-1)
    eye = torch.eye(n, dtype=torch.float64, device=causal.device)
    target, source = torch.zeros(2, n, 1, dtype=torch.float64, device=causal.device)
    target[first - begin : last - begin] = 1.0
    h = torch.linalg.solve_triangular(eye - lower.T, target, upper=True)
    source[: start - begin] = 1 / max(start - begin, 1)
    reweighted = torch.where(h.T > 0, lower * h / h.T, 0.0)
    return (torch.linalg.solve_triangular(eye - reweighted, source * (h > 0), upper=False) * (h > 0))[:, 0]


def measure(device: torch.device, batch: int, length: int, repeats: int) -> dict[str, Any]:
    """Milliseconds and peak MiB of one shape."""
    offsets = [length * i for i in range(batch + 1)]
    layers, options = inputs(offsets[-1], device), FlowOptions()
    padded = [
        tuple(x.view(batch, length, -1, DIM).transpose(1, 2) for x in (q, k, torch.randn_like(k))) for q, k in layers
    ]

    def attention() -> None:
        for q, k, v in padded:
            F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def cudnn() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            attention()

    calls: dict[str, Callable[[], object]] = {"attention": attention}
    if device.type == "cuda":
        calls["cudnn"] = cudnn
    calls["map"] = lambda: gather(layers, offsets, options, solve=False)
    calls["flow"] = lambda: gather(layers, offsets, options, solve=True)
    row: dict[str, Any] = {"batch": batch, "length": length, "ms": {}, "peak_mib": {}}
    for name, call in calls.items():
        try:
            row["ms"][name], row["peak_mib"][name] = cost(call, device, repeats)
        except RuntimeError as error:
            print(f"{name} at {batch}x{length}: {str(error).splitlines()[0][:160]}")
    row["ms"]["solve"] = row["ms"]["flow"] - row["ms"]["map"]
    row["flow_to_attention"] = row["ms"]["flow"] / row["ms"]["attention"]
    figures = ", ".join(f"{name} {ms:.2f} ms" for name, ms in row["ms"].items())
    print(f"{batch}x{length}: {figures}; peak {row['peak_mib'].get('flow')} MiB", flush=True)
    return row


def cost(call: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float | None]:
    """Median milliseconds with the device idle before and after, and the MiB needed beyond what was there."""
    on_gpu = device.type == "cuda"
    times, peak = [], None
    for turn in range(repeats + 2):  # two to warm up; the second says how much memory
        if on_gpu:
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        call()
        if on_gpu:
            torch.cuda.synchronize()
            if turn == 1:
                peak = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
        if turn > 1:
            times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), peak


if __name__ == "__main__":
    main()
