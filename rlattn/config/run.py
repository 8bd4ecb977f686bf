"""A whole run, and the rules that hold between sections."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from rlattn.config.algorithm import AlgorithmConfig, CreditConfig
from rlattn.config.model import ModelConfig
from rlattn.config.policy import PolicyConfig
from rlattn.config.ppo import PPOConfig
from rlattn.config.ray import RayConfig
from rlattn.config.rewards import RewardsConfig
from rlattn.config.rollout import RolloutConfig
from rlattn.config.section import Section
from rlattn.config.signals import SignalsConfig
from rlattn.config.task import TaskConfig
from rlattn.config.trainer import TrainerConfig

FREE = (
    "output_dir",
    "ray.",
    "rollout.check_weights",
    "rollout.max_restarts",
    "rollout.weight_transfer",
    "trainer.best_metric",
    "trainer.checkpoint_url",
    "trainer.greater_is_better",
    "trainer.log_completions",
    "trainer.max_restarts",
    "trainer.report_to",
    "trainer.save_",
    "trainer.trace_step",
)
"""Beginnings of keys that shape nothing of a run's result."""


class RunConfig(Section):
    """A whole run."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Of data order, sampling and credit controls."""
    output_dir: Path = Path("runs/default")
    """Where everything that the run writes goes."""
    task: TaskConfig = TaskConfig()
    """What is learned."""
    rewards: RewardsConfig = RewardsConfig()
    """What a completion is worth."""
    model: ModelConfig = ModelConfig()
    """The policy's starting point."""
    rollout: RolloutConfig = RolloutConfig()
    """Generation."""
    signals: SignalsConfig = SignalsConfig()
    """Attention statistics."""
    credit: CreditConfig = CreditConfig()
    """Per-token credit."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    """Advantage and loss."""
    ppo: PPOConfig = PPOConfig()
    """The critic."""
    policy: PolicyConfig = PolicyConfig()
    """The trained model."""
    trainer: TrainerConfig = TrainerConfig()
    """The loop."""
    ray: RayConfig = RayConfig()
    """Placement."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        responses = self.trainer.prompts_per_step * self.rollout.num_generations
        if responses % self.algorithm.steps_per_generation:
            raise ValueError(
                f"algorithm.steps_per_generation={self.algorithm.steps_per_generation} must divide the batch of "
                f"{responses} responses (trainer.prompts_per_step * rollout.num_generations)"
            )
        if responses // self.algorithm.steps_per_generation < self.policy.ranks:
            raise ValueError(
                f"policy.ranks={self.policy.ranks} is more than the {responses // self.algorithm.steps_per_generation} "
                "responses of one optimizer step; lower policy.ranks or algorithm.steps_per_generation"
            )
        longest = self.rollout.max_prompt_length + self.rollout.max_completion_length
        if self.policy.tokens_per_micro_batch < longest:
            raise ValueError(
                f"policy.tokens_per_micro_batch={self.policy.tokens_per_micro_batch} cannot hold one sequence of "
                f"max_prompt_length + max_completion_length = {longest} tokens; raise it to at least {longest}"
            )
        if self.algorithm.overlong_buffer_tokens > self.rollout.max_completion_length:
            raise ValueError(
                f"algorithm.overlong_buffer_tokens={self.algorithm.overlong_buffer_tokens} must be at most "
                f"rollout.max_completion_length={self.rollout.max_completion_length}"
            )
        if not self.rewards.verifier_weight and not self.rewards.functions:
            raise ValueError("rewards.verifier_weight=0 without rewards.functions leaves no reward; set one of them")
        if self.algorithm.name == "ppo":
            self._check_ppo()
        block = self.policy.deepspeed
        sharded = block.get("zero_optimization", {}).get("stage", 0) > 0
        accumulated = block.get("data_types", {}).get("grad_accum_dtype", "fp32")
        if self.model.dtype == "bfloat16" and not sharded and accumulated != "bf16":
            raise ValueError(
                f"policy.deepspeed without zero_optimization.stage of 1 to 3 cannot add up gradients in {accumulated} "
                "for model.dtype=bfloat16 (DeepSpeed has no such optimizer); leave policy.deepspeed out, which means "
                "stage 1, give it a stage, or set its data_types.grad_accum_dtype to bf16"
            )
        if self.rollout.steps_ahead and not self.algorithm.vllm_importance_sampling_correction:
            raise ValueError(
                "rollout.steps_ahead=1 learns from completions of older weights, which needs "
                "algorithm.vllm_importance_sampling_correction=true"
            )
        if self.rollout.sleep:
            self._check_sleep()
        if self.signals.source == "rollout":
            self._check_rollout_signals()
        if self.signals.forward == "train":
            self._check_training_forward()
        if self.signals.forward == "decode":
            self._check_decoding()
        return self

    @property
    def needs_reference(self) -> bool:
        """A KL to the starting policy is in the loss or in the reward."""
        return self.algorithm.beta > 0 or (self.algorithm.name == "ppo" and self.ppo.kl_coef > 0)

    def _check_sleep(self) -> None:
        if self.ray.placement != "colocate":
            raise ValueError(
                f"rollout.sleep=true gives memory to a policy on the same GPU, but ray.placement={self.ray.placement} "
                "has none there; set it to colocate, or rollout.sleep to false"
            )
        if self.rollout.steps_ahead:
            raise ValueError("rollout.sleep=true and rollout.steps_ahead=1: an engine cannot sample asleep; choose one")

    def _check_ppo(self) -> None:
        if self.signals.forward == "train":
            raise ValueError("signals.forward=train is GRPO's; PPO needs the old log-probs first, set it to score")
        if self.algorithm.estimator != "grpo":
            raise ValueError(
                f"algorithm.estimator={self.algorithm.estimator} has no effect with algorithm.name=ppo, whose "
                "advantages are the critic's; leave it out"
            )

    def _check_rollout_signals(self) -> None:
        """What the policy's scoring forward gives, and the engines do not, must not be asked for."""
        asked = {
            f"algorithm.name={self.algorithm.name}": self.algorithm.name != "grpo",
            f"algorithm.beta={self.algorithm.beta}": self.algorithm.beta > 0,
            "algorithm.vllm_importance_sampling_correction": self.algorithm.vllm_importance_sampling_correction,
            f"rollout.top_p={self.rollout.top_p}": self.rollout.top_p < 1,
            f"credit.name={self.credit.name}": self.credit.name in ("entropy", "entropy_selection", "flow"),
            f"signals.forward={self.signals.forward}": self.signals.forward == "train",
        }
        wrong = [name for name, needed in asked.items() if needed]
        if wrong:
            raise ValueError(f"signals.source=rollout runs no scoring forward, which {', '.join(wrong)} needs")

    def _check_decoding(self) -> None:
        """What rows that come one by one can tell, and whom they must be told by."""
        signals = self.signals
        if signals.source != "rollout":
            raise ValueError(
                f"signals.forward=decode listens to sampling engines, not signals.source={signals.source}; set that to "
                "rollout, or signals.forward to score"
            )
        if signals.heads.select != "all" and signals.heads.scope != "calibrated":
            raise ValueError(
                f"signals.forward=decode cannot have signals.heads.scope={signals.heads.scope}, whose groups are known "
                "only after the batch; set the scope to calibrated, or signals.forward to score"
            )
        if signals.fai_high is None or signals.sink_tokens:
            raise ValueError(
                f"signals.forward=decode sees a row's own band alone, which signals.fai_high={signals.fai_high} and "
                f"signals.sink_tokens={signals.sink_tokens} do not fit; give a number and 0, or set it to score"
            )
        taken = [name for name in ("speculative_config", "kv_cache_dtype") if name in self.rollout.engine_args]
        if taken:
            raise ValueError(
                "signals.forward=decode counts one row a step and reads keys in the model's type, which "
                f"rollout.engine_args.{taken[0]} changes; leave that out, or set signals.forward to score"
            )

    def _check_training_forward(self) -> None:
        iterations, steps = self.algorithm.num_iterations, self.algorithm.steps_per_generation
        if (iterations, steps) != (1, 1):
            raise ValueError(
                "signals.forward=train needs a single optimizer step a batch, not "
                f"algorithm.num_iterations={iterations} times algorithm.steps_per_generation={steps}; set both to 1, "
                "or signals.forward to score"
            )
        if self.signals.heads.scope == "batch" and self.signals.heads.select != "all":
            raise ValueError(
                "signals.forward=train cannot have signals.heads.scope=batch, whose groups are known only after the "
                "whole batch's forward; set the scope to calibrated or sequence, or signals.forward to score"
            )
