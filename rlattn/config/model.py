"""The starting point: a Hugging Face model, or the small one that `rlattn warmup` makes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from rlattn.config.section import Positive, Section


class WarmupConfig(Section):
    """The model that `rlattn warmup` makes: a small Qwen3-shaped policy with a first skill learned by SFT."""

    hidden_size: Positive = 192
    """Width of the residual stream."""
    intermediate_size: Positive = 512
    """Width of the MLP."""
    num_layers: Positive = 4
    """Decoder layers."""
    num_heads: Positive = 4
    """Query heads."""
    num_kv_heads: Positive = 2
    """Key/value heads; must divide `num_heads`."""
    head_dim: Annotated[int, Field(ge=32, multiple_of=16)] = 32
    """Channels per head."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of initialisation and worked solutions; apart from the run's seed, so that runs of several seeds start alike."""
    steps: Positive = 1300
    """SFT optimizer steps."""
    batch_size: Positive = 8
    """Worked solutions per SFT step."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)] = 2e-3
    """Peak SFT learning rate."""
    cache_dir: Path = Path("runs/warmup")
    """Finished models are kept here, in a folder named by the hash of everything that shapes them."""

    @model_validator(mode="after")
    def _groups(self) -> WarmupConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads={self.num_kv_heads} must divide num_heads={self.num_heads}")
        return self


class ModelConfig(Section):
    """The policy's starting point."""

    path: str | None = None
    """A Hugging Face causal LM (folder or hub id). None means: the model that `warmup` makes."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Parameter type of policy and engine; bfloat16 keeps fp32 master weights in the optimizer."""
    warmup: WarmupConfig = WarmupConfig()
    """Shape and training of the small model; used only where `path` is None."""
