"""Credit, advantage and loss."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

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
    """GRPO's family: advantages, objective and loss; names are TRL's."""

    name: Literal["grpo", "ppo"] = "grpo"
    """GRPO and its family take advantages from groups, PPO from a critic (see `ppo`): a file in `trainers/`."""
    estimator: Literal["grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"] = "grpo"
    """How rewards become advantages: a file in `rlattn/estimators`."""
    loss_type: str = "grpo"
    """The objective of a token (`rlattn/objectives`) and how token losses are aggregated (`rlattn/losses`)."""
    importance_sampling_level: Literal["token", "sequence", "sequence_token"] = "token"
    """Whose ratio to the old policy counts: each token's, its sequence's (GSPO), or the sequence's in value and the
    token's in gradient (GSPO-token, which differs where advantages differ by token)."""
    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Lower clip range: the ratio is held above 1 - epsilon."""
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    """Upper clip range: the ratio is held below 1 + epsilon_high; None means `epsilon`. With `loss_type: cispo` the cap
    itself (TRL suggests 5)."""
    delta: Annotated[float, Field(gt=1)] | None = None
    """Dual clip: upper bound on the ratio, of negative advantages too; above 1 + epsilon_high. None has none."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the per-token KL to the reference policy (the starting weights); 0 keeps no reference."""
    entropy_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the entropy bonus, the mean over tokens of the policy's entropy."""
    sapo_temperature_pos: Annotated[float, Field(gt=0)] = 1.0
    """sapo: tau of tokens with positive advantage."""
    sapo_temperature_neg: Annotated[float, Field(gt=0)] = 1.05
    """sapo: tau of the others."""
    vespo_k_pos: Annotated[float, Field(ge=0)] = 2.0
    """vespo: k of sequences with advantage 0 or more: how fast low ratios lose weight."""
    vespo_lambda_pos: Annotated[float, Field(gt=0)] = 3.0
    """vespo: lambda of the same: how fast high ratios do."""
    vespo_k_neg: Annotated[float, Field(ge=0)] = 3.0
    """vespo: k of the others."""
    vespo_lambda_neg: Annotated[float, Field(gt=0)] = 2.0
    """vespo: lambda of the others."""
    vllm_importance_sampling_correction: bool = False
    """Multiply token losses by the trainer's probability over the engine's (truncated importance sampling)."""
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        "sequence_mask"
    )
    """That ratio of each token or, as a product, of its sequence; held within the bounds, or 0 outside of them."""
    vllm_importance_sampling_clip_max: Annotated[float, Field(gt=0)] | None = 3.0
    """Upper bound of that ratio; None has none."""
    vllm_importance_sampling_clip_min: Annotated[float, Field(ge=0)] | None = None
    """Lower bound of that ratio; None has none."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """What the centred reward is divided by: the group's or the batch's standard deviation, or nothing."""
    num_iterations: Positive = 1
    """Passes over a batch of rollouts."""
    steps_per_generation: Positive = 1
    """Optimizer steps in one pass: the batch is cut into this many mini-batches."""
    mask_truncated_completions: bool = False
    """Overlong filtering: leave completions that hit `max_completion_length` out of the loss."""
    overlong_buffer_tokens: Annotated[int, Field(ge=0)] = 0
    """Soft overlong penalty (DAPO): the last so many tokens before the limit cost reward, each more; 0 has none."""
    overlong_penalty: Annotated[float, Field(gt=0)] = 1.0
    """overlong_buffer_tokens: what a completion at the limit costs."""
    filter_groups: bool = False
    """Dynamic sampling (DAPO): a group whose rewards are all equal gives its place to the group of another prompt."""
    max_num_gen_batches: Annotated[int, Field(ge=1, le=100)] = 10
    """filter_groups: batches of `trainer.prompts_per_step` prompts that one step may draw. What is still missing after
    the last is filled with groups whose rewards are equal."""

    @field_validator("loss_type")
    @classmethod
    def _known(cls, name: str) -> str:
        return registry.LOSSES.check(name)

    @model_validator(mode="after")
    def _objective(self) -> AlgorithmConfig:
        level, high = self.importance_sampling_level, self.epsilon_high
        if self.loss_type == "cispo" and (high is None or high < 1):
            raise ValueError(f"loss_type=cispo caps the ratio at epsilon_high={high}; set it to 1 or more, such as 5")
        if self.loss_type == "luspo" and level == "token":
            raise ValueError("loss_type=luspo needs importance_sampling_level sequence or sequence_token, not token")
        if self.loss_type == "vespo" and level != "token":
            raise ValueError(
                f"loss_type=vespo takes its own sequence ratio: importance_sampling_level={level} has no effect; "
                "leave it out"
            )
        if self.delta is not None and self.loss_type in ("cispo", "sapo", "vespo"):
            raise ValueError(f"delta={self.delta} has no effect with loss_type={self.loss_type}; leave it out")
        if self.delta is not None and self.delta <= 1 + (high or self.epsilon):
            raise ValueError(f"delta={self.delta} must be above the upper clip range, {1 + (high or self.epsilon):g}")
        return self

    @model_validator(mode="after")
    def _correction(self) -> AlgorithmConfig:
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"vllm_importance_sampling_clip_min={low} must be below vllm_importance_sampling_clip_max={high}"
            )
        mode = self.vllm_importance_sampling_mode
        if self.loss_type == "vespo" and self.vllm_importance_sampling_correction and not mode.startswith("token"):
            raise ValueError(
                f"loss_type=vespo multiplies token ratios itself: vllm_importance_sampling_mode={mode} must be "
                "token_truncate or token_mask"
            )
        return self
