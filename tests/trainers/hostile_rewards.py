"""Reward functions that a run must survive."""

import os
import time


def length(completions, answer, scale=1, **_):
    assert len(answer) == len(completions)
    return [scale * len(text) for text in completions]


async def later(completions, **_):
    return [1.0 if "good" in text else None for text in completions]


def raising(completions, **_):
    if any("bad" in text for text in completions):
        raise RuntimeError("cannot read this")
    return [1.0] * len(completions)


def hanging(completions, **_):
    if any("bad" in text for text in completions):
        time.sleep(600)
    return [1.0] * len(completions)


def dying(completions, **_):
    if any("bad" in text for text in completions):
        os._exit(3)
    return [1.0] * len(completions)


def infinite(completions, **_):
    return [float("inf") if "bad" in text else 1.0 for text in completions]


def short(completions, **_):
    return [1.0]
