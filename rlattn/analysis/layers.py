"""Which layers an analysis looks at: those that training listens to, all, and each third."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlattn.config import SignalsConfig
from rlattn.kernels import LayerRange, capture_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SELECTIONS = {
    "signals": "the layers that training listens to",
    "all": "all layers",
    "bottom": "bottom third",
    "middle": "middle third",
    "top": "top third",
}


def selections(config: PretrainedConfig, signals: SignalsConfig) -> dict[str, list[int]]:
    """The layers of each of `SELECTIONS`, as `signals.layer_range` names them; only full-attention layers count.

    Raises:
        ValueError: the model has no full-attention layer, or not the layers that `signals` names.
    """
    ranges: tuple[LayerRange, ...] = ("all", "bottom", "middle", "top")
    own = {"signals": capture_layers(config, signals.layers, signals.layer_range)}
    return own | {name: capture_layers(config, None, name) for name in ranges}
