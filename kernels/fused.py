"""The Triton path of the attention statistics: two torch operators, traceable and capturable, without a host sync.

Shape legend: [T] tokens of the packed batch, [Hq] query heads, [Hkv] key heads, [D] head channels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from triton import knobs

from .band import band_statistics
from .bounds import Bounds
from .full import full_statistics

if TYPE_CHECKING:
    from .statistics import AttentionVariant, StatisticsOptions

MAX_DIM = 256
INTERPRETED = knobs.runtime.interpret  # read once, as torch.compile cannot trace the reading


def refusal(q: Tensor) -> str | None:
    """Why the kernels cannot take queries like these [T, Hq, D], or None."""
    if not (q.is_cuda or INTERPRETED):
        return f"its kernels run on CUDA devices, not on {q.device.type}"
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"its kernels take bfloat16, float16 or float32, not {q.dtype}"
    if q.shape[2] > MAX_DIM:
        return f"its kernels take up to {MAX_DIM} channels a head, not {q.shape[2]}"
    return None


def fused_statistics(
    q: Tensor,
    k: Tensor,
    bounds: Bounds,
    options: StatisticsOptions,
    variant: AttentionVariant,
    lse: Tensor | None = None,
) -> dict[str, Any]:
    """Statistics by name, each [Hq, T] fp32; banded where `lse` is given, then without span and entropy.

    Arguments as in `attention_statistics`, `bounds` as made by `bounds_of` for the same options. Made of torch
    operators alone, so it works inside torch.compile and CUDA graphs.
    """
    if INTERPRETED and q.dtype == torch.bfloat16:
        q, k = q.float(), k.float()  # the interpreter multiplies bfloat16 as the integers that hold it
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    logits: dict[str, Any] = {
        "scale": variant.scale,
        "sliding_window": variant.sliding_window,
        "softcap": variant.softcap,
    }
    extra: dict[str, Any] = {"span": None, "entropy": None}
    kept_lse = None
    if lse is None:
        rows = full_statistics(q, k, bounds.first_key, variant.sinks, sink_tokens=options.sink_tokens, **logits)
        lse, extra["span"], extra["entropy"] = rows[:3]
        kept_lse = rows[3] if options.sink_tokens else None
    fai, waad, sink_mass = band_statistics(
        q,
        k,
        lse,
        kept_lse,
        bounds.first_key,
        bounds.keys_counted,
        bounds.rows_counted,
        variant.sinks,
        fai_low=options.fai_low,
        waad_window=options.waad_window,
        **logits,
    )
    return extra | {"lse": lse, "waad": waad, "fai": fai, "sink_mass": sink_mass}
