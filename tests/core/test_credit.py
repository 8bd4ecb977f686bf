"""Every strategy and option against gammas worked out by hand, and what must hold for all of them."""

import math
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlattn import registry
from rlattn.config import CreditConfig
from rlattn.credit import CreditError, PackedResponses, ResponseSignals, assign, assign_packed, needed, needs, spending
from rlattn.credit.selection import budget, select, waad_change
from rlattn.types import Scores, Signals
from tests.make import make_rollouts

NAMES = list(registry.CREDIT.builtin)
DETERMINISTIC = [name for name in NAMES if name not in ("random", "shuffled")]

# One response. Δ = 4 4 0 2 0 1 0 0 7 0, so TopQ(Δ, 0.4) = {0, 1, 3, 8} with threshold 2; the median of WAAD is 2;
# TopQ(FAI, 0.4) = {2, 6, 7, 9}. Anchor 2 follows the jumps at 0 and 1 (a tie: 1 is nearer), anchor 6 the jump at 3,
# anchor 7 none within three tokens, and anchor 9 reaches far itself.
WAAD = [1, 5, 1, 1, 3, 3, 2, 2, 2, 9]
FAI = [0, 0.1, 0.9, 0, 0.2, 0.1, 0.8, 0.7, 0, 0.6]
ENTROPY = [0.5, 0.5, 0.5, 0.5, 0.5, 2, 1, 0, 0.5, 0.5]
FAI_ALL = [0.9, 0.2, 0.3, 0, 0.2, 0.4, 0.2, 0.8, 0.1, 0]
LOGPS = [0, 0, 0, 0, math.log(0.5), math.log(0.25), math.log(0.125), math.log(0.5), math.log(0.25), -200]


config_of = cache(lambda name, **options: CreditConfig(name=name, **options))
strategy = cache(registry.CREDIT.load)  # a look-up scans every installed distribution


def gamma_of(name, waad=WAAD, fai=FAI, entropy=ENTROPY, logps=LOGPS, fai_all=FAI_ALL, seed=0, **options):
    columns = [torch.tensor(x, dtype=torch.float32) for x in (waad, fai, entropy, logps)]
    extra = {"fai_all": torch.tensor(fai_all, dtype=torch.float32)} if needed(name) else {}
    response = ResponseSignals(*columns, torch.Generator().manual_seed(seed), extra)
    return strategy(name)(response, config_of(name, **options))


def paid(gamma):
    return {i: round(value, 6) for i, value in enumerate(gamma.tolist()) if value != 1}


