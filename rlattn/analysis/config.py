"""Settings of `rlattn analyze`: one pydantic tree, from the command's arguments and `key=value` overrides."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from rlattn.config import Positive, Section, SignalsConfig, TaskConfig


class PeaksConfig(Section):
    """What counts as a peak, and how far apart two peaks may be that belong together."""

    prominence: Annotated[float, Field(ge=0)] = 0.5
    """Of `scipy.signal.find_peaks`, in standard deviations of the response's own values."""
    coincide: Annotated[int, Field(ge=0)] = 0
    """A receiver-head peak coincides with a global-head peak at most so many tokens away."""
    follow: Annotated[int, Field(ge=0)] = 1
    """An FAI peak follows or coincides with a WAAD peak at the same token or at most so many tokens earlier."""


class PerturbationConfig(Section):
    """The perturbation study [Li 2026, Table 1]."""

    positions: Annotated[int, Field(ge=0)] = 3
    """Positions of highest, and as many of lowest, FAI in each response; 0 leaves the study out."""
    top_k: Annotated[int, Field(ge=2)] = 4
    """Most likely tokens that are forced, each in turn, at such a position."""
    max_tokens: Positive = 128
    """Greedy continuation after a forced token."""


class GenerationConfig(Section):
    """How responses are made where none are given."""

    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    """Of sampling; 0 is greedy. Entropies are measured at this temperature (at 1 where it is 0)."""
    max_tokens: Positive | None = None
    """Longest response; None is what the model's context leaves after the longest prompt, at most 1024. Where responses
    are read, what goes beyond is cut; None cuts nothing."""


class DisplayConfig(Section):
    """What the page shows; nothing here changes a number."""

    map_examples: Annotated[int, Field(ge=0, le=10)] = 2
    """Responses whose attention maps and curves are drawn."""
    map_tokens: Annotated[int, Field(ge=16, le=4096)] = 512
    """Longest sequence that a map is drawn of; of a longer one only the start."""


class AnalysisConfig(Section):
    """Settings of one analysis."""

    n: Positive = 70
    """Responses: of the first n test problems, or the first n of a file."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of sampling, and of the bootstrap."""
    task: TaskConfig | None = None
    """Whose test problems are answered; None where responses are read."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Parameter type; None is bfloat16 on a GPU and float32 elsewhere."""
    signals: SignalsConfig = SignalsConfig(fai_high=None)
    """Attention statistics; as in a run, but FAI reaches to the end of the response [Li 2026, the analyses]."""
    peaks: PeaksConfig = PeaksConfig()
    """Peaks of WAAD and FAI."""
    perturbation: PerturbationConfig = PerturbationConfig()
    """The perturbation study."""
    generation: GenerationConfig = GenerationConfig()
    """Responses."""
    display: DisplayConfig = DisplayConfig()
    """The page."""
    tokens_per_batch: Positive = 16384
    """Tokens in one packed forward, and in one batch of generation; a longer sequence has one of its own."""

    @property
    def entropy_temperature(self) -> float:
        """What logits are divided by where entropies are measured."""
        return self.generation.temperature or 1.0


def default_folder(name: str, key: str) -> Path:
    """`runs/analysis/<name>-<key>`: other settings, or another model of that name, have a folder of their own."""
    return Path("runs/analysis") / f"{name.replace('/', '--')}-{key}"
