"""MMLU-STEM: the 18 STEM subjects of MMLU (Hendrycks et al., arXiv 2009.03300), 3018 test questions of four choices.

On the hub they are rows of `cais/mmlu`, configuration `all`, whose `subject` is one of `SUBJECTS`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from rlattn.config import ConfigError
from rlattn.problem import Problem, Verifier
from rlattn.tasks import Task
from rlattn.tasks.rows import DataOptions, first_of, read_file, read_rows
from rlattn.verifiers import choice

SUBJECTS = (
    "abstract_algebra", "astronomy", "college_biology", "college_chemistry", "college_computer_science",
    "college_mathematics", "college_physics", "computer_security", "conceptual_physics", "electrical_engineering",
    "elementary_mathematics", "high_school_biology", "high_school_chemistry", "high_school_computer_science",
    "high_school_mathematics", "high_school_physics", "high_school_statistics", "machine_learning",
)  # fmt: skip


class QuestionOptions(DataOptions):
    """Options of tasks that ask for a choice or a short answer."""

    instruction: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """Follows the question and its choices, on a line of its own."""


class MMLUStem(Task):
    """The task. Rows have `problem` (or `question`), `choices`, `answer` (a letter, or the choice's number from 0) and
    `subject`, and may have `id`.

    Raises:
        ConfigError: the data is missing or malformed; or a row is, which is named.
    """

    Options: ClassVar[type[QuestionOptions]] = QuestionOptions
    bounded = True

    def __init__(self, options: QuestionOptions, seed: int) -> None:
        self.verifier: Verifier = choice.judge
        rows = read_rows("mmlu_stem", "cais/mmlu", "test", options.data, subset="all")
        if options.data is None:
            rows = [row for row in rows if row.get("subject") in SUBJECTS]
        train = read_file(options.train_file) if options.train_file else []
        self.test = [self._problem("mmlu_stem", row, index, options) for index, row in enumerate(rows[: options.limit])]
        self.train = [self._problem("train", row, index, options) for index, row in enumerate(train)]

    def answer_span(self, completion: str) -> tuple[int, int] | None:
        """By the rules of `rlattn.verifiers.choice`."""
        return choice.answer_span(completion)

    def _problem(self, prefix: str, row: dict[str, Any], index: int, options: QuestionOptions) -> Problem:
        where = f"mmlu_stem, {prefix} row {index + 1}"
        text = str(first_of(row, ("problem", "question"), where))
        choices = list(first_of(row, ("choices",), where))
        answer = choice_answer(choices, first_of(row, ("answer",), where), where)
        name = row["id"] if isinstance(row.get("id"), str) else f"{prefix}-{index}"
        return Problem(
            name, question(text, choices, options.instruction), answer, chat=True, subject=row.get("subject")
        )


def question(problem: str, choices: list[str], instruction: str) -> str:
    """The prompt: the question, its choices with letters, if any, and what to do."""
    lettered = [f"{chr(ord('A') + index)}. {text}" for index, text in enumerate(choices)]
    return "\n".join([problem.strip(), *lettered, instruction])


def choice_answer(choices: list[str], gold: str | int, where: str) -> dict[str, Any]:
    """`Problem.answer` of a multiple-choice row; `gold` is a letter, a choice's text, or its number from 0.

    Raises:
        ConfigError: fewer than 2 or more than 26 choices, some empty, or a gold answer that is none of them.
    """
    if not 2 <= len(choices) <= 26 or not all(isinstance(text, str) and text.strip() for text in choices):
        raise ConfigError(f"{where}: `choices` is {choices!r:.200}; it must be a list of 2 to 26 texts")
    if isinstance(gold, int):
        letter = chr(ord("A") + gold) if 0 <= gold < len(choices) else None
    else:
        letter, _ = choice.read_choice(gold, choices)
    if letter is None:
        raise ConfigError(
            f"{where}: the answer {gold!r:.200} is none of its {len(choices)} choices, nor a letter of one"
        )
    return {"choice": letter, "choices": choices}