BY_HAND = [
    ("uniform", {}, {}),
    ("entropy", {}, {5: 1.5, 6: 1.5, 0: 1.5, 1: 1.5}),
    ("entropy", {"which": "bottom", "top_q": 0.2}, {7: 1.5, 0: 1.5}),
    ("entropy_selection", {}, dict.fromkeys([0, 1, 2, 3, 4, 7, 8, 9], 0)),
    ("entropy_selection", {"which": "bottom", "selection_q": 0.75}, {5: 0, 6: 0}),
    ("reweight", {}, {4: 0.9, 5: 0.85, 6: 0.825, 7: 0.9, 8: 0.85, 9: 0.8}),
    ("reweight", {"reweight_alpha": 1}, {4: 0.5, 5: 0.25, 6: 0.125, 7: 0.5, 8: 0.25, 9: 0}),
    ("reweight", {"reweight_alpha": 0}, {}),
    ("column_mean", {}, {0: 1.5, 2: 1.5, 5: 1.5, 7: 1.5}),
    ("column_mean", {"which": "bottom", "top_q": 0.2}, {3: 1.5, 9: 1.5}),
    ("position", {}, {0: 1.5, 2: 1.5, 5: 1.5, 7: 1.5}),
    ("position", {"position": "start", "top_q": 0.25}, {0: 1.5, 1: 1.5, 2: 1.5}),
    ("position", {"position": "end", "amplification": 2}, {6: 2, 7: 2, 8: 2, 9: 2}),
    ("position", {"top_q": 1.0}, dict.fromkeys(range(10), 1.5)),
    ("local_chunk", {}, {0: 1.5, 1: 1.5, 3: 1.5, 8: 1.5}),
    ("local_chunk", {"top_q": 0.11, "amplification": 3}, {8: 3, 0: 3}),
    ("local_chunk", {"which": "bottom"}, {2: 1.5, 4: 1.5, 6: 1.5, 7: 1.5}),
    ("global_anchor", {}, {2: 1.5, 6: 1.5, 7: 1.5, 9: 1.5}),
    ("global_anchor", {"which": "bottom"}, {0: 1.5, 3: 1.5, 8: 1.5, 1: 1.5}),
    ("global_anchor", {"top_q": 1.0, "amplification": 0.5}, dict.fromkeys(range(10), 0.5)),
    ("coupled_rhythm", {}, {1: 1.25, 2: 1.25, 3: 1.25, 6: 1.25, 7: 1.5, 9: 1.5}),
    ("coupled_rhythm", {"window": 1}, {1: 1.25, 2: 1.25, 6: 1.5, 7: 1.5, 9: 1.5}),
    ("coupled_rhythm", {"window": 2}, {1: 1.25, 2: 1.25, 6: 1.5, 7: 1.5, 9: 1.5}),
    ("coupled_rhythm", {"window": 100}, {1: 1.25, 2: 1.25, 6: 1.25, 7: 1.25, 9: 1.5}),
    ("coupled_rhythm", {"alpha": 0}, {2: 1.5, 6: 1.5, 7: 1.5, 9: 1.5}),
    ("coupled_rhythm", {"alpha": 1}, {1: 1.5, 3: 1.5, 7: 1.5, 9: 1.5}),
    ("coupled_rhythm", {"alpha": 0.2}, {1: 1.1, 2: 1.4, 3: 1.1, 6: 1.4, 7: 1.5, 9: 1.5}),
    ("coupled_rhythm", {"amplification": 3}, {1: 2, 2: 2, 3: 2, 6: 2, 7: 3, 9: 3}),
    ("coupled_rhythm", {"tau_waad": 0}, {1: 1.25, 2: 1.25, 6: 1.5, 7: 1.5, 9: 1.5}),
    ("coupled_rhythm", {"tau_waad": 1}, {1: 1.25, 2: 1.25, 3: 1.25, 6: 1.25, 7: 1.5, 8: 1.25, 9: 1.25}),
    ("coupled_rhythm", {"tau_delta": 1}, {2: 1.5, 6: 1.5, 7: 1.5, 9: 1.5}),
    ("coupled_rhythm", {"tau_delta": 0.5}, {1: 1.25, 2: 1.25, 3: 1.25, 6: 1.25, 5: 1.25, 7: 1.25, 9: 1.5}),
    ("coupled_rhythm", {"which": "bottom"}, {0: 1.5, 1: 1.75, 3: 1.25, 8: 1.5}),
]


@pytest.mark.parametrize(("name", "options", "expected"), BY_HAND)
def test_by_hand(name, options, expected):
    gamma = gamma_of(name, **options)
    assert paid(gamma) == {i: pytest.approx(value) for i, value in expected.items()}
    assert gamma.dtype == torch.float32


def test_coupled_terms_add_and_a_shared_introduction_is_paid_once():
    """Anchors 1, 2, 3, 9: anchor 1 reaches far itself, and introduces both 2 and 3."""
    gamma = gamma_of("coupled_rhythm", fai=[0, 0.5, 0.6, 0.7, 0, 0, 0, 0, 0, 0.9])
    assert paid(gamma) == {1: 1.75, 2: 1.25, 3: 1.25, 9: 1.5}


