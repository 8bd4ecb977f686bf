"""An analysis as one page: `analysis.html`, self-contained, from the template of that name and the numbers.

It holds at most `LIMIT` bytes of responses: where they are more, the first ones, and the page says so. The numbers are
those of all of them, and `responses.jsonl` has every one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from pydantic_core import to_json

from rlattn.report import embed, short

LIMIT = 16_000_000
_PLACE = "__RLATTN_DATA__"
_SHOWN = (
    "problem_id",
    "prompt",
    "tokens",
    "waad",
    "fai",
    "entropy",
    "waad_peaks",
    "fai_peaks",
    "fai_length",
    "branches",
)
# matplotlib's inks (plots.py) to the page's own, so that a figure is dark where the page is.
_INKS = {
    "#1b1d21": "var(--ink)",
    "#5a6069": "var(--soft)",
    "#e1e1dc": "var(--rule)",
    "#1f5fae": "var(--line)",
    "#c2570c": "var(--second)",
    "#2f7d4f": "var(--third)",
}


def render(numbers: dict[str, Any], lines: Sequence[dict[str, Any]], svgs: dict[str, str], limit: int = LIMIT) -> str:
    """The page's text, in ASCII beyond the template."""
    shown, size = [], 0
    for line in lines:
        item = short(_plain({name: line[name] for name in _SHOWN}), 4)
        size += len(embed(item))
        if size > limit:
            break
        shown.append(item)
    data = short(_plain(numbers), 6) | {
        "items": shown,
        "left_out": len(lines) - len(shown),
        "plots": {name: inline(svg) for name, svg in svgs.items()},
    }
    template = files("rlattn").joinpath("analysis.html").read_text(encoding="utf-8")
    return template.replace(_PLACE, embed(data))


def inline(svg: str) -> str:
    """A figure's `<svg>` element alone, in the page's inks, without what only a file of its own needs."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.S)
    for ink, variable in _INKS.items():
        svg = svg.replace(ink, variable)
    return svg


def _plain(value: Any) -> Any:
    return json.loads(to_json(value, inf_nan_mode="null"))
