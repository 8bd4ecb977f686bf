"""What a run is doing right now: a small file that its driver keeps, and `rlattn status`, which reads it."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rlattn.console import seconds, step_line
from rlattn.tracking import TrackingError, read_metrics, write_atomically

STATUS = "status.json"
DONE, STOPPED = "done", "stopped"


@dataclass(frozen=True)
class Status:
    """What a driver said last.

    Attributes:
        step: that is being made, from 1.
        steps: of the run.
        phase: of the step, see `rlattn.console.PHASES`; `done` after the last, `stopped` where one was asked to be it.
        since: when it began, seconds since the epoch.
        pid: of the driver.
        host: of the driver.
        detail: how far that phase is, where it tells.
    """

    step: int
    steps: int
    phase: str
    since: float
    pid: int
    host: str
    detail: str = ""


class StatusFile:
    """What a driver keeps for readers, who never see half of it. A courtesy: of a full disk others will complain."""

    def __init__(self, run_dir: Path, steps: int) -> None:
        self._path, self._steps = run_dir / STATUS, steps
        self._status: Status | None = None

    def phase(self, step: int, phase: str) -> None:
        """Say what begins now."""
        self._write(Status(step, self._steps, phase, time.time(), os.getpid(), socket.gethostname()))

    def detail(self, text: str) -> None:
        """Say how far it is."""
        if self._status:
            self._write(replace(self._status, detail=text))

    def _write(self, status: Status) -> None:
        self._status = status
        with suppress(TrackingError):
            write_atomically(self._path, json.dumps(asdict(status)).encode(), durable=False)


def read_status(run_dir: Path) -> Status | None:
    """None where the run never wrote one."""
    path = run_dir / STATUS
    return Status(**json.loads(path.read_text())) if path.is_file() else None


def alive(status: Status) -> bool | None:
    """Whether the driver still runs; None where it is on another host."""
    if status.host != socket.gethostname():
        return None
    try:
        os.kill(status.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def describe(run_dir: Path) -> list[str]:
    """Lines about the run in a folder: what it does, its last step, its engines, its newest checkpoint."""
    status, lines = read_status(run_dir), read_metrics(run_dir)
    shown = [_doing(status)]
    done = [line for line in lines if "timing_s/step" in line]
    if done:
        last = done[-1]
        shown.append("last step  " + step_line(last["step"], status.steps if status else last["step"], last))
        engines = {k.rpartition("/")[2]: v for k, v in last.items() if k.startswith("perf/tokens_per_second/")}
        if engines:
            speeds = ", ".join(f"{name} {speed:,.0f} tok/s" for name, speed in engines.items())
            shown.append(f"sampled    {speeds}; {last['rollout/engines_lost']:.0f} lost so far")
    accuracy = [(line["step"], line["eval/accuracy"]) for line in lines if "eval/accuracy" in line]
    if accuracy:
        shown.append("accuracy   " + ", ".join(f"{value:.1%} at step {step}" for step, value in accuracy[-4:]))
    saved = sorted(run_dir.glob("checkpoints/step-*/manifest.json"), key=lambda path: path.stat().st_mtime)
    if saved:
        age = seconds(time.time() - saved[-1].stat().st_mtime)
        shown.append(f"checkpoint {saved[-1].parent.name}, {age} ago")
    return shown


def _doing(status: Status | None) -> str:
    if status is None:
        return "the run has not begun a step yet"
    if status.phase == DONE:
        return f"done: all {status.steps} steps"
    if status.phase == STOPPED:
        return f"stopped after step {status.step} of {status.steps}, as asked; --resume goes on from there"
    place = f"step {status.step} of {status.steps}, {status.phase}"
    where = f"{place} for {seconds(time.time() - status.since)}"
    driver = f"driver {status.pid} on {status.host}"
    match alive(status):
        case True:
            detail = f": {status.detail}" if status.detail else ""
            return f"running: {where} ({driver}){detail}"
        case False:
            return f"not running: ended at {place}; --resume goes on from the checkpoint"
        case _:
            return f"{where} ({driver}, which cannot be asked from here)"
