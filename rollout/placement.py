"""What a run asks of the cluster: pure functions from config to resource bundles. No ray import."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from rlattn.config import ConfigError, RunConfig


@dataclass(frozen=True)
class Seat:
    """One actor's place: its bundle of the placement group, what it reserves there, and which node labels it needs."""

    name: str
    bundle: int
    cpus: int
    gpus: float
    labels: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Every actor of a run and where it sits.

    Attributes:
        policy: one seat a rank.
        engines: one seat an engine.
        critic: one seat a rank, none without PPO.
    """

    policy: tuple[Seat, ...]
    engines: tuple[Seat, ...]
    critic: tuple[Seat, ...] = ()

    @property
    def seats(self) -> tuple[Seat, ...]:
        """Everybody's."""
        return self.policy + self.critic + self.engines

    @property
    def bundles(self) -> list[dict[str, float]]:
        """Ray resources of each bundle, in bundle order: the sum of what its seats reserve."""
        bundles: list[dict[str, float]] = [{} for _ in range(1 + max(seat.bundle for seat in self.seats))]
        for seat in self.seats:
            bundle = bundles[seat.bundle]
            bundle["CPU"] = bundle.get("CPU", 0) + seat.cpus
            if seat.gpus:
                bundle["GPU"] = bundle.get("GPU", 0) + seat.gpus
        return bundles

    @property
    def selectors(self) -> list[dict[str, str]]:
        """Labels of the nodes that each bundle may be on."""
        selectors: list[dict[str, str]] = [{} for _ in self.bundles]
        for seat in self.seats:
            selectors[seat.bundle].update(seat.labels)
        return selectors

    def beside_rank(self, engine: Seat) -> bool:
        """Whether an engine's bundle, and so its GPU where it has one, is a policy rank's too."""
        return any(rank.bundle == engine.bundle for rank in self.policy)

    @property
    def shares_gpus(self) -> bool:
        """Whether an engine sits on a policy rank's GPU."""
        return any(seat.gpus and self.beside_rank(seat) for seat in self.engines)

    def actors(self, bundle: int) -> list[str]:
        """Who sits there."""
        return [seat.name for seat in self.seats if seat.bundle == bundle]

    @property
    def cpus(self) -> int:
        """Logical CPUs that the run reserves."""
        return sum(seat.cpus for seat in self.seats)

    @property
    def gpus(self) -> float:
        """GPUs that the run reserves."""
        return sum(seat.gpus for seat in self.seats)


def on_gpu(config: RunConfig) -> bool:
    """Policy and engines run on the same kind of device: on GPUs where a policy rank reserves any."""
    return config.policy.gpus_per_rank > 0


def plan(config: RunConfig, *, policy: bool = True) -> Plan:
    """Seats for every policy rank and engine; without `policy`, for the engines alone.

    Each actor has a bundle of its own, except that critic rank i joins policy rank i where both fit on its GPU (on CPUs
    always), and that with `ray.placement=colocate` engine i joins too and takes what is left of that GPU.

    Raises:
        ConfigError: ranks and engines cannot share GPUs as the config says.
    """
    ranks = config.policy.ranks if policy else 0
    engines, width = config.rollout.num_engines, config.rollout.tensor_parallel_size
    share = config.policy.gpus_per_rank
    critics = ranks if config.algorithm.name == "ppo" else 0
    own = config.ppo.critic_gpus_per_rank
    own = share if own is None else own
    together = share + own <= 1
    taken = share + own * bool(critics) * together  # of the first rank's GPU
    colocated = policy and config.ray.placement == "colocate"
    if policy and on_gpu(config):
        _check_sharing(colocated, taken, width)
    if not on_gpu(config) and width > 1:
        raise ConfigError(
            f"`rollout.tensor_parallel_size` = {width} needs GPUs (policy.gpus_per_rank > 0); set it to 1"
        )
    cpus, labels = config.policy.cpus_per_rank, config.ray.policy_labels
    seated = tuple(Seat(f"policy rank {i}", i, cpus, share, labels) for i in range(ranks))
    beside = tuple(Seat(f"critic rank {i}", i if together else ranks + i, cpus, own, labels) for i in range(critics))
    before = ranks if together else ranks + critics
    shared = min(ranks, engines) if colocated else 0
    seats = []
    for i in range(engines):
        gpus = 0.0 if not on_gpu(config) else 1 - taken if i < shared else float(width)
        bundle = i if i < shared else before + i - shared
        seats.append(Seat(f"engine {i}", bundle, 1, gpus, config.ray.rollout_labels))
    return Plan(seated, tuple(seats), beside)


def _check_sharing(colocated: bool, taken: float, width: int) -> None:
    """`taken` is what the first rank, and a critic beside it, take of a GPU; `width` the GPUs of an engine."""
    if colocated and width > 1:
        raise ConfigError(
            f"`ray.placement` = 'colocate' shares a GPU with an engine, which needs rollout.tensor_parallel_size=1 and "
            f"has {width}; set it to 1, or ray.placement to separate"
        )
    if colocated and taken >= 1:
        raise ConfigError(
            "`ray.placement` = 'colocate' leaves an engine nothing of a GPU whose rank (and critic) reserve all of it; "
            "lower policy.gpus_per_rank, to 0.5 for example"
        )
    if not colocated and taken < 1:
        raise ConfigError(
            f"the policy's ranks reserve {taken:g} of a GPU each (policy.gpus_per_rank), and with "
            "ray.placement=separate nobody has the rest; set it to 1, or ray.placement to colocate"
        )


def describe(plan: Plan) -> list[str]:
    """A line for each bundle, for `--dry-run`."""
    lines = [f"placement: {len(plan.bundles)} bundles, {plan.cpus} CPUs, {plan.gpus:g} GPUs"]
    for index in range(len(plan.bundles)):
        seats = [seat for seat in plan.seats if seat.bundle == index]
        lines.append(f"  bundle {index}: " + " + ".join(_describe_seat(seat) for seat in seats))
    return lines


def _describe_seat(seat: Seat) -> str:
    gpus = f", {seat.gpus:g} GPU" if seat.gpus else ""
    return f"{seat.name} ({seat.cpus} CPU{gpus})"
