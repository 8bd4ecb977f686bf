"""Signals options from the config through `policy.score`, against whole attention maps of the eager model."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlattn.config import ConfigError, RunConfig
from rlattn.kernels import StatisticsOptions
from rlattn.kernels.reference import map_statistics
from rlattn.signals import GLOBAL, LOCAL, head_groups, kurtosis
from rlattn.trainers.memory import estimate
from tests.make import make_rollouts, policy_of

PROMPT, RESPONSES = 5, [23, 7, 18, 12, 20, 9]


def config(model_path, signals, ranks=1):
    return RunConfig.model_validate(
        {
            "model": {"dtype": "float32", "path": model_path},
            "rollout": {"max_prompt_length": 8, "max_completion_length": 24, "num_generations": 3},
            "signals": signals,
            "credit": {"name": "column_mean"},  # asks for `fai_all`
            "policy": {"ranks": ranks, "gpus_per_rank": 0, "tokens_per_micro_batch": 64, "timeout_s": 240},
            "trainer": {"prompts_per_step": 2},
            "ray": {"num_cpus": 8},
        }
    )


@pytest.fixture(scope="module")
def rollouts():
    return make_rollouts([PROMPT] * len(RESPONSES), RESPONSES, group_size=3)


@pytest.fixture(scope="module")
def maps(model_path, rollouts):
    """Per sequence, the model's [L, H, N, N] attention maps."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        pieces = rollouts.token_ids.split(rollouts.lengths.tolist())
        return [torch.cat(model(ids[None], output_attentions=True).attentions).double() for ids in pieces]


def score(settings, rollouts):
    with policy_of(settings, settings.model.path) as policy:
        return policy.score(rollouts)


def expected_signals(maps, layers, options, heads):
    """WAAD, FAI and FAI over all heads [T], and the pooled groups, by the definitions."""
    found = [map_statistics(own[layers], PROMPT, options) for own in maps]  # [L, H, N] each

    def rank(chosen):  # span and kurtosis [L, H] over the responses of some sequences
        rows = sum(RESPONSES[i] for i in chosen)
        span = sum(found[i]["span"].sum(-1) for i in chosen) / rows
        seen = {i: found[i]["fai"][..., PROMPT : PROMPT + RESPONSES[i] - options.fai_low] for i in chosen}
        return span, sum(RESPONSES[i] * kurtosis(fai) for i, fai in seen.items()) / rows

    def groups_of(chosen):
        span, peaked = rank(chosen)
        return head_groups(span, 0.3, peaked if heads["select"] == "receiver" else None)

    def mean(values, groups, group):
        return values.mean((0, 1)) if heads["select"] == "all" else values[groups == group].mean(0)

    pooled = groups_of(range(len(maps)))
    waad, fai, fai_all = [], [], []
    for i, own in enumerate(found):
        groups = groups_of([i]) if heads.get("scope") == "sequence" else pooled
        waad.append(mean(own["waad"], groups, LOCAL))
        fai.append(mean(own["fai"], groups, GLOBAL))
        fai_all.append(own["fai"].mean((0, 1)))
    return *(torch.cat(parts).float() for parts in (waad, fai, fai_all)), pooled


@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("signals", "layers", "ranks"),
    [
        (
            {"layers": [0, 3, 5], "heads": {"select": "receiver"}, "fai_low": 1, "fai_high": None, "sink_tokens": 2},
            [0, 3, 5],
            2,
        ),
        (
            {"layers": None, "layer_range": "top", "heads": {"select": "all"}, "fai_low": 2, "waad_window": 3},
            [5],
            1,
        ),
        (
            {"layers": 2, "layer_range": "all", "heads": {"select": "receiver", "scope": "sequence"}, "fai_low": 2}
            | {"fai_high": 4, "sink_tokens": 1},
            [0, 5],
            1,
        ),
    ],
    ids=["receiver-batch", "all-heads", "receiver-sequence"],
)
def test_score_equals_whole_maps(model_path, rollouts, maps, signals, layers, ranks):
    settings = config(model_path, signals, ranks)
    chosen = settings.signals
    options = StatisticsOptions(chosen.waad_window, chosen.fai_low, chosen.fai_high, chosen.sink_tokens)
    waad, fai, fai_all, groups = expected_signals(maps, layers, options, signals["heads"])
    scores = score(settings, rollouts)
    found = scores.signals
    assert found.layers == layers
    for actual, wanted in ((found.waad, waad), (found.fai, fai), (found.extra["fai_all"], fai_all)):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    if chosen.heads.select == "all":
        assert not found.groups.any()
        assert torch.equal(found.fai, found.extra["fai_all"])
    else:
        assert torch.equal(found.groups, groups)
        assert not torch.equal(groups, head_groups(found.span, 0.3))  # else kurtosis decided nothing
        assert (fai - fai_all).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("layers", "message"),
    [([2, 6], r"`signals.layers` = \[2, 6\]: layers \[6\] cannot be captured.*\[0, 1, 2, 3, 4, 5\]")],
)
def test_layers_that_the_model_lacks_are_refused_before_anything_starts(model_path, layers, message):
    with pytest.raises(ConfigError, match=message):
        estimate(config(model_path, {"layers": layers}))
