"""The policy as the training loop sees it: a group of ranks that scores, updates, saves and hands out its weights."""

from __future__ import annotations

from collections import ChainMap
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import ray
from ray.util.placement_group import PlacementGroup
from torch import Tensor

from rlattn import credit, losses, packing
from rlattn.config import RunConfig
from rlattn.rollout.placement import Plan
from rlattn.rollout.transfer import Bucket
from rlattn.signals import HeadGroups, group_tensor
from rlattn.trainers.group import RankGroup, update_metrics
from rlattn.trainers.worker import PolicyWorker, ShardScores
from rlattn.types import Rollouts, Scores, Signals


class Trained(NamedTuple):
    """What `Policy.train` says about a batch: scores, gamma [T] fp32, and the metrics of credit and update."""

    scores: Scores
    gamma: Tensor
    credit_metrics: dict[str, float]
    update_metrics: dict[str, float]


class Policy(RankGroup):
    """`policy.ranks` DeepSpeed ranks, each a Ray actor in its seat of `plan`."""

    def __init__(self, config: RunConfig, plan: Plan, group: PlacementGroup) -> None:
        self.extra = credit.needed(config.credit.name)  # here, so that ranks need not know a third party's strategy
        super().__init__(config, plan.policy, group, PolicyWorker, self.extra)

    def load(self, model_path: str, reference_path: str, checkpoint: Path | None) -> None:
        """Load weights on every rank, and the optimizer of `checkpoint` when resuming."""
        endpoint, path = self.endpoint(), str(checkpoint) if checkpoint else None
        self.all("load", [rank.load.remote(endpoint, model_path, reference_path, path) for rank in self.ranks])

    def score(self, rollouts: Rollouts, groups: HeadGroups | None = None) -> Scores:
        """Old log-probs, entropy and attention signals of a batch, from one forward; `groups` None measures them."""
        layout = self.plan(rollouts)
        shards = packing.cut(rollouts, layout, self.config.policy.logits_chunk_tokens)
        given = group_tensor(groups)
        results: list[ShardScores] = self.each("score", shards, lambda rank, shard: rank.score.remote(shard, given))
        return self._restore(rollouts, layout, results)[0]

    def update(self, rollouts: Rollouts, scores: Scores, advantages: Tensor, step: int) -> dict[str, float]:
        """`num_iterations` passes of `steps_per_generation` optimizer steps; `advantages` is [T] fp32."""
        algorithm = self.config.algorithm
        columns = {"old_logps": scores.logps, "advantages": advantages}
        if scores.reference_logps is not None:
            columns["reference_logps"] = scores.reference_logps
        shards = self.mini_batches(rollouts, step, lambda chosen: self._loss_columns(rollouts, chosen, columns))
        results = self.each("update", shards, lambda rank, shard: rank.update.remote(shard))
        return update_metrics(results, algorithm.steps_per_generation * algorithm.num_iterations)

    def train(self, rollouts: Rollouts, advantages: Tensor, groups: HeadGroups | None, step: int) -> Trained:
        """One optimizer step on the whole batch whose own forward gives old log-probs, signals and so gamma.

        Equals `score` with the same groups, `credit.assign` and `update`, for one forward less.

        Args:
            rollouts: the batch.
            advantages: [B] fp32, without credit.
            groups: the head groups to use; None only where they are not the batch's (scope `sequence`).
            step: of the run.
        """
        spread = advantages[rollouts.sequence_ids]  # [T]
        everything = list(range(len(rollouts)))
        layout, shards = self.cut(
            rollouts, everything, self._loss_columns(rollouts, everything, {"advantages": spread})
        )
        given = group_tensor(groups)
        results = self.each("update", shards, lambda rank, shard: rank.train.remote(shard, given, step))
        scores, columns = self._restore(rollouts, layout, [own for own, _ in results])
        gamma = columns["gamma"]
        sums = [own for _, own in results]
        spent = credit.spending(gamma, rollouts.response_mask, int(sum(own["amplified"] for own in sums)))
        return Trained(scores, gamma, spent, update_metrics(sums, 1))

    def weights(self) -> list[ray.ObjectRef]:
        """The current weights as object references, each a bucket `{Hugging Face name: CPU tensor}`."""
        return self.all("gather weights", [rank.weights.remote() for rank in self.ranks])[0]

    def next_weights(self, *, first: bool, again: bool = False) -> Bucket | None:
        """See `rlattn.rollout.transfer.Source`; what a rank's GPU holds can be read by engines on the same GPU."""
        ranks = self.ranks[:1] if again else self.ranks
        found = self.all("gather weights", [rank.next_weights.remote(first=first, again=again) for rank in ranks])
        if found[0] is None:
            return None
        lent = [own.handles for own in found if own.handles]
        merged = [dict(ChainMap(*handles)) for handles in zip(*lent, strict=True)]
        whole: Bucket = found[0]._replace(handles=merged)
        return whole

    def meet(self, world_size: int) -> tuple[str, int, ray.ObjectRef]:
        """See `rlattn.rollout.transfer.Source`."""
        endpoint = urlsplit(self.all("rendezvous", [self.ranks[0].endpoint.remote()])[0])
        assert endpoint.hostname
        assert endpoint.port
        met = self.ranks[0].meet.remote(endpoint.hostname, endpoint.port, world_size)
        return endpoint.hostname, endpoint.port, met

    def broadcast(self, receivers: list[ray.ObjectRef], timeout_s: float) -> bool:
        """See `rlattn.rollout.transfer.Source`."""
        sent: bool = self.all("broadcast weights", [self.ranks[0].broadcast.remote(receivers, timeout_s)])[0]
        return sent

    def adapter(self) -> ray.ObjectRef:
        """The current adapters in PEFT's format, file name -> bytes, as an object reference."""
        return self.all("gather adapters", [rank.adapter.remote() for rank in self.ranks])[0]

    def _loss_columns(self, rollouts: Rollouts, chosen: list[int], columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """`columns` with what else the loss of an optimizer step on `chosen` reads, [T] each."""
        algorithm = self.config.algorithm
        columns = columns | {"weights": losses.token_weights(rollouts, chosen, self.config)}
        if algorithm.entropy_coef:
            columns["mean_weights"] = losses.mean_weights(rollouts, chosen, self.config)
        if algorithm.vllm_importance_sampling_correction:
            columns["sampled_logps"] = rollouts.sampled_logps
        return columns

    def _restore(
        self, rollouts: Rollouts, layout: packing.Plan, results: list[ShardScores]
    ) -> tuple[Scores, dict[str, Tensor]]:
        """The ranks' results as a whole: scores, and every column in the batch's order."""
        columns = {
            name: packing.restore(
                rollouts.cu_seqlens, layout, [[part[name] for part in own.columns] for own in results]
            )
            for name in results[0].columns[0]
        }
        whole = results[0]  # statistics over the batch are equal on every rank
        means = whole.means
        signals = Signals(
            waad=columns["waad"],
            fai=columns["fai"],
            layers=whole.layers,
            span=means.span,
            entropy=means.entropy,
            sink_mass=means.sink_mass,
            groups=whole.groups,
            extra={name: columns[name] for name in self.extra},
        )
        return Scores(columns["logps"], columns["entropy"], signals, columns.get("reference_logps")), columns
