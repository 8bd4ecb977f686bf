"""Reward functions beside the task's verifier."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from rlattn.config.section import Positive, Seconds, Section


class RewardFunctionConfig(Section):
    """One function with TRL's signature, `(prompts, completions, **columns) -> list[float | None]`, sync or async."""

    function: str
    """`package.module:name`, or `path/to/file.py:name`."""
    name: str | None = None
    """Under which it is logged; None means the function's own."""
    weight: float = 1.0
    """What its values are multiplied by."""
    timeout_s: Seconds = 30
    """Longest wait for one call, which has one prompt's completions."""
    default: float = 0.0
    """Value of a completion on which the function raises, hangs, dies or gives what is not finite."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further keyword arguments."""

    @field_validator("function")
    @classmethod
    def _path(cls, function: str) -> str:
        module, colon, name = function.rpartition(":")
        if not (module and colon and name.isidentifier()):
            raise ValueError("must be `package.module:name` or `path/to/file.py:name`")
        return function

    @property
    def label(self) -> str:
        """The name under which it is logged."""
        return self.name or self.function.rpartition(":")[2]


class RewardsConfig(Section):
    """What a completion is worth: the verifier's parts and those of functions, weighted and summed."""

    verifier_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the task's verifier in training; 0 leaves it to evaluation."""
    functions: list[RewardFunctionConfig] = Field(default_factory=list)
    """Reward functions."""
    workers: Positive = 2
    """Processes that call them."""

    @field_validator("functions")
    @classmethod
    def _distinct(cls, functions: list[RewardFunctionConfig]) -> list[RewardFunctionConfig]:
        labels = [function.label for function in functions]
        twice = {label for label in labels if labels.count(label) > 1}
        if twice:
            raise ValueError(f"two functions are logged as {sorted(twice)[0]!r}; give one of them a `name`")
        return functions
