"""Credit, advantage and loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from rlattn import registry
from rlattn.config.section import Positive, Section, Share


class CreditConfig(Section):
    """How signals become gamma, the factor on each token's advantage [Li 2026, eq. 14-19]."""

    name: str = "coupled_rhythm"
    """A built-in strategy (a file in `rlattn/credit`) or one installed under the entry point group `rlattn.credit`."""
    amplification: Annotated[float, Field(gt=0)] = 1.5
    """g: gamma of a selected token."""
    top_q: Annotated[float, Field(gt=0, le=1)] = 0.4
    """q: share of a response's tokens that are selected."""
    which: Literal["top", "bottom"] = "top"
    """Select the largest values, or the smallest (the paper's collapse ablation)."""
    sign: Literal["both", "positive", "negative"] = "both"
    """Shape every advantage, or only those of one sign (v1 of the paper: positive)."""
    alpha: Share = 0.5
    """coupled_rhythm: share of a dominated anchor's bonus that moves to its introducing token."""
    window: Annotated[int, Field(ge=1)] = 3
    """coupled_rhythm: k, how many tokens before an anchor may introduce it (paper: 1 to 3)."""
    tau_waad: Share = 0.5
    """coupled_rhythm: quantile of the response's WAAD at or below which an anchor counts as locally attending."""
    tau_delta: Share | None = None
    """coupled_rhythm: quantile of the response's WAAD change at or above which it counts as a jump; None takes the
    smallest change inside TopQ(change, top_q)."""
    position: Literal["even", "start", "end"] = "even"
    """position: where in a response its budget lies, evenly spread, on the first tokens or on the last."""
    selection_q: Annotated[float, Field(gt=0, le=1)] = 0.2
    """entropy_selection: share of a response's tokens that learn at all (arXiv 2506.01939: 0.2)."""
    reweight_alpha: Share = 0.2
    """reweight: weight of the token's probability, 0 is plain GRPO (the authors' script for this method alone has 0.2,
    with Lopti's separate updates 0.3)."""
    normalize: bool = False
    """Divide gamma by its mean over the response, so that credit moves weight without adding any."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return registry.CREDIT.check(name)


class AlgorithmConfig(Section):
    """GRPO and its loss; names are TRL's."""

    loss_type: str = "grpo"
    """How token losses are aggregated: a file in `rlattn/losses`."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip range: the ratio is held above 1 - epsilon."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """Upper clip range: the ratio is held below 1 + epsilon_high; None means `epsilon`."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the per-token KL to the reference policy (the starting weights); 0 keeps no reference."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What the centred reward is divided by."""
    num_iterations: Positive = 1
    """Passes over a batch of rollouts."""
    steps_per_generation: Positive = 1
    """Optimizer steps in one pass: the batch is cut into this many mini-batches."""
    mask_truncated_completions: bool = False
    """Leave completions that hit `max_completion_length` out of the loss."""

    filter_groups: bool = False
    """Dynamic sampling (DAPO): a group whose rewards are all equal gives its place to the group of another prompt."""
    max_num_gen_batches: Annotated[int, Field(ge=1, le=100)] = 10
    """filter_groups: batches of `trainer.prompts_per_step` prompts that one step may draw. What is still missing after
    the last is filled with groups whose rewards are equal."""

    @field_validator("loss_type")
    @classmethod
    def _known(cls, name: str) -> str:
        return registry.LOSSES.check(name)
