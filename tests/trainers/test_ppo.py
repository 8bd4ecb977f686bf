"""The critic against plain torch, and PPO's step made of known parts."""

import pytest
import torch
from transformers import AutoModelForTokenClassification

from rlattn import credit
from rlattn.config import CreditConfig, RunConfig
from rlattn.losses.value import value_loss
from rlattn.packing import cut
from rlattn.trainers.critic import Critic, CriticModel, load_critic
from rlattn.trainers.ppo import token_rewards
from rlattn.types import Scores, Signals
from tests.make import make_rollouts, policy_config, seats


def config(ranks=1, stage=0, **ppo):
    return policy_config(ranks, stage, algorithm={"name": "ppo"}, ppo={"critic_learning_rate": 1e-2} | ppo)


@pytest.fixture(scope="module")
def critic_path(model_path, tmp_path_factory):
    """A critic whose head says something, so that values differ."""
    critic = load_critic(config().model, model_path)
    assert not critic.score.weight.any()
    with torch.no_grad():
        critic.score.weight.normal_(generator=torch.Generator().manual_seed(3))
    path = tmp_path_factory.mktemp("critic")
    critic.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    rollouts = make_rollouts([5] * 12, torch.randint(1, 24, (12,), generator=generator).tolist(), group_size=4)
    return rollouts, torch.rand(len(rollouts.token_ids), generator=generator) * rollouts.response_mask


def plain_values(model, rollouts, b):
    """V of each response token of sequence b by an eager forward of that sequence alone: from the state before it."""
    start, end = rollouts.cu_seqlens[b : b + 2].tolist()
    prompt = int(rollouts.prompt_lengths[b])
    hidden = model.base_model(input_ids=rollouts.token_ids[start:end][None]).last_hidden_state[0]
    return model.score(hidden)[prompt - 1 : -1, 0], slice(start + prompt, end)


def eager(path):
    return AutoModelForTokenClassification.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def test_values_are_of_the_state_before_the_token(critic_path, batch):
    rollouts, _ = batch
    (micros,) = cut(rollouts, [[[0, 3, 4], [11]]], 16)
    critic, plain = CriticModel(load_critic(config().model, critic_path)), eager(critic_path)
    with torch.no_grad():
        for micro, sequences in zip(micros, ([0, 3, 4], [11]), strict=True):
            expected = torch.cat([plain_values(plain, rollouts, b)[0] for b in sequences])
            torch.testing.assert_close(critic(micro), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_a_critic_step_equals_plain_torch(local_ray, critic_path, batch, ranks, stage):
    rollouts, returns = batch
    plain = eager(critic_path)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    old, loss = torch.zeros_like(returns), torch.zeros(())
    for b in range(len(rollouts)):
        values, where = plain_values(plain, rollouts, b)
        old[where] = values.detach()
        loss = loss + value_loss(values, old[where], returns[where], 0.2)[0].sum() / rollouts.response_mask.sum()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
    optimizer.step()
    after = torch.zeros_like(returns)
    with torch.no_grad():
        for b in range(len(rollouts)):
            values, where = plain_values(plain, rollouts, b)
            after[where] = values

    settings = config(ranks, stage)
    with seats(settings) as (layout, group):
        critic = Critic(settings, layout, group)
        critic.load(critic_path, None)
        values = critic.values(rollouts)
        metrics = critic.update(rollouts, values, returns, step=0)
        then = critic.values(rollouts)
    torch.testing.assert_close(values, old, rtol=1e-4, atol=1e-5)
    assert metrics["vf_loss"] == pytest.approx(float(loss.detach()), rel=1e-4)
    assert metrics["critic/grad_norm"] == pytest.approx(float(norm), rel=1e-3)
    mask = rollouts.response_mask
    explained = 1 - (returns - old)[mask].var() / returns[mask].var()
    assert metrics["explained_variance"] == pytest.approx(float(explained), abs=1e-4)
    # Adam's first step is lr * sign(g), and where g is near 0 its sign is rounding: compare what it does as a whole
    assert (then - after)[mask].abs().mean() < 0.05 * (after - old)[mask].abs().mean()


def scores_of(rollouts, logps, reference=None):
    zeros, heads = torch.zeros(len(rollouts.token_ids)), torch.zeros(1, 2)
    generator = torch.Generator().manual_seed(5)
    waad, fai = torch.rand(2, len(zeros), generator=generator)
    signals = Signals(waad, fai, [0], heads, heads, heads, heads.to(torch.int8))
    return Scores(logps, zeros, signals, reference)


def test_token_rewards_by_hand():
    rollouts = make_rollouts([2, 1], [2, 3]).replace(rewards=torch.tensor([1.0, -0.5]))
    logps = torch.tensor([0, 0, -1.0, -2.0, 0, -1.0, -1.0, -3.0])
    reference = torch.tensor([9.0, 9.0, -2.0, -1.0, 9.0, -1.0, -1.5, -1.0])
    rewards, metrics = token_rewards(rollouts, scores_of(rollouts, logps, reference), 0.1)
    torch.testing.assert_close(rewards, torch.tensor([0, 0, -0.1, 1.1, 0, 0, -0.05, -0.3]))
    assert metrics["kl"] == pytest.approx((1 - 1 + 0 + 0.5 - 2) / 5)
    assert metrics["reward"] == 0.25
    plain, _ = token_rewards(rollouts, scores_of(rollouts, logps), 0.0)
    torch.testing.assert_close(plain, torch.tensor([0, 0, 0, 1.0, 0, 0, 0, -0.5]))


@pytest.mark.parametrize("sign", ["both", "positive", "negative"])
def test_credit_goes_by_the_sign_of_the_token(sign):
    rollouts = make_rollouts([2] * 3, [9, 4, 12])
    scores = scores_of(rollouts, torch.zeros(len(rollouts.token_ids)))
    advantages = torch.randn(len(rollouts.token_ids), generator=torch.Generator().manual_seed(0))
    settings = CreditConfig(name="global_anchor", sign=sign)
    gamma, metrics = credit.assign_tokens(rollouts, scores, advantages, settings, seed=0, step=0)
    plain = CreditConfig(name="global_anchor")
    whole, _ = credit.assign(rollouts, scores, torch.ones(3), plain, seed=0, step=0)
    shaped = {"both": torch.ones_like(advantages), "positive": advantages >= 0, "negative": advantages < 0}[sign].bool()
    assert torch.equal(gamma, torch.where(shaped, whole, 1.0))
    assert (gamma != 1).any()
    mask = rollouts.response_mask
    assert metrics["credit/amplified_share"] == pytest.approx((gamma[mask] > 1).float().mean().item())
    assert metrics["credit/mean_gamma"] == pytest.approx(gamma[mask].mean().item())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": {"name": "ppo", "estimator": "rloo"}}, "the critic's"),
        ({"algorithm": {"name": "ppo"}, "signals": {"forward": "train"}}, "PPO needs the old log-probs"),
        ({"algorithm": {"name": "ppoo"}}, "'grpo' or 'ppo'"),
        ({"ppo": {"lam": 1.5}}, "less than or equal to 1"),
    ],
)
def test_what_ppo_cannot_do_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        RunConfig.model_validate(settings)
