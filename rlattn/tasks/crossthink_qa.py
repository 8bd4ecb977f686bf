"""CrossThink-QA: questions of many domains (Akter et al., arXiv 2504.13941), with choices or with a short answer.

The hub's `nvidia/Nemotron-CrossThink` has no test split: those `test_size` rows of its split `train_qa` whose questions
have the smallest SHA-256 are the test set, the others train. So its numbers compare with this project's only.

What is known of its rows. From the data set's card: the split's name and its 187,496 rows. From public code that reads
the sibling file of mathematics: `reward_model.ground_truth` and `meta_data.question`. Not verified, as the file was out
of reach: that rows of this file have these too (else the question is the last message of `prompt`), and how choices are
written (read here as lines `A. text`, `A) text` or `(A) text` at the end of the question). A row that does not fit is
refused by number.
"""

from __future__ import annotations

import hashlib
import re
from typing import Annotated, Any, ClassVar

from pydantic import Field

from rlattn.config import ConfigError
from rlattn.problem import Problem, Verifier
from rlattn.tasks import Task
from rlattn.tasks.mmlu_stem import QuestionOptions, choice_answer, question
from rlattn.tasks.rows import first_of, read_file, read_rows
from rlattn.verifiers import choice

_CHOICE = re.compile(r"^[ \t]*(?:\(([A-Z])\)|([A-Z])[.):])[ \t]*(\S.*)$", re.MULTILINE)


class CrossThinkQAOptions(QuestionOptions):
    """Options of the task `crossthink_qa`."""

    test_size: Annotated[int, Field(gt=0)] = 1000
    """Rows of the hub's only split that are held out to test on; a local file is the test set as it stands."""
    train_size: Annotated[int, Field(ge=0)] | None = None
    """Only so many training rows; None: all."""


class CrossThinkQA(Task):
    """The task. Rows of a local file or `train_file` are as on the hub; or they have `problem`, `answer` (a letter or a
    choice's text; or a text, or a list of accepted ones) and may have `choices`, `subject` and `id`.

    Raises:
        ConfigError: the data is missing or malformed; or a row is, which is named.
    """

    Options: ClassVar[type[CrossThinkQAOptions]] = CrossThinkQAOptions
    bounded = True

    def __init__(self, options: CrossThinkQAOptions, seed: int) -> None:
        self.verifier: Verifier = choice.judge
        self.instruction = options.instruction
        rows = read_rows("crossthink_qa", "nvidia/Nemotron-CrossThink", "train_qa", options.data)
        problems = [self._problem("crossthink_qa", row, index) for index, row in enumerate(rows)]
        test, rest = (problems, []) if options.data else self._held_out(problems, options.test_size)
        if options.train_file:
            rest = [self._problem("train", row, index) for index, row in enumerate(read_file(options.train_file))]
        self.test, self.train = test[: options.limit], rest[: options.train_size]

    def answer_span(self, completion: str) -> tuple[int, int] | None:
        """By the rules of `rlattn.verifiers.choice`."""
        return choice.answer_span(completion)

    def _problem(self, prefix: str, row: dict[str, Any], index: int) -> Problem:
        where = f"crossthink_qa, {prefix} row {index + 1}"
        if "reward_model" in row:
            row = from_hub(row, where)
        text, gold = str(first_of(row, ("problem", "question"), where)), first_of(row, ("answer",), where)
        choices = list(row.get("choices") or [])
        answer = choice_answer(choices, str(gold), where) if choices else _short_answer(gold, where)
        name = row["id"] if isinstance(row.get("id"), str) else f"{prefix}-{index}"
        return Problem(name, question(text, choices, self.instruction), answer, chat=True, subject=row.get("subject"))

    def _held_out(self, problems: list[Problem], size: int) -> tuple[list[Problem], list[Problem]]:
        # Equal questions have equal hashes: none is in both sets, and none twice in `test`.
        texts = [problem.prompt.removesuffix(self.instruction) for problem in problems]
        hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        by_hash = dict(zip(hashes, problems, strict=True))
        if len(by_hash) < size:
            raise ConfigError(f"task.options: test_size={size}, but there are only {len(by_hash)} different questions")
        chosen = sorted(by_hash)[:size]
        held = set(chosen)
        train = [problem for digest, problem in zip(hashes, problems, strict=True) if digest not in held]
        return [by_hash[digest] for digest in chosen], train


def from_hub(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of the hub as a row of a local file.

    Raises:
        ConfigError: it has no question or no gold answer where they are expected.
    """
    reward, meta, prompt = (row.get(name) or {} for name in ("reward_model", "meta_data", "prompt"))
    gold = reward.get("ground_truth") if isinstance(reward, dict) else None
    text = meta.get("question") if isinstance(meta, dict) else None
    if not text and isinstance(prompt, list) and prompt and isinstance(prompt[-1], dict):
        text = prompt[-1].get("content")
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where} has no question: neither `meta_data.question` nor a message in `prompt`")
    if gold in (None, "", []):
        raise ConfigError(f"{where} has no answer: `reward_model.ground_truth` is {gold!r}")
    text, choices = split_choices(text)
    return {"problem": text, "choices": choices, "answer": gold, "subject": row.get("data_source")}


def split_choices(text: str) -> tuple[str, list[str]]:
    """A question and its lettered choices, one a line from A on; none where there are no two such lines."""
    lines = list(_CHOICE.finditer(text))
    start = max((i for i, line in enumerate(lines) if (line[1] or line[2]) == "A"), default=len(lines))
    choices = []
    for number, line in enumerate(lines[start:]):
        if (line[1] or line[2]) != chr(ord("A") + number):
            break
        choices.append(line[3].strip())
    return (text[: lines[start].start()].strip(), choices) if len(choices) > 1 else (text, [])


def _short_answer(gold: Any, where: str) -> dict[str, Any]:
    accepted = [str(text) for text in gold] if isinstance(gold, list) else [str(gold)]
    if not all(choice.normalise(text) for text in accepted):
        raise ConfigError(f"{where}: the answer {gold!r:.200} has no word and no number to compare")
    return {"text": accepted}
