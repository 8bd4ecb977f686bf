"""Which layers an analysis looks at: those that training listens to, all, and each third."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlattn.kernels import capture_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SELECTIONS = {
    "signals": "the layers that training listens to",
    "all": "all layers",
    "bottom": "bottom third",
    "middle": "middle third",
    "top": "top third",
}


def full_attention_layers(config: PretrainedConfig) -> list[int]:
    """Every layer with a whole attention map, of a hybrid model only those."""
    text = config.get_text_config()
    types = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    return [layer for layer, kind in enumerate(types) if kind == "full_attention"]


def selections(config: PretrainedConfig, count: int) -> dict[str, list[int]]:
    """The layers of each of `SELECTIONS`; thirds are cut at floor(L/3) and floor(2L/3), and left out where empty.

    Raises:
        ValueError: the model has no full-attention layer.
    """
    full = full_attention_layers(config)
    low, high = len(full) // 3, 2 * len(full) // 3
    thirds = {"bottom": full[:low], "middle": full[low:high], "top": full[high:]}
    return {"signals": capture_layers(config, count), "all": full} | {k: v for k, v in thirds.items() if v}
