"""ZebraLogic: house puzzles with one solution (Lin et al. 2025, arXiv 2502.01100), generated; see `rlattn.tasks.zebra`.

The paper's benchmark has 1000 puzzles, 40 of each size from 2x2 to 6x6 (houses x attributes), which are the defaults
here. Wordings, values and mix of clues are this project's: results compare with each other, not with the paper's.
"""

from __future__ import annotations

import json
import random
from functools import cached_property, partial
from itertools import product
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from rlattn.config import ConfigError, Section
from rlattn.problem import Problem
from rlattn.tasks import Task
from rlattn.tasks.zebra import ATTRIBUTES, KINDS, Item, Puzzle, make_puzzle
from rlattn.verifiers import grid

Side = Annotated[int, Field(ge=2, le=6)]

PROMPT = (
    "There are {houses} houses in a row, numbered 1 to {houses} from left to right. A different person lives in each. "
    "The houses and their people differ in each of these characteristics:\n{background}\n\nClues:\n{clues}\n\n"
    "Which value belongs to which house? Please reason step by step, and then present your solution as JSON in exactly "
    "this form, with the right value in place of each ___:\n\n{template}"
)
PATIENCE = (1, 1, 2, 3)
"""Sweeps over the clues that a worked solution makes before it guesses; each as likely."""


