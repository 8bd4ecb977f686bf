"""The pages that rlattn writes, opened from disk in a real browser."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from rlattn.analysis.page import render
from rlattn.evaluation.records import Record, RecordFile, Sample, samples_path
from rlattn.evaluation.results import RunInfo, summarise, write_results
from rlattn.problem import Verdict
from rlattn.report import write_report
from rlattn.tracking import CompletionRecord, Tracker
from tests.browser import CHROMIUM, chromium

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")

NASTY = [
    "</script><script>throw 1</script>",
    "<img src=http://example.com/x onerror=alert(1)>",
    "\u2028",
    "]]>",
    "&lt;",
]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("profile")) as page:
        yield page


def opened(page, file: Path):
    page.requests.clear()
    page.complaints.clear()
    page.open(file)
    return page


def is_clean(page) -> None:
    assert page.complaints == []
    assert page.requests
    assert all(url.startswith(("file:", "data:")) for url in page.requests), page.requests


def test_the_check_sees_requests_and_errors(page, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><img src='http://127.0.0.1:9/x.png'><script>console.error('oh'); "
        "setTimeout(() => { throw new Error('thrown'); });</script>"
    )
    opened(page, bad)
    assert "http://127.0.0.1:9/x.png" in page.requests
    said = " ".join(page.complaints)
    assert "oh" in said
    assert "thrown" in said


TOKEN = "document.querySelectorAll('.tokens span')[{}]"
TIP = "document.getElementById('tip').hidden ? null : document.getElementById('tip').innerText"


def shades(page) -> list[float]:
    return page.evaluate("[...document.querySelectorAll('.tokens span')].map(s => +s.style.getPropertyValue('--p'))")


def short(value: float) -> float:
    return float(f"{value:.3g}")


def test_the_analysis_page(page, analysed):
    opened(page, analysed / "analysis.html")
    data = page.evaluate("data")
    chosen = data["examples"][0]
    item = json.loads((analysed / "responses.jsonl").read_text().splitlines()[chosen])
    assert page.evaluate("[...document.querySelectorAll('.tokens span')].map(s => s.textContent)") == item["tokens"]
    assert page.evaluate("document.querySelectorAll('.plot svg').length") == 9
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")  # nothing sticks out

    place = item["fai_peaks"][0]
    assert page.evaluate(TIP) is None
    page.move(TOKEN.format(place))
    tip = page.evaluate(TIP)
    for name, key in (("FAI", "fai"), ("WAAD", "waad"), ("entropy", "entropy")):
        shown = next(line.split()[-1] for line in tip.splitlines() if line.startswith(name))
        assert float(shown) == pytest.approx(short(item[key][place]), rel=2e-3), tip
    assert f"{place + 1} of {len(item['tokens'])}" in tip
    assert "peak of" in tip
    page.move("document.querySelector('h1')")
    assert page.evaluate(TIP) is None

    page.evaluate(f"{TOKEN.format(0)}.focus()")
    assert f"1 of {len(item['tokens'])}" in page.evaluate(TIP)
    page.press("ArrowRight")
    assert f"2 of {len(item['tokens'])}" in page.evaluate(TIP)
    page.press("ArrowLeft")
    assert f"1 of {len(item['tokens'])}" in page.evaluate(TIP)

    seen = {"fai": shades(page)}
    for key in ("waad", "entropy"):
        page.click(f"document.querySelector('input[value={key}]')")
        assert page.evaluate("document.querySelector('input[name=signal]:checked').value") == key
        seen[key] = shades(page)
    for key, values in seen.items():
        assert len(values) == len(item["tokens"])
        darkest, own = max(range(len(values)), key=values.__getitem__), item[key]
        assert own[darkest] >= sorted(own)[int(0.98 * (len(own) - 1))] * 0.99, key
        order = sorted(range(len(own)), key=own.__getitem__)
        assert all(values[a] <= values[b] + 2e-3 for a, b in itertools.pairwise(order)), key  # darker is more
    background = "getComputedStyle({}).backgroundColor"
    dark, light = (seen["entropy"].index(f(seen["entropy"])) for f in (max, min))
    assert page.evaluate(background.format(TOKEN.format(dark))) != page.evaluate(background.format(TOKEN.format(light)))

    other = (chosen + 1) % len(data["items"])
    page.evaluate(
        f"(s => {{ s.value = {other}; s.dispatchEvent(new Event('change')); }})(document.querySelector('select'))"
    )
    assert page.evaluate("document.querySelectorAll('.tokens span').length") == len(data["items"][other]["tokens"])
    page.settle()
    is_clean(page)


def test_an_analysis_with_hostile_text_and_without_peaks(page, analysed, tmp_path):
    numbers = json.loads((analysed / "analysis.json").read_text())
    line = json.loads((analysed / "responses.jsonl").read_text().splitlines()[0])
    none = {"value": None, "low": None, "high": None}
    for own in numbers["selections"].values():
        for row in [*own["couplings"], *(row for rows in own["alignment"].values() for row in rows)]:
            row |= {"observed": none, "chance": none, "lift": none, "peaks": 0}
    numbers |= {"perturbation": None, "examples": []}
    numbers["info"]["name"] = NASTY[0]
    line |= {
        "tokens": NASTY,
        "prompt": NASTY[1],
        "problem_id": NASTY[0],
        "waad_peaks": [],
        "fai_peaks": [],
        "fai_length": 0,
    }
    line |= {name: line[name][: len(NASTY)] for name in ("waad", "fai", "entropy")}
    file = tmp_path / "hostile.html"
    file.write_text(render(numbers, [line], {}), encoding="utf-8")
    opened(page, file)
    assert page.evaluate("document.querySelector('h1').textContent") == NASTY[0]
    assert page.evaluate("document.querySelectorAll('.tokens span').length") == len(NASTY)
    page.move(TOKEN.format(0))
    assert "none" in page.evaluate(TIP)
    is_clean(page)


def test_a_page_over_its_limit_keeps_the_first_responses_and_says_so(page, analysed, tmp_path):
    numbers = json.loads((analysed / "analysis.json").read_text())
    lines = [json.loads(line) for line in (analysed / "responses.jsonl").read_text().splitlines()]
    one = len(render(numbers, lines[:1], {})) - len(render(numbers, [], {}))
    file = tmp_path / "cut.html"
    file.write_text(render(numbers, lines, {}, limit=one + 10), encoding="utf-8")
    opened(page, file)
    assert page.evaluate("data.items.length") == 1
    assert f"{len(lines) - 1} more responses" in page.evaluate("document.body.innerText")
    is_clean(page)


def test_the_report_of_a_run(page, tmp_path):
    tracker = Tracker(tmp_path)
    for step in range(4):
        tracker.log(
            step, {"reward": step / 4, "entropy": 1.5 - step / 4, "eval/accuracy": step / 5, "timing_s/generate": 1.0}
        )
    signals = {key: [0.1, 0.5, 0.2, 0.4, 0.3] for key in ("waad", "fai", "gamma", "entropy")}
    tracker.log_completions(
        3, "eval", [CompletionRecord("prompt", "p", 1.0, 0.5, False, NASTY, **signals, policy_version=3)]
    )
    opened(page, write_report(tmp_path))
    page.move(TOKEN.format(1))
    assert "0.5" in page.evaluate(TIP)
    is_clean(page)


def test_the_results_of_an_evaluation(page, tmp_path):
    header = {"benchmark": "toy", "model": "m", "k": 1, "temperature": 0.0, "problems": 2, "data_hash": "abc"}
    records = [
        Record(str(i), None, NASTY[1], [Sample(NASTY[0], 9, False, Verdict(i == 0, "7", "7", "7", NASTY[1]))])
        for i in range(2)
    ]
    with RecordFile(samples_path(tmp_path, "toy"), header) as file:
        for record in records:
            file.add(record)
    info = RunInfo("m", "2026-01-05T10:20:30+00:00", "rlattn eval", {"rlattn": "0"}, 1.0)
    write_results(tmp_path, [summarise("toy", records, 2, header)], info)
    opened(page, tmp_path / "results.html")
    assert "toy" in page.evaluate("document.body.innerText")
    is_clean(page)
