"""A trained model as the loop sees it: its ranks, each a Ray actor in its seat, called together under a time-out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from rlattn import packing
from rlattn.config import RunConfig
from rlattn.rollout.cluster import collect, remember
from rlattn.rollout.placement import Seat
from rlattn.trainers.rank import Rank
from rlattn.types import Rollouts


class RankGroup:
    """One `worker` a seat, made with (config, rank, *args)."""

    def __init__(
        self, config: RunConfig, seats: Sequence[Seat], group: PlacementGroup, worker: type[Rank], *args: Any
    ) -> None:
        self.config = config
        # Passive: while the engine generates, this worker's idle threads must leave it the cores.
        threads = {"OMP_NUM_THREADS": str(config.policy.cpus_per_rank), "OMP_WAIT_POLICY": "PASSIVE"}
        device = {} if config.policy.gpus_per_rank else {"DS_ACCELERATOR": "cpu"}
        self.names = [seat.name for seat in seats]
        self.ranks: list[Any] = [
            ray.remote(worker)
            .options(
                num_cpus=seat.cpus,
                num_gpus=seat.gpus,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=seat.bundle),
                runtime_env={"env_vars": threads | device},
            )
            .remote(config, rank, *args)
            for rank, seat in enumerate(seats)
        ]

    def endpoint(self) -> str:
        """Where the ranks meet: a free port on the first one's node. From here on errors say where each rank lives."""
        for name, where in zip(self.names, self.all("starting", [r.place.remote() for r in self.ranks]), strict=True):
            remember(name, where)
        return self.all("rendezvous", [self.ranks[0].endpoint.remote()])[0]

    def save(self, folder: Path) -> None:
        """Write optimizer state and a Hugging Face model under `folder`."""
        self.all("save", [rank.save.remote(str(folder)) for rank in self.ranks])

    def peak_memory(self) -> int:
        """The most that any rank's tensors took of its GPU since this was last asked, bytes."""
        return max(self.all("memory", [rank.peak_memory.remote() for rank in self.ranks]))

    def plan(self, rollouts: Rollouts, chosen: list[int] | None = None) -> packing.Plan:
        """The micro-batches of the sequences `chosen` (places in that list), or of all."""
        lengths = rollouts.lengths if chosen is None else rollouts.lengths[chosen]
        return packing.plan(lengths.tolist(), len(self.ranks), self.config.policy.tokens_per_micro_batch)

    def cut(
        self, rollouts: Rollouts, chosen: list[int], columns: dict[str, Tensor]
    ) -> tuple[packing.Plan, list[list[packing.MicroBatch]]]:
        """The micro-batches of one optimizer step on the sequences `chosen`, with `columns` [T] cut alongside."""
        layout = [[[chosen[i] for i in micro] for micro in rank] for rank in self.plan(rollouts, chosen)]
        return layout, packing.cut(rollouts, layout, self.config.policy.logits_chunk_tokens, **columns)

    def mini_batches(
        self, rollouts: Rollouts, step: int, columns: Callable[[list[int]], dict[str, Tensor]]
    ) -> list[list[list[packing.MicroBatch]]]:
        """[rank][optimizer step][micro-batch] of `num_iterations` passes over the batch, shuffled by (seed, step).

        `columns` gives the [T] columns of the optimizer step on some sequences.
        """
        algorithm = self.config.algorithm
        order = torch.randperm(len(rollouts), generator=torch.Generator().manual_seed(self.config.seed + step))
        shards: list[list[list[packing.MicroBatch]]] = [[] for _ in self.ranks]
        for part in order.chunk(algorithm.steps_per_generation):
            chosen = sorted(part.tolist())
            for shard, piece in zip(shards, self.cut(rollouts, chosen, columns(chosen))[1], strict=True):
                shard.append(piece)
        return [shard * algorithm.num_iterations for shard in shards]

    def each(self, phase: str, shards: list[Any], call: Callable[[Any, Any], ray.ObjectRef]) -> list[Any]:
        """Every rank's answer about its own shard."""
        return self.all(phase, [call(rank, shard) for rank, shard in zip(self.ranks, shards, strict=True)])

    def all(self, phase: str, calls: list[ray.ObjectRef]) -> list[Any]:
        """Every rank's answer within `policy.timeout_s`, or an ActorError that names the rank, the phase and why."""
        return collect(dict(zip(self.names, calls, strict=False)), phase=phase, timeout_s=self.config.policy.timeout_s)


def update_metrics(results: list[dict[str, float]], steps: int) -> dict[str, float]:
    """What `steps` optimizer steps report, from every rank's sums: means per token of what the ranks summed."""
    total = {name: sum(result[name] for result in results) for name in results[0]}
    tokens = max(total["tokens"], 1)
    apart = {
        "loss": total.pop("loss") / steps,
        "grad_norm": results[0]["grad_norm"],
        "learning_rate": results[0]["learning_rate"],
    }
    left = total.keys() - apart.keys() - {"tokens", "amplified"}
    return apart | {name: value / tokens for name, value in total.items() if name in left}
