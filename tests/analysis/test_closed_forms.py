"""The pure functions of an analysis against what a hand or a loop says."""

from __future__ import annotations

import json

import numpy as np
import pytest
from analysis_naive import naive_peaks

from rlattn.analysis.bootstrap import interval, ratio
from rlattn.analysis.couplings import meet, share
from rlattn.analysis.layers import selections
from rlattn.analysis.peaks import fai_length, peaks_of
from rlattn.analysis.perturbation import Site, content_words, extremes, jaccard, similarity, summarise
from rlattn.analysis.responses import Response, read_responses
from rlattn.config import ConfigError, SignalsConfig
from tests.make import tiny_qwen3


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("prominence", [0, 0.5, 2])
def test_peaks_are_what_the_definition_says(seed, prominence):
    values = np.random.default_rng(seed).normal(size=80)
    assert peaks_of(values, prominence).tolist() == naive_peaks(values, prominence)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0], [1.0] * 9, [1.0, 2.0, 3.0]])
def test_no_peaks_without_a_middle_that_stands_out(values):
    assert len(peaks_of(np.array(values), 0.5)) == 0


def test_fai_is_defined_where_a_row_is_far_enough():
    assert [fai_length(length, 10) for length in (0, 10, 11, 30)] == [0, 0, 1, 20]


def test_chance_is_the_mean_over_every_placement_and_every_circular_shift():
    length, peaks, anchors, offsets = 30, np.array([4, 9, 17]), np.array([3, 8, 16, 22, 29]), (0, 1)
    hits, expected = meet(peaks, anchors, offsets, length)
    assert hits == 3  # each stands right behind an anchor
    placed = [meet(np.array([t]), anchors, offsets, length)[0] for t in range(1, length - 1)]
    assert expected == pytest.approx(3 * np.mean(placed))
    turned = [meet((peaks - 1 + s) % (length - 2) + 1, anchors, offsets, length)[0] for s in range(length - 2)]
    assert expected == pytest.approx(np.mean(turned))


def test_random_peaks_have_a_lift_of_one_and_bound_ones_have_more():
    rng = np.random.default_rng(0)
    draw = lambda: np.sort(rng.choice(np.arange(1, 199), 30, replace=False))  # noqa: E731
    free = share("free", [(draw(), draw(), 200) for _ in range(60)], [0], 0)
    assert free.lift.low < 1 < free.lift.high
    same = share("same", [(x := draw(), x, 200) for _ in range(60)], [0], 0)
    assert same.observed.value == 1
    assert same.lift.low > 6


def test_without_peaks_shares_are_undefined_and_nothing_warns(recwarn):
    none = np.empty(0, dtype=np.int64)
    row = share("none", [(none, none, 0), (none, none, 12)], [0], 0)
    assert all(np.isnan(x.value) for x in (row.observed, row.chance, row.lift))
    assert not recwarn.list


