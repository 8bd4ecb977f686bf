"""Head groups and reduction on hand-made rows, and that neither packing nor sharding changes them."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kurtosis as kurtosis_of

from rlattn.config import HeadsConfig, SignalsConfig
from rlattn.kernels import AttentionStatistics
from rlattn.signals import (
    GLOBAL,
    LOCAL,
    SignalRows,
    group_mean,
    head_groups,
    kurtosis,
    reduce_rows,
    reduce_signals,
    reusable_groups,
    signal_metrics,
    trains_in_one_forward,
)
from rlattn.types import Signals
from tests.make import make_rollouts

LAYERS, HEADS = [3, 5], 5
PROMPTS, RESPONSES = [2, 4, 1, 3], [6, 3, 0, 9]


def test_head_groups_by_hand():
    span = torch.tensor([[5.0, 1.0, 9.0, 2.0, 7.0], [3.0, 8.0, 0.5, 6.0, 4.0]])
    assert head_groups(span, 0.3).tolist() == [[0, -1, 1, -1, 1], [0, 1, -1, 0, 0]]
    assert head_groups(span, 0.5).unique().tolist() == [-1, 1]
    assert head_groups(span, 0.01).abs().sum() == 2  # at least one each
    assert head_groups(span, 0.3).dtype == torch.int8


def test_head_group_ties_go_to_the_lower_head_and_local_first():
    assert head_groups(torch.ones(2, 3), 0.34).tolist() == [[-1, -1, 1], [1, 0, 0]]
    assert head_groups(torch.tensor([[2.0, 1, 2, 1, 2]]), 0.2).tolist() == [[1, -1, 0, 0, 0]]


@given(st.integers(1, 6), st.integers(1, 8), st.floats(0.01, 0.5), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_head_groups_are_disjoint_equal_and_ordered(layers, heads, fraction, seed):
    if layers * heads < 2:
        return
    span = torch.randint(0, 5, (layers, heads), generator=torch.Generator().manual_seed(seed)).float()
    groups = head_groups(span, fraction)
    count = max(1, int(fraction * layers * heads + 1e-9))
    assert (groups == LOCAL).sum() == (groups == GLOBAL).sum() == count
    middle = span[groups == 0]
    assert span[groups == LOCAL].max() <= span[groups == GLOBAL].min()
    assert (
        not len(middle) or span[groups == LOCAL].max() <= middle.min() <= middle.max() <= span[groups == GLOBAL].min()
    )
    assert torch.equal(head_groups(torch.stack([span, span.flip(1)]), fraction)[0], groups)


@pytest.mark.parametrize(
    ("span", "fraction", "message"),
    [
        (torch.ones(1, 1), 0.3, "1 captured heads"),
        (torch.ones(2, 2), 0.6, "share 0.6"),
        (torch.tensor([[1.0, torch.nan]]), 0.3, "not finite"),
    ],
)
def test_head_groups_bad_input(span, fraction, message):
    with pytest.raises(ValueError, match=message):
        head_groups(span, fraction)


def test_mean_of_per_head_values_is_the_value_of_the_mean_map():
    """WAAD and FAI of the mean map [Li 2026, eq. 8-10] against means of per-head values."""
    maps = torch.randn(1, 4, 9, 9).masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1)  # [L, H, N, N]
    groups = torch.tensor([[-1, 1, -1, 1]])
    distance = torch.arange(9)[:, None] - torch.arange(9)

    def waad(a):
        return (a * distance.clamp(0, 3)).sum(-1)

    def fai(a):
        future = (distance >= 1) & (distance <= 4)
        return (a * future).sum(-2) / future.sum(-2).clamp(min=1)

    torch.testing.assert_close(group_mean(waad(maps), groups, LOCAL), waad(maps[0, [0, 2]].mean(0)))
    torch.testing.assert_close(group_mean(fai(maps), groups, GLOBAL), fai(maps[0, [1, 3]].mean(0)))


# --- a batch: statistics by sequence, then cut into micro-batches and ranks in any way ---


@pytest.fixture(scope="module")
def sequences():
    """Per sequence: layer -> name -> [H, N], 0 on prompts."""
    generator = torch.Generator().manual_seed(0)
    names = ("lse", "span", "waad", "fai", "entropy", "sink_mass")

    def one(prompt, response):
        mask = torch.arange(prompt + response) >= prompt
        scale = torch.rand(HEADS, 1, generator=generator) * 9
        return {name: torch.rand(HEADS, len(mask), generator=generator) * mask * scale for name in names}

    return [{layer: one(p, r) for layer in LAYERS} for p, r in zip(PROMPTS, RESPONSES, strict=True)]


def rows_of(sequences, chosen, spans=True, missing=(), receivers=None):
    names = [name for name in sequences[0][LAYERS[0]] if name not in missing]
    statistics = {
        layer: AttentionStatistics(
            **{name: torch.cat([sequences[i][layer][name] for i in chosen], -1) for name in names},
            **dict.fromkeys(missing),
        )
        for layer in LAYERS
    }
    lengths = torch.tensor([PROMPTS[i] + RESPONSES[i] for i in chosen])
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    starts = cu_seqlens[:-1] + torch.tensor([PROMPTS[i] for i in chosen])
    return SignalRows.collect(statistics, LAYERS, cu_seqlens, starts, spans=spans, receivers=receivers)


def by_sequence(reduced, micros, name):
    found = {}
    for values, chosen in zip(reduced.columns, micros, strict=True):
        found |= dict(zip(chosen, values[name].split([PROMPTS[i] + RESPONSES[i] for i in chosen]), strict=True))
    return found


def mean_over_responses(sequences, name, chosen):
    rows = sum(RESPONSES[i] for i in chosen)
    return torch.stack([sum(sequences[i][layer][name].sum(-1) for i in chosen) / max(rows, 1) for layer in LAYERS])


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_reduction_by_definition(sequences, scope):
    everything = list(range(4))
    reduced = reduce_signals([rows_of(sequences, everything)], HeadsConfig(scope=scope))
    for name in ("span", "entropy", "sink_mass"):
        torch.testing.assert_close(getattr(reduced.means, name), mean_over_responses(sequences, name, everything))
    pooled = head_groups(reduced.means.span, 0.3)
    assert torch.equal(reduced.groups, pooled)
    own = {i: head_groups(mean_over_responses(sequences, "span", [i]), 0.3) for i in everything}
    assert any(not torch.equal(groups, pooled) for groups in own.values())
    waad, fai = (by_sequence(reduced, [everything], name) for name in ("waad", "fai"))
    for i in everything:
        groups = pooled if scope == "batch" else own[i]
        for found, name, group in ((waad, "waad", LOCAL), (fai, "fai", GLOBAL)):
            chosen = [sequences[i][LAYERS[a]][name][b] for a, b in (groups == group).nonzero().tolist()]
            torch.testing.assert_close(found[i], torch.stack(chosen).mean(0))
        assert not waad[i][: PROMPTS[i]].any()


@pytest.mark.parametrize("select", ["span", "receiver", "all"])
@pytest.mark.parametrize("scope", ["batch", "sequence"])
@pytest.mark.parametrize("ranks", [[[[0, 1], [2, 3]]], [[[3, 0]], [[1, 2]]], [[[2], [1]], [[0], [3]]]])
def test_cutting_changes_nothing(sequences, scope, ranks, select):
    """`ranks` is [rank][micro-batch] -> sequences; the all-reduce is that of ranks that run one after another."""
    heads = HeadsConfig(scope=scope, select=select)
    whole = reduce_signals([rows_of(sequences, list(range(4)), receivers=FAI_LOW)], heads)
    rows = [[rows_of(sequences, micro, receivers=FAI_LOW) for micro in micros] for micros in ranks]
    contributions = []
    for own in rows:
        reduce_signals(own, heads, all_reduce=lambda pooled: contributions.append(pooled.clone()))

    def all_reduce(pooled):
        pooled.copy_(sum(contributions))

    for own, micros in zip(rows, ranks, strict=True):
        reduced = reduce_signals(own, heads, all_reduce=all_reduce)
        torch.testing.assert_close(reduced.means.span, whole.means.span)
        torch.testing.assert_close(reduced.means.kurtosis, whole.means.kurtosis)
        assert torch.equal(reduced.groups, whole.groups)
        for name in ("waad", "fai"):
            expected = by_sequence(whole, [list(range(4))], name)
            for i, values in by_sequence(reduced, micros, name).items():
                assert torch.equal(values, expected[i])


FAI_LOW = 2


def kurtoses(sequences, chosen):
    """[L, H], by scipy: over the positions of each response that some row looks back at, weighted by its rows."""
    total = 0
    for i in chosen:
        seen = [sequences[i][layer]["fai"][:, PROMPTS[i] : PROMPTS[i] + RESPONSES[i] - FAI_LOW] for layer in LAYERS]
        if seen[0].shape[1] > 1:
            total = total + RESPONSES[i] * torch.tensor(kurtosis_of(torch.stack(seen).double(), -1, fisher=False))
    return total / sum(RESPONSES[i] for i in chosen)


def test_kurtosis_by_hand():
    flat, peak = torch.full((8,), 0.3), torch.eye(8)[3]
    # Deviations from 1/8, in eighths: 7 once and -1 seven times. Squares add to 56, fourth powers to 2408.
    assert kurtosis(torch.stack([flat, peak])).tolist() == pytest.approx([0, (2408 / 8) / (56 / 8) ** 2])
    assert kurtosis(torch.zeros(2, 0)).tolist() == [0, 0]
    assert kurtosis(1e-6 * peak).item() == pytest.approx(kurtosis(peak).item())


def test_receiver_heads_by_hand():
    """The local heads are those of the spans; the most peaked of the others are global, however short their spans."""
    span = torch.tensor([[5.0, 1.0, 9.0, 2.0, 7.0], [3.0, 8.0, 0.5, 6.0, 4.0]])
    peaked = torch.tensor([[1.0, 99, 2, 3, 50], [40.0, 5, 6, 60, 1]])
    assert head_groups(span, 0.3, peaked).tolist() == [[0, -1, 0, -1, 1], [1, 0, -1, 1, 0]]
    assert torch.equal(head_groups(span, 0.3, span), head_groups(span, 0.3))


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_receiver_heads_by_definition(sequences, scope):
    everything = list(range(4))
    heads = HeadsConfig(scope=scope, select="receiver")
    reduced = reduce_signals([rows_of(sequences, everything, receivers=FAI_LOW)], heads)
    torch.testing.assert_close(reduced.means.kurtosis, kurtoses(sequences, everything).float())
    assert torch.equal(reduced.groups, head_groups(reduced.means.span, 0.3, reduced.means.kurtosis))
    assert not torch.equal(reduced.groups, head_groups(reduced.means.span, 0.3))
    found = by_sequence(reduced, [everything], "fai")
    for i in (0, 3):  # responses of 6 and 9 tokens
        own = head_groups(mean_over_responses(sequences, "span", [i]), 0.3, kurtoses(sequences, [i]))
        groups = reduced.groups if scope == "batch" else own
        chosen = [sequences[i][LAYERS[a]]["fai"][b] for a, b in (groups == GLOBAL).nonzero().tolist()]
        torch.testing.assert_close(found[i], torch.stack(chosen).mean(0))


@pytest.mark.parametrize("scope", ["batch", "sequence", "calibrated"])
def test_all_heads_need_no_groups(sequences, scope):
    everything, heads = list(range(4)), HeadsConfig(scope=scope, select="all")
    rows = [rows_of(sequences, everything, spans=False, missing=UNMEASURED)]
    reduced = reduce_signals(rows, heads, extra=["fai_all"])
    assert not reduced.groups.any()
    assert reduced.groups.shape == (len(LAYERS), HEADS)
    assert torch.equal(reduced.columns[0]["fai"], reduced.columns[0]["fai_all"])
    for i, waad in by_sequence(reduced, [everything], "waad").items():
        torch.testing.assert_close(waad, torch.cat([sequences[i][layer]["waad"] for layer in LAYERS]).mean(0))
    again = reduce_signals(rows, heads, groups=reduced.groups)  # as scope `calibrated` does between measurements
    assert torch.equal(again.columns[0]["waad"], reduced.columns[0]["waad"])


def test_no_response_at_all_gives_zeros(sequences):
    reduced = reduce_signals([rows_of(sequences, [2])], HeadsConfig())
    assert not reduced.means.span.any()
    assert reduced.columns[0]["waad"].tolist() == [0]


def test_extra_signals_are_reduced_only_where_asked(sequences):
    """`fai_all` is the mean over every captured head, in all scopes, with known groups too."""
    expected = {i: torch.cat([one[layer]["fai"] for layer in LAYERS]).mean(0) for i, one in enumerate(sequences)}
    groups = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, -1, -1]], dtype=torch.int8)
    micros = [[3, 0], [1, 2]]
    for scope, known in (("batch", None), ("sequence", None), ("calibrated", groups)):
        rows, heads = [rows_of(sequences, micro) for micro in micros], HeadsConfig(scope=scope)
        plain = reduce_signals(rows, heads, groups=known)
        reduced = reduce_signals(rows, heads, groups=known, extra=["fai_all"])
        assert [own.keys() for own in plain.columns] == [{"waad", "fai"}] * 2
        for i, values in by_sequence(reduced, micros, "fai_all").items():
            torch.testing.assert_close(values, expected[i])
        for name in ("waad", "fai"):
            assert all(torch.equal(a[name], b[name]) for a, b in zip(plain.columns, reduced.columns, strict=True))


# --- groups that are known beforehand ---


UNMEASURED = ("span", "entropy")  # where a capture had the attention's own log-sum-exp


def test_known_groups_replace_measured_ones(sequences):
    """Whether the capture measured spans or not, they are not reported, and WAAD and FAI follow the given groups."""
    everything, heads = list(range(4)), HeadsConfig(scope="calibrated")
    groups = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 0, -1, -1]], dtype=torch.int8)
    full = [rows_of(sequences, [0, 1], spans=False), rows_of(sequences, [2, 3], spans=False)]
    reduced = reduce_signals(full, heads, groups=groups)
    assert torch.equal(reduced.groups, groups)
    assert reduced.means.span is reduced.means.entropy is None
    torch.testing.assert_close(reduced.means.sink_mass, mean_over_responses(sequences, "sink_mass", everything))
    found = by_sequence(reduced, [[0, 1], [2, 3]], "waad"), by_sequence(reduced, [[0, 1], [2, 3]], "fai")
    for i in everything:
        torch.testing.assert_close(found[0][i], sequences[i][LAYERS[1]]["waad"][3:].mean(0))
        torch.testing.assert_close(found[1][i], sequences[i][LAYERS[0]]["fai"][:2].mean(0))
    other = reduce_signals([rows_of(sequences, everything, spans=False, missing=UNMEASURED)], heads, groups=groups)
    for name in ("waad", "fai"):
        assert torch.equal(other.columns[0][name], torch.cat([own[name] for own in reduced.columns]))


def test_calibrated_measures_as_batch_does(sequences):
    rows = [rows_of(sequences, [0, 1, 2, 3])]
    batch, calibrated = (reduce_signals(rows, HeadsConfig(scope=scope)) for scope in ("batch", "calibrated"))
    assert torch.equal(batch.groups, calibrated.groups)
    assert all(torch.equal(column, calibrated.columns[0][name]) for name, column in batch.columns[0].items())


def test_missing_spans_are_refused_where_they_are_needed(sequences):
    with pytest.raises(ValueError, match="did not measure them"):
        rows_of(sequences, [0], missing=UNMEASURED)
    without = rows_of(sequences, [0], spans=False, missing=UNMEASURED)
    with pytest.raises(ValueError, match="neither given nor"):
        reduce_signals([without], HeadsConfig(scope="calibrated"))
    with pytest.raises(ValueError, match="scope=sequence needs spans"):
        reduce_rows(without, HeadsConfig(scope="sequence"), None)
    for scope in ("batch", "sequence"):
        with pytest.raises(ValueError, match="select=receiver needs the kurtosis of FAI"):
            reduce_signals([rows_of(sequences, [0])], HeadsConfig(scope=scope, select="receiver"))
    with pytest.raises(ValueError, match="scope=calibrated needs the batch's head groups"):
        reduce_rows(without, HeadsConfig(scope="calibrated"), None)


def test_groups_are_reused_between_refreshes():
    known = [[1, -1]]

    def reused(previous=known, **options):
        return [step for step in range(7) if reusable_groups(HeadsConfig(**options), step, previous) is not None]

    assert reused(scope="calibrated", refresh_steps=3) == [1, 2, 4, 5]
    assert reused(scope="calibrated", refresh_steps=1) == []
    assert reused(None, scope="calibrated", refresh_steps=3) == []
    assert reused(scope="batch", refresh_steps=3) == reused(scope="sequence", refresh_steps=3) == []
    assert reusable_groups(HeadsConfig(scope="calibrated"), 1, known) is known


def test_which_steps_need_no_scoring_forward():
    def one_forward(groups, **options):
        return trains_in_one_forward(SignalsConfig.model_validate(options), groups)

    calibrated, sequence = {"scope": "calibrated"}, {"scope": "sequence"}
    assert one_forward(None, forward="train", heads={"select": "all"})
    assert one_forward([[1, -1]], forward="train", heads=calibrated)
    assert not one_forward(None, forward="train", heads=calibrated)
    assert one_forward(None, forward="train", heads=sequence)
    assert not one_forward([[1, -1]], forward="score", heads=calibrated)
    assert not one_forward(None, forward="score", heads=sequence)


# --- metrics ---


def example():
    rollouts = make_rollouts([1, 2, 3], [5, 5, 0])
    waad, fai = torch.zeros(16), torch.zeros(16)
    waad[1:6] = torch.tensor([1.0, 2, 3, 4, 5])
    fai[1:6] = torch.tensor([4.0, 1, 1, 3, 1])  # top 40%: 7 of 10
    fai[8:13] = torch.tensor([0.0, 0, 10, 0, 0])  # 10 of 10
    groups = torch.tensor([[-1, 0, 1], [0, -1, 1]], dtype=torch.int8)
    entropy = torch.tensor([[1.0, 2, 3], [0.0, 0, 3]])
    return rollouts, Signals(waad, fai, [4, 7], entropy, entropy, entropy / 10, groups)


def test_metrics_by_hand():
    rollouts, signals = example()
    assert signal_metrics(signals, rollouts) == pytest.approx(
        {
            "signals/waad_mean": 1.5,
            "signals/fai_top_share": 17 / 20,
            "signals/attention_entropy/4": 2.0,
            "signals/attention_entropy/7": 1.0,
            "signals/sink_mass/4": 0.2,
            "signals/sink_mass/7": 0.1,
        }
    )


def test_head_turnover_by_hand():
    rollouts, signals = example()
    groups = signals.groups.tolist()
    assert signal_metrics(signals, rollouts, groups)["signals/head_turnover"] == 0
    changed = copy.deepcopy(groups)
    changed[0][0] = 0  # was in no group, is local now
    changed[1][2] = -1  # was local, is global now
    changed[1][0] = 1  # was global, is in no group now: not counted
    assert signal_metrics(signals, rollouts, changed)["signals/head_turnover"] == 0.5
    ungrouped = replace(signals, groups=torch.zeros_like(signals.groups))
    assert "signals/head_turnover" not in signal_metrics(ungrouped, rollouts, [[0] * 3] * 2)


def test_what_was_not_measured_is_not_logged():
    rollouts, signals = example()
    measured = signal_metrics(signals, rollouts, signals.groups.tolist())
    reused = signal_metrics(replace(signals, span=None, entropy=None), rollouts, signals.groups.tolist())
    gone = {"signals/head_turnover", "signals/attention_entropy/4", "signals/attention_entropy/7"}
    assert reused == {name: value for name, value in measured.items() if name not in gone}
    assert gone <= measured.keys()


def test_metrics_without_signal():
    rollouts, signals = make_rollouts([2], [0]), example()[1]
    quiet = Signals(torch.zeros(2), torch.zeros(2), [4, 7], signals.span, signals.entropy, signals.span, signals.groups)
    metrics = signal_metrics(quiet, rollouts)
    assert metrics["signals/waad_mean"] == metrics["signals/fai_top_share"] == 0
