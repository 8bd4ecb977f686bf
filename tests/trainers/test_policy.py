"""The DeepSpeed policy against plain torch: the same scores, the same step, however it is packed and sharded."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlattn.config import CreditConfig
from rlattn.estimators.grpo import group_relative
from tests.make import fetch_weights, make_rollouts, policy_config, policy_of, tiny_qwen3

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]


def config(ranks=1, stage=0, **algorithm):
    return policy_config(ranks, stage, policy={"learning_rate": 1e-2}, algorithm=algorithm)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    rollouts = make_rollouts([5] * 12, torch.randint(1, 24, (12,), generator=generator).tolist(), group_size=4)
    rollouts = rollouts.replace(rewards=torch.rand(12, generator=generator))
    advantage, _ = group_relative(rollouts.rewards, rollouts.group_ids, "group")
    gamma = 1 + torch.rand(len(rollouts.token_ids), generator=generator)
    return rollouts, gamma * advantage[rollouts.sequence_ids]


def run(settings, model_path, batch):
    """Scores, update metrics, the weights after one update, and scores again."""
    rollouts, advantages = batch
    with policy_of(settings, model_path) as policy:
        scores = policy.score(rollouts)
        metrics = policy.update(rollouts, scores, advantages, step=0)
        return scores, metrics, fetch_weights(policy.weights()), policy.score(rollouts)


def plain_step(model_path, rollouts, advantages, *, beta=0.0, steps=1):
    """The same GRPO step on unpacked sequences, written out."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    reference = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)

    def logps_of(network, b):
        start, end = rollouts.cu_seqlens[b : b + 2].tolist()
        tokens, prompt = rollouts.token_ids[start:end], int(rollouts.prompt_lengths[b])
        table = network(tokens[None]).logits[0].log_softmax(-1)
        return table[prompt - 1 : -1].gather(1, tokens[prompt:, None])[:, 0], slice(start + prompt, end)

    with torch.no_grad():
        old = [logps_of(model, b)[0] for b in range(len(rollouts))]
    for _ in range(steps):
        loss = torch.zeros(())
        for b in range(len(rollouts)):
            logps, where = logps_of(model, b)
            ratio = torch.exp(logps - old[b])
            token = -torch.min(ratio * advantages[where], ratio.clamp(0.8, 1.2) * advantages[where])
            if beta:
                difference = logps_of(reference, b)[0].detach() - logps
                token = token + beta * ratio * (torch.exp(difference) - difference - 1)
            loss = loss + token.mean() / len(rollouts)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return torch.cat(old), float(loss.detach()), float(norm), dict(model.named_parameters())


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (1, 2), (2, 1), (2, 3)])
def test_a_step_equals_plain_torch(model_path, batch, ranks, stage):
    rollouts, advantages = batch
    old, loss, norm, expected = plain_step(model_path, rollouts, advantages)
    scores, metrics, weights, after = run(config(ranks, stage), model_path, batch)
    torch.testing.assert_close(scores.logps[rollouts.response_mask], old, rtol=1e-5, atol=1e-5)
    assert not scores.logps[~rollouts.response_mask].any()
    assert metrics["loss"] == pytest.approx(loss, abs=1e-5)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        # Adam's first step is lr * sign(g): where g is near 0 its sign is rounding, so compare what moved the same way
        close = (tensor - expected[name]).abs() < 1e-4
        assert close.float().mean() > 0.999, name
    assert not torch.equal(after.logps, scores.logps)
    assert (scores.signals.waad[rollouts.response_mask] > 0).any()


