"""All analyses of one model on given responses, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlattn.analysis.alignment import alignment
from rlattn.analysis.config import AnalysisConfig
from rlattn.analysis.couplings import Coupling, ResponsePeaks, couplings, response_peaks
from rlattn.analysis.generate import Writer
from rlattn.analysis.heads import head_table
from rlattn.analysis.layers import selections
from rlattn.analysis.maps import mean_maps
from rlattn.analysis.measure import Array, Measured, Selected, measure, reduce
from rlattn.analysis.perturbation import PerturbationResult, Site, perturb, summarise
from rlattn.analysis.responses import Response
from rlattn.console import Console


@dataclass(frozen=True)
class Analysis:
    """Everything that is shown and written.

    Attributes:
        responses: n of them.
        measured: per head.
        selected: selection of layers -> its signals.
        peaks: selection -> n responses' peaks.
        couplings: selection -> rows of the couplings table.
        alignment: selection -> pair -> exact, previous, next.
        heads: one row a head.
        sites: every branch of the perturbation study.
        perturbation: its numbers; None where it was left out or no response was long enough.
        maps: index of an example response -> Ā_loc and Ā_glob.
    """

    responses: list[Response]
    measured: Measured
    selected: dict[str, Selected]
    peaks: dict[str, list[ResponsePeaks]]
    couplings: dict[str, list[Coupling]]
    alignment: dict[str, dict[str, list[Coupling]]]
    heads: list[dict[str, Any]]
    sites: list[Site] = field(default_factory=list)
    perturbation: PerturbationResult | None = None
    maps: dict[int, tuple[Array, Array]] = field(default_factory=dict)


def analyze(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    writer: Writer,
    responses: Sequence[Response],
    config: AnalysisConfig,
    context: int,
    console: Console,
) -> Analysis:
    """Measure, count, perturb; `context` is the model's longest sequence, tokens."""
    responses = list(responses)
    chosen = selections(model.config, config.signals)
    with console.count("measuring attention", len(responses)) as step:
        measured = measure(model, responses, sorted({*chosen["all"], *chosen["signals"]}), config, step)
    with console.phase("peaks, couplings, intervals"):
        selected = {name: reduce(measured, layers, config.signals.heads) for name, layers in chosen.items()}
        peaks = {name: response_peaks(own, config.peaks, config.signals.fai_low) for name, own in selected.items()}
        tables = {name: couplings(own, measured.entropy, config.peaks, config.seed) for name, own in peaks.items()}
        aligned = {name: alignment(own, config.seed) for name, own in peaks.items()}
    signals = selected["signals"]
    sites: list[Site] = []
    if config.perturbation.positions:
        with ExitStack() as stack:

            def bar(total: int) -> Callable[[], None]:
                return stack.enter_context(console.count("perturbing", total))

            arguments = (responses, signals.fai, config.signals.fai_low, config.perturbation)
            sites = perturb(model, tokenizer, writer, *arguments, context=context, bar=bar)
    with console.phase("maps"):
        maps = {
            i: mean_maps(model, responses[i], signals.layers, signals.groups, config.display.map_tokens)
            for i in examples(peaks["signals"], config.display.map_examples)
        }
    return Analysis(
        responses,
        measured,
        selected,
        peaks,
        tables,
        aligned,
        head_table(measured, selected),
        sites,
        summarise(sites, responses, config.seed),
        maps,
    )


def examples(peaks: Sequence[ResponsePeaks], count: int) -> list[int]:
    """Responses to draw: the first ones with both kinds of peaks, and of at least median length; else the first."""
    median = sorted(p.length for p in peaks)[len(peaks) // 2]
    fit = [i for i, p in enumerate(peaks) if p.length >= median and len(p.waad) and len(p.fai)]
    return (fit + [i for i in range(len(peaks)) if i not in fit])[:count]
