"""What one decoding step adds to the statistics, read from a paged key cache: a row a sequence, banded.

Shape legend: [R] requests of the step, [T] their new tokens, [Hq] query heads, [Hkv] key heads, [D] head channels,
[P] pages of a request, [S] slots: places for a token in the cache, page * page size + place in the page.

Each slot keeps what its token's row gave (WAAD, sink mass) and what later rows gave to its key (FAI, a sum). Rows come
one by one, so nothing is read twice and no two programs write the same number of a response.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .statistics import AttentionVariant, StatisticsOptions

WAAD, FAI, SINK_MASS = range(3)  # a slot's three numbers of a head
MOST_NUMBERS = 1 << 24  # of keys that the torch path holds at a time, padded to the longest request


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
        ValueError: options that `refusal` names, or queries that the kernels on CUDA cannot take.
    """
    reason = refusal(options)
    if reason:
        raise ValueError(reason)
    assert options.fai_high is not None
    if lse is not None:
        from . import fused, paged_kernel  # triton is no part of torch's CPU builds

        unfit = fused.refusal(q)
        if unfit is None:
            paged_kernel.launch(out, q, keys, starts, lengths, pages, lse, options, variant)
            return
        if q.is_cuda:
            raise ValueError(f"decode_statistics: {unfit}")
    rows = (starts.diff() == 1).nonzero()[:, 0]
    if not len(rows):
        return
    most = max(1, MOST_NUMBERS // max(1, int(lengths.max()) * keys[0, 0].numel()))
    for part in rows.split(most):
        _add_rows(out, q[starts[part]], keys, lengths[part], pages[part].long(), options, variant)


def _add_rows(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    lengths: Tensor,
    pages: Tensor,
    options: StatisticsOptions,
    variant: AttentionVariant,
) -> None:
    """Of requests with a row each, q [R, Hq, D]; N is the longest one's length."""
    size = keys.shape[1]
    s = torch.arange(int(lengths.max()))
    distance = lengths[:, None] - 1 - s  # [R, N]
    visible = distance >= 0
    page = pages[:, s // size].where(visible, 0)
    slots = page * size + s % size
    k = keys[page, s % size].float()  # [R, N, Hkv, D]
    logits = torch.einsum("rkgd,rnkd->rkgn", q.float().unflatten(1, (keys.shape[2], -1)), k).flatten(1, 2)
    p = _maps(logits * variant.scale, distance, variant)  # [R, Hq, N]

    own = slots.gather(1, lengths[:, None].long() - 1)[:, 0]
    out[own, WAAD] = (p * distance.clamp(0, options.waad_window)[:, None]).sum(-1)
    out[own, FAI] = 0
    out[own, SINK_MASS] = p[..., 0]
    band = visible & (distance >= options.fai_low) & (distance <= (options.fai_high or 0))
    out[slots[band], FAI] += p.transpose(1, 2)[band]  # prompts that requests share lose some, which nobody reads


def _maps(logits: Tensor, distance: Tensor, variant: AttentionVariant) -> Tensor:
    """What rows give to the keys at a `distance` [R, N], by their products `logits` [R, Hq, N]."""
    if variant.softcap is not None:
        logits = variant.softcap * (logits / variant.softcap).tanh()
    hidden = distance < 0
    if variant.sliding_window is not None:
        hidden |= distance >= variant.sliding_window
    logits = logits.masked_fill(hidden[:, None], -torch.inf)
    if variant.sinks is not None:  # as one more key, in front
        sinks = variant.sinks.float()[:, None].expand(len(logits), -1, 1)
        logits = torch.cat([sinks, logits], -1)
    return logits.softmax(-1)[..., -distance.shape[1] :]
