"""Where a completion's answer lies, in tokens: the task says which characters, the tokenizer which tokens hold them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import Protocol

import torch

from rlattn.tasks import Task
from rlattn.types import Rollouts

TAIL = 64  # tokens at the end of a completion that are decoded first: answers come last
SEAM = 4  # characters that a decoding from the middle may get wrong: a cut character, a space that is dropped


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    def decode(self, token_ids: list[int], /, *, skip_special_tokens: bool) -> object:
        """The text of some tokens."""


def locate(rollouts: Rollouts, task: Task, tokenizer: Tokenizer) -> Rollouts:
    """Rollouts with `answer_spans` filled in, by `task.answer_span` of their texts."""
    spans = []
    starts = rollouts.cu_seqlens[:-1] + rollouts.prompt_lengths
    bounds = zip(starts.tolist(), rollouts.cu_seqlens[1:].tolist(), rollouts.prompt_lengths.tolist(), strict=True)
    for (start, end, prompt), text in zip(bounds, rollouts.texts, strict=True):
        characters = task.answer_span(text)
        tokens = characters and token_span(tokenizer, rollouts.token_ids[start:end].tolist(), text, characters)
        first, last = tokens or (end - start, end - start)
        spans.append((prompt + first, prompt + last))
    return rollouts.replace(answer_spans=torch.tensor(spans, dtype=torch.int64).view(-1, 2))


def token_span(
    tokenizer: Tokenizer, token_ids: Sequence[int], text: str, characters: tuple[int, int]
) -> tuple[int, int] | None:
    """The tokens, first and one after the last, that hold the characters `characters` of `text`.

    `text` is what the tokens decode to without special tokens. A token that holds more than the answer counts; a
    character that is spread over several tokens belongs to the one that completes it. No offsets are needed, which
    generated tokens do not have, and no encoding, which might cut the text otherwise: ends of the completion are
    decoded until one holds the answer, then the tokens are found by bisection.

    Returns:
        None where `characters` are none, or the tokens do not decode to `text`.
    """
    start, end = characters
    if not 0 <= start < end <= len(text):
        return None
    for size in _doubling(TAIL, len(token_ids)):
        ids = list(token_ids[len(token_ids) - size :])
        shown = _decode(tokenizer, ids)
        seam = SEAM if size < len(token_ids) else 0
        before = len(text) - len(shown)  # characters of the text that precede these
        if before + seam <= start and text.endswith(shown[seam:]):
            break
    else:
        return None

    def complete(tokens: int) -> int:
        """Characters of `text` that are whole after so many of `ids`."""
        return before + len(_decode(tokenizer, ids[:tokens]).rstrip("\ufffd"))

    counts = range(1, len(ids) + 1)
    first = bisect_right(counts, start, key=complete)  # the token that completes the character at `start`
    last = bisect_left(counts, end, key=complete) + 1
    skipped = len(token_ids) - len(ids)
    return skipped + first, skipped + min(last, len(ids))


def _decode(tokenizer: Tokenizer, token_ids: list[int]) -> str:
    return str(tokenizer.decode(token_ids, skip_special_tokens=True))


def _doubling(size: int, most: int) -> list[int]:
    sizes = []
    while size < most:
        sizes.append(size)
        size *= 2
    return [*sizes, most]
