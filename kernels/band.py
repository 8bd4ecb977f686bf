"""Triton: what a known log-sum-exp leaves to do, reading q and k once: WAAD, FAI and sink mass.

Shape legend: [T] tokens of the packed batch, [Hq] query heads, [Hkv] key heads, [D] head channels, [N] tokens of a
program, [M] rows of a tile (STEP positions of each query head that shares the key head), [C] keys near a tile.

A program owns N tokens of one key head. As keys they gather FAI from the rows that look back at them, so every sum has
one owner: no atomics, and two runs give the same bits. As rows they get WAAD from the few keys before them, since rows
sum to one: what is not near lies W or further away.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import LOG2E, advance, cap, exponent, load_tile


@torch.library.custom_op("rlattn::band_statistics", mutates_args=())
def band_statistics(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    kept_lse: Tensor | None,
    first_key: Tensor,
    keys_counted: Tensor,
    rows_counted: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    waad_window: int,
    fai_low: int,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """[3, Hq, T] fp32: FAI, WAAD and sink mass, 0 outside responses; arguments as in `attention_statistics`.

    `first_key`, `keys_counted` and `rows_counted` [T] are those of `Bounds`. `lse` [Hq, T] fp32 normalises rows (nats);
    outside responses it is not used. FAI's rows are normalised by `kept_lse` where sink tokens are left out of it.
    """
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    out = torch.empty(3, heads, tokens, dtype=torch.float32, device=q.device)
    rows, keys, warps, stages = _tile(dim, q.element_size())
    padded_group = triton.next_power_of_2(group)
    step = max(1, rows // padded_group)
    near = min(64, max(16, triton.next_power_of_2(step + waad_window)))
    band_kernel[(triton.cdiv(tokens, keys), kv_heads)](
        q,
        k,
        q if sinks is None else sinks,
        lse,
        lse if kept_lse is None else kept_lse,
        first_key,
        keys_counted,
        rows_counted,
        *out,
        tokens,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        scale,
        softcap or 1.0,
        GROUP=group,
        DIM=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        HEADS=padded_group,
        STEP=step,
        N=keys,
        NEAR=near,
        NEAR_TILES=triton.cdiv(step + waad_window, near),
        WAAD_WINDOW=waad_window,
        FAI_LOW=fai_low,
        SLIDING_WINDOW=sliding_window or 0,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        HAS_KEPT_LSE=kept_lse is not None,
        num_warps=warps,
        num_stages=stages,
    )
    return out


@band_statistics.register_fake
def _(q: Tensor, *_: Any, **__: Any) -> Tensor:
    return q.new_empty(3, q.shape[1], q.shape[0], dtype=torch.float32)


def _tile(dim: int, element_bytes: int) -> tuple[int, int, int, int]:
    """Rows, keys, warps and pipeline stages: fixed by shape, so that two runs add in the same order."""
    if element_bytes == 4:  # exact products have no matrix instruction: small tiles, as their operands fill registers
        return (32, 32, 8, 2) if dim <= 128 else (16, 32, 8, 2)
    return (64, 64, 4, 3) if dim <= 128 else (64, 64, 8, 2)


@triton.jit
def band_kernel(
    q,
    k,
    sinks,
    lse,
    kept_lse,
    first_key,
    keys_counted,
    rows_counted,
    fai_out,
    waad_out,
    sink_mass_out,
    tokens,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    scale,
    softcap,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEADS: tl.constexpr,
    STEP: tl.constexpr,
    N: tl.constexpr,
    NEAR: tl.constexpr,
    NEAR_TILES: tl.constexpr,
    WAAD_WINDOW: tl.constexpr,
    FAI_LOW: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_KEPT_LSE: tl.constexpr,
):
    """One block of tokens of one key head; see `band_statistics`. Every output of these tokens is written."""
    kv_head = tl.program_id(1)
    start = tl.program_id(0) * N
    own = start + tl.arange(0, N)
    inside = own < tokens
    own_rows = tl.load(rows_counted + own, mask=inside, other=0)
    stop = tl.max(tl.where(own_rows > 0, own + FAI_LOW + own_rows, 0))
    k += kv_head * stride_kh
    keys = load_tile(advance(k, start, stride_kt), tl.arange(0, N) * stride_kt, inside, DIM, BLOCK_D)
    factor = exponent(scale, HAS_SOFTCAP)

    row = tl.arange(0, HEADS * STEP)
    position = row % STEP
    in_group = row // STEP < GROUP
    head = kv_head * GROUP + row // STEP
    q += kv_head * GROUP * stride_qh
    offsets = position * stride_qt + row // STEP * stride_qh
    lse += head.to(tl.int64) * tokens
    kept_lse += head.to(tl.int64) * tokens
    # Neighbouring rows of a head that one thread holds are added as they come.
    FOLD: tl.constexpr = 2 if STEP % 16 == 0 else 1
    total = tl.zeros([HEADS * STEP // (8 * FOLD), 8, N], tl.float32)

    own_stop = tl.minimum(start + N, tokens)
    for n in range(start, own_stop, STEP):
        t = n + position
        valid = in_group & (t < own_stop)
        rows = load_tile(advance(q, n, stride_qt), offsets, valid, DIM, BLOCK_D)
        level = tl.load(lse + t, mask=valid, other=float("inf")) * LOG2E
        kept_level = tl.load(kept_lse + t, mask=valid, other=float("inf")) * LOG2E if HAS_KEPT_LSE else level
        counted = tl.load(keys_counted + t, mask=valid, other=0)
        total += _looks_back(
            rows,
            keys,
            t - start,
            kept_level,
            counted,
            scale,
            softcap,
            factor,
            FAI_LOW,
            SLIDING_WINDOW,
            HAS_SOFTCAP,
            FOLD,
        )

        first = tl.load(first_key + t, mask=valid, other=-1)
        reach = t - first  # to the sequence's first key; outside responses anything
        seen = reach if SLIDING_WINDOW == 0 else tl.minimum(reach, SLIDING_WINDOW - 1)
        has_far = seen >= WAAD_WINDOW
        near_limit = tl.minimum(seen, WAAD_WINDOW - 1)
        # Column 0 stands for the first key of the one sequence that may have begun before the near keys.
        front = n - WAAD_WINDOW
        first_column = tl.maximum(first - front, 0)
        early = tl.load(first_key + n)
        early = tl.where(early < 0, -1 - early, early)
        # Rows sum to one: W - sum of p * (W - distance) over near keys, or with no key farther, sum of p * distance.
        offset = t - front - tl.where(has_far, WAAD_WINDOW, 0)
        waad = tl.zeros([HEADS * STEP, 8], tl.float32)
        sink_mass = tl.zeros([HEADS * STEP, 8], tl.float32)
        lane = tl.arange(0, 8)
        for tile in tl.static_range(NEAR_TILES):
            column = tile * NEAR + tl.arange(0, NEAR)
            s = tl.where(column == 0, early, front + column)
            near_keys = load_tile(k, s * stride_kt, (s >= 0) & (s < tokens), DIM, BLOCK_D)
            x = cap(tl.dot(rows, near_keys.T, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
            p = tl.exp2(x * factor - level[:, None]).reshape(HEADS * STEP, NEAR // 8, 8)
            eight = (tile * NEAR + 8 * tl.arange(0, NEAR // 8))[None, :, None]
            distance = ((t - front)[:, None] - lane[None, :])[:, None, :] - eight
            near = distance.to(tl.uint32, bitcast=True) <= near_limit.to(tl.uint32, bitcast=True)[:, None, None]
            on_first = (first_column[:, None] - lane[None, :])[:, None, :] == eight
            sink_mass += tl.sum(tl.where(on_first, p, 0.0), 1)
            p = tl.where(near, p, 0.0)
            waad += (offset[:, None] - lane[None, :]).to(tl.float32) * tl.sum(p, 1) - tl.sum(
                p * eight.to(tl.float32), 1
            )
        on_sink = tl.sum(sink_mass, 1)
        far = tl.full([HEADS * STEP], 1.0, tl.float32)
        if HAS_SINKS:
            far -= tl.exp2(tl.load(sinks + head, mask=in_group, other=0.0).to(tl.float32) * LOG2E - level)
        reached = tl.sum(waad, 1) + tl.where(has_far, WAAD_WINDOW * far, 0.0)
        if SLIDING_WINDOW > 0:
            on_sink = tl.where(reach < SLIDING_WINDOW, on_sink, 0.0)
        response = first >= 0
        at = head.to(tl.int64) * tokens + t
        tl.store(waad_out + at, tl.where(response, reached, 0.0), mask=valid)
        tl.store(sink_mass_out + at, tl.where(response, on_sink, 0.0), mask=valid)

    for n in range(own_stop, stop, STEP):
        t = n + position
        valid = in_group & (t < tokens)
        rows = load_tile(advance(q, n, stride_qt), offsets, valid, DIM, BLOCK_D)
        level = tl.load(kept_lse + t, mask=valid, other=float("inf")) * LOG2E
        counted = tl.load(keys_counted + t, mask=valid, other=0)
        total += _looks_back(
            rows, keys, t - start, level, counted, scale, softcap, factor, FAI_LOW, SLIDING_WINDOW, HAS_SOFTCAP, FOLD
        )

    own_rows = tl.load(rows_counted + own, mask=inside, other=0)  # again: kept since the start it would fill registers
    fai = tl.sum(total.reshape(HEADS, STEP // FOLD, N), 1) / tl.maximum(own_rows, 1).to(tl.float32)[None, :]
    heads = tl.arange(0, HEADS)
    at = (kv_head * GROUP + heads).to(tl.int64)[:, None] * tokens + own[None, :]
    tl.store(fai_out + at, fai, mask=(heads < GROUP)[:, None] & inside[None, :])


@triton.jit
def _looks_back(
    rows,
    keys,
    ahead,
    level,
    counted,
    scale,
    softcap,
    factor,
    FAI_LOW: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FOLD: tl.constexpr,
):
    """[M / (8 FOLD), 8, N] what rows `ahead` [M] tokens of the first key give to the keys in whose FAI mean they count.

    Of its keys from FAI_LOW back a row counts in the nearest `counted` [M].
    """
    M: tl.constexpr = rows.shape[0]
    N: tl.constexpr = keys.shape[0]
    x = cap(tl.dot(rows, keys.T, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
    if SLIDING_WINDOW > 0:
        counted = tl.minimum(counted, max(SLIDING_WINDOW - FAI_LOW, 0))
    p = tl.exp2(x * factor - level[:, None]).reshape(M, N // 8, 8)
    # Columns as 8 a + c, as a thread holds all a of its c: what differs between its columns are constants.
    back = ((ahead - FAI_LOW)[:, None] - tl.arange(0, 8)[None, :])[:, None, :] - (8 * tl.arange(0, N // 8))[
        None, :, None
    ]
    # One unsigned comparison: nearer keys wrap around to far more than any count.
    p = tl.where(back.to(tl.uint32, bitcast=True) < counted.to(tl.uint32, bitcast=True)[:, None, None], p, 0.0)
    return tl.sum(p.reshape(M // (8 * FOLD), FOLD, 8, N), 1)
