"""Who does what when: phases and actors' calls of one step, in Chrome's trace format (Perfetto and chrome://tracing)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

DRIVER, AHEAD = "driver", "driver, a step ahead"


class Trace:
    """Spans of time, each in the row of who spent it; seconds are `time.perf_counter`'s."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, float, float]] = []

    def write(self, path: Path) -> None:
        """Write them as complete events (`ph: X`), microseconds from the first, a thread a row."""
        rows = {row: number for number, row in enumerate(dict.fromkeys(span[0] for span in self.spans))}
        zero = min((start for _, _, start, _ in self.spans), default=0.0)
        events: list[dict[str, object]] = [
            {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": row}}
            for row, number in rows.items()
        ]
        events += [
            {"ph": "X", "name": name, "pid": 0, "tid": rows[row], "ts": 1e6 * (a - zero), "dur": 1e6 * (b - a)}
            for row, name, a, b in self.spans
        ]
        path.write_text(json.dumps({"traceEvents": events}))


_open: Trace | None = None  # one driver runs one step at a time


@contextmanager
def recording(path: Path | None) -> Iterator[None]:
    """Write to `path` what `span` is told while the block runs; None records nothing."""
    global _open
    if path is None:
        yield
        return
    _open = trace = Trace()
    try:
        yield
    finally:
        _open = None
        trace.write(path)


def span(row: str, name: str, start: float) -> None:
    """`row` spent the time from `start` until now on `name`; nothing is kept unless a trace is recorded."""
    if _open is not None:
        _open.spans.append((row, name, start, time.perf_counter()))
