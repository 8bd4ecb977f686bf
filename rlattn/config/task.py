"""What is learned."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from rlattn import registry
from rlattn.config.section import Section


class TaskConfig(Section):
    """What is learned: problems, prompt and verifier."""

    name: str = "countdown"
    """A built-in task (a file in `rlattn/tasks`) or one installed under the entry point group `rlattn.tasks`."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of generated problems; apart from the run's seed, so that runs of several seeds face the same test."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The task's own options, checked by the task (see its `Options`)."""

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        return registry.TASKS.check(name)
