"""A model and responses in, per-response arrays out: one packed forward a batch, through rlattn's own attention.

[L] captured layers, [H] query heads, [T] tokens of a batch, [R] tokens of one response, [n] responses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rlattn.analysis.config import AnalysisConfig
from rlattn.analysis.responses import Response
from rlattn.config import HeadsConfig
from rlattn.kernels import Capture, register
from rlattn.logprobs import token_logps
from rlattn.signals import (
    GLOBAL,
    HeadSums,
    SignalRows,
    group_mean,
    head_groups,
    pool_heads,
    reduce_signals,
    statistics_options,
)

LOGITS_AT_ONCE = 1024  # tokens whose logits exist at one time

Array = NDArray[np.floating]


@dataclass(frozen=True)
class Packed:
    """Responses in one forward.

    Attributes:
        places: their indices among all responses.
        token_ids: [T] int64.
        cu_seqlens: [b+1] int64.
        response_starts: [b] int64, index in [T].
    """

    places: list[int]
    token_ids: Tensor
    cu_seqlens: Tensor
    response_starts: Tensor

    @property
    def position_ids(self) -> Tensor:
        """[T] int64, restarting at 0 in every sequence."""
        return torch.arange(len(self.token_ids)) - self.cu_seqlens[:-1].repeat_interleave(self.cu_seqlens.diff())

    @property
    def spans(self) -> list[slice]:
        """Where each response lies in [T]."""
        return [slice(a, b) for a, b in zip(self.response_starts.tolist(), self.cu_seqlens[1:].tolist(), strict=True)]


@dataclass(frozen=True)
class Measured:
    """What the forwards say, per head; `reduce` makes signals of it.

    Attributes:
        layers: L of them, ascending.
        batches: the packed batches, together every response once.
        rows: their statistics, on the CPU.
        entropy: n arrays [R] fp32, predictive entropy of each response token, nats.
        span: [L, H] fp32, mean attention distance over every response row, tokens [Li 2026, eq. 7].
        attention_entropy: [L, H] fp32, nats, over the same rows.
        sink_mass: [L, H] fp32, mean attention on the first token.
        kurtosis: [L, H] fp32, of each head's FAI over a response's positions, mean over rows: few high columns among
            many low ones make a receiver head [Bogdan et al., arXiv 2506.19143].
    """

    layers: list[int]
    batches: list[Packed]
    rows: list[SignalRows]
    entropy: list[Array]
    span: Array
    attention_entropy: Array
    sink_mass: Array
    kurtosis: Array


@dataclass(frozen=True)
class Selected:
    """Signals over some of the layers.

    Attributes:
        layers: l of them.
        groups: [l, H] int8, -1 local, +1 global, 0 neither.
        receivers: [l, H] bool, the receiver heads: as many as are global, of highest kurtosis among those not local.
        waad: n arrays [R] fp32, of the local heads [Li 2026, eq. 9].
        fai: n arrays [R] fp32, of the global heads [Li 2026, eq. 10].
        receiver_fai: n arrays [R] fp32, the same mean over the receiver heads.
    """

    layers: list[int]
    groups: NDArray[np.int8]
    receivers: NDArray[np.bool_]
    waad: list[Array]
    fai: list[Array]
    receiver_fai: list[Array]


def pack(responses: Sequence[Response], budget: int) -> list[Packed]:
    """Batches of at most `budget` tokens, sequences of like length together; a longer sequence is alone."""
    order = sorted(range(len(responses)), key=lambda i: (-len(responses[i].ids), i))
    batches: list[list[int]] = []
    room = 0
    for i in order:
        length = len(responses[i].ids)
        if length > room:
            batches.append([])
            room = budget
        batches[-1].append(i)
        room -= length
    return [pack_places(responses, places) for places in batches]


def pack_places(responses: Sequence[Response], places: list[int]) -> Packed:
    """The batch of the responses at `places`, in that order."""
    chosen = [responses[i] for i in places]
    lengths = torch.tensor([len(r.ids) for r in chosen])
    cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    starts = cu_seqlens[:-1] + torch.tensor([len(r.prompt_ids) for r in chosen])
    return Packed(places, torch.tensor([t for r in chosen for t in r.ids]), cu_seqlens, starts)


@torch.inference_mode()
def hidden_states(model: PreTrainedModel, batch: Packed, capture: Capture | None = None) -> Tensor:
    """[T, d], the last layer's output for a packed batch."""
    return model.get_decoder()(
        input_ids=batch.token_ids[None].to(model.device),
        position_ids=batch.position_ids[None].to(model.device),
        use_cache=False,
        cu_seqlens=batch.cu_seqlens,
        capture=capture,
    ).last_hidden_state[0]


