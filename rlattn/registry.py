"""Names to code, loaded when used: built-in files first, then what other packages install as entry points."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Registry:
    """One kind of named, replaceable part. `builtin` maps a name to `module:attribute`."""

    kind: str
    group: str
    builtin: dict[str, str]

    def names(self) -> list[str]:
        """Every known name, built-in ones first."""
        return [*self.builtin, *(e.name for e in entry_points(group=self.group) if e.name not in self.builtin)]

    def check(self, name: str) -> str:
        """Return `name`, or raise a ValueError that lists what would be accepted."""
        if name in self.builtin or name in self.names():  # looking through installed packages takes 10 ms
            return name
        close = difflib.get_close_matches(name, self.names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"no {self.kind} called {name!r}; {hint}known: {', '.join(self.names())}")

    def load(self, name: str) -> Any:
        """The object behind a name, imported now."""
        self.check(name)
        if name in self.builtin:
            return resolve_name(self.builtin[name])
        return next(e for e in entry_points(group=self.group) if e.name == name).load()


def _files(package: str, *names: str) -> dict[str, str]:
    return {name: f"rlattn.{package}.{name}:{name}" for name in names}


CREDIT = Registry(
    "credit strategy",
    "rlattn.credit",
    _files(
        "credit",
        "uniform",
        "random",
        "shuffled",
        "position",
        "entropy",
        "entropy_selection",
        "reweight",
        "column_mean",
        "local_chunk",
        "global_anchor",
        "coupled_rhythm",
        "flow",
    ),
)
LOSSES = Registry(
    "loss_type", "rlattn.losses", _files("losses", "grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
)
TASKS = Registry(
    "task",
    "rlattn.tasks",
    {
        "countdown": "rlattn.tasks.countdown:Countdown",
        "dataset": "rlattn.tasks.dataset:Dataset",
        "zebralogic": "rlattn.tasks.zebralogic:ZebraLogic",
        "aime24": "rlattn.tasks.aime24:AIME24",
        "aime25": "rlattn.tasks.aime25:AIME25",
        "amc23": "rlattn.tasks.amc23:AMC23",
        "math500": "rlattn.tasks.math500:MATH500",
        "olympiadbench": "rlattn.tasks.olympiadbench:OlympiadBench",
        "minerva_math": "rlattn.tasks.minerva_math:MinervaMath",
        "gsm8k": "rlattn.tasks.gsm8k:GSM8K",
        "mmlu_stem": "rlattn.tasks.mmlu_stem:MMLUStem",
        "crossthink_qa": "rlattn.tasks.crossthink_qa:CrossThinkQA",
    },
)
