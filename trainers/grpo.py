"""GRPO with attention credit: the loop of the paper, on one screen.

One driver process owns the algorithm; Ray actors own the devices. Everything random is a function of (seed, step), so
a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from rlattn import answers, credit, metrics, rewards
from rlattn.config import RunConfig
from rlattn.data import PromptSchedule
from rlattn.dynamic_sampling import fill
from rlattn.estimators import estimate
from rlattn.evaluation.in_training import evaluate
from rlattn.problem import Problem
from rlattn.rollout.pool import RolloutPool
from rlattn.signals import reusable_groups, signal_metrics, trains_in_one_forward
from rlattn.tasks import Task
from rlattn.timing import PhaseTimer
from rlattn.trainers.policy import Policy
from rlattn.types import Rollouts, Scores
from rlattn.verifiers.pool import VerifierPool

EVAL_SEED = 1_000_003  # added to the run's seed, so that no evaluation repeats a training step's draws

REFILL_SEED = 2_000_003  # likewise, for the prompts of further draws: a step's own stay a function of its number


class Batch(NamedTuple):
    """One step's rollouts with what was made of them: scores, gamma [T] and advantage [B]."""

    rollouts: Rollouts
    scores: Scores
    gamma: Tensor
    advantage: Tensor


class GRPOTrainer:
    """Group-relative policy optimisation whose advantages are shaped token by token [Li 2026, section 5]."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        rollout: RolloutPool,
        policy: Policy,
        verifiers: VerifierPool,
        benchmarks: Sequence[Task] = (),
    ) -> None:
        self.config, self.task, self.rollout, self.policy, self.verifiers = config, task, rollout, policy, verifiers
        self.asked = {"eval": task} | {  # what evaluation asks, by the prefix of its metrics
            f"eval/{named.name}": task for named, task in zip(config.trainer.eval_tasks, benchmarks, strict=True)
        }
        self.prompts = PromptSchedule(task.train, config.trainer.prompts_per_step, config.seed)
        self.refills = PromptSchedule(task.train, config.trainer.prompts_per_step, config.seed + REFILL_SEED)
        self.groups: list[list[int]] | None = None  # the last step's head groups, for reuse and turnover

    def step(self, step: int) -> tuple[dict[str, float], Batch]:
        """One batch of rollouts, one update, weights back into the engines.

        Returns the metrics, and the batch for the report.
        """
        config, timer = self.config, PhaseTimer()
        rollouts, sampled_metrics = self.sample(step, timer)
        with timer("reward"):
            if "flow" in self.policy.extra:
                rollouts = answers.locate(rollouts, self.task, self.rollout.tokenizer)
            advantage, reward_metrics = estimate(rollouts.rewards, rollouts.group_ids, config.algorithm)
        groups = reusable_groups(config.signals.heads, step, self.groups)
        if trains_in_one_forward(config.signals, groups):
            with timer("update"):
                scores, gamma, credit_metrics, update_metrics = self.policy.train(rollouts, advantage, groups, step)
        else:
            with timer("score"):
                scores = self.policy.score(rollouts, groups)
            with timer("credit"):
                gamma, credit_metrics = credit.assign(
                    rollouts, scores, advantage, config.credit, seed=config.seed, step=step
                )
                shaped = gamma * advantage[rollouts.sequence_ids]  # [T]
            with timer("update"):
                update_metrics = self.policy.update(rollouts, scores, shaped, step)
        with timer("weights"):
            self.rollout.load_weights(self.policy.weights(), version=step + 1)

        measured = (
            reward_metrics
            | sampled_metrics
            | metrics.rollout_metrics(rollouts)
            | metrics.sampling_metrics(rollouts, scores)
            | signal_metrics(scores.signals, rollouts, self.groups)
            | credit_metrics
            | update_metrics
            | timer.metrics(tokens=len(rollouts.token_ids))
        )
        self.groups = scores.signals.groups.tolist()
        return measured, Batch(rollouts, scores, gamma, advantage)

    def sample(self, step: int, timer: PhaseTimer) -> tuple[Rollouts, dict[str, float]]:
        """The step's completions with their rewards; with `algorithm.filter_groups`, of groups whose rewards differ."""
        config, filtering = self.config, self.config.algorithm.filter_groups
        most, generations = config.algorithm.max_num_gen_batches, config.rollout.num_generations

        def draw(index: int) -> Rollouts:
            prompts = self.refills.at(step * (most - 1) + index - 1) if index else self.prompts.at(step)
            with timer("generate"):
                first = index * len(prompts) * generations
                rollouts = self.rollout.generate(prompts, generations, seed=config.seed, step=step, first=first)
            with timer("reward"):
                return rewards.score(rollouts, self.task, self.verifiers, config)

        return fill(draw, config.trainer.prompts_per_step, most) if filtering else (draw(0), {})

    def evaluate(self) -> dict[str, float]:
        """Accuracy on the test sets under the current weights; the same draws each time, so that steps compare."""
        trainer, timer = self.config.trainer, PhaseTimer()

        def generate(problems: list[Problem], samples: int) -> Rollouts:
            seed = self.config.seed + EVAL_SEED
            return self.rollout.generate(problems, samples, seed=seed, step=0, temperature=trainer.eval_temperature)

        results: dict[str, float] = {}
        with timer("eval"):
            for name, task in self.asked.items():
                results |= evaluate(task, generate, trainer.eval_samples, self.verifiers, name)
        return results | {"timing_s/eval": timer.phases["eval"]}
