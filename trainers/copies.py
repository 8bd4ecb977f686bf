"""Copies of checkpoints where any node, and any later one, can reach them: S3, GCS, or whatever else fsspec knows."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import fsspec

from rlattn.config import ConfigError
from rlattn.tracking import COMPLETIONS, METRICS
from rlattn.trainers.manifest import MANIFEST, damage

CONFIG = "config.yaml"
BESIDE = (CONFIG, METRICS, COMPLETIONS)
"""Files of a run that a copy of a checkpoint goes with."""
PROBE = ".rlattn"
OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs"}
"""Have no folders to make; asked for one, they would make the bucket."""


class Copies:
    """`step-N` folders and what belongs to their run, at an fsspec URL; the driver alone writes there.

    Object stores cannot rename, so a copy is whole when its manifest, written last, is there. Copying goes on beside
    training, one checkpoint at a time.

    Raises:
        ConfigError: nothing can be written there, or fsspec lacks a package for it; says which.
    """

    def __init__(self, url: str, note: Callable[[str], None] = lambda text: None) -> None:
        self.url, self._note = url, note
        self._side = ThreadPoolExecutor(1, thread_name_prefix="copies")
        self._work: Future[None] | None = None
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url)
            protocols = {self._fs.protocol} if isinstance(self._fs.protocol, str) else set(self._fs.protocol)
            if not protocols & OBJECT_STORES:
                self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(self._at(PROBE), b"")
            self._fs.rm_file(self._at(PROBE))
        except Exception as error:  # whatever a file system raises
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ConfigError(f"`trainer.checkpoint_url` = {url!r}: cannot be written to: {reason}") from None

    def steps(self) -> list[int]:
        """Steps of the whole copies there, ascending."""
        found = self._fs.glob(self._at(f"step-*/{MANIFEST}"))
        return sorted(int(str(path).split("/")[-2].removeprefix("step-")) for path in found)

    def holds_run(self) -> bool:
        """A run has been copied there."""
        return bool(self._fs.exists(self._at(CONFIG)))

    def forget(self) -> None:
        """Remove the run that is there."""
        for name in [*BESIDE, *(Path(path).name for path in self._fs.glob(self._at("step-*")))]:
            if self._fs.exists(self._at(name)):
                self._fs.rm(self._at(name), recursive=True)
        self._fs.invalidate_cache()

    def begin(self, checkpoint: Path, keep: list[int]) -> None:
        """Copy a checkpoint of a run, then drop those there but `keep`; waits for the one before.

        What goes wrong is told, and raised by `finish`: training goes on, and the next checkpoint is another try.
        """
        if self._work and (error := self._work.exception()):
            self._note(f"no copy of a checkpoint at {self.url}: {error}; trying again with {checkpoint.name}")
        self._work = self._side.submit(self._copy, checkpoint, keep)

    def finish(self) -> None:
        """Wait for the last copy.

        Raises:
            OSError: it could not be made.
        """
        if self._work:
            try:
                self._work.result()
            except Exception as error:  # whatever a file system raises
                raise OSError(f"the last checkpoint was not copied to {self.url}: {error}") from None

    def restore(self, output_dir: Path, step: int | None) -> bool:
        """Bring a run and its newest checkpoint, or that of `step`, into an empty folder; False where there is none.

        Raises:
            ConfigError: no such step.
            OSError: what came is not what was written.
        """
        if not self.holds_run():
            return False
        steps = self.steps()
        if step is not None and step not in steps:
            raise ConfigError(f"{self.url} has no step-{step}; there are: {', '.join(map(str, steps)) or 'none'}")
        root = output_dir / "checkpoints"
        root.mkdir(parents=True, exist_ok=True)
        if steps:
            name = f"step-{steps[-1] if step is None else step}"
            fetched = root / f".writing-{name}"
            shutil.rmtree(fetched, ignore_errors=True)
            self._fs.get(f"{self._at(name)}/", f"{fetched}/", recursive=True)
            if wrong := damage(fetched):
                shutil.rmtree(fetched)
                raise OSError(f"the copy of {name} at {self.url} is damaged: {wrong}")
            os.replace(fetched, root / name)
        for name in (METRICS, COMPLETIONS, CONFIG):  # the config last: a folder with one holds a run
            if self._fs.exists(self._at(name)):
                self._fs.get_file(self._at(name), str(output_dir / name))
        return True

    def _copy(self, checkpoint: Path, keep: list[int]) -> None:
        run, there = checkpoint.parent.parent, self._at(checkpoint.name)
        self._fs.invalidate_cache()
        if self._fs.exists(there):  # of an attempt that was cut short, or of a run that went back
            self._fs.rm(there, recursive=True)
        files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.name == MANIFEST):
            target = f"{there}/{path.relative_to(checkpoint).as_posix()}"
            self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._fs.put_file(str(path), target)
        for name in BESIDE:
            if (run / name).is_file():
                self._fs.put_file(str(run / name), self._at(name))
        for step in self.steps():
            if step not in keep:
                self._fs.rm_file(self._at(f"step-{step}/{MANIFEST}"))  # first: no longer whole
                self._fs.rm(self._at(f"step-{step}"), recursive=True)

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"
