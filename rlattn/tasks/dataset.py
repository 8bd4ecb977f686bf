"""Any data set as a task: where its rows are, how a row becomes a prompt, what judges the answer."""

from __future__ import annotations

from pathlib import Path
from pkgutil import resolve_name
from typing import Any, ClassVar, Literal

from rlattn.config import ConfigError, Section
from rlattn.problem import Problem, Verdict, Verifier
from rlattn.tasks import Task
from rlattn.tasks.rows import READERS, read_file, read_hub
from rlattn.verifiers import math


class DatasetOptions(Section):
    """Options of `dataset`.

    A source is a JSON-lines or parquet file, `package.module:generator` (a function that yields rows), or a data set of
    the Hugging Face hub as `owner/name`, `owner/name:split` or `owner/name:subset:split`.
    """

    train: str | None = None
    """Source of the problems that rollouts draw from."""
    test: str
    """Source of the problems that evaluation asks."""
    prompt: str = "{problem}"
    """What the model sees, with a row's columns in braces; `{prompt[0][content]}` reaches into lists and mappings."""
    chat: bool = True
    """Wrap it in the tokenizer's chat template, where it has one."""
    answer: str = "answer"
    """Column with the gold answer, or a template like `prompt`; read only by a verifier."""
    verifier: Literal["math", "none"] | str = "math"
    """`math` (a final answer, boxed or stated), `none` (reward functions alone), or `package.module:function`, called
    as (answer, completion) -> Verdict."""
    limit: int | None = None
    """Only the first so many test problems."""


class Dataset(Task):
    """Problems of a data set, in its order.

    Raises:
        ConfigError: a source that cannot be read, a column that a row lacks, or an unknown verifier.
    """

    Options: ClassVar[type[DatasetOptions]] = DatasetOptions
    verifier: Verifier

    def __init__(self, options: DatasetOptions, seed: int) -> None:
        self.options = options
        self.verifier = _verifier(options.verifier)
        self.test = self._problems("test", read_source(options.test)[: options.limit])
        self.train = self._problems("train", read_source(options.train)) if options.train else []

    def _problems(self, part: str, rows: list[dict[str, Any]]) -> list[Problem]:
        return [self._problem(part, index, row) for index, row in enumerate(rows)]

    def _problem(self, part: str, index: int, row: dict[str, Any]) -> Problem:
        options, where = self.options, f"task 'dataset', {part} row {index + 1}"
        prompt = _filled(options.prompt, row, where, "prompt")
        answer = "" if options.verifier == "none" else _filled(_template(options.answer), row, where, "answer")
        return Problem(str(row.get("id", f"{part}-{index}")), prompt, answer, chat=options.chat, columns=row)


def read_source(source: str) -> list[dict[str, Any]]:
    """Rows of a file, a generator or a hub data set, see `DatasetOptions`.

    Raises:
        ConfigError: it cannot be read.
    """
    if Path(source).suffix in READERS or Path(source).exists():
        return read_file(Path(source))
    if ":" in source and "/" not in source:
        try:
            return [dict(row) for row in resolve_name(source)()]
        except Exception as error:  # whatever the user's generator raises
            raise ConfigError(f"cannot generate rows by {source!r}: {type(error).__name__}: {error}") from None
    name, *rest = source.split(":")
    return read_hub(name, rest[0] if len(rest) > 1 else None, rest[-1] if rest else "train")


def _template(column: str) -> str:
    return column if "{" in column else f"{{{column}}}"


def _filled(template: str, row: dict[str, Any], where: str, option: str) -> str:
    try:
        text = template.format(**row)
    except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{where}: `{option}` = {template!r} needs {error}, which the row lacks; it has {', '.join(row)}"
        ) from None
    if not text or text == "None":
        raise ConfigError(f"{where}: `{option}` = {template!r} is empty")
    return text


def unjudged(answer: Any, completion: str) -> Verdict:
    """Nothing is right or wrong: reward functions say what a completion is worth."""
    return Verdict(False, None, None, "", "no verifier")


def _verifier(name: str) -> Verifier:
    if name in ("math", "none"):
        return math.judge if name == "math" else unjudged
    try:
        return resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"`task.options.verifier` = {name!r}: {error}; accepted: math, none or package.module:function"
        ) from None
