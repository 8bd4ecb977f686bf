"""Every number of an analysis, again from whole attention maps of Hugging Face's eager attention, by plain loops."""

from __future__ import annotations

import io
from math import floor, inf

import numpy as np
import pytest
import torch
from analysis_naive import naive_peaks
from scipy import stats
from transformers import AutoModelForCausalLM

from rlattn.analysis.analyze import analyze
from rlattn.analysis.config import AnalysisConfig
from rlattn.analysis.generate import Writer
from rlattn.analysis.responses import Response
from rlattn.config import validate
from rlattn.console import Console
from rlattn.kernels import register

LOW, W = 10, 10
LAYERS = {"signals": [2, 3, 4], "all": [0, 1, 2, 3, 4, 5], "bottom": [0, 1], "middle": [2, 3, 4], "top": [5]}


@pytest.fixture(scope="module", params=[None, 25], ids=["to the end", "25 tokens"])
def high(request):
    return request.param


@pytest.fixture(scope="module")
def responses():
    generator = np.random.default_rng(3)
    sizes = [(7, 60), (3, 41), (9, 75), (5, 12), (4, 9), (6, 50)]  # two too short for any FAI peak
    draw = lambda count: generator.integers(2, 97, count).tolist()  # noqa: E731
    return [Response(str(i), "", draw(prompt), draw(answer)) for i, (prompt, answer) in enumerate(sizes)]


@pytest.fixture(scope="module")
def found(model_path, tokenizer, responses, high):
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation=register())
    tree = {"signals": {"fai_high": high}, "perturbation": {"positions": 0}, "tokens_per_batch": 100}
    writer = Writer(model, {0}, 1000)
    return analyze(model, tokenizer, writer, responses, validate(AnalysisConfig, tree), 256, Console(io.StringIO()))