def test_from_attention_maps():
    """Maps of six tokens, two of them prompt, to gammas: W = 3, H_lo = 1, H_hi = 2, one local and one global head."""
    local = torch.tensor(
        [
            [1, 0, 0, 0, 0, 0],
            [0, 1, 0, 0, 0, 0],
            [0, 0, 1, 0, 0, 0],  # WAAD 0
            [1, 0, 0, 0, 0, 0],  # reaches back 3: WAAD 3
            [0, 0, 0, 0.5, 0.5, 0],  # WAAD 0.5
            [1, 0, 0, 0, 0, 0],  # reaches back 5, counted as W: WAAD 3
        ]
    )
    far = torch.zeros(6, 6)
    far[:2, 0] = 1
    far[2:, :] = torch.tensor([[0, 0, 1, 0, 0, 0], [0, 0, 0.2, 0.8, 0, 0], [0, 0, 0.4, 0.6, 0, 0], [0, 0, 0, 0, 1, 0]])
    t = torch.arange(6)
    distance = t[:, None] - t
    waad = (local * distance.clamp(0, 3)).sum(1)[2:]
    future = (distance >= 1) & (distance <= 2) & (t >= 2)[:, None]
    fai = ((far * future).sum(0) / future.sum(0).clamp(min=1))[2:]
    assert waad.tolist() == [0, 3, 0.5, 3]
    # Token 2 is seen by rows 3 and 4, token 3 by 4 and 5, token 4 by 5, token 5 by none.
    assert fai.tolist() == pytest.approx([0.3, 0.3, 1.0, 0])
    # Δ = 3 2.5 2.5 0. With q = 0.5: TopQ(Δ) = {0, 1}, τ_Δ = 2.5; anchors {2, 0}; the median of WAAD is 1.75, so
    # anchor 2 (WAAD 0.5) is dominated, by token 0's larger jump; anchor 0 has no past.
    signals = {"waad": waad.tolist(), "fai": fai.tolist(), "entropy": [0] * 4, "top_q": 0.5}
    assert paid(gamma_of("local_chunk", **signals)) == {0: 1.5, 1: 1.5}
    assert paid(gamma_of("global_anchor", **signals)) == {2: 1.5, 0: 1.5}
    assert paid(gamma_of("coupled_rhythm", **signals)) == {0: 1.75, 2: 1.25}
    assert paid(gamma_of("coupled_rhythm", window=1, **signals)) == {0: 1.5, 1: 1.25, 2: 1.25}


def literal_coupled(waad, fai, c):
    """METHOD's sentences, token by token."""
    n, g = len(waad), c.amplification
    delta = [abs(waad[t] - waad[t + 1]) for t in range(n - 1)] + [0]
    size = budget(c.top_q, n)
    anchors = sorted(range(n), key=lambda t: (-fai[t], t))[:size]
    tau_delta = sorted(delta, reverse=True)[size - 1]
    tau_waad = torch.tensor(waad, dtype=torch.float32).quantile(c.tau_waad).item()
    gamma, introductions = [1.0] * n, set()
    for t in anchors:
        past = range(max(0, t - c.window), t)
        largest = max((delta[u] for u in past), default=-math.inf)
        if waad[t] <= tau_waad and largest >= tau_delta:
            gamma[t] += (1 - c.alpha) * (g - 1)
            introductions.add(max(u for u in past if delta[u] == largest))
        else:
            gamma[t] += g - 1
    for u in introductions:
        gamma[u] += c.alpha * (g - 1)
    return gamma


small = st.integers(0, 4)


@given(st.lists(st.tuples(small, small), min_size=1, max_size=25), st.integers(1, 5), st.sampled_from([0.2, 0.4, 1.0]))
@settings(max_examples=200, deadline=None)
def test_coupled_equals_the_definition(tokens, window, q):
    waad, fai = ([float(token[i]) for token in tokens] for i in (0, 1))
    config = config_of("coupled_rhythm", window=window, top_q=q, alpha=0.25)
    gamma = gamma_of("coupled_rhythm", waad, fai, fai, window=window, top_q=q, alpha=0.25)
    assert gamma.tolist() == pytest.approx(literal_coupled(waad, fai, config))


