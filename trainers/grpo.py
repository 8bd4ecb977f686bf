"""GRPO with attention credit: the loop of the paper, on one screen."""

from __future__ import annotations

from rlattn import credit
from rlattn.estimators import estimate
from rlattn.signals import reusable_groups, trains_in_one_forward
from rlattn.trainers.trainer import Batch, Trainer


class GRPOTrainer(Trainer):
    """Group-relative policy optimisation whose advantages are shaped token by token [Li 2026, section 5]."""

    def step(self, step: int) -> tuple[dict[str, float], Batch]:
        """One batch of rollouts, one update, weights back into the engines."""
        config, timer = self.config, self.timer(step)
        rollouts, sampled_metrics = self.sample(step, timer)
        with timer("reward"):
            rollouts = self.located(rollouts)
            advantage, reward_metrics = estimate(rollouts.rewards, rollouts.group_ids, config.algorithm)
        groups = reusable_groups(config.signals.heads, step, self.groups)
        if trains_in_one_forward(config.signals, groups):
            with timer("update"):
                scores, gamma, credit_metrics, update_metrics = self.policy.train(rollouts, advantage, groups, step)
        else:
            with timer("score"):
                scores = self.score(rollouts, groups)
            with timer("credit"):
                gamma, credit_metrics = credit.assign(
                    rollouts, scores, advantage, config.credit, seed=config.seed, step=step
                )
                shaped = gamma * advantage[rollouts.sequence_ids]  # [T]
            with timer("update"):
                update_metrics = self.policy.update(rollouts, scores, shaped, step)
        with timer("weights"):
            self.publish(step + 1)

        parts = reward_metrics, sampled_metrics, credit_metrics, update_metrics
        return self.measured(rollouts, scores, timer, *parts), Batch(rollouts, scores, gamma, advantage)
