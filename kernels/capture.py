"""Which layers to listen to, and the object that carries their statistics out of a forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from .ragged import Offsets, as_ints
from .statistics import AttentionStatistics, StatisticsOptions, attention_statistics

if TYPE_CHECKING:
    from transformers import PretrainedConfig


LayerRange = Literal["middle", "bottom", "top", "all"]


class Capture:
    """Collects attention statistics of some layers during one forward; pass it to the model as `capture=`.

    Under gradient checkpointing a layer runs twice; only its first run is measured.

    Attributes:
        layers: the layers to measure.
        options: what is measured.
        response_starts: [B], see `attention_statistics`.
        spans: whether span and entropy are wanted, which need every key. Without them, and where the attention gives
            its log-sum-exp (flash attention on CUDA), only the bands of WAAD and FAI are computed.
        statistics: layer -> its statistics, filled by the forward.
    """

    def __init__(
        self, layers: Sequence[int], options: StatisticsOptions, response_starts: Offsets, *, spans: bool = True
    ) -> None:
        self.layers = list(layers)
        self.options = options
        self.response_starts = as_ints(response_starts)
        self.spans = spans
        self.statistics: dict[int, AttentionStatistics] = {}
        self._cu_seqlens: list[int] | None = None

    def takes_lse(self, layer: int) -> bool:
        """Whether the rows' log-sum-exp of this layer would spare `record` the pass over every key."""
        return layer in self.layers and layer not in self.statistics and not self.spans and not self.options.sink_tokens

    def record(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        cu_seqlens: Offsets,
        *,
        scale: float,
        sliding_window: int | None = None,
        lse: Tensor | None = None,
    ) -> None:
        """Measure a layer from its q [T, Hq, D], k [T, Hkv, D] and, if at hand, lse [Hq, T], unless it was measured.

        Raises:
            ValueError: called with another batch than before: a Capture serves one forward.
        """
        if layer not in self.layers:
            return
        offsets = as_ints(cu_seqlens)
        self._cu_seqlens = self._cu_seqlens or offsets
        if offsets != self._cu_seqlens:
            raise ValueError(f"a Capture serves one forward: it holds cu_seqlens={self._cu_seqlens}, got {offsets}")
        if layer not in self.statistics:
            self.statistics[layer] = attention_statistics(
                q,
                k,
                offsets,
                self.response_starts,
                scale=scale,
                options=self.options,
                sliding_window=sliding_window,
                lse=lse if self.takes_lse(layer) else None,
            )


def spaced_layers(num_layers: int, count: int | None = 5, layer_range: LayerRange = "middle") -> list[int]:
    """Up to `count` evenly spaced layers of a range, both ends in; None takes every layer of it.

    `middle` reaches from floor(L/3) to floor(2L/3) [Li 2026, section 3]; `bottom` and `top` are the layers before and
    after it (where there are none, the first and the last layer), `all` is every layer. Fewer where rounding makes two
    of them one.

    Raises:
        ValueError: either number is below 1, or no such range.
    """
    if num_layers < 1 or (count is not None and count < 1):
        raise ValueError(f"num_layers={num_layers} and count={count} must be at least 1")
    low, high, last = num_layers // 3, 2 * num_layers // 3, num_layers - 1
    ranges = {
        "middle": (low, high),
        "bottom": (0, max(low - 1, 0)),
        "top": (min(high + 1, last), last),
        "all": (0, last),
    }
    if layer_range not in ranges:
        raise ValueError(f"layer_range={layer_range!r} must be one of {', '.join(ranges)}")
    low, high = ranges[layer_range]
    if count is None:
        return list(range(low, high + 1))
    if count == 1:
        return [(low + high) // 2]
    return sorted({round(low + (high - low) * i / (count - 1)) for i in range(count)})


def capture_layers(
    config: PretrainedConfig, layers: int | Sequence[int] | None = 5, layer_range: LayerRange = "middle"
) -> list[int]:
    """The layers of a model to capture, only full-attention layers where the config tells types apart.

    Args:
        config: the model's.
        layers: how many evenly spaced layers of the range, which counts full-attention layers only, or None for all
            of it; or the layers themselves, by the model's own numbers from 0.
        layer_range: see `spaced_layers`; not used for layers that are given themselves.

    Raises:
        ValueError: the model has no full-attention layer, or not the layers given.
    """
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    full = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
    if not full:
        raise ValueError(f"the model has no full_attention layer to capture; layer_types: {sorted(set(types))}")
    if layers is None or isinstance(layers, int):
        return [full[i] for i in spaced_layers(len(full), layers, layer_range)]
    unknown = sorted(set(layers) - set(full))
    if unknown or not layers:
        raise ValueError(f"layers {unknown or layers} cannot be captured; the model's full_attention layers: {full}")
    return sorted(set(layers))