@given(st.integers(1, 100), st.integers(1, 500))
def test_budget_is_the_exact_ceiling(percent, length):
    assert budget(percent / 100, length) == -(-percent * length // 100)


@given(st.lists(small, min_size=1, max_size=30), st.floats(0.01, 1))
@settings(deadline=None)
def test_select_prefers_the_lower_index(values, q):
    x = torch.tensor(values, dtype=torch.float32)
    size, order = budget(q, len(values)), range(len(values))
    top, bottom = select(x, q), select(x, q, "bottom")
    assert top.nonzero().flatten().tolist() == sorted(sorted(order, key=lambda i: (-values[i], i))[:size])
    assert bottom.nonzero().flatten().tolist() == sorted(sorted(order, key=lambda i: (values[i], i))[:size])


def test_waad_change_of_one_token_is_zero():
    assert waad_change(torch.tensor([4.0])).tolist() == [0]


@pytest.mark.parametrize("q", [0.05, 0.4, 0.75])
def test_random_spends_the_budget_and_follows_its_generator(q):
    n = 37
    draws = [gamma_of("random", [0] * n, [0] * n, [0] * n, seed=seed, top_q=q) for seed in (1, 1, 2)]
    assert all(
        (gamma == 1.5).sum() == math.ceil(q * n) and (gamma == 1).sum() == n - math.ceil(q * n) for gamma in draws
    )
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_random_is_fair():
    counts = sum((gamma_of("random", seed=seed) > 1).float() for seed in range(600))
    assert counts.min() > 180  # 240 expected; five standard deviations away
    assert counts.max() < 300


def test_shuffled_permutes_the_coupled_gammas():
    coupled = gamma_of("coupled_rhythm")
    shuffles = [gamma_of("shuffled", seed=seed) for seed in (3, 3, 4)]
    for gamma in shuffles:
        assert torch.equal(gamma.sort().values, coupled.sort().values)
    assert torch.equal(shuffles[0], shuffles[1])
    assert not torch.equal(shuffles[0], shuffles[2])


# --- a batch ---


def make_batch(responses=(30, 1, 0, 17, 44), prompts=None, seed=0):
    rollouts = make_rollouts(list(prompts or [3 + i for i in range(len(responses))]), list(responses))
    mask = rollouts.response_mask
    generator = torch.Generator().manual_seed(seed)
    waad, fai, entropy, logps, fai_all = (torch.rand(len(mask), generator=generator) * mask for _ in range(5))
    heads = torch.zeros(1, 2)
    signals = Signals(waad, fai, [0], heads, heads, heads, heads.to(torch.int8), {"fai_all": fai_all})
    return rollouts, Scores(-logps, entropy, signals)


def run(batch, advantages=None, seed=0, step=0, **options):
    rollouts, scores = batch
    if advantages is None:
        advantages = [1.0] * len(rollouts)
    return assign(rollouts, scores, torch.tensor(advantages), CreditConfig(**options), seed=seed, step=step)


def split(rollouts, gamma):
    starts = rollouts.cu_seqlens[:-1] + rollouts.prompt_lengths
    return [gamma[a:b] for a, b in zip(starts, rollouts.cu_seqlens[1:], strict=True)]


@pytest.mark.parametrize("name", NAMES)
def test_batch_invariants(name):
    batch = make_batch()
    gamma, metrics = run(batch, name=name)
    mask = batch[0].response_mask
    assert gamma.dtype == torch.float32
    assert gamma.shape == mask.shape
    assert (gamma[~mask] == 1).all()
    assert gamma.isfinite().all()
    assert metrics["credit/mean_gamma"] == pytest.approx(gamma[mask].mean().item())
    assert metrics["credit/amplified_share"] == pytest.approx((gamma[mask] > 1).float().mean().item())
    if name == "uniform":
        assert (gamma == 1).all()
        assert metrics == {"credit/amplified_share": 0, "credit/mean_gamma": 1}
    elif name in ("entropy_selection", "reweight"):
        assert metrics["credit/amplified_share"] == 0
    elif name not in ("coupled_rhythm", "shuffled"):
        assert metrics["credit/amplified_share"] == pytest.approx((12 + 1 + 0 + 7 + 18) / 92)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_permuting_sequences_permutes_gammas(name):
    rollouts, scores = make_batch()
    order = [3, 0, 4, 2, 1]
    pieces = [torch.arange(int(a), int(b)) for a, b in rollouts.cu_seqlens.unfold(0, 2, 1)]
    index = torch.cat([pieces[i] for i in order])
    moved = make_rollouts(rollouts.prompt_lengths[order].tolist(), rollouts.response_lengths[order].tolist())
    signals = scores.signals
    extra = {name: column[index] for name, column in signals.extra.items()}
    signals = replace(signals, waad=signals.waad[index], fai=signals.fai[index], extra=extra)
    other = Scores(scores.logps[index], scores.entropy[index], signals)
    before = run((rollouts, scores), name=name)[0]
    assert torch.equal(run((moved, other), name=name)[0], before[index])


@pytest.mark.parametrize("name", ["random", "shuffled"])
def test_randomness_is_a_function_of_seed_step_and_sequence(name):
    batch = make_batch((40, 40), (2, 2))
    signals = batch[1].signals
    signals.waad[42 + 2 :], signals.fai[42 + 2 :] = signals.waad[2:42], signals.fai[2:42]  # two equal responses
    gamma = run(batch, name=name, seed=5, step=9)[0]
    assert torch.equal(gamma, run(batch, name=name, seed=5, step=9)[0])
    assert not torch.equal(gamma, run(batch, name=name, seed=5, step=10)[0])
    assert not torch.equal(gamma, run(batch, name=name, seed=6, step=9)[0])
    assert not torch.equal(*split(batch[0], gamma))


# --- budgets ---

AMPLIFIES = ["random", "position", "entropy", "column_mean", "local_chunk", "global_anchor"]
REPAYS = ["coupled_rhythm", "shuffled"]  # bonuses move and add; see the test
SCALES_DOWN = ["entropy_selection", "reweight"]

responses = st.tuples(st.integers(1, 120), st.integers(0, 10**6))  # length and seed
shares = st.integers(1, 100).map(lambda percent: percent / 100)


def random_response(length, seed):
    """Random columns with many ties."""
    draws = torch.randint(0, 12, (5, length), generator=torch.Generator().manual_seed(seed)) / 8
    names = ("waad", "fai", "entropy", "logps", "fai_all")
    return {name: (-draw if name == "logps" else draw).tolist() for name, draw in zip(names, draws, strict=True)}


def test_every_strategy_has_its_budget_tested():
    assert sorted(NAMES) == sorted([*AMPLIFIES, *REPAYS, *SCALES_DOWN, "uniform"])


@given(responses, shares, st.sampled_from([1.5, 3.0]), st.sampled_from(["top", "bottom"]))
@settings(max_examples=60, deadline=None)
def test_baselines_spend_the_same_budget(response, q, g, which):
    size = math.ceil(round(q * 100) * response[0] / 100)
    for name in AMPLIFIES:
        gamma = gamma_of(name, **random_response(*response), seed=response[1], top_q=q, amplification=g, which=which)
        assert sorted(gamma.tolist()) == [1] * (response[0] - size) + [g] * size, name
        assert (gamma - 1).sum().item() == size * (g - 1), name


@given(responses, shares, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
@settings(max_examples=60, deadline=None)
def test_coupled_rhythm_spends_at_most_the_same_budget(response, q, alpha):
    """A bonus that moves from anchors to a token that introduces several of them is paid once; α = 0 moves none."""
    columns, size = random_response(*response), math.ceil(round(q * 100) * response[0] / 100)
    spent, shuffled = (
        (gamma_of(name, **columns, seed=response[1], top_q=q, alpha=alpha) - 1).sum().item() for name in REPAYS
    )
    assert shuffled == pytest.approx(spent)
    assert size * 0.5 * (1 - alpha) - 1e-4 <= spent <= size * 0.5 + 1e-4
    if alpha == 0:
        assert spent == pytest.approx(size * 0.5)


@given(responses, st.integers(1, 100))
@settings(max_examples=60, deadline=None)
def test_what_scales_down_states_its_own_budget_and_normalises_to_the_plain_weight(response, percent):
    columns = random_response(*response)
    selected = gamma_of("entropy_selection", **columns, selection_q=percent / 100)
    assert selected.sum() == math.ceil(percent * response[0] / 100)
    assert ((selected == 0) | (selected == 1)).all()
    alpha = percent / 100
    weights = gamma_of("reweight", **columns, reweight_alpha=alpha)
    assert weights.sum().item() == pytest.approx(sum(alpha * math.exp(x) + 1 - alpha for x in columns["logps"]))
    rollouts = make_rollouts([0], [response[0]])
    given = {name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}
    whole = PackedResponses(rollouts.cu_seqlens[:-1], rollouts.cu_seqlens[1:], [0], torch.ones(1))
    for name, plain in (("entropy_selection", selected), ("reweight", weights)):
        config = CreditConfig(name=name, normalize=True, selection_q=alpha, reweight_alpha=alpha)
        gamma, amplified = assign_packed(given, whole, config, seed=0, step=0)
        assert gamma.sum().item() == pytest.approx(response[0], rel=1e-5)
        torch.testing.assert_close(gamma, plain / plain.mean())
        assert amplified == 0


def test_position_gammas_depend_on_the_length_alone():
    for place in ("even", "start", "end"):
        gammas = [gamma_of("position", **random_response(31, seed), seed=seed, position=place) for seed in (1, 2)]
        assert torch.equal(*gammas)
    even = gamma_of("position", **random_response(997, 0)).gt(1).nonzero().flatten()
    assert set(even.diff().tolist()) == {2, 3}  # 2.5 on average
    assert even[0] == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"sign": "negative"}, {"normalize": True}])
