"""Triton: one decoding step's rows over a paged key cache; see `paged.py`, also for the shapes.

A program owns one request's row for the query heads that share a key head, and reads the keys of its band once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused import INTERPRETED
from .statistics import AttentionVariant, StatisticsOptions
from .tiles import LOG2E, cap, exponent


def launch(
    out: Tensor,
    q: Tensor,
    keys: Tensor,
    starts: Tensor,
    lengths: Tensor,
    pages: Tensor,
    lse: Tensor,
    options: StatisticsOptions,
    variant: AttentionVariant,
) -> None:
    """`decode_statistics` on a GPU; `lse` [Hq, T] is given."""
    if INTERPRETED and q.dtype == torch.bfloat16:
        q, keys = q.float(), keys.float()  # the interpreter multiplies bfloat16 as the integers that hold it
    _, heads, dim = q.shape
    group = heads // keys.shape[2]
    reach = max(options.waad_window, (options.fai_high or 0) + 1)
    decode_kernel[(len(lengths), keys.shape[2])](
        out,
        q,
        keys,
        starts,
        lengths,
        pages,
        lse,
        q if variant.sinks is None else variant.sinks,
        *out.stride(),
        *q.stride()[:2],
        *keys.stride()[:3],
        pages.stride(0),
        lse.stride(0),
        variant.scale,
        variant.softcap or 1.0,
        GROUP=group,
        HEADS=max(16, triton.next_power_of_2(group)),
        DIM=dim,
        BLOCK_D=max(16, triton.next_power_of_2(dim)),
        PAGE=keys.shape[1],
        TILE=min(128, max(16, triton.next_power_of_2(reach))),
        REACH=reach,
        WAAD_WINDOW=options.waad_window,
        FAI_LOW=options.fai_low,
        FAI_HIGH=options.fai_high,
        SLIDING_WINDOW=variant.sliding_window or 0,
        HAS_SOFTCAP=variant.softcap is not None,
        HAS_SINKS=variant.sinks is not None,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["stride_p", "stride_lse"])  # which differ from batch to batch
def decode_kernel(
    out,
    q,
    keys,
    starts,
    lengths,
    pages,
    lse,
    sinks,
    stride_os,
    stride_ok,
    stride_oh,
    stride_qt,
    stride_qh,
    stride_kp,
    stride_ks,
    stride_kh,
    stride_p,
    stride_lse,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
    TILE: tl.constexpr,
    REACH: tl.constexpr,
    WAAD_WINDOW: tl.constexpr,
    FAI_LOW: tl.constexpr,
    FAI_HIGH: tl.constexpr,
    SLIDING_WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):
    """One request's new row, for one key head."""
    r = tl.program_id(0)
    kv_head = tl.program_id(1)
    row = tl.load(starts + r)
    length = tl.load(lengths + r)
    if (tl.load(starts + r + 1) - row == 1) & (length > 0):
        pages += r.to(tl.int64) * stride_p
        keys += kv_head * stride_kh
        h = tl.arange(0, HEADS)
        in_group = h < GROUP
        head = kv_head * GROUP + h
        d = tl.arange(0, BLOCK_D)
        channels = d < DIM
        at = row.to(tl.int64) * stride_qt + (head * stride_qh)[:, None] + d[None, :]
        rows = tl.load(q + at, mask=in_group[:, None] & channels[None, :], other=0.0)
        level = tl.load(lse + head * stride_lse + row, mask=in_group, other=float("inf")) * LOG2E
        factor = exponent(scale, HAS_SOFTCAP)

        seen = length if SLIDING_WINDOW == 0 else tl.minimum(length, SLIDING_WINDOW)
        near = tl.zeros([HEADS], tl.float32)  # the keys nearer than W, and their part of WAAD
        waad = tl.zeros([HEADS], tl.float32)
        for first in tl.static_range(0, REACH, TILE):
            distance = first + tl.arange(0, TILE)
            visible = distance < seen
            s = length - 1 - distance
            page = tl.load(pages + s // PAGE, mask=visible, other=0).to(tl.int64)
            at = page * stride_kp + (s % PAGE).to(tl.int64) * stride_ks
            k = tl.load(keys + at[:, None] + d[None, :], mask=visible[:, None] & channels[None, :], other=0.0)
            x = cap(tl.dot(rows, k.T, input_precision="ieee"), scale, softcap, HAS_SOFTCAP)
            p = tl.where(visible[None, :], tl.exp2(x * factor - level[:, None]), 0.0)
            within = tl.where((distance < WAAD_WINDOW)[None, :], p, 0.0)
            near += tl.sum(within, 1)
            waad += tl.sum(within * distance.to(tl.float32)[None, :], 1)
            counted = (distance >= FAI_LOW) & (distance <= FAI_HIGH)
            # A token's own slot still has what an earlier token left there.
            touched = visible & (counted | (distance == 0))
            slot = out + (page * PAGE + s % PAGE)[None, :] * stride_os + (head * stride_oh)[:, None] + stride_ok
            touched = touched[None, :] & in_group[:, None]
            old = tl.load(slot, mask=touched & (distance > 0)[None, :], other=0.0)
            tl.store(slot, old + tl.where(counted[None, :], p, 0.0), mask=touched)

        far = tl.full([HEADS], 1.0, tl.float32)
        if HAS_SINKS:
            far -= tl.exp2(tl.load(sinks + head, mask=in_group, other=0.0).to(tl.float32) * LOG2E - level)
        # Rows sum to one: what is not nearer than W lies W or further away.
        waad += tl.where(seen > WAAD_WINDOW, WAAD_WINDOW * (far - near), 0.0)

        first_page = tl.load(pages).to(tl.int64)
        k = tl.load(keys + first_page * stride_kp + d, mask=channels, other=0.0)
        x = tl.sum(rows.to(tl.float32) * k.to(tl.float32)[None, :], 1)
        sink = tl.exp2(cap(x, scale, softcap, HAS_SOFTCAP) * factor - level)
        if SLIDING_WINDOW > 0:
            sink = tl.where(length <= SLIDING_WINDOW, sink, 0.0)

        t = length - 1
        own = tl.load(pages + t // PAGE).to(tl.int64) * PAGE + t % PAGE
        slot = out + own * stride_os + head * stride_oh
        tl.store(slot, waad, mask=in_group)
        tl.store(slot + 2 * stride_ok, sink, mask=in_group)
