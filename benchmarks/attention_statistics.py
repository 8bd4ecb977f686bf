"""Attention statistics on a GPU: correct first, then time, bytes and memory beside what others need for the same.

    python -P benchmarks/attention_statistics.py    # the whole table
    python -P benchmarks/attention_statistics.py --only forward    # up to 8192 tokens
    python -P benchmarks/attention_statistics.py --plot    # draws the saved results, measures nothing

Writes `benchmarks/results/attention_statistics.json` (with --only, `..._forward.json`). All figures of a file come from
one run on one device; ratios are to the flash attention forward of the same shape in that run. With the wheel of
flash-colreduce installed (`pip install flash-colreduce`) its column mean is timed too.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import fields
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from statistics import median as median_of
from typing import Any

import torch
import torch.nn.functional as F
import transformers
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import AuxRequest, varlen_attn
from triton.testing import do_bench

from rlattn.kernels import Capture, StatisticsOptions, attention_statistics, capture_layers, register
from rlattn.kernels.attention import _GQA
from rlattn.kernels.reference import dense_statistics, map_statistics
from rlattn.kernels.statistics import AttentionStatistics

sys.path.append(str(Path(__file__).parent))  # which -P leaves off
from loop import interval

RESULTS = Path(__file__).parent / "results" / "attention_statistics.json"
HEADS, KV_HEADS, DIM = 32, 8, 128  # a layer of Qwen3-4B
SHAPES = ((64, 1024), (8, 8192), (2, 32768), (1, 131072))  # sequences of tokens
FORWARDS = ((16, 1024), (1, 8192), (1, 131072))
TOLERANCE = 1e-5
OPTIONS = StatisticsOptions()
TURNS_S = 40  # of a forward with capture off, banded and full


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("forward",))
    parser.add_argument("--plot", action="store_true", help="draw the saved results, measure nothing")
    args = parser.parse_args()
    if args.plot:
        plot(json.loads(RESULTS.read_text()))
        return
    torch.manual_seed(0)
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "versions": {m.__name__: m.__version__ for m in (torch, triton, transformers)},
        "copy_bytes_per_second": copy_rate(),
        "relative_errors": check(),
    }
    path = RESULTS.with_stem(RESULTS.stem + "_forward") if args.only else RESULTS

    def keep(part: str, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:  # a run that is cut short leaves what it has
            result.setdefault(part, []).append(row)
            path.write_text(json.dumps(result, indent=1) + "\n")

    if not args.only:
        keep("layer", (layer(*shape, result["copy_bytes_per_second"]) for shape in SHAPES))
    keep("forward", forwards(FORWARDS[:-1] if args.only else FORWARDS))


def inputs(lengths: list[int], heads: int, kv_heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v [T, H, D]: peaked enough that attention is far from uniform."""
    tokens = sum(lengths)
    return tuple(torch.randn(tokens, h, dim, device="cuda").to(dtype) for h in (heads, kv_heads, kv_heads))


def check() -> dict[str, float]:
    """Worst error of every statistic over odd ragged batches, all types, GQA 1, 4 and 8; raises above TOLERANCE."""
    cases = [
        (dtype, *shape)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for shape in ((4, 4, 64), (8, 2, 128), (8, 1, 128), (4, 2, 256))
    ]
    worst: dict[str, float] = {}
    # Nearly all of it is compiling, a core each; the slowest to compile, fp32, come first.
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        for errors in pool.map(check_case, *zip(*cases, strict=True)):
            worst = {name: max(error, worst.get(name, 0.0)) for name, error in errors.items()}
    bad = {name: error for name, error in worst.items() if not error <= TOLERANCE}
    print("relative errors:", {name: f"{error:.1e}" for name, error in worst.items()}, flush=True)
    if bad:
        raise SystemExit(f"not within {TOLERANCE}: {bad}; nothing was timed")
    return worst


def check_case(dtype: torch.dtype, heads: int, kv_heads: int, dim: int) -> dict[str, float]:
    """Worst error of every statistic for one kind of input, full and banded."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new tensors with NaN: outputs are poisoned
    worst: dict[str, float] = {}
    for options, variant in (
        (OPTIONS, {}),
        (StatisticsOptions(sink_tokens=2, fai_high=None), {}),
        (StatisticsOptions(waad_window=3, fai_low=0), {"sliding_window": 100}),
        (OPTIONS, {"softcap": 5.0, "sinks": torch.randn(heads, device="cuda")}),
    ):
        lengths = [5, 333, 1, 150, 1025, 77]
        q, k, _ = inputs(lengths, heads, kv_heads, dim, dtype)
        offsets = [0, *accumulate(lengths)]
        starts = [begin + n // 3 for begin, n in zip(offsets, lengths, strict=False)]
        shared: dict[str, Any] = {"scale": dim**-0.5, "options": options, **variant}
        expected = dense_statistics(q, k, offsets, starts, **shared)
        found = [attention_statistics(q, k, offsets, starts, backend="triton", **shared)]
        if not options.sink_tokens:
            lse = expected.lse.float()
            found.append(attention_statistics(q, k, offsets, starts, backend="triton", lse=lse, **shared))
        for statistics in found:
            compare(statistics, expected, worst)
    return worst


def compare(actual: AttentionStatistics, expected: AttentionStatistics, worst: dict[str, float]) -> None:
    for field in fields(expected):
        a, e = getattr(actual, field.name), getattr(expected, field.name)
        if a is None:
            continue
        error = ((a.double() - e.double()).abs().max() / e.double().abs().max()).item()
        worst[field.name] = max(worst.get(field.name, 0.0), error if error == error else float("inf"))


def copy_rate() -> float:
    """Bytes a second, read and written, of a large copy on the device: the ceiling of anything bound by memory."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * len(source) / (1e-3 * median(lambda: target.copy_(source)))


