"""Checkpoints: whole or absent. A folder is written under a temporary name and renamed when it is complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlattn.config import ConfigError
from rlattn.rollout.cluster import ActorError


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; what was there before is untouched."""


class Checkpoints:
    """`step-N` folders under `root`, the newest `limit` of them kept.

    A checkpoint holds `optimizer/` (DeepSpeed's state), `model/` (a Hugging Face folder, ready for export) and
    `state.json` (the driver's state).
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        found = self._all()
        return found[-1] if found else None

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        """Optimizer version of a checkpoint's weights: the number in its name."""
        return int(checkpoint.name.removeprefix("step-"))

    def state(self, checkpoint: Path) -> dict[str, Any]:
        """The driver's state in a checkpoint."""
        try:
            return json.loads((checkpoint / "state.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{checkpoint} is damaged ({error}); delete it and resume from an older one"
            ) from None

    def save(self, step: int, state: dict[str, Any], write: Callable[[Path], None]) -> Path:
        """Write checkpoint `step` through `write(folder)`, then drop those beyond the limit.

        Raises:
            CheckpointError: the disk is full or the folder cannot be written; nothing is left of the attempt.
        """
        final, temporary = self.root / f"step-{step}", self.root / f".writing-step-{step}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            (temporary / "state.json").write_text(json.dumps(state | {"step": step}))
            _sync(temporary)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
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
            shutil.rmtree(old)
        return final

    def _all(self) -> list[Path]:
        folders = [p for p in self.root.glob("step-*") if (p / "state.json").is_file()]
        return sorted(folders, key=self.step_of)


def _sync(folder: Path) -> None:
    """Force the files to disk before the rename, so that a power cut cannot leave a named but empty checkpoint."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def newest(run: Path, purpose: str) -> Path:
    """The newest complete checkpoint of the run in a folder, for somebody who wants to `purpose` it.

    Raises:
        ConfigError: the run has none.
    """
    checkpoint = Checkpoints(run / "checkpoints", 1).latest()
    if checkpoint is None:
        raise ConfigError(f"{run} has no complete checkpoint to {purpose}")
    return checkpoint
