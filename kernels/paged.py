"""What one decoding step adds to the statistics, read from a paged key cache: a row a sequence, banded.

Shape legend: [R] requests of the step, [T] their new tokens, [Hq] query heads, [Hkv] key heads, [D] head channels,
[P] pages of a request, [S] slots: places for a token in the cache, page * page size + place in the page.

Each slot keeps what its token's row gave (WAAD, sink mass) and what later rows gave to its key (FAI, a sum). Rows come
one by one, so nothing is read twice and no two programs write the same number of a response.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .statistics import AttentionVariant, StatisticsOptions

WAAD, FAI, SINK_MASS = range(3)  # a slot's three numbers of a head


def refusal(options: StatisticsOptions) -> str | None:
    """Why statistics with such options cannot be had while decoding, or None."""
    if options.fai_high is None:
        return "fai_high must be a number: a row reaches back no farther than its band"
    if options.sink_tokens:
        return f"sink_tokens={options.sink_tokens} must be 0: rows are renormalised by keys outside the band"
    return None


def decode_statistics(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    starts: Tensor,
    lengths: Tensor,
    pages: Tensor,
    *,
    options: StatisticsOptions,
    variant: AttentionVariant,
    lse: Tensor | None = None,
) -> None:
    """Add a step's rows to `out`; requests with another number of new tokens than one (prompts) are passed over.

    Triton on CUDA, where it neither waits for the GPU nor allocates, so a CUDA graph may hold it; torch elsewhere.

    Args:
        out: [S, 3, Hq] fp32, any stride over S: WAAD, the sum of FAI, and sink mass, [Li 2026, eq. 9-10]. FAI's sum is
            over the rows so far; divide by their number.
        q: [T, Hq, D] queries of the step.
        keys: [pages, page size, Hkv, D], those of the step among them.
        starts: [R+1] int32, request r has rows starts[r] to starts[r+1].
        lengths: [R] int32, tokens of each request, new ones included.
        pages: [R, P] int32, where a request's keys are.
        options: what is measured.
        variant: how the layer makes its map.
        lse: [Hq, T] fp32 of the rows, nats; None, which only torch takes, has it computed from every key.

    Raises:
        ValueError: options that `refusal` names.
    """
    reason = refusal(options)
    if reason:
        raise ValueError(reason)
    assert options.fai_high is not None
    if lse is not None and _fused(q):
        _launch(out, q, keys, starts, lengths, pages, options, variant, lse)
        return
    table, bounds = pages.tolist(), starts.tolist()
    for r, (row, end, length) in enumerate(zip(bounds, bounds[1:], lengths.tolist(), strict=False)):
        if end - row != 1:
            continue
        s = torch.arange(length)
        size = keys.shape[1]
        page = torch.tensor(table[r])[s // size]
        slots = page * size + s % size  # [N]
        p = _row(q[row], keys[page, s % size], variant)  # [Hq, N]
        distance = length - 1 - s
        band = (distance >= options.fai_low) & (distance <= options.fai_high)
        out[slots[-1], WAAD] = (p * distance.clamp(max=options.waad_window)).sum(-1)
        out[slots[-1], FAI] = 0
        out[slots[-1], SINK_MASS] = p[:, 0]
        out[slots[band], FAI] += p.T[band]


def _row(q: Tensor, keys: Tensor, variant: AttentionVariant) -> Tensor:
    """[Hq, N], what the last of N tokens gives to each, by its query [Hq, D] and the keys [N, Hkv, D]."""
    heads, length = len(q), len(keys)
    k = keys.float().transpose(0, 1).repeat_interleave(heads // keys.shape[1], 0)  # [Hq, N, D]
    logits = (k @ q.float()[..., None])[..., 0] * variant.scale
    if variant.softcap is not None:
        logits = variant.softcap * (logits / variant.softcap).tanh()
    if variant.sliding_window is not None:
        logits[:, : max(0, length - variant.sliding_window)] = -torch.inf
    if variant.sinks is not None:  # as one more key, in front
        logits = torch.cat([variant.sinks.float()[:, None], logits], -1)
    return logits.softmax(-1)[:, -length:]


def _fused(q: Tensor) -> bool:
    from .fused import refusal

    return refusal(q) is None


def _launch(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    starts: Tensor,
    lengths: Tensor,
    pages: Tensor,
    options: StatisticsOptions,
    variant: AttentionVariant,
    lse: Tensor,
) -> None:
    from .paged_kernel import launch

    extra: dict[str, Any] = {
        "softcap": variant.softcap,
        "sinks": variant.sinks,
        "sliding_window": variant.sliding_window,
    }
    launch(out, q, keys, starts, lengths, pages, lse, scale=variant.scale, options=options, **extra)
