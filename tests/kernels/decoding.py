"""A packed batch decoded token by token over a paged cache, its pages in disorder; shared by CPU and GPU tests."""

from __future__ import annotations

import torch

from rlattn.kernels.bounds import bounds_of
from rlattn.kernels.paged import FAI, SINK_MASS, WAAD, decode_statistics
from rlattn.kernels.reference import dense_statistics
from rlattn.kernels.statistics import AttentionVariant

PAGE = 8


def decode(batch, options, *, given_lse, device="cpu", **variant):
    """What a decoder measures of the batch's responses, and what the definitions say: name -> [H, t] each.

    Every step has an idle place, the first nothing but prompts of several tokens, and the second one: none may count.
    """
    made = {"scale": 0.3} | {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in variant.items()}
    shared = {"options": options, "scale": 0.3} | variant
    expected = dense_statistics(batch.q, batch.k, batch.cu_seqlens, batch.response_starts, **shared)
    every = dense_statistics(batch.q, batch.k, batch.cu_seqlens, batch.cu_seqlens[:-1], **shared)  # prompts' lse too
    each = [-(-(end - begin) // PAGE) for begin, end in batch.bounds]
    order = torch.randperm(sum(each) + 3, generator=torch.Generator().manual_seed(1)).tolist()
    table = torch.full((len(each) + 1, max(each)), -1, dtype=torch.int32)
    slots = []  # of each sequence's tokens
    keys = torch.full((len(order), PAGE, *batch.k.shape[1:]), torch.nan, dtype=batch.k.dtype)
    for b, (begin, end) in enumerate(batch.bounds):
        own, order = order[: each[b]], order[each[b] :]
        table[b, : each[b]] = torch.tensor(own)
        token = torch.arange(end - begin)
        slots.append(torch.tensor(own)[token // PAGE] * PAGE + token % PAGE)
        keys.flatten(0, 1)[slots[b]] = batch.k[begin:end]
    # Layers share a store in a decoder, so a slot's numbers are not next to another slot's; old ones must not matter.
    out = torch.full((len(keys) * PAGE, 2, 3, batch.q.shape[1]), 7.0, device=device)
    done = [start - begin for start, (begin, _) in zip(batch.response_starts, batch.bounds, strict=True)]
    turn = 0
    while any(done[b] < len(slots[b]) for b in range(len(slots))):
        rows, starts, lengths = [], [0], []
        for b, (begin, end) in enumerate(batch.bounds):
            prompt = turn == 0 or (turn == 1 and b == 1)
            new = min(3, done[b]) if prompt else int(done[b] < end - begin)
            last = done[b] if prompt else done[b] + new
            rows += range(begin + last - new, begin + last)
            lengths.append(last)
            starts.append(len(rows))
            done[b] += 0 if prompt else new
        turn += 1
        step = {"starts": [*starts, len(rows)], "lengths": [*lengths, 0]}
        decode_statistics(
            out[:, 1],
            batch.q[rows].to(device),
            keys.to(device),
            **{name: torch.tensor(values, dtype=torch.int32, device=device) for name, values in step.items()},
            pages=table.to(device),
            options=options,
            variant=AttentionVariant(**made),
            lse=every.lse[:, rows].float().to(device) if given_lse else None,
        )
    assert (out[:, 0] == 7).all()
    out = out[:, 1].double().cpu()
    rows = bounds_of(batch.cu_seqlens, batch.response_starts, torch.device("cpu"), options).rows_counted
    begins = zip(slots, batch.response_starts, batch.bounds, strict=True)
    at = torch.cat([own[start - begin :] for own, start, (begin, _) in begins])
    kept = torch.cat([torch.arange(s, e) for s, (_, e) in zip(batch.response_starts, batch.bounds, strict=True)])
    found = {"waad": out[at, WAAD].T, "sink_mass": out[at, SINK_MASS].T}
    found["fai"] = out[at, FAI].T / rows[kept].clamp(min=1)
    return found, {name: getattr(expected, name)[:, kept] for name in found}


def assert_decoded(batch, options, **how):
    found, expected = decode(batch, options, **how)
    for name, actual in found.items():
        error = (actual - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1e-30)
        assert error <= 1e-5, f"{name}: relative error {error:.1e}"
