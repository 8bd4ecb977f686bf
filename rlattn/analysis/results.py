"""What an analysis writes: `analysis.json`, `responses.jsonl`, `plots/` and `analysis.html`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic_core import to_json
from transformers import PreTrainedTokenizerBase

from rlattn.analysis.analyze import Analysis
from rlattn.analysis.config import AnalysisConfig
from rlattn.analysis.layers import SELECTIONS
from rlattn.analysis.page import render
from rlattn.analysis.plots import draw
from rlattn.config import ConfigError
from rlattn.tracking import write_atomically


@dataclass(frozen=True)
class Info:
    """What was analysed, by what, when.

    Attributes:
        name: of the model, for people.
        model: Hugging Face folder or hub id.
        fingerprint: changes when the model does.
        task: whose problems; None where responses were read.
        source: file that responses were read from, or None.
        date: ISO time.
        command: as typed.
        versions: of packages.
        seconds: that it took.
    """

    name: str
    model: str
    fingerprint: str
    task: str | None
    source: str | None
    date: str
    command: str
    versions: dict[str, str]
    seconds: float


def check_folder(folder: Path) -> None:
    """Refuse to write among files that no analysis wrote.

    Raises:
        ConfigError: the folder holds something else.
    """
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / "analysis.json").exists())):
        raise ConfigError(f"{folder} holds something that is no analysis; give another --out")


def write_results(
    folder: Path, analysis: Analysis, config: AnalysisConfig, info: Info, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write everything; each file is replaced whole or left."""
    (folder / "plots").mkdir(parents=True, exist_ok=True)
    numbers = {"info": asdict(info), "settings": config.model_dump(mode="json"), **summary(analysis)}
    lines = response_lines(analysis, tokenizer)
    svgs = {}
    for name, plot in draw(analysis, numbers).items():
        write_atomically(folder / "plots" / f"{name}.png", plot.png)
        write_atomically(folder / "plots" / f"{name}.svg", plot.svg)
        svgs[name] = plot.svg.decode()
    write_atomically(folder / "responses.jsonl", b"".join(to_json(x, inf_nan_mode="null") + b"\n" for x in lines))
    write_atomically(folder / "analysis.html", render(numbers, lines, svgs).encode())
    write_atomically(folder / "analysis.json", to_json(numbers, inf_nan_mode="null", indent=1) + b"\n")


def summary(analysis: Analysis) -> dict[str, Any]:
    """The numbers over all responses, JSON-able but for NaN (undefined)."""
    lengths = [len(response.token_ids) for response in analysis.responses]
    return {
        "responses": len(lengths),
        "tokens": sum(lengths),
        "entropy": float(np.concatenate(analysis.measured.entropy).mean()),
        "selections": {
            name: {
                "title": SELECTIONS[name],
                "layers": own.layers,
                "groups": own.groups.tolist(),
                "receivers": own.receivers.tolist(),
                "receivers_among_global": int((own.receivers & (own.groups == 1)).sum()),
                "peaks": {
                    kind: sum(len(getattr(p, kind)) for p in analysis.peaks[name])
                    for kind in ("waad", "fai", "receiver")
                },
                "couplings": [asdict(row) for row in analysis.couplings[name]],
                "alignment": {pair: [asdict(r) for r in rows] for pair, rows in analysis.alignment[name].items()},
            }
            for name, own in analysis.selected.items()
        },
        "heads": analysis.heads,
        "perturbation": analysis.perturbation and asdict(analysis.perturbation),
        "examples": list(analysis.maps),
    }


def response_lines(analysis: Analysis, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """One object a response: its tokens with their signals (of the layers that training listens to), peaks, branches.

    `rlattn analyze --responses` reads them again.
    """
    signals, peaks = analysis.selected["signals"], analysis.peaks["signals"]
    lines = []
    for i, response in enumerate(analysis.responses):
        pieces: Sequence[str] = tokenizer.batch_decode([[token] for token in response.token_ids])
        lines.append(
            {
                "problem_id": response.id,
                "prompt": response.prompt,
                "prompt_ids": response.prompt_ids,
                "token_ids": response.token_ids,
                "tokens": pieces,
                "waad": signals.waad[i].tolist(),
                "fai": signals.fai[i].tolist(),
                "receiver_fai": signals.receiver_fai[i].tolist(),
                "entropy": analysis.measured.entropy[i].tolist(),
                "waad_peaks": peaks[i].waad.tolist(),
                "fai_peaks": peaks[i].fai.tolist(),
                "receiver_peaks": peaks[i].receiver.tolist(),
                "fai_length": peaks[i].fai_length,
                "branches": [asdict(site) for site in analysis.sites if site.response == i],
            }
        )
    return lines
