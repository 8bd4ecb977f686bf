"""Attention statistics, and the heads and layers that they come from."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from rlattn.config.section import Positive, Section


class HeadsConfig(Section):
    """Which captured heads count as local-focused and which as global-focused [Li 2026, eq. 7-8]."""

    select: Literal["span", "receiver", "all"] = "span"
    """`span`: the lowest spans are local, the highest global. `receiver`: the global heads are those whose FAI is most
    peaked, by kurtosis over a response's positions (receiver heads, arXiv 2506.19143), among those not local. `all`: no
    groups, WAAD and FAI are means over every captured head (the paper's ablation)."""
    fraction: Annotated[float, Field(gt=0, le=0.5)] = 0.3
    """Share of the captured heads in each group."""
    scope: Literal["batch", "sequence", "calibrated"] = "batch"
    """Spans (and kurtosis) pooled over every response row of the step's batch, or over each sequence's own;
    `calibrated` pools them as `batch` does, but only every `refresh_steps` steps, and the steps between go without the
    pass that spans need."""
    refresh_steps: Annotated[int, Field(ge=1, le=10_000)] = 10
    """calibrated: groups are measured at step 0 and every so many steps, and reused in between."""


class FlowConfig(Section):
    """The flow from prompt to answer over the mean attention map (credit `flow`); see docs/flow.md."""

    threshold: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Edges of the mean map that weigh this or less are cut; 0 cuts none."""
    storage: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the map while it is gathered: 2 or 4 bytes for each pair of tokens of a sequence, halved."""
    fallback_tokens: Annotated[int, Field(ge=0)] = 10
    """A response in which the task finds no answer: so many of its last tokens count as one. With 0 it gets no credit
    beyond others."""


class SignalsConfig(Section):
    """Attention statistics: captured in a forward of the policy, or in the engines."""

    source: Literal["policy", "rollout"] = "policy"
    """Whose forward is captured. `policy`: the policy's (see `forward`). `rollout`: a prefill of whole sequences in the
    engines that sampled them; the policy then scores nothing, and the engines' log-probs are the old ones."""
    forward: Literal["score", "train", "decode"] = "score"
    """The forward that is captured. `score`: one before the update, which also gives the old log-probs. `train`: the
    update's own, before each micro-batch's loss, so that no scoring forward runs; for batches that take a single
    optimizer step, with `heads.scope` calibrated (steps that measure the groups score first) or sequence, or with
    `heads.select` all. `decode`: with `source: rollout`, sampling itself, by head groups known before it: with
    `heads.scope` calibrated (steps that measure the groups score) or `heads.select` all (the first step scores)."""
    layers: int | list[int] | None = 5
    """How many evenly spaced layers of `layer_range`, fewer where the model has fewer there; null takes every one. Or a
    list, such as [3, 7, 11]: these layers, counted from 0."""
    layer_range: Literal["middle", "bottom", "top", "all"] = "middle"
    """The middle third [Li 2026, section 3], the layers below it, those above it, or all. Of hybrid models only
    full-attention layers count."""
    heads: HeadsConfig = HeadsConfig()
    """Head groups."""
    flow: FlowConfig = FlowConfig()
    """Measured only where the credit strategy asks for it."""
    waad_window: Positive = 10
    """W of eq. 9, tokens."""
    fai_low: Annotated[int, Field(ge=0)] = 10
    """H_lo of eq. 10, tokens."""
    fai_high: Positive | None = 100
    """H_hi of eq. 10, tokens; None reaches to the end of the response."""
    sink_tokens: Annotated[int, Field(ge=0)] = 0
    """First keys of a sequence left out of span and FAI, rows renormalised; 0 is the paper."""

    @field_validator("layers", mode="before")
    @classmethod
    def _which_layers(cls, layers: object) -> object:
        numbers = layers if isinstance(layers, list) else [1 if layers is None else layers]
        least = 0 if isinstance(layers, list) else 1
        whole = bool(numbers) and all(type(number) is int and number >= least for number in numbers)
        if not whole or any(a >= b for a, b in pairwise(numbers)):
            raise ValueError("must be a number of layers, at least 1, null for all, or a rising list like [3, 7, 11]")
        return layers

    @model_validator(mode="after")
    def _explicit(self) -> SignalsConfig:
        if isinstance(self.layers, list) and self.layer_range != "middle":
            raise ValueError(
                f"layers={self.layers} names the layers, so layer_range={self.layer_range} has no effect; "
                "leave layer_range out, or give a number of layers"
            )
        return self

    @model_validator(mode="after")
    def _band(self) -> SignalsConfig:
        if self.fai_high is not None and self.fai_high < self.fai_low:
            raise ValueError(f"fai_high={self.fai_high} must be at least fai_low={self.fai_low}, or null")
        return self
