"""PPO with attention credit: a critic's advantage of each token, multiplied by what attention says the token did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlattn import credit
from rlattn.estimators.gae import gae, whiten
from rlattn.signals import reusable_groups
from rlattn.trainers.critic import Critic
from rlattn.trainers.trainer import Batch, Trainer
from rlattn.types import Rollouts, Scores


class PPOTrainer(Trainer):
    """Proximal policy optimisation (arXiv 1707.06347) with GAE over response tokens (arXiv 1506.02438)."""

    def __init__(self, *args: Any, critic: Critic, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.critic = critic

    def step(self, step: int) -> tuple[dict[str, float], Batch]:
        """One batch of rollouts, one update of policy and critic, weights back into the engines."""
        config, ppo, timer = self.config, self.config.ppo, self.timer(step)
        rollouts, sampled_metrics = self.sample(step, timer)
        with timer("score"):
            rollouts = self.located(rollouts)
            scores = self.policy.score(rollouts, reusable_groups(config.signals.heads, step, self.groups))
            values = self.critic.values(rollouts)  # [T]
        with timer("credit"):
            rewards, reward_metrics = token_rewards(rollouts, scores, ppo.kl_coef)
            raw, returns = gae(rollouts, rewards, values, gamma=ppo.gamma, lam=ppo.lam)
            advantages = whiten(raw, rollouts.response_mask) if ppo.whiten_advantages else raw  # [T]
            gamma, credit_metrics = credit.assign_tokens(
                rollouts, scores, advantages, config.credit, seed=config.seed, step=step
            )
        with timer("update"):
            critic_metrics = self.critic.update(rollouts, values, returns, step)
            learns = step >= ppo.critic_warmup_steps
            update_metrics = self.policy.update(rollouts, scores, gamma * advantages, step) if learns else {}
        with timer("weights"):
            self.publish(step + 1)

        parts = reward_metrics, sampled_metrics, credit_metrics, critic_metrics, update_metrics
        mean = torch.segment_reduce(raw[rollouts.response_mask], "mean", lengths=rollouts.response_lengths)  # [B]
        return self.measured(rollouts, scores, timer, *parts), Batch(rollouts, scores, gamma, mean)

    def save(self, folder: Path) -> None:
        """Write policy and critic under `folder`."""
        super().save(folder)
        self.critic.save(folder / "critic")


def token_rewards(rollouts: Rollouts, scores: Scores, kl_coef: float) -> tuple[Tensor, dict[str, float]]:
    """Rewards of drawing each token, [T] fp32: the completion's at its last, less `kl_coef` times each one's KL.

    The KL to the starting policy is the single sample log p - log p_reference (k1), as in InstructGPT
    (arXiv 2203.02155, eq. 2) and TRL's PPO.

    Returns the rewards, and `reward`, `reward_std` and, with a KL, `kl`.
    """
    rewards = torch.zeros_like(scores.logps)
    metrics = {"reward": rollouts.rewards.mean().item(), "reward_std": rollouts.rewards.std().item()}
    if kl_coef:
        assert scores.reference_logps is not None
        kl = (scores.logps - scores.reference_logps) * rollouts.response_mask
        rewards -= kl_coef * kl
        metrics["kl"] = kl[rollouts.response_mask].mean().item()
    rewards[rollouts.cu_seqlens[1:] - 1] += rollouts.rewards
    return rewards, metrics
