"""New weights straight from GPU to GPU, by vLLM's own weight-transfer interface.

An engine that shares a policy rank's GPU reads the weights where they lie (CUDA IPC); the others get them broadcast
from rank 0 (NCCL). On CPUs weights go by Ray's object store instead (`RolloutPool.load_weights`).
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any, Literal, NamedTuple, Protocol

import ray

from rlattn.config import RunConfig
from rlattn.rollout.cluster import ActorLost, outcome
from rlattn.rollout.fleet import Audience, Member
from rlattn.rollout.placement import Plan, Seat, on_gpu

BROKEN_S = 10.0  # how long those left of a broken broadcast may take to show that they are alive
Backend = Literal["ipc", "nccl"]
"""vLLM's `weight_transfer_config.backend`."""


class Bucket(NamedTuple):
    """Some of the policy's weights, as an engine is told of them.

    Attributes:
        names: Hugging Face names.
        dtypes: such as "bfloat16".
        shapes: of the full, unsharded tensors.
        size: their bytes.
        handles: by the rank's GPU's uuid, arguments of torch's `rebuild_cuda_tensor`; of each weight, where ranks share
            their GPUs with engines.
        checksums: by name, where `rollout.check_weights` asks for them.
    """

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    size: int
    handles: list[dict[str, tuple[Any, ...]]]
    checksums: dict[str, str] | None


class Source(Protocol):
    """Who has the weights: the policy."""

    def next_weights(self, *, first: bool, again: bool = False) -> Bucket | None:
        """The next bucket, or the `first` one; None after the last. It is whole until the next is asked for.

        `again` are those of the last transfer, where the source keeps them: with `rollout.steps_ahead`.
        """

    def meet(self, world_size: int) -> tuple[str, int, ray.ObjectRef]:
        """Have rank 0 wait for `world_size` - 1 others; returns the host and port where, and when it is done."""

    def broadcast(self, receivers: list[ray.ObjectRef], timeout_s: float) -> bool:
        """Send the bucket to those met; False, and nothing is left of the group, if a receiver failed or is late."""


def direct(config: RunConfig) -> bool:
    """Whether weights go straight from GPU to GPU.

    Not with `steps_ahead` where engines share GPUs: the policy learns while they sample, so it could not give one that
    is rebuilt the same weights again. Where they are sent weights, rank 0 keeps these in its node's memory.
    """
    rollout = config.rollout
    shares = config.ray.placement == "colocate"
    wanted = rollout.weight_transfer == "auto" and not (rollout.steps_ahead and shares)
    return on_gpu(config) and wanted and not config.policy.sends_adapters


def backend(config: RunConfig, plan: Plan, seat: Seat) -> Backend | None:
    """How the engine in this seat is given weights; None if by the object store."""
    if not direct(config) or not plan.policy:
        return None
    return "ipc" if plan.beside_rank(seat) else "nccl"


class Broadcasts:
    """The engines that weights are broadcast to, as a group that is formed anew whenever one of them is another."""

    def __init__(self, source: Source, names: Collection[str], width: int) -> None:
        """`names` are the seats of the engines concerned, `width` the GPUs of each."""
        self.source, self._names, self._width = source, names, width
        self._met: list[Any] = []  # their actors

    def concerned(self, audience: Audience) -> list[Member]:
        """Those of the audience that are in the group, or should be."""
        return [member for member in audience.members() if member.seat.name in self._names]

    def form(self, audience: Audience, phase: str, left_s: float) -> None:
        """Make sure that the engines concerned are the group."""
        members = self.concerned(audience)
        actors = [member.actor for member in members]
        if not actors or actors == self._met:
            return
        self._met = []
        world = 1 + self._width * len(members)
        host, port, met = self.source.meet(world)
        calls = [
            (member, member.actor.meet.remote(host, port, 1 + self._width * place, world))
            for place, member in enumerate(members)
        ]
        answers = audience.wait(f"{phase} (meeting)", left_s, calls)
        if len(answers) < len(calls):
            raise ActorLost(f"{phase}: an engine was lost while rank 0 of the policy waited for it to join a broadcast")
        outcome(met, "policy rank 0", f"{phase} (meeting)", left_s)
        self._met = actors

    def send(self, audience: Audience, phase: str, left_s: float, calls: list[tuple[Member, ray.ObjectRef]]) -> None:
        """Broadcast a bucket to those of `calls`, who expect it; if one is lost, all are."""
        receivers = {member.seat.name: ref for member, ref in calls if member.seat.name in self._names}
        if receivers and not self.source.broadcast(list(receivers.values()), left_s):
            self._met = []
            late = ray.wait(list(receivers.values()), num_returns=len(receivers), timeout=BROKEN_S)[1]
            for member, ref in calls:
                if ref in late:
                    audience.lose(member, ActorLost(f"{phase}: {member.seat.name} waits for a broken broadcast"))


def send(
    broadcasts: Broadcasts, audience: Audience, phase: str, timeout_s: float, version: int, *, again: bool = False
) -> int:
    """Give an audience the weights that the source has now, or had at the last transfer; returns their bytes, over all
    of it.

    Raises:
        ActorError: an engine failed, or has been lost too often; or a policy rank did.
    """
    # The policy may be at work, which has a time-out of its own, so this is not counted.
    bucket = broadcasts.source.next_weights(first=True, again=again)
    deadline = time.monotonic() + timeout_s

    def left() -> float:
        return max(0.0, deadline - time.monotonic())

    audience.tell(f"{phase} (begin)", left(), lambda engine: engine.begin_weights.remote())
    sent = index = 0
    while bucket is not None:
        part = f"{phase} (bucket {index})"
        broadcasts.form(audience, part, left())  # anew if one was lost since the last
        calls = [(member, member.actor.load_shared.remote(bucket)) for member in audience.members()]
        broadcasts.send(audience, part, left(), calls)
        alive = {member.seat.name for member in audience.members()}
        sent += sum(audience.wait(part, left(), [call for call in calls if call[0].seat.name in alive]))
        bucket, index = broadcasts.source.next_weights(first=False, again=again), index + 1
    audience.tell(f"{phase} (finish)", left(), lambda engine: engine.finish_weights.remote(version))
    return sent