def median(call: Callable[[], object]) -> float:
    """Milliseconds."""
    return do_bench(call, warmup=50, rep=300, return_mode="median")


def layer(batch: int, length: int, rate: float) -> dict[str, Any]:
    """One attention layer at one shape, all tokens responses."""
    lengths = [length] * batch
    offsets = [0, *accumulate(lengths)]
    q, k, v = inputs(lengths, HEADS, KV_HEADS, DIM, torch.bfloat16)
    scale = DIM**-0.5
    cu = torch.tensor(offsets, dtype=torch.int32, device="cuda")
    padded = [x.view(batch, length, -1, DIM).transpose(1, 2) for x in (q, k, v)]

    def varlen() -> Any:
        return varlen_attn(
            q, k, v, cu, cu, length, length, scale=scale, window_size=(-1, 0), return_aux=AuxRequest(lse=True), **_GQA
        )

    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*padded, is_causal=True, scale=scale, enable_gqa=True)

        return run

    lse = varlen()[1]
    shared: dict[str, Any] = {"scale": scale, "options": OPTIONS}
    arguments = (q, k, offsets, offsets[:-1])
    column_mean = StatisticsOptions(fai_low=0, fai_high=None)
    calls: dict[str, Callable[[], object]] = {
        "cudnn_forward": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flash_forward": sdpa(SDPBackend.FLASH_ATTENTION),
        "varlen_forward_with_lse": varlen,
        "full": lambda: attention_statistics(*arguments, **shared),
        "banded": lambda: attention_statistics(*arguments, **shared, lse=lse),
        "column_mean": lambda: attention_statistics(*arguments, scale=scale, options=column_mean),
        "column_mean_with_lse": lambda: attention_statistics(*arguments, scale=scale, options=column_mean, lse=lse),
        "torch_path": lambda: attention_statistics(*arguments, **shared, backend="torch"),
        "eager_maps": lambda: eager(q, k, length, scale),
    } | colreduce(padded, scale)
    row: dict[str, Any] = {"batch": batch, "length": length, "ms": {}, "peak_mib": {}}
    for name, call in calls.items():
        if name in ("torch_path", "eager_maps") and length > 8192:
            continue  # minutes, or more memory than there is
        try:
            row["peak_mib"][name] = peak_mib(call)
            row["ms"][name] = median(call)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            row["ms"][name] = None
            print(f"{name} at {batch}x{length}: {str(error).splitlines()[0][:160]}")
    floor_bytes = q.nbytes + k.nbytes
    row["floor_ms"] = 1e3 * floor_bytes / rate
    row["to_cudnn"] = {name: ms / row["ms"]["cudnn_forward"] for name, ms in row["ms"].items() if ms}
    print(f"{batch}x{length}: floor of reading q and k once {row['floor_ms']:.2f} ms")
    for name, ms in row["ms"].items():
        if ms:
            print(f"  {name:24} {ms:9.3f} ms  {row['to_cudnn'][name]:8.3f} of cuDNN  {row['peak_mib'][name]:9.1f} MiB")
    return row


