"""Engines that outlive their actors: requests go to the engine with least to do, a lost engine is rebuilt, and what it
had not finished is dealt out again.

Every request has a number and is answered once: what a lost engine had finished but not told is sampled again, from the
same seed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Protocol, TypeVar

import ray

from rlattn import trace
from rlattn.config import RolloutConfig
from rlattn.rollout.cluster import FETCH_S, ActorError, ActorLost, collect, outcome, remember, whereabouts
from rlattn.rollout.engine import HEARTBEAT_S, Activity, Completion, EngineInfo, Progress, Request
from rlattn.rollout.placement import Seat

T = TypeVar("T")
Unit = Sequence[tuple[int, Request]]
"""Numbered requests that stay together: a problem's, so that its prompt is in one engine's prefix cache."""
LONGEST_BACKOFF_S = 30.0
FEEDING_S = 0.25  # how often an engine with room is given more, while there is more


@dataclass
class Member:
    """One engine's place in the fleet, whoever fills it.

    Attributes:
        actor: None once it was lost, until it is started again.
        info: of the actor, once it is loaded.
        units: given to it and not all finished.
        unsent: those of them that it has not been told of yet.
        call: what it is doing now.
        due: when that must be answered, by `time.monotonic`.
        began: when that began, by `time.perf_counter`.
        tokens, busy_s: sampled in the last batch, and how long that took.
        activity: what it said last of that batch.
        losses: in a row, without a batch finished in between.
        again: earliest time to start it again.
    """

    seat: Seat
    actor: Any = None
    info: EngineInfo | None = None
    units: list[dict[int, Request]] = field(default_factory=list)
    unsent: list[tuple[int, Request]] = field(default_factory=list)
    call: ray.ObjectRef | None = None
    due: float = 0.0
    began: float = 0.0
    tokens: int = 0
    busy_s: float = 0.0
    activity: Activity = field(default_factory=Activity)
    losses: int = 0
    again: float = 0.0

    @property
    def load(self) -> int:
        """Requests given to it and not finished."""
        return sum(map(len, self.units))


class Audience(Protocol):
    """Engines that are told the same, and waited for: all that are loaded, or one that has just been rebuilt."""

    def members(self) -> list[Member]:
        """Those not lost so far."""

    def wait(self, phase: str, timeout_s: float, calls: Sequence[tuple[Member, ray.ObjectRef]]) -> list[Any]:
        """Their answers; one that is lost gives none."""

    def tell(self, phase: str, timeout_s: float, call: Callable[[Any], ray.ObjectRef]) -> list[Any]:
        """The answers of all to the same call."""
        return self.wait(phase, timeout_s, [(member, call(member.actor)) for member in self.members()])

    def lose(self, member: Member, error: ActorLost) -> None:
        """Give one up that does not answer."""


class Everyone(Audience):
    """All engines that are loaded. One that is lost on the way gives no answer, and is rebuilt later.

    Raises:
        ActorError: from `wait` and `lose`: one failed, or has been lost too often.
    """

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet

    def members(self) -> list[Member]:
        """The loaded ones."""
        return [member for member in self.fleet.members if member.info]

    def wait(self, phase: str, timeout_s: float, calls: Sequence[tuple[Member, ray.ObjectRef]]) -> list[Any]:
        """Their answers; who gives none is lost."""
        self.fleet.check_open(phase)
        return self.fleet.each(phase, timeout_s, calls, all_needed=False)

    def lose(self, member: Member, error: ActorLost) -> None:
        """Have it rebuilt later."""
        self.fleet.lose(member, error)


class OnlyOne(Audience):
    """One engine, before it is the fleet's again; its errors are the caller's."""

    def __init__(self, member: Member) -> None:
        self.member = member

    def members(self) -> list[Member]:
        """That one."""
        return [self.member]

    def wait(self, phase: str, timeout_s: float, calls: Sequence[tuple[Member, ray.ObjectRef]]) -> list[Any]:
        """Its answer, or ActorLost or ActorError."""
        return [outcome(ref, member.seat.name, phase, timeout_s, timeout_s) for member, ref in calls]

    def lose(self, member: Member, error: ActorLost) -> None:
        """Tell the caller."""
        raise error


class Fleet:
    """The engines of a pool.

    Attributes:
        members: one a seat.
        lost: how often one was lost.
        watch: is told how far a batch is, whenever an engine says something.
        supply: gives a rebuilt member the weights that the others have; None where those on disk are still right.
    """

    def __init__(
        self, config: RolloutConfig, seats: Sequence[Seat], make: Callable[[Seat], Any], note: Callable[[str], None]
    ) -> None:
        """`make` starts a seat's actor, `note` tells the user of losses."""
        self.config, self._make, self._note = config, make, note
        self.members = [Member(seat) for seat in seats]
        self.watch: Callable[[str], None] = lambda text: None
        self.supply: Callable[[Member], object] | None = None
        self.lost = 0
        self._batch = 0

    def start(self, ready: Callable[[], object] = lambda: None) -> None:
        """Start every engine's process, have it load once `ready` returns, and wait until all are loaded.

        Raises:
            ActorError: one failed, died, or was not loaded in time; none is tried again.
        """
        for member in self.members:
            member.actor = self._make(member.seat)
        ready()
        calls = {member.seat.name: member.actor.load.remote() for member in self.members}
        infos = collect(calls, phase="starting engines", timeout_s=self.config.start_timeout_s)
        for member, info in zip(self.members, infos, strict=True):
            self._loaded(member, info)

    def _loaded(self, member: Member, info: EngineInfo) -> None:
        member.info = info
        remember(member.seat.name, info.place)

    def each(
        self, phase: str, timeout_s: float, calls: Sequence[tuple[Member, ray.ObjectRef]], *, all_needed: bool = True
    ) -> list[Any]:
        """The answers of some members to calls that run side by side.

        Raises:
            ActorLost: one was lost, and `all_needed`.
            ActorError: one failed, or has been lost too often.
        """
        start, deadline = time.perf_counter(), time.monotonic() + timeout_s
        answers = []
        for member, ref in calls:
            try:
                answers.append(outcome(ref, member.seat.name, phase, deadline - time.monotonic(), timeout_s))
                trace.span(member.seat.name, phase, start)
            except ActorLost as error:
                self.lose(member, error)
                if all_needed:
                    raise
        return answers

    def metrics(self) -> dict[str, float]:
        """Of the last batch, and `rollout/engines_lost` so far.

        `perf/tokens_per_second/<engine>` of its sampling, `rollout/prefix_cache_hit_rate` of prompt tokens,
        `rollout/preemptions`, and `rollout/queue_depth`, the most requests that waited in one engine's queue.
        """
        speeds = {
            f"perf/tokens_per_second/{member.seat.name}": member.tokens / member.busy_s
            for member in self.members
            if member.busy_s
        }
        activities = [member.activity for member in self.members]
        return speeds | {
            "rollout/engines_lost": float(self.lost),
            "rollout/prefix_cache_hit_rate": sum(a.cached_tokens for a in activities)
            / max(1, sum(a.prompt_tokens for a in activities)),
            "rollout/preemptions": float(sum(a.preemptions for a in activities)),
            "rollout/queue_depth": float(max(a.most_waiting for a in activities)),
        }

    def run(
        self,
        units: Iterable[Unit],
        *,
        patience_s: float = HEARTBEAT_S,
        longest: Callable[[], int | None] = lambda: None,
        **sampling: Any,
    ) -> Iterator[dict[int, Completion]]:
        """Sample every request; yields completions by their number, those of `patience_s` seconds together.

        What `longest` says is passed to the engines with every call: completions longer than that are given up, see
        `Engine.advance`, and not among those yielded.

        Engines go on while the caller is at work, and drop what they still have of an earlier batch.

        Raises:
            ActorError: an engine failed, was lost more than `rollout.max_restarts` times in a row, or the batch is not
                done within `rollout.generate_timeout_s`.
        """
        self.check_open("generating")
        waiting = deque(dict(unit) for unit in units)
        self._batch += 1
        for member in self.members:
            member.units, member.unsent, member.call = [], [], member.call if member.info is None else None
            member.tokens, member.busy_s, member.activity = 0, 0.0, Activity()
        left = total = self._missing(waiting)
        deadline = time.monotonic() + self.config.generate_timeout_s
        done: dict[int, Completion] = {}
        while left:
            self.check_open("generating")  # another thread may shut it down
            self._deal(waiting)
            asked = sampling | {"longest": longest()}
            for member in self.members:
                self._call(member, asked, min(patience_s, FEEDING_S) if waiting else patience_s)
            if done:
                yield done
                done = {}
            done, unfinished = self._wait(deadline, f"generating: {left} of {total} completions are missing")
            waiting.extendleft(reversed(unfinished))
            left = self._missing(waiting)
            self.watch(f"{total - left} of {total} completions; {self._queues()}")
        yield done
        for member in self.members:
            member.losses = 0

    def insist(self, work: Callable[[], T]) -> T:
        """The result of `work` on the whole fleet: done again whenever an engine is lost, once that one is back.

        Raises:
            ActorError: one was lost too often.
        """
        while True:
            while any(member.info is None for member in self.members):
                for member in self.members:
                    self._call(member, {}, 0.0)
                self._wait(inf, "")
            try:
                result = work()
            except ActorLost:
                continue
            for member in self.members:
                member.losses = 0
            return result

    def shutdown(self) -> None:
        """End every actor; safe to call twice."""
        for member in self.members:
            if member.actor is not None:
                ray.kill(member.actor)
        self.members = []

    def _missing(self, waiting: Iterable[dict[int, Request]]) -> int:
        """Requests that nobody has finished or given up; a pool that is shut down has no say in that."""
        self.check_open("generating")
        return sum(map(len, waiting)) + sum(member.load for member in self.members)

    def _queues(self) -> str:
        shown = [
            f"{m.seat.name} {m.activity.running} running, {m.activity.waiting} waiting" for m in self.members if m.info
        ]
        return "; ".join(shown)

    def check_open(self, phase: str) -> None:
        """Raise ActorError if the pool is shut down."""
        if not self.members:
            raise ActorError(f"{phase}: the pool is shut down")

    def _deal(self, waiting: deque[dict[int, Request]]) -> None:
        """Give units to the loaded engine with least to do, as long as one has room; a lone engine has room for all."""
        alone = len(self.members) == 1
        while waiting:
            room = [m for m in self.members if m.info and (alone or m.load < m.info.max_num_seqs)]
            if not room:
                return
            member = min(room, key=lambda m: m.load)
            unit = waiting.popleft()
            member.units.append(unit)
            member.unsent += unit.items()

    def _call(self, member: Member, sampling: dict[str, Any], patience_s: float) -> None:
        """Have a member that does nothing do what it should: start, or go on sampling."""
        if member.call is not None:
            return
        now, member.began = time.monotonic(), time.perf_counter()
        if member.actor is None and now >= member.again:
            member.actor = self._make(member.seat)
            member.call, member.due = member.actor.load.remote(), now + self.config.start_timeout_s
        elif member.info and member.load:
            new, member.unsent = member.unsent, []
            member.call = member.actor.advance.remote(self._batch, new, patience_s=patience_s, **sampling)
            member.due = now + self.config.silence_timeout_s

    def _wait(self, deadline: float, missing: str) -> tuple[dict[int, Completion], list[dict[int, Request]]]:
        """What the next member has finished, and what one left unfinished that was lost; often nothing."""
        found = self._next(deadline, missing)
        if found is None:
            return {}, []
        member, answer = found
        try:
            return self._answered(member, answer), []
        except ActorLost as error:
            return {}, self.lose(member, error)

    def _next(self, deadline: float, missing: str) -> tuple[Member, Any] | None:
        """Who answers next (it, the call) or is overdue (it, an ActorLost); None where one may be started again."""
        calls = {member.call: member for member in self.members if member.call is not None}
        times = [member.due for member in calls.values()]
        times += [member.again for member in self.members if member.actor is None]
        wait = min([deadline, *times]) - time.monotonic()
        if calls:
            ready: list[Any] = ray.wait(list(calls), num_returns=1, timeout=max(0.0, wait))[0]
            if ready:
                return calls[ready[0]], ready[0]
        else:
            time.sleep(max(0.0, wait))
        now = time.monotonic()
        for member in calls.values():
            if now >= member.due:
                limit = self.config.silence_timeout_s if member.info else self.config.start_timeout_s
                phase = "generating" if member.info else "starting engines"
                silent = f"{phase}: no answer from {member.seat.name} within {limit:g} s"
                return member, ActorLost(silent + whereabouts(member.seat.name))
        if now >= deadline:
            raise ActorError(f"{missing} after {self.config.generate_timeout_s:g} s")
        return None

    def _answered(self, member: Member, answer: Any) -> dict[int, Completion]:
        """What a member just finished: completions, or being loaded, which gives none."""
        if isinstance(answer, ActorLost):
            raise answer
        member.call = None
        if member.info is None:
            try:
                info = outcome(answer, member.seat.name, "starting engines", FETCH_S)
            except ActorError as error:  # what stood in the way, such as memory not yet free, may be gone next time
                raise ActorLost(str(error)) from None
            if self.supply:
                self.supply(member)
            self._loaded(member, info)
            trace.span(member.seat.name, "starting", member.began)
            self._note(f"{member.seat.name} is back")
            return {}
        progress: Progress = outcome(answer, member.seat.name, "generating", FETCH_S)
        done, cut, member.activity = progress
        trace.span(member.seat.name, "sampling", member.began)
        member.busy_s += time.perf_counter() - member.began
        member.tokens += sum(len(completion.token_ids) for completion in done.values())
        for unit in member.units:
            for number in unit.keys() & {*done, *cut}:
                del unit[number]
        member.units = [unit for unit in member.units if unit]
        return done

    def lose(self, member: Member, error: ActorLost) -> list[dict[int, Request]]:
        """Give a member up, to be started again after a while; returns what it had not finished."""
        ray.kill(member.actor)
        unfinished = member.units
        member.actor, member.info, member.call, member.units, member.unsent = None, None, None, [], []
        member.losses += 1
        self.lost += 1
        if member.losses > self.config.max_restarts:
            raise ActorError(f"lost {member.losses} times in a row (rollout.max_restarts): {error}") from None
        delay = 0.0 if member.losses == 1 else min(2.0**member.losses, LONGEST_BACKOFF_S)
        member.again = time.monotonic() + delay
        first = str(error).splitlines()[0].rstrip(":")
        self._note(f"{first}; it is rebuilt, its {sum(map(len, unfinished))} unfinished requests are dealt out again")
        return unfinished
