"""What an evaluation asks: its settings, and the benchmarks made from them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from rlattn import registry
from rlattn.config import ConfigError, Positive, Section, TaskConfig, validate
from rlattn.problem import Problem
from rlattn.tasks import Task, load_task


class EvalConfig(Section):
    """Settings of `rlattn eval`."""

    benchmarks: Annotated[list[str], Field(min_length=1)]
    """Names of tasks; their test problems are asked."""
    options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Options of each benchmark's task, as in a run's `task.options`, and `seed`, as in `task.seed`."""
    data: Path | None = None
    """Folder with `<benchmark>.jsonl` files; None takes data sets from the Hugging Face hub."""
    limit: Positive | None = None
    """Only the first so many problems of each benchmark."""
    samples: Positive | None = None
    """Completions a problem (k); None is the benchmark's own: 16 for AIME, else 1."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """Of sampling; None is 0 (greedy) where k is 1 and 1.0 where it is more."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass."""
    max_tokens: Positive | None = None
    """Longest completion; None is what the model's context leaves after the longest prompt, at most 32768."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of sampling: completion j of a problem depends on this, on the problem's id and on j alone."""

    @field_validator("benchmarks")
    @classmethod
    def _known(cls, names: list[str]) -> list[str]:
        for name in names:
            registry.TASKS.check(name)
        if len(set(names)) < len(names):
            raise ValueError("a benchmark is named twice")
        return names


def eval_config(settings: dict[str, Any], benchmarks: list[str]) -> EvalConfig:
    """The settings with these benchmarks.

    Raises:
        ConfigError: one line a problem, each naming the field, its value and what would be accepted.
    """
    return validate(EvalConfig, settings | {"benchmarks": benchmarks})


@dataclass(frozen=True)
class Benchmark:
    """A task's test problems and how they are asked."""

    name: str
    task: Task
    problems: list[Problem]
    samples: int
    temperature: float

    @property
    def data_hash(self) -> str:
        """Of the problems with their prompts and answers: runs of equal hashes compare."""
        rows = [(problem.id, problem.prompt, problem.answer) for problem in self.problems]
        return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def load_benchmarks(config: EvalConfig) -> list[Benchmark]:
    """The benchmarks that `config` names, in its order.

    Raises:
        ConfigError: options that the task refuses, data that is missing or malformed, or k > 1 greedy completions.
    """
    stray = sorted(config.options.keys() - set(config.benchmarks))
    if stray:
        raise ConfigError(f"options for {', '.join(stray)}, which is not among the benchmarks asked for")
    return [_benchmark(name, config) for name in config.benchmarks]


def _benchmark(name: str, config: EvalConfig) -> Benchmark:
    options = dict(config.options.get(name, {}))
    seed = options.pop("seed", 0)
    if config.data is not None and "data" in registry.TASKS.load(name).Options.model_fields:
        options.setdefault("data", config.data)
    try:
        task = load_task(TaskConfig(name=name, options=options), seed, training=False)
    except ConfigError as error:  # options are given by the benchmark's name here
        raise ConfigError(str(error).replace("task.options", name)) from None
    samples = config.samples or task.samples
    temperature = config.temperature if config.temperature is not None else float(samples > 1)
    if samples > 1 and temperature == 0:
        raise ConfigError(f"{name}: {samples} completions a problem at temperature 0 are all alike; use k 1 or sample")
    return Benchmark(name, task, task.test[: config.limit], samples, temperature)
