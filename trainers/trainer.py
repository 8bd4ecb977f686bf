"""What the trainers of all algorithms do alike: sample and reward a batch, evaluate, save.

One driver process owns the algorithm; Ray actors own the devices. Everything random is a function of (seed, step), so
a resumed run repeats an uninterrupted one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path
from typing import NamedTuple, TypeVar

from torch import Tensor

from rlattn import answers, metrics, rewards, trace
from rlattn.config import RunConfig
from rlattn.data import PromptSchedule
from rlattn.dynamic_sampling import fill
from rlattn.evaluation.in_training import evaluate
from rlattn.problem import Problem
from rlattn.rollout.pool import RolloutPool
from rlattn.rollout.transfer import direct
from rlattn.signals import HeadGroups, decodable_groups, signal_metrics
from rlattn.tasks import Task
from rlattn.timing import PhaseTimer
from rlattn.trainers.ahead import Ahead
from rlattn.trainers.policy import Policy
from rlattn.trainers.reward_pool import RewardPool
from rlattn.types import Rollouts, Scores
from rlattn.verifiers.pool import VerifierPool

EVAL_SEED = 1_000_003  # added to the run's seed, so that no evaluation repeats a training step's draws

REFILL_SEED = 2_000_003  # likewise, for the prompts of further draws: a step's own stay a function of its number


T = TypeVar("T")


class Batch(NamedTuple):
    """One step's rollouts with what was made of them: scores, gamma [T] and advantage [B]."""

    rollouts: Rollouts
    scores: Scores
    gamma: Tensor
    advantage: Tensor


