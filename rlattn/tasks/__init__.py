"""Tasks: problems, their prompts and their verifiers, one file each."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, create_model

from rlattn import registry
from rlattn.config import ConfigError, Section, TaskConfig, validate
from rlattn.problem import Problem, Verifier


@runtime_checkable
class Task(Protocol):
    """What a run learns or a benchmark asks; subclass it. Built as `TaskClass(options, seed)`, with `options` an
    instance of its `Options`."""

    Options: ClassVar[type[Section]]
    """Schema of `task.options`."""
    samples: ClassVar[int] = 1
    """Completions a problem that `rlattn eval` draws unless told otherwise: k of avg@k."""
    bounded: ClassVar[bool] = False
    """The verifier bounds its own time and memory on any text, so it may run in the driver; others run in processes
    that can be ended."""
    train: list[Problem]
    """Problems that rollouts draw from; may be empty where the task is only a benchmark."""
    test: list[Problem]
    """Problems that evaluation asks; they share none with `train`."""
    verifier: Verifier
    """Judges completions. The reward is `accuracy` (1 where right) plus the verdict's `parts`."""

    def answer_span(self, completion: str) -> tuple[int, int] | None:
        """The characters of a completion that the verifier reads as its answer, first and one after the last.

        Credit `flow` traces what reaches them. None where there is no answer, or the task has no pattern for one.
        """
        return None


@runtime_checkable
class TeachableTask(Task, Protocol):
    """A task that can also write completions for the warm start."""

    def worked_solution(self, problem: Problem, rng: random.Random) -> str:
        """One completion of `problem.prompt` to imitate; it need not be right."""


def load_task(config: TaskConfig, seed: int, *, training: bool = True) -> Task:
    """Build the task that `config` names; without `training` it may lack training problems.

    Raises:
        ConfigError: an option that is unknown or out of bounds, an unusable data file, no problems, or a problem
            without an answer; one line each.
    """
    kind = registry.TASKS.load(config.name)
    schema = _schema(kind.Options)
    tree = validate(schema, {"task": {"options": config.options}})
    task: Task = kind(tree.task.options, seed)  # type: ignore[attr-defined]
    if training and not task.train and "train_file" in kind.Options.model_fields:
        raise ConfigError(f"task {config.name!r} has nothing to train on; give `task.options.train_file`")
    if training:
        check_problems(task.train, f"task {config.name!r}, train")
    check_problems(task.test, f"task {config.name!r}, test")
    return task


def check_problems(problems: Sequence[Problem], where: str) -> None:
    """Refuse a set of problems that cannot be trained or tested on; `where` names it in the error.

    Raises:
        ConfigError: the set is empty, a row has no answer, or two rows have the same id.
    """
    if not problems:
        raise ConfigError(f"{where}: no problems; at least one is needed")
    seen: set[str] = set()
    for row, problem in enumerate(problems):
        if problem.answer is None:
            raise ConfigError(
                f"{where}: row {row} (id {problem.id!r}) has no answer; every row needs one to be verified"
            )
        if problem.id in seen:
            raise ConfigError(f"{where}: row {row} has the id {problem.id!r} of an earlier row; ids must be unique")
        seen.add(problem.id)


def _schema(options: type[Section]) -> type[BaseModel]:
    # Wrapped as they stand in the run's YAML, so that errors name the key a user has to edit.
    inner = create_model("task", options=(options, ...))
    return create_model("run", task=(inner, ...))
