"""What a study says: each arm's score with its interval, differences to the baseline seed by seed, learning curves.

Seeds are the unit that is drawn at random. Nothing here depends on when or in how many calls the runs were made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rlattn.evaluation.statistics import LEVEL, Estimate, Paired, estimate, estimates, paired
from rlattn.study.config import Run, StudyConfig
from rlattn.study.progress import Curve, Progress


@dataclass(frozen=True)
class Band:
    """A curve over seeds.

    Attributes:
        steps: S of them.
        values: S means with their intervals over seeds.
        seeds: how many there are.
    """

    steps: list[int]
    values: list[Estimate]
    seeds: int


@dataclass(frozen=True)
class Difference:
    """An arm against the baseline on the seeds that both finished.

    Attributes:
        paired: mean difference, its bootstrap interval and the p-value of the sign-flip test.
        t_half: half of the 95% Student's t interval around the mean, which is wide enough for few seeds where
            differences are about normal; 0 for one seed.
    """

    paired: Paired
    t_half: float


@dataclass(frozen=True)
class Arm:
    """One arm of a study.

    Attributes:
        name: of the arm.
        scores: final score by seed, of finished runs.
        score: their mean with its bootstrap interval; None without any.
        difference: to the baseline; None for the baseline, or without a seed that both finished.
        raw: by metric, the curve as logged.
        smooth: by metric, the curve of the EMA of the running peak, taken of each seed before the mean.
        finished: whether the curves are of finished runs; else they end where the slowest started run is.
    """

    name: str
    scores: dict[int, float]
    score: Estimate | None
    difference: Difference | None
    raw: dict[str, Band]
    smooth: dict[str, Band]
    finished: bool


@dataclass(frozen=True)
class Missing:
    """A run that is not finished.

    Attributes:
        arm: name.
        seed: of the run.
        step: the last one logged; None before anything was.
        total: steps of the whole run.
    """

    arm: str
    seed: int
    step: int | None
    total: int

    def __str__(self) -> str:
        return f"seed {self.seed} {'not started' if self.step is None else f'at step {self.step} of {self.total}'}"


@dataclass(frozen=True)
class Summary:
    """A study's arms, in its order, and what is missing of it."""

    study: StudyConfig
    arms: list[Arm]
    missing: list[Missing]


def summarise(study: StudyConfig, runs: Sequence[tuple[Run, Progress]]) -> Summary:
    """The summary of what the runs of a study have logged so far."""
    by_arm: dict[str, dict[int, Progress]] = {name: {} for name in study.arms}
    for run, found in runs:
        by_arm[run.arm][run.seed] = found
    scores = {
        name: {seed: _last(found.curves[study.metric]) for seed, found in cells.items() if found.finished}
        for name, cells in by_arm.items()
    }
    arms = [_arm(study, name, cells, scores[name], scores[study.baseline]) for name, cells in by_arm.items()]
    missing = [Missing(run.arm, run.seed, found.step, found.total) for run, found in runs if not found.finished]
    return Summary(study, arms, missing)


def ema_of_peak(values: ArrayLike, a: float) -> NDArray[np.float64]:
    """EMA_t = a * max(x_t, EMA_{t-1}) + (1 - a) * EMA_{t-1} of [S] values, beginning at the first [Li 2026].

    It never falls; a = 1 is the running maximum.
    """
    smooth = np.array(values, dtype=np.float64)
    for t in range(1, len(smooth)):
        smooth[t] = smooth[t - 1] + a * max(smooth[t] - smooth[t - 1], 0)  # the same, and rounding cannot make it fall
    return smooth


def compare(baseline: Mapping[int, float], arm: Mapping[int, float], resamples: int) -> Difference | None:
    """An arm's scores against the baseline's, both by seed; None without a seed in common."""
    common = sorted(baseline.keys() & arm.keys())
    if not common:
        return None
    found = paired({str(s): baseline[s] for s in common}, {str(s): arm[s] for s in common}, resamples=resamples)
    stderr = found.difference.stderr
    return Difference(found, 0.0 if stderr is None else float(stats.t.isf((1 - LEVEL) / 2, len(common) - 1)) * stderr)


def band(curves: Sequence[Curve], resamples: int, smooth: float | None = None) -> Band:
    """The mean of curves over the steps that all of them have, with intervals; `smooth` is the EMA's a."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    if not steps:
        return Band([], [], len(curves))
    values = np.array([[curve[step] for step in steps] for curve in curves])  # [seeds, S]
    if smooth is not None:
        values = np.stack([ema_of_peak(row, smooth) for row in values])
    return Band(steps, estimates(values.T, resamples=resamples), len(curves))


def _arm(
    study: StudyConfig,
    name: str,
    cells: Mapping[int, Progress],
    scores: dict[int, float],
    baseline: Mapping[int, float],
) -> Arm:
    drawn = [found for found in cells.values() if found.finished] or [f for f in cells.values() if f.step is not None]
    curves = {metric: [found.curves[metric] for found in drawn] for metric in study.metrics}
    return Arm(
        name=name,
        scores=scores,
        score=estimate(list(scores.values()), resamples=study.resamples) if scores else None,
        difference=None if name == study.baseline else compare(baseline, scores, study.resamples),
        raw={metric: band(seeds, study.resamples) for metric, seeds in curves.items()},
        smooth={metric: band(seeds, study.resamples, study.ema) for metric, seeds in curves.items()},
        finished=bool(scores),
    )


def _last(curve: Curve) -> float:
    return curve[max(curve)]
