"""Flow against closed forms, conservation, and dense float64 solves written here from the paper's definitions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.linalg import solve_triangular

from rlattn.kernels import FlowMap, FlowOptions, flow
from rlattn.kernels.ragged import layout_of


def dense_map(q, k, scale, window=None):
    """Mean over heads of one sequence's maps, float64: q [n, Hq, D], k [n, Hkv, D] -> [n, n]."""
    q, k = (x.double().transpose(0, 1) for x in (q, k))
    k = k.repeat_interleave(len(q) // len(k), 0)
    t = torch.arange(q.shape[1])
    distance = t[:, None] - t
    visible = (distance >= 0) & (distance < (window or len(t)))
    return (q @ k.mT * scale).masked_fill(~visible, -torch.inf).softmax(-1).mean(0)


def dense_flow(a, prompt, answer, threshold=0.0):
    """f [n] of a map a [n, n] float64, by the definitions: h, then W' itself, then f; no trick shared with the code."""
    edges = a.double().numpy().copy()  # edges[k, i] = W_ik
    edges[edges <= threshold] = 0.0
    n = len(edges)
    lower = np.tril(edges, -1)
    eye, target, source = np.eye(n), np.zeros(n), np.zeros(n)
    target[slice(*answer)] = 1.0
    h = solve_triangular(eye - lower.T, target, lower=False)
    source[:prompt] = 1 / max(prompt, 1)
    source[h == 0] = 0.0
    reweighted = (lower * h[:, None]) / (h + (h == 0))  # [k, i] = W_ik h(k) / h(i)
    return torch.from_numpy(solve_triangular(eye - reweighted, source, lower=True)) * torch.from_numpy(h > 0)


def dense_batch(layers, cu, starts, answers, threshold=0.0, **variant):
    """The same of a packed batch; `layers` are pairs of q and k."""
    parts = []
    for b, (begin, end) in enumerate(pairwise(cu)):
        a = sum(dense_map(q[begin:end], k[begin:end], **variant) for q, k in layers) / len(layers)
        parts.append(dense_flow(a, starts[b] - begin, [x - begin for x in answers[b]], threshold))
    return torch.cat(parts)


def flow_of(layers, cu, starts, answers, options, *, scale, window=None):
    gathered = FlowMap(cu, starts, answers, len(layers), options)
    for q, k in layers:
        assert gathered.flow is None
        gathered.add(q, k, scale=scale, sliding_window=window)
    assert not gathered._tiles
    return gathered.flow


def solve_map(a, prompt, answer, *, tile=4):
    """Flow over a given map a [n, n], put into tiles by hand."""
    n = len(a)
    options = FlowOptions(tile=tile, storage="float32")
    gathered = FlowMap([0, n], [prompt], [answer], 2, options)  # the second layer never comes
    gathered.add(torch.zeros(n, 1, 1), torch.zeros(n, 1, 1), scale=1.0)
    tiles = gathered._tiles[0].zero_()
    rows = -(-n // tiles.shape[-1])
    whole = (
        torch.nn.functional.pad(a, (0, rows * tiles.shape[-1] - n) * 2)
        .unflatten(0, (rows, -1))
        .unflatten(2, (rows, -1))
    )
    for i in range(rows):
        for j in range(i + 1):
            tiles[i * (i + 1) // 2 + j, 0] = whole[i, :, j]
    return gathered._solve(layout_of([0, n], n, torch.device("cpu")))


ODD = [5, 33, 1, 150, 77, 64, 65, 200, 32]


def some_answers(cu, starts):
    """Answers of 1 to 7 tokens, some at the end, some before it, and one sequence without."""
    answers = []
    for b, (start, end) in enumerate(zip(starts, cu[1:], strict=True)):
        last = max(start, end - b % 3 * 4)
        answers.append((max(start, last - 1 - b % 7), last))
    answers[-1] = (starts[-1], starts[-1])
    return answers


def test_a_chain_carries_everything():
    n = 9
    a = torch.zeros(n, n)
    a[torch.arange(1, n), torch.arange(n - 1)] = 0.3  # the weights do not matter: there is one way
    expected = torch.tensor([1 / 3, 2 / 3, 1, 1, 1, 1, 1, 1, 0])
    torch.testing.assert_close(solve_map(a, 3, (7, 8)), expected)


def test_a_diamond_splits_by_weight():
    """0 -> {1, 2} -> 3 and 0 -> 4, which leads nowhere."""
    a = torch.zeros(5, 5)
    a[1, 0], a[2, 0], a[3, 1], a[3, 2], a[4, 0] = 0.2, 0.4, 0.9, 0.1, 0.8
    one, two = 0.2 * 0.9, 0.4 * 0.1
    expected = torch.tensor([1, one / (one + two), two / (one + two), 1, 0])
    for tile in (1, 2, 3, 128):
        torch.testing.assert_close(solve_map(a, 1, (3, 4), tile=tile), expected)


def test_answer_tokens_share_with_the_sink():
    """0 -> 1 -> 2 with 1 and 2 answers: of what is in 1, W_12 against 1 goes on."""
    a = torch.zeros(3, 3)
    a[1, 0], a[2, 1] = 0.5, 0.25
    torch.testing.assert_close(solve_map(a, 1, (1, 3)), torch.tensor([1, 1, 0.25 / 1.25]))


def test_paths_enumerated():
    """Every path from the question to the sink by recursion: f is the share of path weight through a token."""
    n, prompt, answer = 9, 3, (6, 8)
    a = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tril()
    through = torch.zeros(n, dtype=torch.float64)

    def walk(path, weight):
        if answer[0] <= path[-1] < answer[1]:
            ends.append((path, weight))
        for k in range(path[-1] + 1, n):
            walk([*path, k], weight * a[k, path[-1]].item())

    for start in range(prompt):
        ends = []
        walk([start], 1.0)
        whole = sum(weight for _, weight in ends)
        for path, weight in ends:
            through[path] += weight / whole / prompt
    torch.testing.assert_close(solve_map(a.float(), prompt, answer).double(), through, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("tile", "window"), [(16, None), (33, 9), (128, None), (16, 70), (33, 1)])
def test_matches_dense(packed, tile, window):
    batches = [packed(ODD, seed=seed) for seed in range(3)]
    cu, starts = batches[0].cu_seqlens, batches[0].response_starts
    layers, answers = [(x.q, x.k) for x in batches], some_answers(cu, starts)
    actual = flow_of(layers, cu, starts, answers, FlowOptions(tile=tile, storage="float32"), scale=0.3, window=window)
    expected = dense_batch(layers, cu, starts, answers, scale=0.3, window=window)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)
    assert not actual[starts[-1] : cu[-1]].any()  # no answer
    stored = flow_of(layers, cu, starts, answers, FlowOptions(tile=tile), scale=0.3, window=window)
    # Each of three layers rounds the stored map by at most 2^-9; flow sums what is rounded up and down.
    torch.testing.assert_close(stored.double(), expected, rtol=3 * 2**-9 * 4, atol=1e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(1, 1, 8), (4, 4, 16), (8, 1, 64), (14, 2, 128)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_head_shapes(packed, monkeypatch, heads, kv_heads, dim, dtype):
    monkeypatch.setitem(flow.WORKSPACE, "cpu", 5000)  # pieces of sequences and of key heads
    batch = packed([40, 7, 90, 88, 41], heads=heads, kv_heads=kv_heads, dim=dim, dtype=dtype)
    cu, starts = batch.cu_seqlens, batch.response_starts
    answers, layers = [(end - 3, end - 1) for end in cu[1:]], [(batch.q, batch.k)]
    actual = flow_of(layers, cu, starts, answers, FlowOptions(tile=32, storage="float32"), scale=dim**-0.5)
    torch.testing.assert_close(
        actual.double(), dense_batch(layers, cu, starts, answers, scale=dim**-0.5), rtol=1e-5, atol=1e-7
    )


def test_threshold_cuts_edges(packed):
    batch = packed([150, 60])
    cu, starts = batch.cu_seqlens, batch.response_starts
    answers, layers = [(end - 3, end) for end in cu[1:]], [(batch.q, batch.k)]
    options = FlowOptions(threshold=0.012, storage="float32", tile=32)
    actual = flow_of(layers, cu, starts, answers, options, scale=0.3)
    expected = dense_batch(layers, cu, starts, answers, threshold=0.012, scale=0.3)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-7)
    assert (actual - dense_batch(layers, cu, starts, answers, scale=0.3)).abs().max() > 0.01  # the cut is no detail


def test_what_enters_the_question_leaves_at_the_answer(packed):
    """Into the sink flows f(a) / h(a) from each answer token; and no token passes on more than there is."""
    batch = packed([300])
    start, end = batch.response_starts[0], 300
    f = flow_of(
        [(batch.q, batch.k)], [0, end], [start], [(280, 290)], FlowOptions(storage="float32", tile=64), scale=0.3
    )
    a = dense_map(batch.q, batch.k, 0.3)
    target = torch.zeros(end, dtype=torch.float64)
    target[280:290] = 1
    h = torch.linalg.solve_triangular(torch.eye(end).double() - a.tril(-1).mT, target[:, None], upper=True)[:, 0]
    assert (f[280:290].double() / h[280:290]).sum().item() == pytest.approx(1.0, rel=1e-5)
    assert f[:start].sum() >= 1.0 - 1e-6
    assert f.max() <= 1 + 1e-6
    assert not f[290:].any()


def test_unconnected_question_tokens_inject_nothing():
    """0 reaches the answer, 1 does not: half the flow arrives."""
    a = torch.zeros(4, 4)
    a[2, 0], a[3, 2] = 0.5, 0.5
    torch.testing.assert_close(solve_map(a, 2, (3, 4)), torch.tensor([0.5, 0, 0.5, 0.5]))


@pytest.mark.parametrize("weight", [0.6, 1.0])
def test_h_out_of_range_of_every_float(weight):
    """A chain of 2500 tokens that keep most attention to themselves: h falls to 1e-550, and f stays 1."""
    n = 2500
    a = torch.zeros(n, n)
    a[torch.arange(1, n), torch.arange(n - 1)] = weight
    f = solve_map(a, 1, (n - 1, n), tile=128)
    torch.testing.assert_close(f, torch.ones(n), rtol=1e-4, atol=0)


def test_far_edges_beat_a_chain_that_died():
    """Tiles that reach the answer at wildly different strength, and some that do not at all."""
    n, tile = 1024, 64
    a = torch.zeros(n, n)
    a[torch.arange(1, n), torch.arange(n - 1)] = 0.5
    a[500, 499] = 0.0  # below, only the direct edge from 20 leads on
    a[n - 1, 20] = 1e-3
    f = solve_map(a, 1, (n - 1, n), tile=tile)
    expected = torch.zeros(n)
    expected[:21] = expected[n - 1] = 1
    torch.testing.assert_close(f, expected)


@pytest.mark.parametrize("window", [None, 40])
def test_thousands_of_tokens(packed, window):
    batch = packed([2300], heads=4, kv_heads=2, dim=16)
    arguments = [(batch.q, batch.k)], [0, 2300], [200], [(2280, 2290)]
    expected = dense_batch(*arguments, scale=1.0, window=window)
    exact = flow_of(*arguments, FlowOptions(storage="float32"), scale=1.0, window=window)
    torch.testing.assert_close(exact.double(), expected, rtol=1e-5, atol=1e-8)
    stored = flow_of(*arguments, FlowOptions(), scale=1.0, window=window)
    torch.testing.assert_close(stored.double(), expected, rtol=2**-5, atol=1e-5)


def test_sequences_do_not_touch(packed):
    batch = packed([70, 66, 20, 68])
    answers = [(end - 2, end) for end in batch.cu_seqlens[1:]]
    options = FlowOptions(tile=16, storage="float32")
    whole = flow_of([(batch.q, batch.k)], batch.cu_seqlens, batch.response_starts, answers, options, scale=0.3)
    for (begin, end), start, answer in zip(batch.bounds, batch.response_starts, answers, strict=True):
        own = [(batch.q[begin:end], batch.k[begin:end])], [0, end - begin], [start - begin]
        alone = flow_of(*own, [tuple(x - begin for x in answer)], options, scale=0.3)
        torch.testing.assert_close(whole[begin:end], alone, rtol=1e-6, atol=1e-8)


def test_errors_at_the_door(packed):
    batch = packed([20])
    gathered = FlowMap([0, 20], [5], [(10, 12)], 2)
    gathered.add(batch.q, batch.k, scale=1.0)
    assert gathered.flow is None
    gathered.add(batch.q, batch.k, scale=1.0)
    with pytest.raises(ValueError, match="all 2 layers"):
        gathered.add(batch.q, batch.k, scale=1.0)
    for start, end in ((4, 6), (12, 10), (19, 21)):
        with pytest.raises(ValueError, match=f"tokens {start} to {end}"):
            FlowMap([0, 20], [5], [(start, end)], 2)
    for bad in ({"threshold": 1.0}, {"threshold": -0.1}, {"storage": "float16"}, {"tile": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}="):
            FlowOptions(**bad)
