"""How far a run is, read from what it wrote; the only thing that a study remembers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlattn.config import ConfigError, differences, load_config
from rlattn.study.config import Run
from rlattn.tracking import read_metrics

Curve = dict[int, float]
"""A metric by step."""


@dataclass(frozen=True)
class Progress:
    """What a run has logged.

    Attributes:
        step: the last one logged; None before anything was.
        total: steps of the whole run.
        curves: by metric, for those asked for.
    """

    step: int | None
    total: int
    curves: Mapping[str, Curve]

    @property
    def finished(self) -> bool:
        """Whether the last step was logged."""
        return self.step == self.total

    def __str__(self) -> str:
        if self.step is None:
            return f"not started, {self.total} steps"
        return "finished" if self.finished else f"step {self.step} of {self.total}"


def step_of(run: Run) -> int | None:
    """The last step that a run has logged."""
    lines = read_metrics(run.folder)
    return lines[-1]["step"] if lines else None


def progress(run: Run, metrics: Sequence[str]) -> Progress:
    """How far a run is.

    Raises:
        ConfigError: its folder holds a run of another config, or it ended without logging one of `metrics`.
    """
    total = run.config.trainer.steps
    saved = run.folder / "config.yaml"
    if not saved.is_file():
        return Progress(None, total, {name: {} for name in metrics})
    differing = list(differences(load_config(saved).model_dump(mode="json"), run.config.model_dump(mode="json")))
    if differing:
        raise ConfigError(
            f"{run.folder} holds a run of another config: {'; '.join(differing)}; "
            "delete that folder, or give the study another output_dir"
        )
    lines = read_metrics(run.folder)
    curves: dict[str, Curve] = {
        name: {line["step"]: line[name] for line in lines if line.get(name) is not None} for name in metrics
    }
    found = Progress(lines[-1]["step"] if lines else None, total, curves)
    if found.finished:
        known = sorted({name for line in lines for name in line} - {"step"})
        for name in metrics:
            if not curves[name]:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean {close[0]!r}?" if close else f"logged: {', '.join(known)}"
                raise ConfigError(f"{run.name} is finished and never logged {name!r}; {hint}")
    return found
