"""Per-token, per-head statistics of attention maps that are never materialised.

Shape legend: [T] tokens of the packed batch, [B] sequences, [Hq] query heads, [Hkv] key heads, [D] head channels.
Notation as in the paper: A[t, s] is what position t of a sequence gives to s <= t (post-RoPE q·k·scale, softmax), R are
the response positions, N the sequence's length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .blockwise import blockwise_statistics
from .bounds import bounds_of, check_starts
from .ragged import Offsets, as_ints, layout_of

Backend = Literal["auto", "torch", "triton"]


@dataclass(frozen=True)
class StatisticsOptions:
    """What is measured. Defaults are those of [Li 2026, section 3 and eq. 9-10].

    Attributes:
        waad_window: W of eq. 9, tokens; distances are clipped there.
        fai_low: H_lo of eq. 10, tokens; nearer rows do not count as future.
        fai_high: H_hi of eq. 10, tokens; None reaches to the end of the response.
        sink_tokens: the first keys of a sequence left out of span and FAI, rows renormalised; 0 is the paper.

    Raises:
        ValueError: a bound is not met.
    """

    waad_window: int = 10
    fai_low: int = 10
    fai_high: int | None = 100
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        for name, least in (("waad_window", 1), ("fai_low", 0), ("sink_tokens", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.fai_high is not None and self.fai_high < self.fai_low:
            raise ValueError(f"fai_high={self.fai_high} must be at least fai_low={self.fai_low}, or None")


@dataclass(frozen=True)
class AttentionVariant:
    """How a layer makes its attention map from q and k.

    Attributes:
        scale: factor on q·k, above 0.
        sliding_window: key s is visible to t iff t - s < sliding_window; None means every earlier key.
        softcap: logits are softcap * tanh(q·k·scale / softcap), as in Gemma 2; None means q·k·scale.
        sinks: [Hq] learned logits that take part in each row's softmax and are no keys, as in gpt-oss; or None.

    Raises:
        ValueError: a bound is not met.
    """

    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "softcap"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window={self.sliding_window} must be at least 1, or None")


@dataclass(frozen=True)
class AttentionStatistics:
    """One layer's statistics: each [Hq, T] fp32, 0 outside responses, detached; None where it was not measured.

    A'[t, s] is A[t, s] with the first `sink_tokens` keys left out and the row renormalised (A' = A at the default of 0;
    a row with no key left counts as 0).

    Attributes:
        lse: log of the row's sum of exp(logit), learned sinks among them, nats; where it was given, as given.
        span: sum over s of A'[t, s] (t - s), tokens; its mean over R is the head's span [Li 2026, eq. 7].
        waad: sum over s of A[t, s] min(t - s, W), tokens [Li 2026, eq. 9].
        fai: of token s as a key, mean over t in T(s) of A'[t, s], T(s) = {t in R: s + H_lo <= t <= min(N-1, s + H_hi)};
            0 where T(s) is empty [Li 2026, eq. 10].
        entropy: -sum over keys s of A[t, s] log A[t, s], nats.
        sink_mass: A[t, 0], what the row gives to the sequence's first token.
    """

    lse: Tensor
    span: Tensor | None
    waad: Tensor
    fai: Tensor
    entropy: Tensor | None
    sink_mass: Tensor


@torch.no_grad()
def attention_statistics(
    q: Tensor,
    k: Tensor,
    cu_seqlens: Offsets,
    response_starts: Offsets,
    *,
    scale: float,
    options: StatisticsOptions,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    lse: Tensor | None = None,
    backend: Backend = "auto",
) -> AttentionStatistics:
    """Statistics of causal attention over a packed batch, in memory linear in T.

    The one entry point, whatever computes them: fp32 accumulation for any input type, response rows only. Triton
    kernels serve CUDA, torch everything else. Without `lse` every earlier key is visited once (`full`); with it only
    the W nearest and the FAI band (`banded`), and span and entropy stay unknown.

    Args:
        q: [T, Hq, D] queries after RoPE.
        k: [T, Hkv, D] keys after RoPE; Hkv divides Hq.
        cu_seqlens: [B+1] integers on the CPU, sequence b is tokens cu_seqlens[b] to cu_seqlens[b+1].
        response_starts: [B] integers on the CPU, index in the packed batch of each sequence's first response token;
            cu_seqlens[b+1] means that there is none.
        scale: see `AttentionVariant`, also for the next three.
        options: what is measured.
        sliding_window: tokens, or None.
        softcap: of the logits, or None.
        sinks: [Hq] learned sinks, or None.
        lse: [Hq, T] fp32, log-sum-exp of the rows (nats, with `sinks`), as flash attention returns it.
        backend: `torch` or `triton`; `auto` takes Triton where it can.

    Raises:
        ValueError: shapes or offsets do not fit together, `lse` with `sink_tokens` (they need every key's mass), or a
            backend that cannot do what is asked.
    """
    variant = AttentionVariant(scale, sliding_window, softcap, sinks)
    _check(q, k, variant, lse, options)
    offsets, starts = as_ints(cu_seqlens), as_ints(response_starts)
    layout = layout_of(offsets, len(q), q.device)
    check_starts(offsets, starts)
    if _use_triton(q, backend):
        from .fused import fused_statistics

        bounds = bounds_of(offsets, starts, q.device, options)
        return AttentionStatistics(**fused_statistics(q, k, bounds, options, variant, lse))
    prompts = [start - begin for start, begin in zip(starts, offsets, strict=False)]
    return AttentionStatistics(**blockwise_statistics(q, k, layout, prompts, options, variant, lse))


def _check(q: Tensor, k: Tensor, variant: AttentionVariant, lse: Tensor | None, options: StatisticsOptions) -> None:
    if q.ndim != 3 or k.ndim != 3 or q.shape[::2] != k.shape[::2] or q.shape[1] % k.shape[1]:
        raise ValueError(f"need q [T, Hq, D] and k [T, Hkv, D], Hkv dividing Hq; got {[*q.shape]} and {[*k.shape]}")
    if q.dtype != k.dtype:
        raise ValueError(f"q and k must be of one type, got {q.dtype} and {k.dtype}")
    for name, tensor, shape in (("sinks", variant.sinks, q.shape[1:2]), ("lse", lse, (q.shape[1], len(q)))):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {[*shape]}, got {[*tensor.shape]}")
    if lse is not None and options.sink_tokens:
        raise ValueError(
            f"sink_tokens={options.sink_tokens} needs the mass of every key: leave lse out, or set sink_tokens to 0"
        )


def _use_triton(q: Tensor, backend: Backend) -> bool:
    if backend not in ("auto", "torch", "triton"):
        raise ValueError(f"backend={backend!r} must be auto, torch or triton")
    if backend == "torch" or (backend == "auto" and not q.is_cuda):
        return False
    from .fused import refusal  # triton is no part of torch's CPU builds

    reason = refusal(q)
    if reason and backend == "triton":
        raise ValueError(f"backend='triton': {reason}; use 'torch' or 'auto'")
    return reason is None
