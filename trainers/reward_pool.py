"""Reward functions in Ray processes that can be ended: a bound on the time of each call.

A call has one prompt's completions. Where it fails, each of them is asked again alone, so that one bad completion costs
no other its reward; what fails twice gets the function's default and is counted.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from dataclasses import dataclass
from math import isfinite
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError, RayError, RayTaskError
from torch import Tensor

from rlattn.config import RewardsConfig
from rlattn.reward_functions import RewardError, RewardFunction, call, load_function
from rlattn.rollout.cluster import ActorError, collect
from rlattn.types import Rollouts

START_S = 300.0  # for a process to start and import the functions
REPLACE_S, AGAIN_S = 60.0, 2.0  # how long one that dies as it starts is tried again, and how often


class RewardWorker:
    """Calls reward functions, in a process of its own."""

    def __init__(self, config: RewardsConfig) -> None:
        self.config = config
        self.functions: list[RewardFunction] = []

    def load(self) -> None:
        """Import the functions."""
        self.functions = [load_function(function) for function in self.config.functions]

    def call(self, index: int, columns: dict[str, list[Any]]) -> list[float | None]:
        """Values of one function on some completions."""
        config = self.config.functions[index]
        return call(self.functions[index], config.label, columns, config.options)


@dataclass(frozen=True)
class Call:
    """One function on some sequences of the batch."""

    function: int
    sequences: list[int]


class RewardPool:
    """`rewards.workers` processes; none without `rewards.functions`. Ray must be running.

    They reserve no CPUs: the engines wait while rewards are computed.
    """

    def __init__(self, config: RewardsConfig) -> None:
        self.config = config
        self.workers: list[Any] = []
        if config.functions:
            self.workers = [self._start() for _ in range(config.workers)]
            loads = {f"reward worker {i}": worker.load.remote() for i, worker in enumerate(self.workers)}
            collect(loads, phase="importing reward functions", timeout_s=START_S)

    def score(self, rollouts: Rollouts) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The weighted parts of the reward, name -> [B] fp32, and `rewards/<name>/failures`.

        A value of None counts as 0.

        Raises:
            RewardError: a function gave another number of values than it was asked for.
            ActorError: a process could not be started again.
        """
        values: dict[int, dict[int, float]] = {index: {} for index in range(len(self.config.functions))}
        failures: Counter[int] = Counter()
        waiting = deque(
            Call(index, sequences) for index in range(len(self.config.functions)) for sequences in _groups(rollouts)
        )
        idle = list(self.workers)
        running: dict[ray.ObjectRef, tuple[Any, Call, float]] = {}
        while waiting or running:
            while waiting and idle:
                worker, job = idle.pop(), waiting.popleft()
                deadline = time.monotonic() + self.config.functions[job.function].timeout_s
                reference = worker.call.remote(job.function, _columns(rollouts, job.sequences))
                running[reference] = worker, job, deadline
            first = min(deadline for *_, deadline in running.values())
            ready, _ = ray.wait(list(running), num_returns=1, timeout=max(0.0, first - time.monotonic()))
            done = ready or [ref for ref, (*_, deadline) in running.items() if deadline <= time.monotonic()]
            for reference in done:
                worker, job, _ = running.pop(reference)
                answer = self._answer(reference) if ready else None
                alive = answer is not None or (bool(ready) and self._alive(worker))
                idle.append(worker if alive else self._replace(worker))
                known = {b: v for b, v in zip(job.sequences, answer or [], strict=False) if v is None or isfinite(v)}
                values[job.function] |= {b: 0.0 if v is None else v for b, v in known.items()}
                failed = [b for b in job.sequences if b not in known]
                if len(job.sequences) > 1 and not known:
                    waiting.extend(Call(job.function, [b]) for b in failed)
                    continue
                failures[job.function] += len(failed)
                values[job.function] |= dict.fromkeys(failed, self.config.functions[job.function].default)
        parts, metrics = {}, {}
        for index, function in enumerate(self.config.functions):
            own = torch.tensor([values[index][b] for b in range(len(rollouts))], dtype=torch.float32)
            parts[function.label] = function.weight * own
            metrics[f"rewards/{function.label}/failures"] = float(failures[index])
        return parts, metrics

    def _answer(self, reference: ray.ObjectRef) -> list[float | None] | None:
        """What a finished call says; None where the function raised or its process died."""
        try:
            return ray.get(reference, timeout=60)
        except RayTaskError as error:
            if isinstance(error.cause, RewardError):
                raise error.cause from None
            return None
        except RayError:
            return None

    @staticmethod
    def _alive(worker: Any) -> bool:
        try:
            ray.get(worker.__ray_ready__.remote(), timeout=10)
        except (RayActorError, RayError):
            return False
        return True

    def _replace(self, worker: Any) -> Any:
        place, deadline = self.workers.index(worker), time.monotonic() + REPLACE_S
        while True:
            ray.kill(self.workers[place])
            fresh = self.workers[place] = self._start()
            try:
                ray.get(fresh.load.remote(), timeout=START_S)
                return fresh
            except RayError as error:
                # A node that is lost takes workers for a while before Ray knows of it.
                if not isinstance(error, RayActorError) or time.monotonic() > deadline:
                    raise ActorError(f"a reward worker could not be started again: {error}") from None
            time.sleep(AGAIN_S)

    def _start(self) -> Any:
        threads = {"OMP_NUM_THREADS": "1"}
        actor = ray.remote(RewardWorker).options(num_cpus=0, runtime_env={"env_vars": threads})
        return actor.remote(self.config)


def _groups(rollouts: Rollouts) -> list[list[int]]:
    """The sequences of each prompt."""
    groups: dict[int, list[int]] = {}
    for sequence, group in enumerate(rollouts.group_ids.tolist()):
        groups.setdefault(group, []).append(sequence)
    return list(groups.values())


def _columns(rollouts: Rollouts, sequences: list[int]) -> dict[str, list[Any]]:
    """TRL's keyword arguments: prompts, completions, their tokens, the answer and the columns of the data."""
    problems = [rollouts.problems[b] for b in sequences]
    starts, ends = rollouts.cu_seqlens[:-1] + rollouts.prompt_lengths, rollouts.cu_seqlens[1:]
    names = dict.fromkeys(name for problem in problems for name in problem.columns)
    return {name: [problem.columns.get(name) for problem in problems] for name in names} | {
        "prompts": [problem.prompt for problem in problems],
        "completions": [rollouts.texts[b] for b in sequences],
        "completion_ids": [rollouts.token_ids[starts[b] : ends[b]].tolist() for b in sequences],
        "answer": [problem.answer for problem in problems],
    }
