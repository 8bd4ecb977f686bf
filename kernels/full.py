"""Triton: what needs every key of a row, in one online softmax that never reads values: log-sum-exp, span, entropy.

Shape legend: [T] tokens of the packed batch, [Hq] query heads, [Hkv] key heads, [D] head channels, [M] rows of a
program (neighbouring positions times the query heads that share a key head), [N] keys of a tile, [C] column classes.

A program reads each key tile once for all query heads that share it. The columns of a tile fall into LANES classes,
each with an online softmax of its own: a thread holds whole classes of its rows, so that a tile needs no exchange
between threads; the classes are merged once, at the end. WAAD, FAI and sink mass follow from the log-sum-exp: `band`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import HIDDEN, LN2, LOG2E, UNSEEN, advance, cap, exponent, load_tile

LANES = 8  # columns of a tile that a Hopper matrix instruction spreads over different threads or registers


@torch.library.custom_op("rlattn::full_statistics", mutates_args=())
def full_statistics(
    q: Tensor,
    k: Tensor,
    first_key: Tensor,
    sinks: Tensor | None,
    *,
    scale: float,
    sink_tokens: int,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """[3 or 4, Hq, T] fp32: lse, span, entropy and, with `sink_tokens`, kept lse; 0 outside responses.

    Arguments as in `attention_statistics`; `first_key` [T] is that of `Bounds`. Kept lse is the log-sum-exp of the keys
    behind the first `sink_tokens` (infinite where there is none), by which FAI's rows are normalised.
    """
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    out = torch.empty(4 if sink_tokens else 3, heads, tokens, dtype=torch.float32, device=q.device)
    rows, keys, warps, stages, registers = _tile(dim, q.element_size())
    full_kernel[(triton.cdiv(tokens * group, rows), kv_heads)](
        q,
        k,
        q if sinks is None else sinks,
        first_key,
        out[0],
        out[1],
        out[2],
        out[-1],
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
        M=rows,
        N=keys,
        LANES=LANES,
        SINK_TOKENS=sink_tokens,
        SLIDING_WINDOW=sliding_window or 0,
        HAS_SOFTCAP=softcap is not None,
        HAS_SINKS=sinks is not None,
        num_warps=warps,
        num_stages=stages,
        maxnreg=registers,
    )
    return out


@full_statistics.register_fake
def _(q: Tensor, *_: Any, sink_tokens: int, **__: Any) -> Tensor:
    return q.new_empty(4 if sink_tokens else 3, q.shape[1], q.shape[0], dtype=torch.float32)


def _tile(dim: int, element_bytes: int) -> tuple[int, int, int, int, int | None]:
    """Rows, keys, warps, pipeline stages, registers: fixed by shape, so that two runs add in the same order.

    168 registers let three programs of four warps share a Hopper multiprocessor.
    """
    if element_bytes == 4:  # exact products have no matrix instruction: small tiles, as their operands fill registers
        return (32, 64, 8, 2, None) if dim <= 64 else (32, 32, 8, 2, None)
    return (128, 64, 4, 2, 168) if dim <= 128 else (128, 64, 8, 2, None)


@triton.jit
def full_kernel(
    q,
    k,
    sinks,
    first_key,
    lse_out,
    span_out,
    entropy_out,
    kept_lse_out,
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
    M: tl.constexpr,
    N: tl.constexpr,
    LANES: tl.constexpr,
    SINK_TOKENS: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One block of rows of one key head; see `full_statistics`. Every output of these rows is written."""
    kv_head = tl.program_id(1)
    # Late positions of a sequence take longest; started first, they do not trail.
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    t_low = block * M // GROUP
    t_high = tl.minimum((block * M + M - 1) // GROUP, tokens - 1)
    row = block * M - t_low * GROUP + tl.arange(0, M)
    t = t_low + row // GROUP
    in_group = row % GROUP
    first = tl.load(first_key + t, mask=t < tokens, other=-1)
    response = first >= 0
    latest = tl.max(first)  # where the last of the rows' sequences begins; -1: no response row
    begin = tl.maximum(tl.min(tl.where(response, first, tokens)), 0)
    limit = t - first  # the farthest key that a row sees; outside responses, whose vectors are 0, any
    edge = latest + SINK_TOKENS
    if SLIDING_WINDOW > 0:
        begin = tl.maximum(begin, t_low - SLIDING_WINDOW + 1)
        limit = tl.minimum(limit, SLIDING_WINDOW - 1)
        edge = tl.maximum(edge, t_high - SLIDING_WINDOW + 1)
    stop = tl.where(latest >= 0, t_high + 1, begin)
    # Before `plain` a key may be hidden from some row or left out as a sink, from `late` on it may come after one.
    plain = begin + tl.cdiv(tl.minimum(tl.maximum(edge, begin), stop) - begin, N) * N
    late = tl.maximum(plain, begin + tl.maximum(t_low + 1 - begin, 0) // N * N)

    k += kv_head * stride_kh
    q = advance(q, t_low, stride_qt) + kv_head * GROUP * stride_qh
    rows = load_tile(q, (row // GROUP) * stride_qt + in_group * stride_qh, response, DIM, BLOCK_D)
    factor = exponent(scale, HAS_SOFTCAP)
    m = tl.full([M, LANES], UNSEEN, tl.float32)  # running maximum, an exponent of 2
    mass = tl.zeros([M, LANES], tl.float32)
    kept = tl.zeros([M, LANES], tl.float32)  # mass of the keys behind the first SINK_TOKENS
    span = tl.zeros([M, LANES], tl.float32)  # sum of kept p * (t - s); no difference of large sums
    depth = tl.zeros([M, LANES], tl.float32)  # sum of p * (exponent - m)
    j = tl.arange(0, N)
    lane = tl.arange(0, LANES)[None, :]
    # Columns as LANES * a + lane, as a thread holds all a of its lanes: what differs between its columns are constants.
    eights = (LANES * tl.arange(0, N // LANES))[None, :, None]
    offsets = j * stride_kt

    edges = (plain - begin) // N
    for i in range(edges + tl.cdiv(stop - late, N)):  # the tiles at both ends
        n = begin + i * N + tl.where(i < edges, 0, late - plain)
        keys = load_tile(advance(k, n, stride_kt), offsets, n + j < tokens, DIM, BLOCK_D)
        x = cap(tl.dot(rows, keys.T, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        x = x.reshape(M, N // LANES, LANES)
        m, mass, kept, span, depth = _edge_tile(
            x, factor, t - n, limit, t - first, lane, eights, m, mass, kept, span, depth, SINK_TOKENS
        )
    for n in range(plain, late, N):
        keys = load_tile(advance(k, n, stride_kt), offsets, j >= 0, DIM, BLOCK_D, CHECKED=False)
        x = cap(tl.dot(rows, keys.T, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
        x = x.reshape(M, N // LANES, LANES)
        m, mass, kept, span, depth = _plain_tile(
            x, factor, t - n, lane, eights, m, mass, kept, span, depth, SINK_TOKENS
        )

    top = tl.max(m, 1)
    share = tl.exp2(m - top[:, None])
    depth = tl.sum(share * (depth + (m - top[:, None]) * mass), 1)
    span = tl.sum(share * span, 1)
    kept = tl.sum(share * kept, 1)
    mass = tl.sum(share * mass, 1)
    level = top + tl.log2(tl.where(response, mass, 1.0))  # lse, an exponent of 2
    entropy = tl.where(response, level - top - depth / mass, 0.0)
    if HAS_SINKS:  # a learned sink takes part in the softmax and is no key
        sink = tl.load(sinks + kv_head * GROUP + in_group).to(tl.float32) * LOG2E
        high = tl.maximum(level, sink)
        joint = high + tl.log2(tl.exp2(level - high) + tl.exp2(sink - high))
        entropy = (entropy + joint - level) * tl.exp2(level - joint)
        level = joint
    if SINK_TOKENS > 0:
        span = tl.where(kept > 0, span / kept, 0.0)
    else:
        span *= tl.exp2(top - level)

    at = (kv_head * GROUP + in_group).to(tl.int64) * tokens + t
    inside = t < tokens
    tl.store(lse_out + at, tl.where(response, level * LN2, 0.0), mask=inside)
    tl.store(span_out + at, tl.where(response, span, 0.0), mask=inside)
    tl.store(entropy_out + at, tl.where(response, entropy * LN2, 0.0), mask=inside)
    if SINK_TOKENS > 0:
        kept_lse = tl.where(kept > 0, (top + tl.log2(kept)) * LN2, float("inf"))
        tl.store(kept_lse_out + at, tl.where(response, kept_lse, 0.0), mask=inside)


@triton.jit
def _plain_tile(x, factor, reach, lane, eights, m, mass, kept, span, depth, SINK_TOKENS: tl.constexpr):
    """Add a tile whose first key lies `reach` [M] before each row, all of which every row sees and counts."""
    new_m = tl.maximum(m, tl.max(x, 1) * factor)
    below = x * factor - new_m[:, None, :]
    p = tl.exp2(below)
    tile_mass = tl.sum(p, 1)
    old = tl.exp2(m - new_m)
    depth = old * (depth + (m - new_m) * mass) + tl.sum(p * below, 1)
    distance = (reach[:, None] - lane).to(tl.float32)  # to the tile's first key of each class
    span = old * span + (distance * tile_mass - tl.sum(p * eights.to(tl.float32), 1))
    mass = old * mass + tile_mass
    if SINK_TOKENS > 0:
        kept = old * kept + tile_mass
    return new_m, mass, kept, span, depth


@triton.jit
def _edge_tile(x, factor, reach, limit, last, lane, eights, m, mass, kept, span, depth, SINK_TOKENS: tl.constexpr):
    """Add a tile whose first key lies `reach` [M] before each row, each key where its row may see it.

    A row sees no key farther than `limit` [M], and keeps no sink, whose distance is at most `last` [M].
    """
    distance = (reach[:, None] - lane)[:, None, :] - eights
    # One unsigned comparison: keys after the row wrap around to far more than any limit.
    seen = distance.to(tl.uint32, bitcast=True) <= limit.to(tl.uint32, bitcast=True)[:, None, None]
    x = tl.where(seen, x, HIDDEN)
    new_m = tl.maximum(m, tl.max(x, 1) * factor)
    below = x * factor - new_m[:, None, :]
    p = tl.exp2(below)
    kept_p = tl.where(distance <= (last - SINK_TOKENS)[:, None, None], p, 0.0) if SINK_TOKENS > 0 else p
    old = tl.exp2(m - new_m)
    depth = old * (depth + (m - new_m) * mass) + tl.sum(p * below, 1)
    span = old * span + tl.sum(kept_p * distance.to(tl.float32), 1)
    mass = old * mass + tl.sum(p, 1)
    if SINK_TOKENS > 0:
        kept = old * kept + tl.sum(kept_p, 1)
    return new_m, mass, kept, span, depth
