"""Ending a run between two steps: SIGTERM, as job servers, Slurm and Kubernetes send it, asks for that."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 128 + signal.SIGTERM
"""Of a run that was asked to stop and did: not 0, as it is not at its end."""


class Stopped(Exception):
    """A run has stopped as it was asked to; the message says where it goes on."""


@contextmanager
def stoppable(note: Callable[[str], None]) -> Iterator[Callable[[], bool]]:
    """While the block runs, SIGTERM only sets what the given function tells; a second one interrupts at once.

    `note` tells the user. Outside the main thread, which alone may handle signals, nothing changes.

    Raises:
        KeyboardInterrupt: the second SIGTERM.
    """
    asked = False

    def stop(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        note("asked to stop: after this step, with a checkpoint; a second SIGTERM ends the run at once")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGTERM, before)