def eager(q: Tensor, k: Tensor, length: int, scale: float) -> None:
    """The same statistics from whole maps, a sequence at a time."""
    causal = torch.ones(length, length, dtype=torch.bool, device="cuda").tril()
    for begin in range(0, len(q), length):
        queries, keys = (x[begin : begin + length].transpose(0, 1) for x in (q, k))
        logits = (queries @ keys.repeat_interleave(HEADS // KV_HEADS, 0).transpose(1, 2)).float() * scale
        for maps in logits.masked_fill_(~causal, -torch.inf).softmax(-1).split(4):
            map_statistics(maps, 0, OPTIONS)


def colreduce(padded: list[Tensor], scale: float) -> dict[str, Callable[[], object]]:
    """flash-colreduce's causal column mean, where that package is installed."""
    try:
        from flash_colreduce import flash_colreduce
    except ImportError:
        return {}
    q, k, _ = padded
    keys = k.repeat_interleave(HEADS // KV_HEADS, 1)
    return {"flash_colreduce": lambda: flash_colreduce(q, keys, "mean", is_causal=True, scale=scale)}


def peak_mib(call: Callable[[], object]) -> float:
    """Memory that a call needs at its peak beyond what is there already."""
    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def forwards(shapes: Sequence[tuple[int, int]]) -> Iterator[dict[str, Any]]:
    """The scoring forward of a Qwen3-4B shape with random weights: capture off, banded, full, and eager maps.

    The paper runs eager attention that returns its maps, then reduces them; timed here without that reducing, and where
    the maps of all layers do not fit, without keeping them.
    """
    config = transformers.Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=DIM, max_position_embeddings=131072, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("cuda"):
        model = transformers.AutoModel.from_config(config, attn_implementation=register(), dtype=torch.bfloat16).eval()
    for shape in shapes:
        yield forward_row(model, *shape)


@torch.inference_mode()
def forward_row(model: transformers.PreTrainedModel, batch: int, length: int) -> dict[str, Any]:
    """The forward at one shape, three quarters of each sequence response."""
    layers = capture_layers(model.config)
    offsets = [length * i for i in range(batch + 1)]
    starts = [begin + length // 4 for begin in offsets[:-1]]
    ids = torch.randint(model.config.vocab_size, (1, batch * length), device="cuda")
    positions = torch.arange(length, device="cuda").repeat(batch)[None]

    def forward(spans: bool | None) -> object:
        capture = None if spans is None else Capture(layers, OPTIONS, starts, spans=spans)
        return model(input_ids=ids, position_ids=positions, use_cache=False, cu_seqlens=offsets, capture=capture)

    def paper(keep: bool) -> None:
        for row in range(batch):  # the maps of more than one sequence do not fit
            part = slice(row * length, (row + 1) * length)
            model(input_ids=ids[:, part], position_ids=positions[:, part], use_cache=False, output_attentions=keep)

    calls: dict[str, Callable[[], object]] = {
        "off": lambda: forward(None),
        "banded": lambda: forward(False),
        "full": lambda: forward(True),
    }
    row: dict[str, Any] = {"batch": batch, "length": length, "layers": layers}
    row["peak_mib"] = {name: peak_mib(call) for name, call in calls.items()}
    # In turns, so that a drift of the clocks meets all alike; a forward of 128K tokens takes many seconds.
    names = list(calls)
    count = 3 if length > 8192 else max(5, int(TURNS_S * 1e3 / (len(calls) * once(calls["off"]))))
    turns = [{name: once(calls[name]) for name in names[i % 3 :] + names[: i % 3]} for i in range(count)]
    row["turns"] = count
    row["ms"] = {name: median_of([turn[name] for turn in turns]) for name in calls}
    shares = {name: [turn[name] / turn["off"] - 1 for turn in turns] for name in ("banded", "full")}
    row["extra"] = {name: median_of(own) for name, own in shares.items()}
    row["extra_95"] = {name: interval(own) for name, own in shares.items()}
    row["weights_mib"] = sum(p.nbytes for p in model.parameters()) / 2**20
    peak = row["weights_mib"] + row["peak_mib"]["off"]
    row["extra_memory"] = {n: (row["peak_mib"][n] - row["peak_mib"]["off"]) / peak for n in ("banded", "full")}
    if length <= 8192:
        model.set_attn_implementation("eager")
        for keep, name in ((True, "eager_maps_kept"), (False, "eager")):
            try:
                row["peak_mib"][name] = peak_mib(lambda keep=keep: paper(keep))
                row["ms"][name] = median(lambda keep=keep: paper(keep))
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
        model.set_attn_implementation(register())
        row["eager_to_banded_extra"] = row["ms"]["eager"] / (row["extra"]["banded"] * row["ms"]["off"])
    extra = ", ".join(
        f"{name} {100 * share:+.2f}% [{100 * low:+.2f}, {100 * high:+.2f}]"
        for (name, share), (low, high) in zip(row["extra"].items(), row["extra_95"].values(), strict=True)
    )
    memory = ", ".join(f"{name} {100 * share:+.2f}%" for name, share in row["extra_memory"].items())
    print(f"forward {batch}x{length}, {count} turns: off {row['ms']['off']:.1f} ms, time {extra}; peak memory {memory}")
    print("  ", {name: row["ms"][name] for name in row["ms"]}, row.get("eager_to_banded_extra"))
    return row


def once(call: Callable[[], object]) -> float:
    """Milliseconds of a single run."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def plot(result: dict[str, Any]) -> None:
    """Time and memory against length, for the README."""
    import matplotlib.pyplot as plt

    rows = result["layer"]
    names = {"cudnn_forward": "cuDNN flash forward", "full": "full", "banded": "banded", "eager_maps": "eager maps"}
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, key, label in ((axes[0], "ms", "ms a layer"), (axes[1], "peak_mib", "MiB beyond the inputs")):
        for name, text in names.items():
            points = [(row["length"], row[key][name]) for row in rows if row[key].get(name)]
            axis.loglog(*zip(*points, strict=True), marker="o", label=text)
        axis.set_xlabel("tokens a sequence")
        axis.set_title(label, fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"One attention layer, 32 query and 8 key heads of 128, bf16, {result['device']}", fontsize=10)
    figure.savefig(Path(__file__).parent.parent / "docs" / "attention_statistics.png", dpi=150)


if __name__ == "__main__":
    main()