@torch.inference_mode()
def measure(
    model: PreTrainedModel,
    responses: Sequence[Response],
    layers: Sequence[int],
    config: AnalysisConfig,
    step: Callable[[], None] = lambda: None,
) -> Measured:
    """Statistics of every head of `layers`, and the entropies; `step` is called once a response."""
    model.set_attn_implementation(register())
    layers = sorted(layers)
    batches = pack(responses, config.tokens_per_batch)
    rows, entropy = [], [np.empty(0, np.float32) for _ in responses]
    for batch in batches:
        capture = Capture(layers, statistics_options(config.signals), batch.response_starts)
        hidden = hidden_states(model, batch, capture)
        own_rows = SignalRows.collect(
            capture.statistics,
            layers,
            batch.cu_seqlens,
            batch.response_starts,
            receivers=config.signals.fai_low,
        )
        rows.append(_on_cpu(own_rows))
        chosen = torch.cat([torch.arange(span.start, span.stop) for span in batch.spans])
        _, own = token_logps(
            hidden[(chosen - 1).to(model.device)],  # the logits at t-1 draw token t
            model.get_output_embeddings(),
            batch.token_ids[chosen].to(model.device),
            temperature=config.entropy_temperature,
            num_chunks=ceil(len(chosen) / LOGITS_AT_ONCE),
            with_entropy=True,
        )
        assert own is not None
        parts = own.cpu().split([span.stop - span.start for span in batch.spans])
        for place, part in zip(batch.places, parts, strict=True):
            entropy[place] = part.numpy()
            step()
    means = pool_heads([row.sums for row in rows])
    assert means.span is not None
    assert means.entropy is not None
    assert means.kurtosis is not None
    arrays = (x.numpy() for x in (means.span, means.entropy, means.sink_mass, means.kurtosis))
    return Measured(layers, batches, rows, entropy, *arrays)


def reduce(measured: Measured, layers: Sequence[int], heads: HeadsConfig) -> Selected:
    """Group the heads of some of the measured layers and average WAAD and FAI over the groups.

    Raises:
        ValueError: a layer that was not measured, or too few heads for two groups.
    """
    places = [measured.layers.index(layer) for layer in layers]
    chosen = [_layers(row, places) for row in measured.rows]
    reduced = reduce_signals(chosen, heads)
    span, kurtosis = (torch.from_numpy(values[places]) for values in (measured.span, measured.kurtosis))
    by_kurtosis = head_groups(span, heads.fraction, kurtosis)
    received = [group_mean(row.fai, by_kurtosis, GLOBAL) for row in chosen]
    return Selected(
        list(layers),
        reduced.groups.numpy(),
        (by_kurtosis == GLOBAL).numpy(),
        _responses(measured, [columns["waad"] for columns in reduced.columns]),
        _responses(measured, [columns["fai"] for columns in reduced.columns]),
        _responses(measured, received),
    )


def _on_cpu(rows: SignalRows) -> SignalRows:
    sums = HeadSums(rows.sums.values.cpu(), rows.sums.rows.cpu())
    return replace(rows, waad=rows.waad.cpu(), fai=rows.fai.cpu(), sums=sums)


def _layers(rows: SignalRows, places: list[int]) -> SignalRows:
    sums = HeadSums(rows.sums.values[:, places], rows.sums.rows)
    return replace(rows, waad=rows.waad[places], fai=rows.fai[places], sums=sums)


def _responses(measured: Measured, batches: Sequence[Tensor]) -> list[Array]:
    """[T] values of each batch to [R] of each response, in the responses' order."""
    found = [np.empty(0, np.float32) for _ in measured.entropy]
    for batch, values in zip(measured.batches, batches, strict=True):
        for place, span in zip(batch.places, batch.spans, strict=True):
            found[place] = values[span].numpy()
    return found
