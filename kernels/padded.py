"""Capture in somebody else's forward: padded batches, through the attention implementation the model already has.

    listen("sdpa")                                      # once; the implementation computes what it did before
    padding = Padding.of(attention_mask, response_mask)
    capture = Capture(layers, options, padding.response_starts)
    model(input_ids=ids, attention_mask=attention_mask, use_cache=False, capture=PaddedCapture(capture, padding))

`rlattn`'s own attention (`register`) takes packed batches only and has its own rounding. Here nothing but the listening
is added, so that a forward, its gradients and generation stay what they are to the bit.

Shape legend: [B, S] a batch of B sequences padded on either side to S tokens, [T] its real tokens, packed, [Hq] query
heads, [Hkv] key heads, [D] head channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .attention import NAME, map_options
from .capture import Capture


@dataclass(frozen=True)
class Padding:
    """Where the real tokens of a padded batch are.

    Attributes:
        shape: (B, S).
        index: [T] int64, their positions in [B * S], on the batch's device.
        cu_seqlens: [B+1] int64, on the CPU: sequence b is the packed tokens cu_seqlens[b] to cu_seqlens[b+1].
        response_starts: [B] int64, on the CPU, index in [T] of each response's first token; its sequence's end where
            there is no response.
    """

    shape: tuple[int, int]
    index: Tensor
    cu_seqlens: Tensor
    response_starts: Tensor

    @classmethod
    def of(cls, attention_mask: Tensor, response_mask: Tensor) -> Padding:
        """From the masks [B, S] (True or 1: a real token; a token of the response).

        Raises:
            ValueError: padding between two real tokens, a sequence without any, or a response that is not the end.
        """
        real, response = attention_mask.bool().cpu(), response_mask.bool().cpu()
        lengths, responses = real.sum(1), response.sum(1)
        cu_seqlens = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        rank = real.cumsum(1)  # of a real token in its sequence, from 1
        gaps = (real[:, 1:] > real[:, :-1]).sum(1) + real[:, 0] != 1
        inner = response != (real & (rank > (lengths - responses)[:, None]))
        if gaps.any() or inner.any():
            row = int((gaps | inner.any(1)).nonzero()[0])
            raise ValueError(
                f"row {row} of the padded batch is not prompt, then response, with padding only around them: attention "
                f"{real[row].int().tolist()}, response {response[row].int().tolist()}"
            )
        index = real.flatten().nonzero().squeeze(1).to(attention_mask.device)
        return cls((real.shape[0], real.shape[1]), index, cu_seqlens, cu_seqlens[1:] - responses)

    def pack(self, x: Tensor) -> Tensor:
        """[B, S, ...] to [T, ...]."""
        return x.flatten(0, 1)[self.index.to(x.device)]

    def unpack(self, x: Tensor, fill: float) -> Tensor:
        """[T] to [B, S], `fill` on padding."""
        padded = x.new_full((self.shape[0] * self.shape[1],), fill)
        padded[self.index.to(x.device)] = x
        return padded.view(self.shape)


@dataclass(frozen=True)
class PaddedCapture:
    """A capture and the padding of the batch that it is to be filled from; pass it to the model as `capture=`."""

    capture: Capture
    padding: Padding

    def record(self, module: nn.Module, query: Tensor, key: Tensor, kwargs: dict[str, Any]) -> None:
        """Measure a layer from query [B, Hq, S, D], key [B, Hkv, S, D] and what else its attention was called with.

        Raises:
            ValueError: a cached or split batch, or an attention variant that is not supported.
        """
        layer: Any = getattr(module, "layer_idx", None)
        if layer not in self.capture.layers or layer in self.capture.statistics:
            return
        seen = (query.shape[0], query.shape[2], key.shape[2])
        if seen != (self.padding.shape[0], self.padding.shape[1], self.padding.shape[1]):
            raise ValueError(
                f"attention is captured of whole sequences: the batch is {self.padding.shape}, layer {layer} got "
                f"{seen[0]} sequences with {seen[1]} queries and {seen[2]} keys (a cache, virtual tokens or a sequence "
                "split over devices)"
            )
        scale, sliding_window = map_options(module, query.shape[-1], kwargs)
        q, k = (self.padding.pack(x.detach().transpose(1, 2)) for x in (query, key))  # [T, H, D]
        self.capture.record(layer, q, k, self.padding.cu_seqlens, scale=scale, sliding_window=sliding_window)


@dataclass(frozen=True)
class _Listening:
    """An attention function of transformers that computes what `plain` does, and hears `capture=`."""

    plain: Callable[..., tuple[Tensor, Tensor | None]]

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *args: Any,
        capture: PaddedCapture | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if capture is not None:
            capture.record(module, query, key, kwargs)
        return self.plain(module, query, key, value, attention_mask, *args, **kwargs)


def listen(implementation: str) -> None:
    """Let transformers' attention implementation `implementation` hear a `PaddedCapture`; once or more.

    It stays registered under its own name, by which transformers makes masks and generation picks its way.

    Raises:
        ValueError: transformers has no such entry (`eager` is a function of each model's own), or it is `rlattn`'s own.
    """
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    known = sorted(
        name for name in ALL_ATTENTION_FUNCTIONS.valid_keys() if name != NAME and not name.startswith("paged|")
    )
    if implementation not in known:
        raise ValueError(
            f"attn_implementation={implementation!r} cannot be listened to; accepted: {', '.join(known)} (eager is "
            "each model's own function, not one that transformers has registered)"
        )
    plain = ALL_ATTENTION_FUNCTIONS[implementation]
    if not isinstance(plain, _Listening):
        AttentionInterface.register(implementation, _Listening(plain))