def test_a_part_of_the_batch_gets_the_gammas_of_the_whole(name, options):
    rollouts, scores = make_batch()
    advantages = torch.tensor([1.0, -1, 0, -2, 3])
    whole, metrics = run((rollouts, scores), advantages.tolist(), seed=3, step=8, name=name, **options)
    bounds = rollouts.cu_seqlens.tolist()
    total = 0
    for chosen in ([4, 0], [2], [1, 3]):
        index = torch.cat([torch.arange(bounds[i], bounds[i + 1]) for i in chosen])
        ends = rollouts.lengths[chosen].cumsum(0)
        starts = ends - rollouts.response_lengths[chosen]
        responses = PackedResponses(starts, ends, chosen, advantages[chosen])
        signals = scores.signals
        columns = {"waad": signals.waad, "fai": signals.fai, "entropy": scores.entropy, "logps": scores.logps}
        columns = {name: column[index] for name, column in {**columns, **signals.extra}.items()}
        gamma, amplified = assign_packed(columns, responses, config_of(name, **options), seed=3, step=8)
        assert torch.equal(gamma, whole[index])
        total += amplified
    assert spending(whole, rollouts.response_mask, total) == metrics


def test_sign_shapes_only_its_side():
    batch = make_batch((10, 10, 10))
    advantages = [1.0, -1.0, 0.0]
    changed = {
        sign: [bool((part != 1).any()) for part in split(batch[0], run(batch, advantages, sign=sign)[0])]
        for sign in ("both", "positive", "negative")
    }
    assert changed == {
        "both": [True, True, True],
        "positive": [True, False, True],  # zero goes with the positive ones, as in the paper's A >= 0
        "negative": [False, True, False],
    }
    assert run(batch, advantages, sign="negative", name="global_anchor")[1] == {
        "credit/amplified_share": pytest.approx(4 / 30),
        "credit/mean_gamma": pytest.approx(1 + 0.5 * 4 / 30),
    }


