"""Time by phase of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rlattn import trace


class PhaseTimer:
    """`with timer("generate"): ...` adds up wall-clock seconds by phase."""

    def __init__(self, begin: Callable[[str], None] = lambda phase: None, row: str = trace.DRIVER) -> None:
        """`begin` is told of each phase as it begins; a trace shows them in `row`."""
        self._begin, self._row = begin, row
        self.phases: dict[str, float] = {}
        self.start = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time the body as part of `phase`."""
        self._begin(phase)
        start = time.perf_counter()
        yield
        trace.span(self._row, phase, start)
        self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self, tokens: int) -> dict[str, float]:
        """`timing_s/<phase>`, `timing_s/step` and `perf/tokens_per_second` over everything since the timer was made."""
        whole = time.perf_counter() - self.start
        named = {f"timing_s/{phase}": seconds for phase, seconds in self.phases.items()}
        return named | {"timing_s/step": whole, "perf/tokens_per_second": tokens / whole}
