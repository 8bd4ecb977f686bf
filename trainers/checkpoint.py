"""Checkpoints: whole or absent. A folder is written under a temporary name and renamed when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rlattn.config import ConfigError
from rlattn.rollout.cluster import ActorError, ActorLost
from rlattn.trainers.copies import Copies
from rlattn.trainers.manifest import damage, write_manifest


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; what was there before is untouched."""


class Best(NamedTuple):
    """Which checkpoint is the best so far, and by what."""

    step: int
    metric: str
    value: float


class Checkpoints:
    """`step-N` folders under `root`, the newest `limit` of them kept, and beyond it the best one.

    A checkpoint holds `optimizer/` (DeepSpeed's state), `model/` (a Hugging Face folder, ready for export), `rng/`
    (every process's generators), `state.json` (the driver's state) and `manifest.json` (checksums of all these).
    """

    def __init__(self, root: Path, limit: int, copies: Copies | None = None) -> None:
        """`copies` keeps copies of them elsewhere."""
        self.root, self.limit, self.copies = root, limit, copies

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        found = self._all()
        return found[-1] if found else None

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        """Optimizer version of a checkpoint's weights: the number in its name."""
        return int(checkpoint.name.removeprefix("step-"))

    def at(self, step: int) -> Path:
        """The checkpoint of a step.

        Raises:
            ConfigError: there is none.
        """
        found = {self.step_of(path): path for path in self._all()}
        if step not in found:
            raise ConfigError(f"{self.root} has no step-{step}; there are: {', '.join(map(str, found)) or 'none'}")
        return found[step]

    def verified(self, checkpoint: Path, option: str) -> Path:
        """`checkpoint`, once every file of it is as it was written.

        Raises:
            CheckpointError: one is not; offers the newest intact checkpoint before it, which `option` asks for.
        """
        wrong = damage(checkpoint)
        if not wrong:
            return checkpoint
        older = [path for path in self._all() if self.step_of(path) < self.step_of(checkpoint)]
        intact = next((self.step_of(path) for path in reversed(older) if not damage(path)), None)
        offer = "no older one is intact" if intact is None else f"step-{intact} is intact: give {option} {intact}"
        raise CheckpointError(f"{checkpoint} is damaged: {wrong}; {offer}")

    @staticmethod
    def state(checkpoint: Path) -> dict[str, Any]:
        """The driver's state in a checkpoint."""
        try:
            return json.loads((checkpoint / "state.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint} is damaged ({error}); delete it and resume from an older one"
            ) from None

    def best(self) -> Best | None:
        """The best checkpoint so far, as the newest one remembers it; None where no evaluation chose one."""
        newest = self.latest()
        kept = self.state(newest).get("best") if newest else None
        return Best(**kept) if kept and (self.root / f"step-{kept['step']}").is_dir() else None

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None], best: Best | None = None) -> Path:
        """Write checkpoint `step` through `write(folder)`, then drop those beyond the limit but the best.

        `best` says that it is this one; None keeps the best so far.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written; nothing is left of the attempt.
        """
        best = best or self.best()
        final, temporary = self.root / f"step-{step}", self.root / f".writing-step-{step}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            chosen = {"best": best._asdict()} if best else {}
            (temporary / "state.json").write_text(json.dumps(state | {"step": step} | chosen))
            write_manifest(temporary)
            _sync(temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
        except ActorLost:  # no fault of the disk: who runs the policy may start it again
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        except (OSError, ActorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            last = self.latest()
            kept = f"{last.name} is intact" if last else "no earlier checkpoint exists"
            cause = str(error).strip().splitlines()[-1].strip()
            raise CheckpointError(
                f"checkpoint step-{step} was not written to {self.root}: {cause}. {kept}; "
                "free some space and continue with --resume"
            ) from None
        for old in self._all()[: -self.limit]:
            if best is None or self.step_of(old) != best.step:
                shutil.rmtree(old)
        if self.copies:
            self.copies.begin(final, [self.step_of(kept) for kept in self._all()])
        return final

    def drop_after(self, step: int) -> None:
        """Forget what a run that goes on from `step` will write again."""
        for newer in self._all():
            if self.step_of(newer) > step:
                shutil.rmtree(newer)

    def _all(self) -> list[Path]:
        folders = [p for p in self.root.glob("step-*") if (p / "state.json").is_file()]
        return sorted(folders, key=self.step_of)


def _sync(folder: Path) -> None:
    """Force the files to disk before the rename, so that a power cut cannot leave a named but empty checkpoint."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def newest(run: Path, purpose: str, *, step: int | None = None, best: bool = False) -> Path:
    """A verified checkpoint of the run in a folder, for somebody who wants to `purpose` it: the newest, that of a
    `step`, or the `best`.

    Raises:
        ConfigError: the run has no such checkpoint.
        CheckpointError: it is damaged.
    """
    checkpoints = Checkpoints(run / "checkpoints", 1)
    if best:
        chosen = checkpoints.best()
        if chosen is None:
            raise ConfigError(f"{run} has no best checkpoint; it is chosen by trainer.best_metric")
        step = chosen.step
    checkpoint = checkpoints.latest() if step is None else checkpoints.at(step)
    if checkpoint is None:
        raise ConfigError(f"{run} has no complete checkpoint to {purpose}")
    return checkpoints.verified(checkpoint, "--step")
