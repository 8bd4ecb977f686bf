"""Work that goes on beside the driver's own: one thing at a time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """At most one piece of work in a thread of its own; its result is taken once."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._work: Future[T] | None = None

    def begin(self, work: Callable[[], T]) -> None:
        """Start it; what was begun before must have been taken."""
        assert self._work is None, "the work before was not taken"
        self._work = self._thread.submit(work)

    def wait(self) -> None:
        """Until it is done, if there is any; what went wrong is raised by `result`."""
        if self._work is not None:
            self._work.exception()

    def close(self) -> None:
        """Wait for it, and begin no more."""
        self._thread.shutdown()

    def result(self) -> T | None:
        """Wait for it and take its result; None where nothing was begun.

        Raises:
            Exception: what the work raised.
        """
        work, self._work = self._work, None
        return None if work is None else work.result()
