"""What a study compares: arms (sets of overrides on one base config) times seeds, and how the runs are run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from rlattn.config import ConfigError, Positive, RunConfig, Seconds, Section, load_config, read_tree, validate

OWNED = {"seed": "`seeds`", "output_dir": "`output_dir`"}


class LaunchConfig(Section):
    """How runs are run."""

    mode: Literal["local", "jobs"] = "local"
    """`local`: processes of this machine, each with a Ray of its own. `jobs`: Ray jobs that write into `output_dir` on
    a file system which the cluster shares with this machine."""
    address: str | None = None
    """jobs: of the cluster's job server, such as `http://head:8265`; None means what RAY_API_SERVER_ADDRESS says."""
    at_once: Positive = 1
    """Most runs at a time. Local ones share this machine's cores and GPUs without knowing of each other: let
    `rollout.gpu_memory_utilization` be the share that an engine of one run may take."""
    python: str = "python"
    """jobs: the cluster's interpreter, in whose environment rlattn is installed."""
    runtime_env: dict[str, Any] = Field(default_factory=dict)
    """jobs: Ray's, passed through; such as `{pip: [rlattn-0.1.0-py3-none-any.whl]}`."""
    stall_timeout_s: Seconds = 7200
    """Longest wait for a run's next step, its start included; the run is then stopped and counts as failed."""


class StudyConfig(Section):
    """A whole study."""

    base: str
    """The config that every run starts from: a YAML file or a shipped name."""
    output_dir: Path
    """Each run's folder is `<arm>/seed-<n>` in here; table, report and curves lie beside them."""
    overrides: list[str] = Field(default_factory=list)
    """`key=value` on the base, for every arm."""
    arms: Annotated[dict[str, list[str]], Field(min_length=1)]
    """By name, each arm's own `key=value` overrides; after the common ones."""
    baseline: str
    """The arm that the others are compared with, seed by seed."""
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
    """Of the runs. The grid is run seed by seed, all arms of the first one first: a study cut short is balanced."""
    metric: str = "eval/accuracy"
    """What is compared: this metric of `metrics.jsonl` where a run logged it last."""
    curves: list[str] = Field(default_factory=lambda: ["reward"])
    """Further metrics whose curves are drawn."""
    ema: Annotated[float, Field(gt=0, le=1)] = 0.3
    """a of the smoothed curves, EMA_t = a * max(x_t, EMA_t-1) + (1 - a) * EMA_t-1 [Li 2026]; 1 is the running peak."""
    resamples: Annotated[int, Field(ge=100)] = 10_000
    """Bootstrap draws of each interval."""
    launch: LaunchConfig = LaunchConfig()
    """How runs are run."""

    @field_validator("arms")
    @classmethod
    def _folders(cls, arms: dict[str, list[str]]) -> dict[str, list[str]]:
        for name in arms:
            if not re.fullmatch(r"\w[\w.-]*", name):
                raise ValueError(f"arm {name!r} names a folder; use letters, digits, `_`, `-` and `.`")
        return arms

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if self.baseline not in self.arms:
            raise ValueError(f"`baseline` = {self.baseline!r} is not an arm; arms: {', '.join(self.arms)}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"`seeds` = {self.seeds} names a seed twice")
        for place, items in {"overrides": self.overrides, **self.arms}.items():
            for item in items:
                if owner := OWNED.get(item.partition("=")[0]):
                    raise ValueError(f"{place}: {item!r} is set by the study's {owner}; remove it")
        return self

    @property
    def metrics(self) -> list[str]:
        """What is drawn, the compared one first."""
        return list(dict.fromkeys([self.metric, *self.curves]))


@dataclass(frozen=True)
class Run:
    """One cell of the grid.

    Attributes:
        arm: name.
        seed: of the run.
        base: the base config, as `rlattn train` takes it.
        overrides: on the base; `seed` and `output_dir` among them.
        config: what these resolve to.
    """

    arm: str
    seed: int
    base: str
    overrides: list[str]
    config: RunConfig

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        """Where the run writes."""
        return self.config.output_dir

    def arguments(self) -> list[str]:
        """Of the command `rlattn`, to start this run or to go on with it."""
        resume = ["--resume"] if (self.folder / "config.yaml").is_file() else []
        return ["train", self.base, *self.overrides, *resume]


def load_study(path: str | Path, overrides: list[str] | None = None) -> StudyConfig:
    """Read a study file (or a shipped one, by name), apply overrides and validate.

    Raises:
        ConfigError: one line a problem, each naming the key, its value and what would be accepted.
    """
    return validate(StudyConfig, read_tree(path, overrides, shelf="studies"))


def grid(study: StudyConfig) -> list[Run]:
    """Every run in its order, its config resolved and valid.

    Raises:
        ConfigError: names the arm, and what is wrong with its config.
    """
    runs = []
    for seed in study.seeds:
        for arm, own in study.arms.items():
            folder = study.output_dir / arm / f"seed-{seed}"
            overrides = [*study.overrides, *own, f"seed={seed}", f"output_dir={folder}"]
            try:
                config = load_config(study.base, overrides)
            except ConfigError as error:
                raise ConfigError(f"arm {arm}: {error}") from None
            _check(study, arm, config)
            runs.append(Run(arm, seed, study.base, overrides, config))
    return runs


def _check(study: StudyConfig, arm: str, config: RunConfig) -> None:
    if study.metric.startswith("eval/") and not config.trainer.eval_steps:
        raise ConfigError(f"arm {arm}: trainer.eval_steps=0 never logs `metric` = {study.metric!r}")
    if study.launch.mode == "jobs" and config.ray.address is None:
        raise ConfigError(
            f"arm {arm}: ray.address is null, so each job would start a Ray of its own inside the cluster; "
            "launch.mode=jobs needs `overrides: [ray.address=auto]`"
        )