@pytest.mark.parametrize("name", NAMES)
def test_normalise_gives_every_response_mean_one(name):
    batch = make_batch()
    plain, before = run(batch, name=name)
    gamma, after = run(batch, name=name, normalize=True)
    for part, raw in zip(split(batch[0], gamma), split(batch[0], plain), strict=True):
        if len(part):
            assert part.mean().item() == pytest.approx(1)
            torch.testing.assert_close(part, raw / raw.mean())
    assert after["credit/amplified_share"] == before["credit/amplified_share"]
    assert after["credit/mean_gamma"] == pytest.approx(1)
    if name == "uniform":
        assert (gamma == 1).all()


def test_only_empty_responses():
    gamma, metrics = run(make_batch((0, 0), (2, 3)))
    assert gamma.tolist() == [1] * 5
    assert metrics == {"credit/amplified_share": 0, "credit/mean_gamma": 1}


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """Installs a strategy as another distribution would: a module and an entry point."""

    def install(body, decorator=""):
        head = f"import torch\nfrom rlattn.credit import needs\n\n{decorator}\ndef theirs(response, config):\n"
        (tmp_path / "their_credit.py").write_text(f"{head}    return {body}\n")
        info = tmp_path / "their_credit-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-credit\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[rlattn.credit]\ntheirs = their_credit:theirs\n")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "their_credit", raising=False)

    return install


