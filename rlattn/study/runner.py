"""Running what is missing of a grid: so many at a time, each failure contained, one line of progress."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlattn.console import Console, seconds
from rlattn.study.config import Run
from rlattn.study.progress import step_of

POLL_S = 1.0
TAIL_LINES = 15  # of a failed run's log that are shown


@dataclass(frozen=True)
class Ended:
    """How a run ended: why, and where its log is with its last lines."""

    reason: str
    log: str
    tail: list[str]


class Launcher(Protocol):
    """Starts runs and says how they end."""

    at_once: int
    """Most runs at a time."""

    def start(self, run: Run) -> None:
        """Start a run, or go on with it."""

    def poll(self, run: Run) -> Ended | None:
        """How a run ended, or None while it runs."""

    def stop(self, run: Run) -> None:
        """End a run."""

    def leave(self) -> str:
        """This process is interrupted; says what becomes of its runs."""


def execute(
    runs: Sequence[Run], finished: int, launcher: Launcher, stall_timeout_s: float, console: Console
) -> dict[str, Ended]:
    """Run `runs`, which a study of `finished` further ones misses; returns how those ended that failed, by name.

    A run has ended well when it has logged its last step, whatever its exit code.
    """
    clock = _Clock(runs, finished)
    waiting, active, failed = list(runs), dict[str, _Watch](), dict[str, Ended]()
    bar = console.progress.add_task("study", total=None)
    try:
        while waiting or active:
            while waiting and len(active) < launcher.at_once:
                run = waiting.pop(0)
                launcher.start(run)
                active[run.name] = _Watch(run)
                console.note(f"{clock.place(run)} {run.name}: {'going on' if step_of(run) else 'started'}")
            time.sleep(POLL_S)
            for name, watch in list(active.items()):
                ended = launcher.poll(watch.run)
                clock.steps[name] = watch.look() or 0
                if not ended and watch.idle() > stall_timeout_s:
                    launcher.stop(watch.run)
                    late = launcher.poll(watch.run)
                    reason = f"no step for launch.stall_timeout_s = {stall_timeout_s:g} s, so it was stopped"
                    ended = Ended(reason, late.log if late else "", late.tail if late else [])
                if not ended:
                    continue
                del active[name]
                if watch.step == watch.run.config.trainer.steps:
                    console.note(f"{clock.place(watch.run)} {name}: finished, {seconds(watch.age())}")
                else:
                    failed[name] = ended
                    clock.give_up(watch.run)
                    console.note(f"{clock.place(watch.run)} {name}: FAILED, {ended.reason}; the end of {ended.log}:")
                    console.note("\n".join(f"    {line}" for line in ended.tail))
            console.progress.update(bar, description=clock.line(active.values()))
    except BaseException:
        console.note(launcher.leave())
        raise
    finally:
        console.progress.remove_task(bar)
    return failed


class _Watch:
    """A started run: its last step, and since when there is no further one."""

    def __init__(self, run: Run) -> None:
        self.run, self.step = run, step_of(run)
        self._began = self._moved = time.monotonic()

    def look(self) -> int | None:
        step = step_of(self.run)
        if step != self.step:
            self.step, self._moved = step, time.monotonic()
        return self.step

    def idle(self) -> float:
        return time.monotonic() - self._moved

    def age(self) -> float:
        return time.monotonic() - self._began


class _Clock:
    """The progress line, and the time left: steps still missing at the pace of this call's."""

    def __init__(self, runs: Sequence[Run], finished: int) -> None:
        self._places = {run.name: finished + i for i, run in enumerate(runs, 1)}
        self._count = finished + len(runs)
        self._totals = {run.name: run.config.trainer.steps for run in runs}
        self._first = {run.name: step_of(run) or 0 for run in runs}
        self.steps = dict(self._first)
        self._start = time.monotonic()

    def place(self, run: Run) -> str:
        return f"[{self._places[run.name]}/{self._count}]"

    def give_up(self, run: Run) -> None:
        self._totals[run.name] = self.steps[run.name]

    def left(self) -> str:
        done = sum(self.steps.values()) - sum(self._first.values())
        missing = sum(self._totals.values()) - sum(self.steps.values())
        return f"time left {seconds((time.monotonic() - self._start) / done * missing)}" if done > 0 else "time left ?"

    def line(self, active: Iterable[_Watch]) -> str:
        shown = [f"{self.place(w.run)} {w.run.name}: step {w.step or 0}/{w.run.config.trainer.steps}" for w in active]
        return "  ".join([*shown, self.left()])