class Trainer(ABC):
    """An algorithm over a pool of engines and a policy; a subclass says what a `step` is."""

    def __init__(
        self,
        config: RunConfig,
        task: Task,
        rollout: RolloutPool,
        policy: Policy,
        verifiers: VerifierPool,
        benchmarks: Sequence[Task] = (),
        functions: RewardPool | None = None,
    ) -> None:
        self.functions = functions
        self._ahead: Ahead[tuple[Rollouts, dict[str, float]]] = Ahead()
        self.tell: Callable[[int, str], None] = lambda step, phase: None  # who shows what is going on
        self.config, self.task, self.rollout, self.policy, self.verifiers = config, task, rollout, policy, verifiers
        self.asked = {"eval": task} | {  # what evaluation asks, by the prefix of its metrics
            f"eval/{named.name}": task for named, task in zip(config.trainer.eval_tasks, benchmarks, strict=True)
        }
        drawn = ceil(config.trainer.prompts_per_step * config.rollout.oversampling)
        self.prompts = PromptSchedule(task.train, drawn, config.seed)
        self.refills = PromptSchedule(task.train, drawn, config.seed + REFILL_SEED)
        self.groups: list[list[int]] | None = None  # the last step's head groups, for reuse and turnover

    def timer(self, step: int) -> PhaseTimer:
        """A step's, which tells of each phase as it begins."""
        return PhaseTimer(lambda phase: self.tell(step, phase))

    def close(self) -> None:
        """End what goes on beside the step; the engines must have been shut down, so that it can end."""
        self._ahead.close()

    @abstractmethod
    def step(self, step: int) -> tuple[dict[str, float], Batch]:
        """One batch of rollouts, its update, weights back into the engines.

        Returns the metrics, and the batch for the report.
        """

    def save(self, folder: Path) -> None:
        """Write what the models of this algorithm have learned under `folder`."""
        self.policy.save(folder)

    def score(self, rollouts: Rollouts, groups: HeadGroups | None) -> Scores:
        """Old log-probs and attention signals of a batch, from the policy or from the engines that sampled it."""
        if self.config.signals.source == "policy":
            return self.policy.score(rollouts, groups)
        scores = self.rollout.score(rollouts, groups, self.policy.extra)
        if self.config.rollout.sleep:
            self.rollout.sleep()
        return scores

    def publish(self, version: int) -> None:
        """Give the engines what the policy is now, once they have sampled what they were asked."""
        self._ahead.wait()
        if self.config.policy.sends_adapters:
            self.rollout.load_adapter(_kept(self.policy.adapter), version)
        elif direct(self.config):
            self.rollout.take_weights(self.policy, version)
        else:
            weights = self.policy.weights
            self.rollout.load_weights(_kept(weights) if self.config.rollout.steps_ahead else weights, version)

    def sample(self, step: int, timer: PhaseTimer) -> tuple[Rollouts, dict[str, float]]:
        """The step's rewarded completions, and what to log of them; see `rollout.steps_ahead`."""
        ahead = self.config.rollout.steps_ahead
        with timer("generate"):
            found = self._ahead.result()
        rollouts, metrics = found if found else self._sample(step, timer)
        if ahead and step + ahead < self.config.trainer.steps:
            self._ahead.begin(lambda: self._sample(step + ahead, PhaseTimer(row=trace.AHEAD)))
        if self.config.rollout.sleep and self.config.signals.source == "policy":  # else they score the batch first
            with timer("sleep"):
                self.rollout.sleep()
        return rollouts, metrics | {"rollout/staleness": step - rollouts.policy_version.double().mean().item()}

    def _sample(self, step: int, timer: PhaseTimer) -> tuple[Rollouts, dict[str, float]]:
        """Completions with their rewards; with `algorithm.filter_groups`, of groups whose rewards differ."""
        config, filtering = self.config, self.config.algorithm.filter_groups
        failures: Counter[str] = Counter()
        most, generations = config.algorithm.max_num_gen_batches, config.rollout.num_generations

        def draw(index: int) -> Rollouts:
            prompts = self.refills.at(step * (most - 1) + index - 1) if index else self.prompts.at(step)
            with timer("generate"):
                first = index * len(prompts) * generations
                rollouts = self.rollout.generate(
                    prompts,
                    generations,
                    seed=config.seed,
                    step=step,
                    first=first,
                    keep=config.trainer.prompts_per_step,
                    groups=decodable_groups(config.signals, step, self.groups),
                    extra=self.policy.extra,
                )
            with timer("reward"):
                return self.reward(rollouts, failures)

        rollouts, metrics = fill(draw, config.trainer.prompts_per_step, most) if filtering else (draw(0), {})
        return rollouts, metrics | failures

    def reward(self, rollouts: Rollouts, failures: Counter[str]) -> Rollouts:
        """The completions with every part of their training reward; adds to `failures` what functions failed on."""
        weight, parts = self.config.rewards.verifier_weight, rewards.overlong(rollouts, self.config)
        if weight:
            judged = rewards.judge(rollouts, self.task, self.verifiers).reward_parts
            parts = {name: weight * part for name, part in judged.items()} | parts
        if self.functions:
            own, failed = self.functions.score(rollouts)
            failures.update(failed)
            parts |= own
        return rewards.with_parts(rollouts, parts)

    def evaluate(self) -> dict[str, float]:
        """Accuracy on the test sets under the current weights; the same draws each time, so that steps compare."""
        trainer, timer = self.config.trainer, PhaseTimer()
        self._ahead.wait()

        def generate(problems: list[Problem], samples: int) -> Rollouts:
            seed = self.config.seed + EVAL_SEED
            return self.rollout.generate(problems, samples, seed=seed, step=0, temperature=trainer.eval_temperature)

        results: dict[str, float] = {}
        with timer("eval"):
            for name, task in self.asked.items():
                results |= evaluate(task, generate, trainer.eval_samples, self.verifiers, name)
        return results | {"timing_s/eval": timer.phases["eval"]}

    def located(self, rollouts: Rollouts) -> Rollouts:
        """The batch with the answers found that credit `flow` starts from, where it is asked for."""
        if "flow" not in self.policy.extra:
            return rollouts
        return answers.locate(rollouts, self.task, self.rollout.tokenizer)

    def measured(
        self, rollouts: Rollouts, scores: Scores, timer: PhaseTimer, *parts: dict[str, float]
    ) -> dict[str, float]:
        """The metrics of a step; remembers its head groups for the next."""
        whole: dict[str, float] = {}
        for part in (
            metrics.rollout_metrics(rollouts),
            metrics.sampling_metrics(rollouts, scores) if self.config.signals.source == "policy" else {},
            signal_metrics(scores.signals, rollouts, self.groups),
            self.rollout.metrics(),
            *parts,
            timer.metrics(tokens=len(rollouts.token_ids)),
        ):
            whole |= part
        self.groups = scores.signals.groups.tolist()
        return whole


def _kept(gather: Callable[[], T]) -> Callable[[], T]:
    """What `gather` gives now, whenever it is asked for again: the policy may have learned since."""
    found = gather()
    return lambda: found
