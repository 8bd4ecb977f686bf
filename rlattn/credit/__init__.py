"""Credit: how attention signals become gamma, the factor on each token's advantage [Li 2026, section 5].

A strategy is a pure function of one response, one short file each; `assign` runs it over a batch, `assign_packed` over
any part of one, and both check what it returns. Third parties add one under the entry point group `rlattn.credit`.

[T] tokens of the packed batch, [B] sequences, [R] tokens of one response, [t] tokens and [b] sequences of a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from rlattn import registry
from rlattn.config import CreditConfig
from rlattn.types import EXTRA_SIGNALS, ExtraSignal, Rollouts, Scores


class CreditError(ValueError):
    """A strategy returned something that cannot multiply advantages; the message names it and the sequence."""


@dataclass(frozen=True)
class ResponseSignals:
    """What a strategy sees of one response; treat the tensors as read-only.

    Attributes:
        waad: [R] fp32, windowed average attention distance, tokens [Li 2026, eq. 9].
        fai: [R] fp32, future attention influence [Li 2026, eq. 10].
        entropy: [R] fp32, predictive entropy, nats.
        logps: [R] fp32, log-probs of the sampled tokens before the update, nats.
        generator: the only source of randomness; seeded by (seed, step, sequence).
        extra: name -> [R] fp32, the signals that the strategy declared with `needs`, and no others.
    """

    waad: Tensor
    fai: Tensor
    entropy: Tensor
    logps: Tensor
    generator: torch.Generator
    extra: Mapping[ExtraSignal, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class PackedResponses:
    """Where the responses of some packed sequences lie, and whose they are.

    Attributes:
        starts: [b] int64, index in [t] of each response's first token.
        ends: [b] int64, index in [t] after its last; equal to its start where there is no response.
        sequences: b positions in the whole batch, which seed the sequences' randomness.
        advantages: [b] fp32, read only for their sign.
    """

    starts: Tensor
    ends: Tensor
    sequences: Sequence[int]
    advantages: Tensor


Strategy = Callable[[ResponseSignals, CreditConfig], Tensor]  # -> gamma [R] fp32, finite and not negative
AnyStrategy = TypeVar("AnyStrategy", bound=Strategy)

ALWAYS = ("waad", "fai", "entropy", "logps")  # what every strategy is given


def needs(*names: ExtraSignal) -> Callable[[AnyStrategy], AnyStrategy]:
    """Decorator: the strategy reads these `extra` signals, which are otherwise not measured.

    Raises:
        ValueError: no such signal.
    """
    for name in names:
        if name not in EXTRA_SIGNALS:
            raise ValueError(f"no extra signal called {name!r}; known: {', '.join(EXTRA_SIGNALS)}")

    def declare(strategy: AnyStrategy) -> AnyStrategy:
        setattr(strategy, "needs", names)  # noqa: B010 (functions have no such attribute for a type checker)
        return strategy

    return declare


def needed(name: str) -> tuple[ExtraSignal, ...]:
    """The extra signals that the strategy `name` declared with `needs`."""
    return _declared(registry.CREDIT.load(name))


def _declared(strategy: Strategy) -> tuple[ExtraSignal, ...]:
    return getattr(strategy, "needs", ())


def assign(
    rollouts: Rollouts,
    scores: Scores,
    advantages: Tensor,
    config: CreditConfig,
    *,
    seed: int,
    step: int,
) -> tuple[Tensor, dict[str, float]]:
    """Gamma of every token of a batch, and what it spends.

    Nothing is kept between calls: randomness is a function of (seed, step, position of the sequence in the batch).

    Args:
        rollouts: the batch.
        scores: what the policy says about it.
        advantages: [B] fp32, read only for their sign. Zero counts as positive, as in the paper's first version
            (A >= 0); its gamma changes nothing but the metrics.
        config: strategy and options.
        seed: of the run.
        step: of the run.

    Returns:
        gamma [T] fp32, 1 outside responses and where `config.sign` leaves a sequence alone; and
        `credit/amplified_share` (share of response tokens with gamma > 1 before `normalize`) and `credit/mean_gamma`
        (over response tokens, as applied).

    Raises:
        CreditError: the strategy's gamma has the wrong type or shape, is not finite or is negative.
        ValueError: inputs of the wrong length, or not finite.
    """
    starts, ends = rollouts.cu_seqlens[:-1] + rollouts.prompt_lengths, rollouts.cu_seqlens[1:]
    responses = PackedResponses(starts, ends, range(len(ends)), advantages)
    signals = scores.signals
    columns = {"waad": signals.waad, "fai": signals.fai, "entropy": scores.entropy, "logps": scores.logps}
    gamma, amplified = assign_packed(columns | {**signals.extra}, responses, config, seed=seed, step=step)
    return gamma, spending(gamma, rollouts.response_mask, amplified)


def assign_tokens(
    rollouts: Rollouts,
    scores: Scores,
    advantages: Tensor,
    config: CreditConfig,
    *,
    seed: int,
    step: int,
) -> tuple[Tensor, dict[str, float]]:
    """`assign` where every token has an advantage of its own, [T] fp32: `config.sign` then goes by the token's.

    With `sign: both` equal to `assign`.
    """
    both = config.model_copy(update={"sign": "both"})
    gamma, metrics = assign(rollouts, scores, torch.zeros(len(rollouts)), both, seed=seed, step=step)
    if config.sign == "both":
        return gamma, metrics
    gamma = torch.where((advantages >= 0) == (config.sign == "positive"), gamma, 1.0)
    mask = rollouts.response_mask
    return gamma, spending(gamma, mask, int((gamma[mask] > 1).sum()))


def assign_packed(
    columns: Mapping[str, Tensor],
    responses: PackedResponses,
    config: CreditConfig,
    *,
    seed: int,
    step: int,
) -> tuple[Tensor, int]:
    """Gamma of some packed sequences, the same whatever else the batch holds: see `assign`.

    Args:
        columns: name -> [t] fp32, at least `ALWAYS` and what the strategy `needs`.
        responses: where the responses lie among the t tokens.
        config: strategy and options.
        seed: of the run.
        step: of the run.

    Returns:
        gamma [t] fp32, and how many tokens it amplifies (before `normalize`).
    """
    tokens = int(responses.ends[-1])
    strategy: Strategy = registry.CREDIT.load(config.name)
    extra = _declared(strategy)
    _check_inputs(tokens, columns, [*ALWAYS, *extra], responses, config.name)
    gamma = torch.ones(tokens, dtype=torch.float32)  # [t]
    amplified = 0
    bounds = zip(responses.starts.tolist(), responses.ends.tolist(), strict=True)
    for i, (start, end), advantage in zip(responses.sequences, bounds, responses.advantages.tolist(), strict=True):
        if start == end or not _shaped(advantage, config):
            continue
        generator = torch.Generator().manual_seed(_mix(seed, step, i))
        response = ResponseSignals(
            waad=columns["waad"][start:end],
            fai=columns["fai"][start:end],
            entropy=columns["entropy"][start:end],
            logps=columns["logps"][start:end],
            generator=generator,
            extra={name: columns[name][start:end] for name in extra},
        )
        try:
            own = _checked(strategy(response, config), end - start, config.name, i)  # [R]
        except KeyError as error:
            name = error.args[0] if error.args else None
            if name not in EXTRA_SIGNALS:
                raise
            raise CreditError(
                f"credit strategy {config.name!r} reads {name!r} without declaring it; add @needs({name!r})"
            ) from None
        amplified += int((own > 1).sum())
        gamma[start:end] = own / own.mean() if config.normalize else own
    if not gamma.isfinite().all():  # a mean of zero under `normalize`
        raise CreditError(
            f"credit strategy {config.name!r} returned only zeros for a response; it cannot be normalised"
        )
    return gamma, amplified


def spending(gamma: Tensor, mask: Tensor, amplified: int) -> dict[str, float]:
    """The metrics of `assign` from gamma [T], the response mask [T] and the number of amplified tokens."""
    tokens = int(mask.sum())
    return {
        "credit/amplified_share": amplified / max(tokens, 1),
        "credit/mean_gamma": gamma[mask].mean().item() if tokens else 1.0,
    }


def _check_inputs(
    tokens: int, columns: Mapping[str, Tensor], names: Sequence[str], responses: PackedResponses, strategy: str
) -> None:
    missing = [name for name in names if name not in columns]
    if missing:
        raise ValueError(f"credit strategy {strategy!r} needs {', '.join(missing)}, which were not measured")
    checked = [(name, columns[name], tokens) for name in names]
    for name, tensor, length in [*checked, ("advantages", responses.advantages, len(responses.ends))]:
        if tuple(tensor.shape) != (length,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; this batch needs ({length},)")
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite; a NaN would be ranked in silence")


def _shaped(advantage: float, config: CreditConfig) -> bool:
    return config.sign == "both" or (advantage >= 0) == (config.sign == "positive")


def _mix(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _checked(gamma: object, length: int, name: str, sequence: int) -> Tensor:
    problem = None
    if not isinstance(gamma, Tensor):
        problem = f"a {type(gamma).__name__}"
    elif tuple(gamma.shape) != (length,):
        problem = f"shape {tuple(gamma.shape)}"
    else:
        low, high = (x.item() for x in gamma.aminmax())  # NaN shows in both
        if not (low >= 0 and high < inf):
            problem = f"values from {low:g} to {high:g}"
    if problem:
        raise CreditError(
            f"credit strategy {name!r} returned {problem} for sequence {sequence}; "
            f"it must return a tensor of shape ({length},), finite and not negative"
        )
    assert isinstance(gamma, Tensor)
    return gamma.detach().to("cpu", torch.float32)