@pytest.fixture(scope="module")
def after_two_updates(model_path, batch):
    """The weights after two updates, by ranks and DeepSpeed's `zero_optimization`.

    AdamW's epsilon is far above the gradients' rounding: with the usual one the first step is lr * sign(g), which turns
    the rounding of a g near 0 into a whole step.
    """
    rollouts, advantages = batch

    def learned(ranks, **zero):
        settings = config(ranks, num_iterations=2, steps_per_generation=2)
        changes = {"adam_epsilon": 1e-3, "deepspeed": {"zero_optimization": zero}}
        settings = settings.model_copy(update={"policy": settings.policy.model_copy(update=changes)})
        return run(settings, model_path, (rollouts, advantages))[2]

    return learned, learned(1, stage=0)


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("ranks", "zero"),
    [
        (1, {"stage": 1}),
        (1, {"stage": 2} | OFFLOAD),
        (1, {"stage": 3}),
        (2, {"stage": 0}),
        (2, {"stage": 1}),
        (2, {"stage": 2}),
        (2, {"stage": 3, "offload_param": {"device": "cpu"}} | OFFLOAD),
        (4, {"stage": 3}),
    ],
)
def test_ranks_stages_and_offload_learn_the_same_to_1e_5(model_path, after_two_updates, ranks, zero):
    learned, expected = after_two_updates
    start = dict(AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).named_parameters())
    weights = learned(ranks, **zero)
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert (expected[name] - start[name]).abs().max() > 1e-3, name  # there was something to get wrong
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def test_uniform_credit_in_the_training_forward_is_plain_grpo(model_path, batch):
    rollouts, _ = batch
    advantage, _ = group_relative(rollouts.rewards, rollouts.group_ids, "group")
    old, _, norm, expected = plain_step(model_path, rollouts, advantage[rollouts.sequence_ids])
    settings = config(1, 2).model_copy(update={"credit": CreditConfig(name="uniform")})
    with policy_of(settings, model_path) as policy:
        trained = policy.train(rollouts, advantage, [[-1, 1, 0, 0]] * 3, step=0)
        weights = fetch_weights(policy.weights())
    assert (trained.gamma == 1).all()
    torch.testing.assert_close(trained.scores.logps[rollouts.response_mask], old, rtol=1e-5, atol=1e-5)
    assert trained.update_metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    for name, tensor in weights.items():
        assert ((tensor - expected[name]).abs() < 1e-4).float().mean() > 0.999, name


def test_reference_kl_and_several_iterations(model_path, batch):
    rollouts, advantages = batch
    _, _, _, expected = plain_step(model_path, rollouts, advantages, beta=0.1, steps=2)
    scores, metrics, weights, _ = run(config(2, 3, beta=0.1, num_iterations=2), model_path, batch)
    torch.testing.assert_close(scores.reference_logps, scores.logps, rtol=0, atol=1e-5)
    assert metrics["kl"] > 0
    for name, tensor in weights.items():
        assert ((tensor - expected[name]).abs() < 1e-3).float().mean() > 0.99, name


def test_ranks_with_nothing_left_change_nothing(model_path):
    """Five long sequences on two ranks under a budget of one each: a rank runs an empty forward."""
    rollouts = make_rollouts([5] * 5, [19] * 5, group_size=5)
    batch = rollouts, torch.linspace(-1, 1, len(rollouts.token_ids))
    settings = config(2, 3)
    settings = settings.model_copy(update={"policy": settings.policy.model_copy(update={"tokens_per_micro_batch": 40})})
    one, few = run(config(1, 0), model_path, batch), run(settings, model_path, batch)
    torch.testing.assert_close(few[0].logps, one[0].logps, rtol=0, atol=1e-5)
    torch.testing.assert_close(few[0].signals.span, one[0].signals.span, rtol=1e-5, atol=1e-5)
    assert few[1]["loss"] == pytest.approx(one[1]["loss"], abs=1e-5)
    assert few[1]["grad_norm"] == pytest.approx(one[1]["grad_norm"], rel=1e-4)


def test_signals_do_not_depend_on_sharding(model_path, batch):
    one = run(config(1, 0), model_path, batch)[0]
    two = run(config(2, 3), model_path, batch)[0]
    for name in ("waad", "fai", "span", "entropy", "sink_mass", "groups"):
        torch.testing.assert_close(getattr(one.signals, name), getattr(two.signals, name), rtol=1e-5, atol=1e-5)
    assert one.signals.layers == two.signals.layers == [2, 3, 4]


@pytest.mark.parametrize(
    ("zero", "whole"), [({"stage": 3}, True), ({"stage": 2}, False), ({"stage": 3, "leaf_module": {}}, False)]
)
def test_zero_3_gathers_whole_layers_unless_the_user_says_which(zero, whole):
    from deepspeed.utils import z3_leaf_module

    from rlattn.trainers.rank import gathered_by_layer

    policy = policy_config(2, policy={"deepspeed": {"zero_optimization": zero}}).policy
    model = gathered_by_layer(tiny_qwen3(), policy)
    assert {name for name, part in model.named_modules() if z3_leaf_module(part)} == (
        {"model.layers.0", "model.layers.1"} if whole else set()
    )