def test_interval_of_a_mean_is_the_normal_one_and_follows_the_seed():
    values = np.random.default_rng(1).normal(3, 2, 400)
    got = ratio(values, np.ones(400), 0)
    half = 1.96 * values.std() / 20
    assert got.value == pytest.approx(values.mean())
    assert (got.low, got.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert ratio(values, np.ones(400), 0) == got != ratio(values, np.ones(400), 1)
    assert interval([[2.0] * 9, [4.0] * 9], lambda s: s[0] / s[1], 0).low == 0.5  # nothing varies: no width


def test_thirds_are_the_ranges_of_the_signals():
    config = tiny_qwen3(num_hidden_layers=12).config
    assert selections(config, SignalsConfig(layers=[1, 5])) == {
        "signals": [1, 5],
        "all": list(range(12)),
        "bottom": [0, 1, 2, 3],
        "middle": [4, 5, 6, 7, 8],
        "top": [9, 10, 11],
    }


def test_content_words():
    assert content_words("The answer is 3.5 + 12, don't you see? SEE!") == {"answer", "3.5", "12", "don't", "see"}
    assert content_words(" =15 ~22 </think>") == {"15", "22", "think"}
    assert content_words("of the and") == set()


def test_jaccard_and_similarity():
    assert jaccard({"a", "b"}, {"b", "c"}) == 1 / 3
    assert jaccard(set(), set()) == 1
    assert jaccard(set(), {"a"}) == 0
    assert similarity(["3 4", "3 5", "3 4"]) == pytest.approx((1 / 3 + 1 + 1 / 3) / 3)


def test_extremes_leave_out_where_fai_is_undefined_and_never_overlap():
    fai = np.array([5, 1, 5, 3, 2, 0, 0, 0], dtype=np.float32)  # H_lo = 3: the last three have none
    assert extremes(fai, 3, 2) == {"top": [0, 2], "bottom": [1, 4]}
    assert extremes(fai, 3, 9) == {"top": [0, 2], "bottom": [1, 4]}  # five positions make two pairs
    assert extremes(fai, 7, 2) == {"top": [], "bottom": []}
    assert extremes(np.ones(6), 2, 2) == {"top": [0, 1], "bottom": [2, 3]}  # ties to the lower index


def test_the_studys_numbers():
    responses = [Response(str(i), "", [1], [1] * 10) for i in range(8)]
    values = [(0.1, 0.5)] * 6 + [(0.5, 0.5), (0.9, 0.5)]
    sites = [
        Site(i, position, kind, [], [], value)
        for i, pair in enumerate(values)
        for kind, position, value in (("top", 2, pair[0]), ("bottom", 6, pair[1]))
    ]
    result = summarise(sites, responses, 0)
    assert result.top.value == pytest.approx(np.mean([v[0] for v in values]))
    assert result.share.value == 6 / 8
    assert (result.ties, result.responses) == (1, 8)
    assert result.place == {"top": pytest.approx(0.2), "bottom": pytest.approx(0.6)}
    assert result.sign_p_value == pytest.approx(2 * (1 + 7) / 2**7)  # 6 or more of 7 heads, both sides
    assert result.p_value == pytest.approx(0.125)  # equal sizes: the same test
    assert summarise([], responses, 0) is None


LINES = [
    {"step": 1, "kind": "train", "prompt": "ab", "problem_id": "p", "tokens": ["c", "d"], "waad": [0, 0]},
    {"id": "q", "prompt": "ab", "samples": [{"text": "cd", "truncated": False}, {"text": "c", "truncated": True}]},
    {"prompt": "ab", "prompt_ids": [5], "token_ids": [6, 7, 8]},
    {"prompt": "ab", "completion": "d"},
]


def written(tmp_path, *lines):
    file = tmp_path / "lines.jsonl"
    file.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return file


def test_responses_are_read_as_runs_evaluations_and_analyses_write_them(tmp_path, tokenizer):
    ids = lambda text: tokenizer(text)["input_ids"]  # noqa: E731
    file = written(tmp_path, {"benchmark": "x", "samples": 2}, *LINES)
    found = read_responses(file, tokenizer, 10, None)
    assert [(r.id, r.prompt_ids, r.token_ids) for r in found] == [
        ("p", ids("ab"), ids("cd")),
        ("q", ids("ab"), [*ids("cd"), 0]),
        ("q", ids("ab"), ids("c")),
        ("line-4", [5], [6, 7, 8]),
        ("line-5", ids("ab"), ids("d")),
    ]
    assert [r.token_ids for r in read_responses(file, tokenizer, 4, 2)] == [ids("cd"), ids("cd"), ids("c"), [6, 7]]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1: is not JSON"),
        ("[]", "line 1"),
        ({"completion": "x"}, "line 1: lacks 'prompt'.*prompt_ids"),
        ({"prompt": "x"}, "line 1: lacks 'completion'"),
        ({"prompt": "x", "completion": ""}, r"line 1: .*0..96"),
        ({"prompt": "x", "prompt_ids": [1], "token_ids": [97]}, r"line 1: .*0..96"),
        ({"prompt": 3, "completion": "x"}, "line 1"),
        ("", "holds no responses"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused_by_line(tmp_path, tokenizer, line, says):
    with pytest.raises(ConfigError, match=says):
        read_responses(written(tmp_path, line), tokenizer, 10, None)
