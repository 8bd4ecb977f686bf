"""Judges a house puzzle's solution (ZebraLogic): the grid of houses and attributes, every cell of it.

Where a completion has `<answer>...</answer>`, the last one counts, else its whole text. There, the answer is the object
after the last `"solution":`; what surrounds it need not be JSON. An `<answer>` without one may write
each house as its values, in any order, between semicolons: `amy cat ; bob dog`.

Time is linear in the text; no more than `MAX_CHARS` of it are ever parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from rlattn.problem import Verdict
from rlattn.verifiers.extract import stripped

MAX_CHARS = 16_384
"""Longest answer that is read; a 6x6 grid takes about 1000 characters."""
MAX_TRIES = 1000
"""How many `"solution"` without a colon and an object may follow the answer."""

_HEAD = re.compile(r'"solution"\s{0,99}:\s{0,99}(?=\{)')

Grid = dict[str, dict[str, str]]


def judge(answer: dict[str, Any], completion: str, *, cell_reward: float = 0.0) -> Verdict:
    """Judge a completion; a text of 10 MB takes some 5 ms.

    Right is a grid with exactly the houses and attributes of `answer["solution"]` and every cell right. Case and spaces
    do not count. Where `cell_reward` is set, part `cells` is that times the share of right cells; 0 for another shape.
    """
    gold: Grid = answer["solution"]
    extracted = normalised = None
    right = wrong = 0
    try:
        extracted, grid = _read(completion, gold)
        cells = _cells(grid, gold)
        normalised = "; ".join(_plain(given) for *_, given, _ in cells).encode("utf-8", "backslashreplace").decode()
        misses = [cell for cell in cells if _plain(cell[2]) != _plain(cell[3])]
        right, wrong = len(cells) - len(misses), len(misses)
        reason = f"{right} of {len(cells)} cells right"
        reason += "".join(f"; {house} {name}: {given[:40]!a}, gold {cell}" for house, name, given, cell in misses[:3])
        reason += f"; and {wrong - 3} more" if wrong > 3 else ""
    except ValueError as error:
        reason = str(error)
    written = "; ".join(" ".join(house.values()) for house in gold.values())
    parts = {"cells": cell_reward * right / max(1, right + wrong)} if cell_reward else {}
    return Verdict(right > 0 and not wrong, extracted, normalised, written, reason, parts)


def answer_span(completion: str) -> tuple[int, int] | None:
    """The characters that `judge` reads as the answer; None where there is none that could be read."""
    start, stop, head = _place(completion)
    if head:
        try:
            text = completion[head.end() : min(stop, head.end() + MAX_CHARS)]
            return head.end(), head.end() + json.JSONDecoder().raw_decode(text)[1]
        except (ValueError, RecursionError):
            return None
    if start == 0 or stop - start > MAX_CHARS:
        return None
    start, stop = stripped(completion, start, stop)
    return (start, stop) if start < stop else None


def _place(completion: str) -> tuple[int, int, re.Match[str] | None]:
    """Where to look, from 0 where there is no `<answer>...</answer>`; and the last `"solution":` there."""
    end = completion.rfind("</answer>")
    tag = completion.rfind("<answer>", 0, max(end, 0))
    start, stop = (tag + len("<answer>"), end) if tag >= 0 else (0, len(completion))
    head, at = None, stop
    for _ in range(MAX_TRIES):
        at = completion.rfind('"solution"', start, at)
        if at < 0 or (head := _HEAD.match(completion, at, stop)):
            break
    return start, stop, head


def _read(completion: str, gold: Grid) -> tuple[str, list[tuple[str, Any]]]:
    """The answer as written and its (house, content) pairs."""
    start, stop, head = _place(completion)
    if head:
        text = completion[head.end() : min(stop, head.end() + MAX_CHARS)]
        try:
            pairs, length = json.JSONDecoder(object_pairs_hook=list).raw_decode(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"the solution is not JSON: {str(error)[:80]}") from None
        return text[:length], pairs
    if start == 0:
        raise ValueError('no "solution" and no <answer>...</answer>')
    if stop - start > MAX_CHARS:
        raise ValueError(f"an answer of {stop - start} characters; at most {MAX_CHARS} are read")
    content = completion[start:stop].strip()
    return content, _houses(content, gold)


def _houses(content: str, gold: Grid) -> list[tuple[str, Any]]:
    # A value says which attribute it is, as no two attributes share one.
    rows = [row.split() for row in content.rstrip(";").split(";")]
    if len(rows) != len(gold):
        raise ValueError(f"{len(rows)} houses between semicolons, gold has {len(gold)}")
    attribute = {_plain(value): name for house in gold.values() for name, value in house.items()}
    for word in (word for row in rows for word in row):
        if _plain(word) not in attribute:
            raise ValueError(f"{word[:40]!a} is none of the puzzle's values")
    return [(house, [(attribute[_plain(word)], word) for word in row]) for house, row in zip(gold, rows, strict=True)]


def _cells(grid: list[tuple[str, Any]], gold: Grid) -> list[tuple[str, str, str, str]]:
    """(house, attribute, value given, gold value) of every cell, in gold's order."""
    cells = []
    houses = _match(grid, gold, "the solution")
    for house, attributes in gold.items():
        if not isinstance(houses[house], list):
            raise ValueError(f"{house} is not an object")
        given = _match(houses[house], attributes, house)
        for name, value in attributes.items():
            if not isinstance(given[name], str | int):
                raise ValueError(f"{house} {name} is not a text")
            cells.append((house, name, str(given[name]), value))
    return cells


def _match(pairs: list[Any], wanted: Iterable[str], where: str) -> dict[str, Any]:
    """The values of `pairs` under the keys `wanted`, each of which must be there once, and nothing else."""
    names = {_plain(name): name for name in wanted}
    found: dict[str, Any] = {}
    for pair in pairs:
        if not isinstance(pair, tuple):
            raise ValueError(f"{where} is a list")
        key = names.get(_plain(pair[0]))
        if key is None:
            raise ValueError(f"{where} has {pair[0][:40]!a}, which the puzzle has not")
        if key in found:
            raise ValueError(f"{where} has {key} twice")
        found[key] = pair[1]
    missing = [name for name in names.values() if name not in found]
    if missing:
        raise ValueError(f"{where} lacks {', '.join(missing)}")
    return found


def _plain(text: str) -> str:
    return "".join(text.casefold().split())
