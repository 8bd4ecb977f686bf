"""Reward functions by import path, as TRL's users write them."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlattn.config import ConfigError, RewardFunctionConfig

RewardFunction = Callable[..., Any]
"""(prompts, completions, **columns) -> one number, or None where it does not apply, a completion; may be async."""


class RewardError(ValueError):
    """A reward function answered what cannot be a reward of each completion; the message names it."""


def load_function(config: RewardFunctionConfig) -> RewardFunction:
    """The function that `config` names, imported now.

    Raises:
        ConfigError: it cannot be imported, or is no function.
    """
    source, _, name = config.function.rpartition(":")
    where = f"`rewards.functions` {config.function!r}"
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"rlattn_reward_{Path(source).stem}", source)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        function = getattr(module, name)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(f"{where} cannot be imported: {type(error).__name__}: {error}") from None
    if not callable(function):
        raise ConfigError(f"{where} is a {type(function).__name__}, not a function")
    return function


def call(
    function: RewardFunction, label: str, columns: Mapping[str, Sequence[Any]], options: Mapping[str, Any]
) -> list[Any]:
    """What a function says of some completions, awaited where it is async.

    Args:
        function: what to call.
        label: its name in errors.
        columns: keyword arguments with one value a completion; `prompts` and `completions` among them.
        options: further keyword arguments.

    Raises:
        RewardError: the answer is not a list of one value a completion, which would broadcast or shift in silence.
    """
    answer = function(**columns, **options)
    if inspect.isawaitable(answer):
        answer = asyncio.run(_awaited(answer))
    count = len(columns["completions"])
    if isinstance(answer, str) or not hasattr(answer, "__len__"):
        raise RewardError(f"reward function {label!r} returned a {type(answer).__name__}, not a list of {count} values")
    if len(answer) != count:
        raise RewardError(f"reward function {label!r} returned {len(answer)} values for {count} completions")
    return [None if value is None else float(value) for value in answer]


async def _awaited(answer: Any) -> Any:
    return await answer
