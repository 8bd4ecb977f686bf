"""Numbers of an evaluation with their uncertainty: avg@k, pass@k, maj@k, intervals over problems, paired comparison.

Problems are the unit that is drawn at random: completions of one problem are alike, so an interval over completions
would be too narrow [Miller 2024, arXiv 2411.00640]. Nothing depends on the order of problems or of completions: a run
that was killed and went on gives the numbers of one that was not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from rlattn.problem import Verdict

LEVEL = 0.95
"""Of every interval."""
RESAMPLES = 10_000
"""Bootstrap draws of an interval: its ends move by about 1% of its width between seeds."""
FLIPS = 2**14
"""Sign flips of a paired test; all of them, so an exact p-value, where at most 14 problems differ."""

_AT_ONCE = 2_000_000  # numbers resampled in one batch: bounds memory


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its 95% interval.

    An interval of width 0 says that the problems show no spread (all right, all wrong, or only one problem): it has no
    information about uncertainty, and does not mean that there is none. Tables leave such an interval out.

    Attributes:
        value: the mean.
        low: lower end of the interval.
        high: upper end of the interval.
        stderr: standard error of the mean; None for one problem.
    """

    value: float
    low: float
    high: float
    stderr: float | None = None


@dataclass(frozen=True)
class Paired:
    """Run B against run A on the same problems.

    Attributes:
        difference: mean of B minus A over the common problems.
        p_value: two-sided, of the sign-flip test that A and B are interchangeable on each problem.
        problems: how many were compared.
        only_a: ids of problems that B lacks, sorted; left out.
        only_b: ids of problems that A lacks, sorted; left out.
    """

    difference: Estimate
    p_value: float
    problems: int
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)


def avg_at_k(verdicts: Sequence[Verdict]) -> float:
    """Share of a problem's completions that are right."""
    return sum(verdict.right for verdict in verdicts) / len(verdicts)


def pass_at_k(n: ArrayLike, c: ArrayLike, k: int) -> NDArray[np.float64]:
    """Chance that at least one of k completions is right, drawn without replacement from n of which c are right.

    Unbiased: 1 - C(n-c, k) / C(n, k) [Chen et al. 2021, arXiv 2107.03374, eq. 1], as a product of k ratios in [0, 1],
    so that no factorial overflows. Elementwise over arrays.

    Raises:
        ValueError: k outside 1..n, or c outside 0..n.
    """
    n, c = np.broadcast_arrays(np.asarray(n), np.asarray(c))
    if k < 1 or (n < k).any():
        raise ValueError(f"pass@{k} of {n.min()} completions; k must be from 1 to the number of completions")
    if (c < 0).any() or (c > n).any():
        raise ValueError("more right completions than completions, or fewer than 0")
    wrong = np.ones(n.shape)
    for i in range(k):
        wrong *= np.maximum(n - c - i, 0) / (n - i)
    return 1.0 - wrong


def maj_at_k(verdicts: Iterable[Verdict]) -> float:
    """Whether the most frequent answer (`Verdict.normalised`) is right, in [0, 1].

    Completions without an answer do not vote; without any vote it is 0. Of tied answers each is chosen with the same
    chance, and the expected value of that is returned.
    """
    votes: Counter[str] = Counter()
    right: Counter[str] = Counter()
    for verdict in verdicts:
        if verdict.normalised is not None:
            votes[verdict.normalised] += 1
            right[verdict.normalised] += verdict.right
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    return sum(right[answer] / most for answer in winners) / len(winners) if winners else 0.0


def estimate(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Estimate:
    """Mean of one value a problem, with its interval; see `estimates`."""
    return estimates(np.asarray(values, dtype=np.float64)[None], seed, resamples)[0]


def estimates(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> list[Estimate]:
    """Means of [metrics, problems] over problems, each with its bootstrap interval.

    The expanded percentile interval [Hesterberg 2015, arXiv 1411.5279]: a plain percentile one is too narrow by
    sqrt((n-1)/n) and by normal against t quantiles, together 6% at AIME's 30 problems, so its level is raised by as
    much. Values are sorted first, so that their order changes nothing.

    Raises:
        ValueError: no problems, or a value that is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 2 or values.shape[1] == 0 or not np.isfinite(values).all():
        raise ValueError(f"values of shape {values.shape}; need finite ones of [metrics, problems], at least 1 problem")
    values, n = np.sort(values, axis=1), values.shape[1]
    means = values.mean(axis=1)
    if n == 1:
        return [Estimate(mean, mean, mean) for mean in means.tolist()]
    level = 1 - 2 * stats.norm.sf(np.sqrt(n / (n - 1)) * stats.t.isf((1 - LEVEL) / 2, n - 1))
    interval = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=resamples,
        batch=max(1, _AT_ONCE // values.size),
        axis=1,
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    flat = np.ptp(values, axis=1) == 0  # where rounding would make a width out of none
    low = np.where(flat, means, np.minimum(interval.low, means))
    high = np.where(flat, means, np.maximum(interval.high, means))
    errors = np.where(flat, 0.0, values.std(axis=1, ddof=1) / np.sqrt(n))
    columns = (means.tolist(), low.tolist(), high.tolist(), errors.tolist())
    return [Estimate(*row) for row in zip(*columns, strict=True)]


def paired(a: Mapping[str, float], b: Mapping[str, float], seed: int = 0, resamples: int = RESAMPLES) -> Paired:
    """Compare two runs by their values on each problem; problems that only one of them has are left out and named.

    The p-value is the share of sign assignments to the differences whose mean is as far from 0 as the one seen: exact
    where few problems differ, otherwise from random assignments, and then never below 2 / (FLIPS + 1).

    Raises:
        ValueError: no problem in common.
    """
    common = sorted(a.keys() & b.keys())
    if not common:
        raise ValueError(f"no problem in common: {len(a)} problems against {len(b)}, with no id in both")
    differences = np.sort([b[id_] - a[id_] for id_ in common])
    return Paired(
        difference=estimate(differences, seed, resamples),
        p_value=_sign_flip(differences[differences != 0], seed),  # a 0 has no sign to flip
        problems=len(common),
        only_a=sorted(a.keys() - b.keys()),
        only_b=sorted(b.keys() - a.keys()),
    )


def _sign_flip(differences: NDArray[np.float64], seed: int) -> float:
    if len(differences) < 2:  # both signs of one difference are as far from 0 as each other
        return 1.0
    test = stats.permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=FLIPS,
        batch=max(1, _AT_ONCE // len(differences)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)
