"""What PPO has beside GRPO's family: a critic."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlattn.config.section import Section, Share


class PPOConfig(Section):
    """The critic and its advantages; read only with `algorithm.name: ppo`.

    Objective, clip ranges, passes and mini-batches are those of `algorithm`.
    """

    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of a token."""
    lam: Share = 0.95
    """GAE's lambda: weight of longer looks ahead; 1 is the plain return minus the value."""
    cliprange_value: Annotated[float, Field(gt=0)] | None = 0.2
    """The value loss counts as if a value were held this near to what it was; None clips nothing."""
    whiten_advantages: bool = True
    """Advantages of a batch have mean 0 and standard deviation 1, before credit."""
    kl_coef: Annotated[float, Field(ge=0)] = 0.0
    """What a nat of a token's KL to the starting policy costs of its reward; 0 keeps no reference."""
    critic_path: str | None = None
    """A Hugging Face model for the critic; None starts from the policy's."""
    critic_learning_rate: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Peak learning rate of the critic's AdamW; its schedule is the policy's."""
    critic_warmup_steps: Annotated[int, Field(ge=0)] = 0
    """First steps in which the critic alone learns."""
    critic_gpus_per_rank: Annotated[float, Field(ge=0, le=1)] | None = None
    """GPUs that Ray reserves for a critic rank; None means as many as `policy.gpus_per_rank`. Where both fit on one
    GPU, they share it."""
