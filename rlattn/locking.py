"""A folder for one writer at a time."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlattn.config import ConfigError

PATIENCE_S = 10.0  # processes of a writer that was killed take a moment to end


@contextmanager
def locked(folder: Path, other: str) -> Iterator[int]:
    """A folder for this process and those it starts alone; gives the lock's file descriptor.

    Processes that inherit the descriptor keep the lock after this one: it is free when the last of them has ended. On
    storage that nodes share it holds between nodes as far as that storage does POSIX locks, as NFSv4 does.

    Raises:
        ConfigError: `other` works in that folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    with open(lock, "w") as file:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(f"{other} works in {folder}") from None
                time.sleep(0.2)
        try:
            yield file.fileno()
        finally:
            if folder.is_dir() and list(folder.iterdir()) == [lock]:  # nothing came of it
                lock.unlink()
                folder.rmdir()