class ZebraLogicOptions(Section):
    """Options of the task `zebralogic`."""

    sizes: Annotated[list[tuple[Side, Side]], Field(min_length=1)] = Field(
        [(houses, attributes) for houses in range(2, 7) for attributes in range(2, 7)]
    )
    """[houses, attributes] of the puzzles, 2 to 6 each; every size as often as any other."""
    train_size: Annotated[int, Field(ge=0, le=1_000_000)] = 2000
    """Generated training puzzles; 0 where the task is only a benchmark."""
    test_size: Annotated[int, Field(gt=0, le=100_000)] = 1000
    """Generated test puzzles."""
    prompt: Literal["zebralogic", "compact"] = "zebralogic"
    """Plain English that asks for JSON; or a few words a clue, of a small vocabulary, for tiny models, which `rlattn
    warmup` can teach."""
    cell_reward: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Reward for right cells: this times their share of a well-formed grid, beside 1 for a grid that is right."""


class ZebraLogic(Task):
    """The task. `Problem.answer` is `{"solution": {"House 1": {"Name": "Eve", ...}, ...}}`; verifier: `grid.judge`.

    Raises:
        ConfigError: the sizes do not give enough distinct puzzles.
    """

    Options: ClassVar[type[ZebraLogicOptions]] = ZebraLogicOptions
    bounded = True

    def __init__(self, options: ZebraLogicOptions, seed: int) -> None:
        self.options = options
        self.verifier = partial(grid.judge, cell_reward=options.cell_reward)
        self.puzzles: dict[str, Puzzle] = {}
        self.seed = seed
        self.seen: set[frozenset[tuple[str, ...]]] = set()
        self.test = [self._problem(f"zebralogic-{row}", row) for row in range(options.test_size)]

    @cached_property
    def train(self) -> list[Problem]:  # type: ignore[override]
        """Made when first asked for: an evaluation does without."""
        return [self._problem(f"train-{row}", row) for row in range(self.options.train_size)]

    def worked_solution(self, problem: Problem, rng: random.Random) -> str:
        """A completion for the warm start: a deduction of mixed quality, see `deduction`.

        Raises:
            ConfigError: the prompt is not the compact one.
        """
        if self.options.prompt != "compact":
            raise ConfigError("task.options.prompt must be 'compact' to learn zebralogic from worked solutions")
        return deduction(self.puzzles[problem.id], rng)

    def answer_span(self, completion: str) -> tuple[int, int] | None:
        """By the rules of `rlattn.verifiers.grid`."""
        return grid.answer_span(completion)

    def _problem(self, name: str, row: int) -> Problem:
        sizes = self.options.sizes
        houses, attributes = sizes[row % len(sizes)]
        compact = self.options.prompt == "compact"
        for attempt in range(50):
            rng = random.Random(f"zebralogic {self.seed} {name} {attempt}")
            puzzle = make_puzzle(houses, attributes, rng, few_words=compact)
            if puzzle.key() not in self.seen:
                break
        else:
            raise ConfigError(
                f"task.options: only {len(self.seen)} distinct puzzles found, and no other of {houses}x{attributes}; "
                "give larger sizes, or lower train_size and test_size"
            )
        self.seen.add(puzzle.key())
        self.puzzles[name] = puzzle
        prompt = compact_prompt(puzzle) if compact else english_prompt(puzzle)
        return Problem(name, prompt, {"solution": puzzle.solution()}, not compact, f"{houses}x{attributes}")


def english_prompt(puzzle: Puzzle) -> str:
    """Background, clues and the form of the answer, as in the paper."""
    background = [
        f"- {ATTRIBUTES[name][0]}: {', '.join(sorted(values))}."
        for name, values in zip(puzzle.attributes, puzzle.values, strict=True)
    ]
    clues = [f"{number}. {puzzle.sentence(clue)}" for number, clue in enumerate(puzzle.clues, 1)]
    blank = {house: dict.fromkeys(cells, "___") for house, cells in puzzle.solution().items()}
    return PROMPT.format(
        houses=len(blank),
        background="\n".join(background),
        clues="\n".join(clues),
        template=json.dumps({"solution": blank}, indent=2),
    )


def compact_prompt(puzzle: Puzzle) -> str:
    """The values of each attribute and the clues in a few words: `name amy bob. pet cat dog.\\namy before cat.`"""
    background = [
        f"{name} {' '.join(sorted(values))}.".lower()
        for name, values in zip(puzzle.attributes, puzzle.values, strict=True)
    ]
    clues = [f"{puzzle.short(clue)}." for clue in puzzle.clues]
    return f"{' '.join(background)}\n{' '.join(clues)}\n<think>"


def deduction(puzzle: Puzzle, rng: random.Random) -> str:
    """A completion `deductions </think> <answer> grid </answer>` of mixed quality, so that RL has room.

    Clue after clue is written down with the houses that it leaves to its values, and to others of their attributes:

        amy before cat : amy ~1 ~2 ; cat ~2 ~3 . cat at 2 : cat =2 ; dog ~1 ~3 ; fish ~1 ~3 .

    When all is settled it answers. Where its patience (`PATIENCE`, drawn for each trace) ends first, or the clues one
    by one leave more than one way, it guesses the rest, which is often wrong.
    """
    houses = len(puzzle.values[0])
    items_as_listed = sorted(product(range(len(puzzle.values)), range(houses)), key=lambda i: (i[0], puzzle.word(i)))
    left = {item: set(range(houses)) for item in items_as_listed}
    thoughts = ""

    def settled() -> bool:
        return all(len(places) == 1 for places in left.values())

    def note(item: Item) -> str:
        places = sorted(place + 1 for place in left[item])
        mark = "=" if len(places) == 1 else "~"
        known = [f" {mark}{place}" for place in places if len(places) < houses]
        return f" {puzzle.word(item).lower()}{''.join(known)}"

    def notes(items: list[Item]) -> str:
        return " ;".join(map(note, dict.fromkeys(items + _exclude(left))))

    for clue in puzzle.clues * rng.choice(PATIENCE):
        if settled():
            break
        items = [clue.item] if isinstance(clue.other, int) else [clue.item, clue.other]
        allows = KINDS[clue.kind].allows
        second = {clue.other} if isinstance(clue.other, int) else left[clue.other]
        pairs = [(a, b) for a in left[clue.item] for b in second if allows(a, b)]
        for item, places in zip(items, map(set, zip(*pairs, strict=True)), strict=False):
            left[item] = places
        thoughts += f" {puzzle.short(clue)} :{notes(items)} ."
    while not settled():
        item = min((i for i in left if len(left[i]) > 1), key=lambda i: len(left[i]))
        left[item] = {rng.choice(sorted(left[item]))}
        thoughts += f" guess{notes([item])} ."
    rows = [[puzzle.word(item).lower() for item in left if left[item] == {house}] for house in range(houses)]
    return f"{thoughts} </think> <answer> {' ; '.join(' '.join(row) for row in rows)} </answer>"


def _exclude(left: dict[Item, set[int]]) -> list[Item]:
    """Take settled houses from the other values of their attribute, until nothing changes; the values it changed."""
    changed: list[Item] = []
    again = True
    while again:
        again = False
        for one in left:
            if len(left[one]) > 1:
                continue
            for other in left:
                if other[0] == one[0] and len(left[other]) > 1 and left[other] & left[one]:
                    left[other] -= left[one]
                    changed.append(other)
                    again = True
    return list(dict.fromkeys(changed))
