"""Mathematics with a checkable final answer: what AIME, AMC, MATH and their like have in common."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from rlattn.problem import Problem, Verifier
from rlattn.tasks import Task
from rlattn.tasks.rows import DataOptions, first_of, read_file, read_rows
from rlattn.verifiers import math
from rlattn.verifiers.extract import find_span


class MathOptions(DataOptions):
    """Options of the mathematics tasks."""

    instruction: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """Follows the problem, on a line of its own."""
    skip_unanswered: bool = False
    """Leave rows without an answer out of `train_file`, rather than refuse it."""


class MathTask(Task):
    """Problems with one final answer, judged by `rlattn.verifiers.math.judge`; a subclass says where they are.

    Rows have `problem` (or `question`) and `answer` (or `final_answer`, a list), and may have `id` and `subject`.

    Raises:
        ConfigError: the data is missing or malformed, or a row has no problem or no answer.
    """

    Options: ClassVar[type[MathOptions]] = MathOptions
    name: ClassVar[str]
    """Of the task, and of its local file."""
    hub: ClassVar[str]
    """Data set of the Hugging Face hub."""
    split: ClassVar[str] = "test"
    """Of the hub's data set."""
    subset: ClassVar[str | None] = None
    """Configuration of the hub's data set."""
    tolerance: ClassVar[float] = 0.0
    """Relative error that numbers may have."""

    def __init__(self, options: MathOptions, seed: int) -> None:
        self.options = options
        self.verifier: Verifier = partial(math.judge, tolerance=self.tolerance)
        rows = read_rows(self.name, self.hub, self.split, options.data, subset=self.subset)
        self.test = [self._problem(self.name, index, row) for index, row in enumerate(rows[: options.limit])]
        train = list(enumerate(read_file(options.train_file))) if options.train_file else []
        if options.skip_unanswered:
            train = [(index, row) for index, row in train if row.get("answer") or row.get("final_answer")]
        self.train = [self._problem("train", index, row) for index, row in train]

    @classmethod
    def gold(cls, row: dict[str, Any], where: str) -> str:
        """The gold answer of a row."""
        answer = first_of(row, ("answer", "final_answer"), where)
        return ", ".join(map(str, answer)) if isinstance(answer, list) else str(answer)

    def answer_span(self, completion: str) -> tuple[int, int] | None:
        """By the rules of `rlattn.verifiers.extract`."""
        return find_span(completion)[0]

    def _problem(self, prefix: str, index: int, row: dict[str, Any]) -> Problem:
        where = f"{self.name}, {'train row' if prefix == 'train' else 'row'} {index + 1}"
        text = first_of(row, ("problem", "question"), where)
        subject = row.get("subject") or row.get("subfield")
        name = str(row["id"]) if isinstance(row.get("id"), str) else f"{prefix}-{index}"
        return Problem(name, f"{text}\n{self.options.instruction}", self.gold(row, where), chat=True, subject=subject)
