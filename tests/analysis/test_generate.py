"""Continuations and the perturbation study against loops without cache, padding or batch."""

from __future__ import annotations

from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from analysis_naive import naive_greedy
from transformers import AutoModelForCausalLM, GenerationConfig

from rlattn.analysis.config import PerturbationConfig
from rlattn.analysis.generate import Writer
from rlattn.analysis.perturbation import perturb, similarity
from rlattn.analysis.responses import Response
from rlattn.kernels import register

PREFIXES = [[5, 9, 40], [7], [60, 33, 21, 20, 11, 80, 3], [7, 8], [90, 14, 13, 12]]


@pytest.fixture(scope="module")
def eager(model_path):
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture
def model(model_path):
    return AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation=register()).eval()


def test_greedy_is_greedy_whatever_the_batch(model, eager):
    whole = [naive_greedy(eager, prefix, 12, set()) for prefix in PREFIXES]
    end = {whole[0][5], whole[2][3]}  # so that some stop early
    expected = [naive_greedy(eager, prefix, 12, end) for prefix in PREFIXES]
    assert len({len(tokens) for tokens in expected}) > 1
    for budget in (1, 40, 10_000):
        writer, steps = Writer(model, end, budget), Counter()
        batches = writer.batches(PREFIXES, 12)
        assert sorted(i for batch in batches for i in batch) == list(range(len(PREFIXES)))
        assert all(len(batch) == 1 or len(batch) * (len(PREFIXES[batch[0]]) + 12) <= budget for batch in batches)
        assert writer.write(PREFIXES, 12, step=partial(steps.update, "s")) == expected
        assert steps.total() == 12 * len(batches)


def test_sampling_follows_the_seed_and_no_shipped_sampling_settings(model):
    model.generation_config = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=1.9, eos_token_id=0)
    writer = Writer(model, set(), 10_000)
    draw = lambda seed: writer.write([[7]] * 40, 3, temperature=2.0, seed=seed)  # noqa: E731
    assert draw(0) == draw(0) != draw(1)
    assert len({tuple(tokens) for tokens in draw(0)}) > 5  # top_k 1 would draw the same forty times


def test_sampled_tokens_come_from_the_models_distribution(model, eager):
    writer = Writer(model, set(), 10**6)
    drawn = np.array(writer.write([[7, 8, 9]] * 3000, 1, temperature=1.5, seed=4)).ravel()
    with torch.no_grad():
        chance = (eager(torch.tensor([[7, 8, 9]])).logits[0, -1] / 1.5).softmax(-1).numpy()
    seen = np.bincount(drawn, minlength=97) / 3000
    assert np.abs(seen - chance).sum() / 2 < 0.08  # total variation; sampling noise alone gives about 0.04


def test_branches_are_forced_and_continued_greedily(model, eager, tokenizer):
    rng = np.random.default_rng(0)
    responses = [
        Response(str(i), "", rng.integers(2, 97, 4).tolist(), rng.integers(2, 97, size).tolist())
        for i, size in enumerate((20, 14, 10))  # the last is too short for H_lo = 10
    ]
    fai = [rng.random(len(r.token_ids)).astype(np.float32) for r in responses]
    with torch.no_grad():
        likely = int(eager(torch.tensor([responses[0].ids])).logits[0, 5].argmax())
    end = {0, likely}  # a token that would be forced, were it not an end
    config = PerturbationConfig(positions=2, top_k=3, max_tokens=6)
    writer = Writer(model, end, 200)
    totals = []
    sites = perturb(
        model,
        tokenizer,
        writer,
        responses,
        fai,
        10,
        config,
        context=256,
        bar=lambda n: totals.append(n) or (lambda: None),
    )
    assert sorted((s.response, s.kind) for s in sites) == sorted(
        (i, kind) for i, count in ((0, 2), (1, 2)) for kind in ("top", "bottom") for _ in range(count)
    )
    assert len(totals) == 1
    for site in sites:
        response = responses[site.response]
        prefix = response.prompt_ids + response.token_ids[: site.position]
        with torch.no_grad():
            logits = eager(torch.tensor([prefix])).logits[0, -1]
        order = [token for token in logits.argsort(descending=True).tolist() if token not in end][:3]
        assert site.forced == [tokenizer.decode([token]) for token in order]
        texts = [
            tokenizer.decode([token, *naive_greedy(eager, [*prefix, token], 6, end)], skip_special_tokens=True)
            for token in order
        ]
        assert site.texts == texts
        assert site.similarity == similarity(texts)
        own = fai[site.response][: len(response.token_ids) - 10]
        ranked = np.argsort(-own if site.kind == "top" else own)[:2]
        assert site.position in ranked
