"""A problem and a verdict on an answer to it. Imports nothing, so that verifier processes start fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One task instance.

    Attributes:
        id: unique in its set.
        prompt: the text the model sees.
        answer: what the verifier needs (JSON-able).
        chat: the prompt is a user's message: wrap it in the tokenizer's chat template, where it has one. Otherwise the
            model sees exactly `prompt`.
        subject: which table row it belongs to in per-subject results, if any.
        columns: further columns of its data row, which reward functions are given.
    """

    id: str
    prompt: str
    answer: Any
    chat: bool = False
    subject: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What a verifier found in one completion, and why.

    Attributes:
        right: the answer is the gold one.
        extracted: the answer as the completion writes it; None where none was found.
        normalised: the form that was compared; completions with equal forms give one answer (maj@k counts them
            together). None where there is no answer or it cannot be read: such a completion is "unparsable".
        gold: the gold answer, as compared.
        reason: one line for `--explain`.
        parts: further parts of the reward, such as `format`; beside `accuracy`, which is 1 where right.
    """

    right: bool
    extracted: str | None
    normalised: str | None
    gold: str
    reason: str
    parts: dict[str, float] = field(default_factory=dict)


Verifier = Callable[[Any, str], Verdict]
"""Judges a completion: (problem.answer, completion) -> Verdict. Picklable; never raises on any text."""
