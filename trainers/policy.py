"""The policy as the training loop sees it: a group of ranks that scores, updates, saves and hands out its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from rlattn import credit, losses
from rlattn.config import RunConfig
from rlattn.rollout.cluster import collect
from rlattn.rollout.placement import Plan
from rlattn.signals import HeadGroups
from rlattn.trainers import packing
from rlattn.trainers.worker import PolicyWorker, ShardScores
from rlattn.types import Rollouts, Scores, Signals


class Trained(NamedTuple):
    """What `Policy.train` says about a batch: scores, gamma [T] fp32, and the metrics of credit and update."""

    scores: Scores
    gamma: Tensor
    credit_metrics: dict[str, float]
    update_metrics: dict[str, float]


class Policy:
    """`policy.ranks` DeepSpeed ranks, each a Ray actor in its seat of `plan`."""

    def __init__(self, config: RunConfig, plan: Plan, group: PlacementGroup) -> None:
        self.config = config
        cpus, gpus = config.policy.cpus_per_rank, config.policy.gpus_per_rank
        # Passive: while the engine generates, this worker's idle threads must leave it the cores.
        threads = {"OMP_NUM_THREADS": str(cpus), "OMP_WAIT_POLICY": "PASSIVE"}
        device = {} if gpus else {"DS_ACCELERATOR": "cpu"}
        self.names = [seat.name for seat in plan.policy]
        self.extra = credit.needed(config.credit.name)  # here, so that ranks need not know a third party's strategy
        self.ranks: list[Any] = [
            ray.remote(PolicyWorker)
            .options(
                num_cpus=seat.cpus,
                num_gpus=seat.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=seat.bundle),
                runtime_env={"env_vars": threads | device},
            )
            .remote(config, rank, self.extra)
            for rank, seat in enumerate(plan.policy)
        ]

    def load(self, model_path: str, reference_path: str, checkpoint: Path | None) -> None:
        """Load weights on every rank, and the optimizer of `checkpoint` when resuming."""
        endpoint = self._all("rendezvous", [self.ranks[0].endpoint.remote()])[0]
        path = str(checkpoint) if checkpoint else None
        self._all("load", [rank.load.remote(endpoint, model_path, reference_path, path) for rank in self.ranks])

    def score(self, rollouts: Rollouts, groups: HeadGroups | None = None) -> Scores:
        """Old log-probs, entropy and attention signals of a batch, from one forward; `groups` None measures them."""
        layout = self._plan(rollouts)
        shards = packing.cut(rollouts, layout, self.config.policy.logits_chunk_tokens)
        given = _tensor(groups)
        results: list[ShardScores] = self._each("score", shards, lambda rank, shard: rank.score.remote(shard, given))
        return self._restore(rollouts, layout, results)[0]

    def update(self, rollouts: Rollouts, scores: Scores, advantages: Tensor, step: int) -> dict[str, float]:
        """`num_iterations` passes of `steps_per_generation` optimizer steps; `advantages` is [T] fp32."""
        algorithm = self.config.algorithm
        columns = {"old_logps": scores.logps, "advantages": advantages}
        if scores.reference_logps is not None:
            columns["reference_logps"] = scores.reference_logps
        order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(self.config.seed + step))
        shards: list[list[list[packing.MicroBatch]]] = [[] for _ in self.ranks]  # [rank][mini-batch][micro-batch]
        for chosen in order.chunk(algorithm.steps_per_generation):
            _, pieces = self._cut(rollouts, sorted(chosen.tolist()), columns)
            for shard, piece in zip(shards, pieces, strict=True):
                shard.append(piece)
        shards = [shard * algorithm.num_iterations for shard in shards]
        results = self._each("update", shards, lambda rank, shard: rank.update.remote(shard))
        return _update_metrics(results, algorithm.steps_per_generation * algorithm.num_iterations)

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
        layout, shards = self._cut(rollouts, list(range(len(rollouts))), {"advantages": spread})
        given = _tensor(groups)
        results = self._each("update", shards, lambda rank, shard: rank.train.remote(shard, given, step))
        scores, columns = self._restore(rollouts, layout, [own for own, _ in results])
        gamma = columns["gamma"]
        sums = [own for _, own in results]
        spent = credit.spending(gamma, rollouts.response_mask, int(sum(own["amplified"] for own in sums)))
        return Trained(scores, gamma, spent, _update_metrics(sums, 1))

    def weights(self) -> list[ray.ObjectRef]:
        """The current weights as object references, each a bucket `{Hugging Face name: CPU tensor}`."""
        return self._all("gather weights", [rank.weights.remote() for rank in self.ranks])[0]

    def save(self, folder: Path) -> None:
        """Write optimizer state and a Hugging Face model under `folder`."""
        self._all("save", [rank.save.remote(str(folder)) for rank in self.ranks])

    def _cut(
        self, rollouts: Rollouts, chosen: list[int], columns: dict[str, Tensor]
    ) -> tuple[packing.Plan, list[list[packing.MicroBatch]]]:
        """The micro-batches of one optimizer step on the sequences `chosen`, with their loss weights."""
        weights = losses.token_weights(rollouts, chosen, self.config)
        layout = [[[chosen[i] for i in micro] for micro in rank] for rank in self._plan(rollouts, chosen)]
        chunk = self.config.policy.logits_chunk_tokens
        return layout, packing.cut(rollouts, layout, chunk, weights=weights, **columns)

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

    def _plan(self, rollouts: Rollouts, chosen: list[int] | None = None) -> packing.Plan:
        lengths = rollouts.lengths if chosen is None else rollouts.lengths[chosen]
        return packing.plan(lengths.tolist(), len(self.ranks), self.config.policy.tokens_per_micro_batch)

    def _each(self, phase: str, shards: list[Any], call: Callable[[Any, Any], ray.ObjectRef]) -> list[Any]:
        return self._all(phase, [call(rank, shard) for rank, shard in zip(self.ranks, shards, strict=True)])

    def _all(self, phase: str, calls: list[ray.ObjectRef]) -> list[Any]:
        """Every rank's answer within `policy.timeout_s`, or an ActorError that names the rank, the phase and why."""
        return collect(dict(zip(self.names, calls, strict=False)), phase=phase, timeout_s=self.config.policy.timeout_s)


def _tensor(groups: HeadGroups | None) -> Tensor | None:
    return None if groups is None else torch.tensor(groups, dtype=torch.int8)  # [L, H]


def _update_metrics(results: list[dict[str, float]], steps: int) -> dict[str, float]:
    """What `steps` optimizer steps report, from every rank's sums."""
    total = {name: sum(result[name] for result in results) for name in results[0]}
    tokens = max(total["tokens"], 1)
    metrics = {
        "loss": total["loss"] / steps,
        "clip_ratio/low_mean": total["clip_low"] / tokens,
        "clip_ratio/high_mean": total["clip_high"] / tokens,
        "grad_norm": results[0]["grad_norm"],
        "learning_rate": results[0]["learning_rate"],
    }
    return metrics | ({"kl": total["kl"] / tokens} if "kl" in total else {})
