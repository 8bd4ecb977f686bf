"""What each token of a packed batch may see and who counts it, as three integers a token, made once a batch.

Shape legend: [T] tokens of the packed batch, [B] sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .ragged import Offsets, as_ints

if TYPE_CHECKING:
    from .statistics import StatisticsOptions


@dataclass(frozen=True)
class Bounds:
    """The reach of every token, indices in the packed batch; needs no sequence number, so kernels need no search.

    Attributes:
        first_key: [T] int32, first token f of token t's sequence; its complement -1 - f outside responses, whose rows
            are not measured.
        keys_counted: [T] int32, in how many keys' FAI mean row t counts: those from t - H_lo back to the farthest,
            t - H_hi or the first response key behind the first `sink_tokens` [Li 2026, eq. 10].
        rows_counted: [T] int32, how many rows count in key s's mean, |T(s)|: those from s + H_lo on.
    """

    first_key: Tensor
    keys_counted: Tensor
    rows_counted: Tensor


def bounds_of(
    cu_seqlens: Offsets, response_starts: Offsets, device: torch.device, options: StatisticsOptions
) -> Bounds:
    """Bounds of a batch on `device`, made without waiting for it; arguments as in `attention_statistics` (cached)."""
    reach = options.fai_low, options.fai_high, options.sink_tokens
    return _bounds(tuple(as_ints(cu_seqlens)), tuple(as_ints(response_starts)), device, *reach)


def check_starts(offsets: Sequence[int], starts: Sequence[int]) -> None:
    """Raise ValueError unless each sequence's response starts in it or right behind it."""
    bounds = list(pairwise(offsets))
    if len(starts) != len(bounds) or any(not a <= s <= b for s, (a, b) in zip(starts, bounds, strict=True)):
        raise ValueError(
            f"response_starts must give a token in each sequence of cu_seqlens={[*offsets]}, got {[*starts]}"
        )


@lru_cache(maxsize=8)
@torch.inference_mode(False)
def _bounds(
    offsets: tuple[int, ...],
    starts: tuple[int, ...],
    device: torch.device,
    fai_low: int,
    fai_high: int | None,
    sink_tokens: int,
) -> Bounds:
    lengths = torch.tensor(offsets).diff()
    begin, end, start = (
        torch.tensor(values, dtype=torch.int32).repeat_interleave(lengths)
        for values in (offsets[:-1], offsets[1:], starts)
    )  # [T] each
    token = torch.arange(offsets[-1], dtype=torch.int32)
    response = token >= start
    first_counted = torch.maximum(start, begin + sink_tokens)
    keys = token - fai_low - first_counted + 1
    rows = torch.where(token >= first_counted, end - token - fai_low, 0)
    if fai_high is not None:
        keys, rows = (x.clamp(max=fai_high - fai_low + 1) for x in (keys, rows))
    bounds = [begin.where(response, -1 - begin), keys.where(response, 0).clamp(min=0), rows.clamp(min=0)]
    if device.type == "cuda":  # from pinned memory the copy is ordered on the stream and the host goes on
        bounds = [x.pin_memory() for x in bounds]
    return Bounds(*(x.to(device, torch.int32, non_blocking=True) for x in bounds))