def test_third_party_strategy(third_party):
    third_party("torch.full_like(response.fai, 2.0)")
    batch = make_batch()
    gamma, metrics = run(batch, name="theirs")
    assert (gamma[batch[0].response_mask] == 2).all()
    assert metrics == {"credit/amplified_share": 1, "credit/mean_gamma": 2}


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("torch.ones(3)", r"shape \(3,\)"),
        ("torch.ones_like(response.fai)[:, None]", r"shape \(30, 1\)"),
        ("torch.full_like(response.fai, torch.nan)", "nan"),
        ("torch.full_like(response.fai, torch.inf)", "inf"),
        ("torch.full_like(response.fai, -0.5)", "-0.5"),
        ("[1.0] * len(response.fai)", "a list"),
        ("None", "a NoneType"),
    ],
)
def test_broken_third_party_strategy_gets_one_line(third_party, body, problem):
    third_party(body)
    with pytest.raises(CreditError, match=problem) as error:
        run(make_batch(), name="theirs")
    assert "'theirs'" in str(error.value)
    assert "sequence 0" in str(error.value)
    assert "\n" not in str(error.value)


def test_zeros_cannot_be_normalised(third_party):
    third_party("torch.zeros_like(response.fai)")
    with pytest.raises(CreditError, match="theirs"):
        run(make_batch(), name="theirs", normalize=True)


def test_inputs_are_checked():
    rollouts, scores = make_batch()
    with pytest.raises(ValueError, match=r"advantages has shape \(1,\); this batch needs \(5,\)"):
        run((rollouts, scores), [1.0])
    with pytest.raises(ValueError, match="entropy has shape"):
        run((rollouts, replace(scores, entropy=scores.entropy[:-1])))
    scores.signals.waad[-1] = torch.nan
    with pytest.raises(ValueError, match="waad has values that are not finite"):
        run((rollouts, scores))


# --- signals that only some strategies need ---


def test_a_strategy_gets_the_extra_signals_it_declares_and_no_others(third_party):
    third_party("response.extra['fai_all'] + response.logps.exp()", "@needs('fai_all')")
    batch = make_batch()
    rollouts, scores = batch
    mask = rollouts.response_mask
    assert needed("theirs") == ("fai_all",)
    assert needed("uniform") == needed("coupled_rhythm") == ()
    expected = scores.signals.extra["fai_all"] + scores.logps.exp()
    assert torch.equal(run(batch, name="theirs")[0][mask], expected[mask])
    without = replace(scores, signals=replace(scores.signals, extra={}))
    with pytest.raises(ValueError, match="'theirs' needs fai_all, which were not measured"):
        run((rollouts, without), name="theirs")
    assert torch.equal(run((rollouts, without))[0], run(batch)[0])


def test_an_undeclared_extra_signal_is_refused_by_name(third_party):
    third_party("response.extra['fai_all']")
    with pytest.raises(CreditError, match=r"'theirs' reads 'fai_all' without declaring it; add @needs\('fai_all'\)"):
        run(make_batch(), name="theirs")
    with pytest.raises(ValueError, match="no extra signal called 'fay_all'; known: fai_all"):
        needs("fay_all")