@pytest.fixture(scope="module")
def direct(model_path, responses):
    """Per response: maps [L, H, N, N] fp64 and the logits [N, V] fp64."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        outs = [model(torch.tensor(r.ids)[None], output_attentions=True) for r in responses]
    return [(torch.cat(out.attentions).double().numpy(), out.logits[0].double().numpy()) for out in outs]


@pytest.fixture(scope="module")
def statistics(direct, responses, high):
    """Per response: WAAD and FAI [L, H, R], span, entropy and sink sums [L, H], kurtosis [L, H], token entropy [R]."""
    every = []
    for (maps, logits), response in zip(direct, responses, strict=True):
        p, n = len(response.prompt_ids), len(response.ids)
        distance = np.arange(n)[:, None] - np.arange(n)
        own = {
            "waad": np.stack([(maps[:, :, t] * np.minimum(distance[t], W)).sum(-1) for t in range(p, n)], -1),
            "fai": np.zeros((*maps.shape[:2], n - p)),
            "span": sum((maps[:, :, t] * distance[t]).sum(-1) for t in range(p, n)),
            "attention_entropy": sum(stats.entropy(maps[:, :, t, : t + 1], axis=-1) for t in range(p, n)),
            "sink_mass": sum(maps[:, :, t, 0] for t in range(p, n)),
        }
        for s in range(p, n):
            rows = range(s + LOW, min(n - 1, inf if high is None else s + high) + 1)
            if len(rows):
                own["fai"][:, :, s - p] = np.mean([maps[:, :, t, s] for t in rows], 0)
        defined = own["fai"][..., : max(0, n - p - LOW)]
        varied = defined.shape[-1] and np.ptp(defined)
        peaked = stats.kurtosis(defined, -1, fisher=False, bias=True) if varied else np.zeros(maps.shape[:2])
        own["kurtosis"] = np.nan_to_num(peaked) * (n - p)
        own["entropy"] = stats.entropy(
            np.exp(logits[p - 1 : n - 1] - logits[p - 1 : n - 1].max(-1, keepdims=True)), axis=-1
        )
        every.append(own)
    return every


@pytest.fixture(scope="module")
def pooled(statistics, responses):
    rows = sum(len(r.token_ids) for r in responses)
    return {
        name: sum(own[name] for own in statistics) / rows
        for name in ("span", "attention_entropy", "sink_mass", "kurtosis")
    }


def grouped(pooled, layers):
    """(local, global, receiver) lists of (layer, head), by sorting."""
    heads = [(layer, head) for layer in layers for head in range(4)]
    count = max(1, floor(0.3 * len(heads)))
    local = sorted(heads, key=lambda h: (pooled["span"][h], h))[:count]
    rest = [h for h in heads if h not in local]
    return (
        local,
        sorted(rest, key=lambda h: (-pooled["span"][h], h))[:count],
        sorted(rest, key=lambda h: (-pooled["kurtosis"][h], h))[:count],
    )


def mean_over(values, heads):
    return np.mean([values[h] for h in heads], 0)


def test_means_of_every_head(found, pooled):
    for name, expected in pooled.items():
        np.testing.assert_allclose(getattr(found.measured, name), expected, rtol=1e-4, atol=1e-6, err_msg=name)
    assert pooled["kurtosis"].std() > 0.5  # the heads do differ
    for row in found.heads:
        place = row["layer"], row["head"]
        assert row["span"] == pytest.approx(pooled["span"][place], rel=1e-4)
        assert row["entropy"] == pytest.approx(pooled["attention_entropy"][place], rel=1e-4)
        assert row["sink_mass"] == pytest.approx(pooled["sink_mass"][place], rel=1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_groups_and_signals(found, statistics, pooled, name):
    own, layers = found.selected[name], LAYERS[name]
    assert own.layers == layers
    local, global_, receiver = grouped(pooled, layers)
    place = lambda heads: sorted((layers.index(layer), head) for layer, head in heads)  # noqa: E731
    assert [tuple(x) for x in np.argwhere(own.groups == -1).tolist()] == place(local)
    assert [tuple(x) for x in np.argwhere(own.groups == 1).tolist()] == place(global_)
    assert [tuple(x) for x in np.argwhere(own.receivers).tolist()] == place(receiver)
    for i, values in enumerate(statistics):
        np.testing.assert_allclose(own.waad[i], mean_over(values["waad"], local), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(own.fai[i], mean_over(values["fai"], global_), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(own.receiver_fai[i], mean_over(values["fai"], receiver), rtol=1e-4, atol=1e-7)
        np.testing.assert_allclose(found.measured.entropy[i], values["entropy"], rtol=1e-4, atol=1e-5)


def peaks_of_all(statistics, pooled, layers):
    local, global_, receiver = grouped(pooled, layers)
    every = []
    for values in statistics:
        defined = max(0, values["waad"].shape[-1] - LOW)
        every.append(
            {
                "length": defined,
                "waad": naive_peaks(mean_over(values["waad"], local)),
                "fai": naive_peaks(mean_over(values["fai"], global_)[:defined]),
                "receiver": naive_peaks(mean_over(values["fai"], receiver)[:defined]),
                "entropy": values["entropy"],
            }
        )
    return every


@pytest.mark.parametrize("name", LAYERS)
def test_peaks_couplings_and_alignment(found, statistics, pooled, name):
    every = peaks_of_all(statistics, pooled, LAYERS[name])
    for own, expected in zip(found.peaks[name], every, strict=True):
        for kind in ("waad", "fai", "receiver"):
            assert getattr(own, kind).tolist() == expected[kind]
    assert sum(len(e["fai"]) for e in every) > 20  # there is something to count

    def counted(peaks, anchors, offsets):
        """Share of peaks with an anchor at one of the offsets before them, and its mean over all placements."""
        pairs = [(t, e) for e in every for t in e[peaks]]
        hit = lambda t, e: any(t - o in e[anchors] for o in offsets)  # noqa: E731
        chance = [np.mean([hit(t, e) for t in range(1, e["length"] - 1)]) for _, e in pairs]
        return np.mean([hit(t, e) for t, e in pairs]), np.mean(chance), len(pairs)

    def check(row, observed, chance, count):
        assert row.observed.value == pytest.approx(observed, rel=1e-4)
        assert row.chance.value == pytest.approx(chance, rel=1e-4)
        assert row.lift.value == pytest.approx(observed / chance, rel=1e-4)
        assert row.peaks == count
        assert row.observed.low <= row.observed.value <= row.observed.high

    entropy, receiver, rhythm = found.couplings[name]
    at = [e["entropy"][t] for e in every for t in e["waad"]]
    check(entropy, np.mean(at), np.mean(np.concatenate([e["entropy"] for e in every])), len(at))
    check(receiver, *counted("receiver", "fai", [0]))
    check(rhythm, *counted("fai", "waad", [0, 1]))
    for pair, (peaks, anchors) in zip(
        found.alignment[name].values(), (("fai", "waad"), ("receiver", "fai")), strict=True
    ):
        assert [row.name for row in pair] == ["exact", "previous", "next"]
        for row, offset in zip(pair, (0, 1, -1), strict=True):
            check(row, *counted(peaks, anchors, [offset]))


def test_mean_maps_are_those_of_the_groups(found, direct, pooled):
    local, global_, _ = grouped(pooled, LAYERS["signals"])
    assert len(found.maps) == 2
    for i, own in found.maps.items():
        for values, heads in zip(own, (local, global_), strict=True):
            np.testing.assert_allclose(values, mean_over(direct[i][0], heads), rtol=1e-4, atol=1e-6)
