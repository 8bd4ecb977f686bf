"""PPO's critic: a transformer that says of each state how much reward is still to come.

[T] tokens of the whole batch, [t] tokens of a micro-batch, [n] response tokens among them, [d] width.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from ray.util.placement_group import PlacementGroup
from torch import Tensor, nn
from transformers import AutoModelForTokenClassification, PreTrainedModel

from rlattn import losses, packing
from rlattn.config import ConfigError, ModelConfig, RunConfig
from rlattn.kernels import register
from rlattn.losses.value import value_loss
from rlattn.packing import MicroBatch
from rlattn.rollout.placement import Plan
from rlattn.trainers.group import RankGroup, update_metrics
from rlattn.trainers.norms import fuse_norms
from rlattn.trainers.rank import Rank
from rlattn.trainers.worker import spread
from rlattn.types import Rollouts


class CriticModel(nn.Module):
    """A token classifier with one label, read as V of the state in which each response token is drawn."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, micro: MicroBatch) -> Tensor:
        """Values [n] fp32: that of token t comes from what precedes it, the hidden state at t-1."""
        device, rows = self.lm.device, micro.response_indices
        hidden = self.lm.base_model(
            input_ids=micro.token_ids[None].to(device),  # [1, t]
            position_ids=micro.position_ids[None].to(device),  # [1, t]
            use_cache=False,
            cu_seqlens=micro.cu_seqlens,
        ).last_hidden_state[0]  # [t, d]
        score = cast("nn.Linear", self.lm.score)
        return score(hidden[(rows - 1).to(device)]).squeeze(-1).float()


class CriticWorker(Rank):
    """Holds a shard of the critic."""

    def load(self, endpoint: str, path: str, checkpoint: str | None) -> None:
        """Join the other ranks, load the weights and, where given, the checkpoint's optimizer state."""
        self.join(endpoint)
        self.lm = load_critic(self.config.model, path)
        if self.config.policy.gradient_checkpointing:
            self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.engine = self.trained(CriticModel(self.lm), self.config.ppo.critic_learning_rate)
        self.restore(checkpoint)

    def values(self, shard: list[MicroBatch]) -> list[Tensor]:
        """V of every token, [t] fp32 a micro-batch, 0 on prompts."""
        self.engine.eval()
        with torch.no_grad():
            return [spread(micro, self.engine(micro)) for micro in shard]

    def update(self, mini_batches: list[list[MicroBatch]]) -> dict[str, float]:
        """One optimizer step a mini-batch; returns `summary`."""
        learned = []
        self.engine.train()
        for micros in mini_batches:
            for micro in micros:
                rows = micro.response_indices
                given = {name: column[rows].to(self.device) for name, column in micro.columns.items()}  # [n] each
                clip = self.config.ppo.cliprange_value
                loss, clipped = value_loss(self.engine(micro), given["old_values"], given["returns"], clip)
                counted = given["mean_weights"] != 0
                sums = {"vf_clip_ratio": clipped[counted].sum().item(), "tokens": int(counted.sum())}
                learned.append(sums | self.step((given["mean_weights"] * loss).sum(), last=micro is micros[-1]))
        self.release()
        return self.summary(learned, len(mini_batches))


class Critic(RankGroup):
    """As many ranks as the policy has, each a Ray actor in its seat of `plan`."""

    def __init__(self, config: RunConfig, plan: Plan, group: PlacementGroup) -> None:
        super().__init__(config, plan.critic, group, CriticWorker)

    def load(self, path: str, checkpoint: Path | None) -> None:
        """Load weights on every rank, and the optimizer of `checkpoint` when resuming."""
        endpoint, folder = self.endpoint(), str(checkpoint) if checkpoint else None
        self.all("load critic", [rank.load.remote(endpoint, path, folder) for rank in self.ranks])

    def values(self, rollouts: Rollouts) -> Tensor:
        """[T] fp32, V of the state in which each response token is drawn, 0 on prompts."""
        layout = self.plan(rollouts)
        shards = packing.cut(rollouts, layout, self.config.policy.logits_chunk_tokens)
        results = self.each("values", shards, lambda rank, shard: rank.values.remote(shard))
        return packing.restore(rollouts.cu_seqlens, layout, results)

    def update(self, rollouts: Rollouts, values: Tensor, returns: Tensor, step: int) -> dict[str, float]:
        """`num_iterations` passes of `steps_per_generation` optimizer steps towards `returns` [T].

        Returns `vf_loss`, `vf_clip_ratio`, `critic/grad_norm`, `critic/learning_rate`, and of the values before the
        update `value_mean` and `explained_variance` (1 - Var[returns - values] / Var[returns]).
        """
        algorithm = self.config.algorithm

        def columns(chosen: list[int]) -> dict[str, Tensor]:
            weights = losses.mean_weights(rollouts, chosen, self.config)
            return {"old_values": values, "returns": returns, "mean_weights": weights}

        shards = self.mini_batches(rollouts, step, columns)
        results = self.each("update critic", shards, lambda rank, shard: rank.update.remote(shard))
        metrics = update_metrics(results, algorithm.steps_per_generation * algorithm.num_iterations)
        mask = rollouts.response_mask
        left = (returns - values)[mask].var(correction=0) / returns[mask].var(correction=0).clamp(min=1e-12)
        return {
            "vf_loss": metrics["loss"],
            "vf_clip_ratio": metrics["vf_clip_ratio"],
            "critic/grad_norm": metrics["grad_norm"],
            "critic/learning_rate": metrics["learning_rate"],
            "value_mean": values[mask].mean().item(),
            "explained_variance": 1 - left.item(),
        }


def load_critic(config: ModelConfig, path: str) -> PreTrainedModel:
    """The token classifier at `path`, or the causal LM there with a new head that says 0 of every state.

    Raises:
        ConfigError: no such model, or none that transformers knows as a token classifier.
    """
    try:
        model, info = AutoModelForTokenClassification.from_pretrained(
            path,
            num_labels=1,
            dtype=getattr(torch, config.dtype),
            attn_implementation=register(),
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"no critic can be made from {path!r}: {str(error).splitlines()[0]}") from error
    if info["missing_keys"]:
        with torch.no_grad():
            for parameter in model.score.parameters():
                parameter.zero_()
    fuse_norms(model)
    return model
