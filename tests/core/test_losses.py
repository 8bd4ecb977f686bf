"""The loss of an optimizer step against TRL's own `GRPOTrainer`, and against a plain GRPO step written out here."""

import math

import pytest
import torch

from rlattn.advantages import group_relative
from rlattn.config import CreditConfig, RunConfig
from rlattn.credit import assign
from rlattn.logprobs import token_logps
from rlattn.losses import kl_k3, policy_loss, token_weights
from rlattn.types import Scores, Signals
from tests.make import make_rollouts, tiny_qwen3

VOCAB, LIMIT = 50, 12
PROMPTS, RESPONSES = [3, 5, 2, 4], [7, 1, 12, 5]


def run_config(**algorithm):
    return RunConfig(algorithm=algorithm, rollout={"max_completion_length": LIMIT})


def signals_of(rollouts):
    zeros, heads = torch.zeros(len(rollouts.token_ids)), torch.zeros(1, 2)
    return Signals(zeros, zeros, [0], heads, heads, heads, heads.to(torch.int8))


@pytest.fixture(scope="module")
def model():
    return tiny_qwen3(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )


@pytest.fixture(scope="module")
def trl_trainer(model, tmp_path_factory):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1", pad_token="w2"
    )
    args = GRPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        max_completion_length=LIMIT,
        num_generations=2,
        per_device_train_batch_size=4,
    )
    data = Dataset.from_list([{"prompt": "w3"}])
    trainer = GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [0.0], args=args, train_dataset=data, processing_class=tokenizer
    )
    trainer.model.train()
    return trainer


def padded(rows, side):
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=rows[0].dtype)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


class Step:
    """The same tensors for both sides: packed [T] for rlattn, padded for TRL."""

    def __init__(self, model, *, per_token, truncated):
        self.rollouts = make_rollouts(PROMPTS, RESPONSES, vocab=VOCAB, seed=1, group_size=2)
        self.rollouts = self.rollouts.replace(truncated=torch.tensor(truncated))
        generator = torch.Generator().manual_seed(2)
        count = len(self.rollouts.token_ids)
        with torch.no_grad():
            logps = self.logps(model, range(len(PROMPTS)))
        self.old = torch.zeros(count).masked_scatter(self.rollouts.response_mask, logps)
        self.old += 0.4 * torch.randn(count, generator=generator)  # ratios on both sides of the clip range
        self.reference = self.old + 0.3 * torch.randn(count, generator=generator)
        self.sequence_advantages = torch.tensor([1.3, -0.7, -1.1, 0.4])
        gamma = 1 + 0.5 * torch.rand(count, generator=generator).round() if per_token else torch.ones(count)
        self.advantages = gamma * self.sequence_advantages[self.rollouts.sequence_ids]
        self.per_token = per_token

    def responses(self, column, chosen):
        r = self.rollouts
        return [column[r.cu_seqlens[i] + r.prompt_lengths[i] : r.cu_seqlens[i + 1]] for i in chosen]

    def logps(self, model, chosen):
        """[n] of the response tokens of `chosen`, each sequence run alone."""
        r, parts = self.rollouts, []
        for i in chosen:
            tokens, prompt = r.token_ids[r.cu_seqlens[i] : r.cu_seqlens[i + 1]], int(r.prompt_lengths[i])
            hidden = model.get_decoder()(input_ids=tokens[None]).last_hidden_state[0, prompt - 1 : -1]
            parts.append(token_logps(hidden, model.lm_head, tokens[prompt:], num_chunks=3)[0])
        return torch.cat(parts)

    def ours(self, model, chosen, config, *, correct_kl=True):
        weights = token_weights(self.rollouts, chosen, config)
        old, reference, advantages, weights = (
            torch.cat(self.responses(column, chosen)) for column in (self.old, self.reference, self.advantages, weights)
        )
        a = config.algorithm
        logps = self.logps(model, chosen)
        loss, clipped = policy_loss(logps, old, advantages, epsilon=a.epsilon, epsilon_high=a.epsilon_high)
        if a.beta:
            loss = loss + a.beta * kl_k3(logps, reference, old if correct_kl else None)
        return (weights * loss).sum(), clipped

    def theirs(self, trainer, chosen, config):
        r = self.rollouts
        prompts = [r.token_ids[r.cu_seqlens[i] : r.cu_seqlens[i] + r.prompt_lengths[i]] for i in chosen]
        prompt_ids, prompt_mask = padded(prompts, "left")
        completion_ids, completion_mask = padded(self.responses(r.token_ids, chosen), "right")
        lengths = r.response_lengths
        if config.algorithm.mask_truncated_completions:  # what `_generate_and_score_completions` does
            completion_mask = completion_mask * (~r.truncated[chosen])[:, None].int()
            lengths = lengths * ~r.truncated
        advantages = self.sequence_advantages[chosen]
        if self.per_token:
            advantages = padded(self.responses(self.advantages, chosen), "right")[0]
        inputs = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask,
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
            "advantages": advantages,
            "num_items_in_batch": lengths.sum(),
            "old_per_token_logps": padded(self.responses(self.old, chosen), "right")[0],
            "ref_per_token_logps": padded(self.responses(self.reference, chosen), "right")[0],
        }
        return trainer._compute_loss(trainer.model, inputs)


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def set_up(trainer, config, *, accumulation, steps_per_generation, correct_kl=True):
    a = config.algorithm
    trainer.loss_type, trainer.beta = a.loss_type, a.beta
    trainer.epsilon_low = a.epsilon
    trainer.epsilon_high = a.epsilon if a.epsilon_high is None else a.epsilon_high
    trainer.current_gradient_accumulation_steps = accumulation
    trainer.args.steps_per_generation = steps_per_generation
    trainer.args.use_bias_correction_kl = correct_kl


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo"])
@pytest.mark.parametrize(
    ("options", "per_token"),
    [
        ({}, False),
        ({"epsilon_high": 0.28}, True),
        ({"beta": 0.2}, True),
        ({"mask_truncated_completions": True, "beta": 0.1}, True),
    ],
)
def test_loss_and_gradients_equal_trl(loss_type, options, per_token, model, trl_trainer):
    config = run_config(loss_type=loss_type, **options)
    step = Step(model, per_token=per_token, truncated=[False, False, True, False])
    everything = list(range(len(PROMPTS)))
    set_up(trl_trainer, config, accumulation=1, steps_per_generation=1)
    expected = step.theirs(trl_trainer, everything, config)
    loss, clipped = step.ours(model, everything, config)

    assert abs(expected.item()) > 1e-3
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    if not config.algorithm.mask_truncated_completions:
        logged = trl_trainer._metrics["train"]
        for name, mask in clipped._asdict().items():
            assert 0 < mask.float().mean() < 1
            assert mask.float().mean().item() == pytest.approx(logged[f"clip_ratio/{name}_mean"][-1])


def test_kl_without_the_importance_ratio_equals_trl(model, trl_trainer):
    config = run_config(beta=0.2)
    step = Step(model, per_token=True, truncated=[False] * 4)
    set_up(trl_trainer, config, accumulation=1, steps_per_generation=1, correct_kl=False)
    expected = step.theirs(trl_trainer, list(range(4)), config)
    loss, _ = step.ours(model, range(4), config, correct_kl=False)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(model, loss), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_mini_batches_equal_trl_with_gradient_accumulation(loss_type, model, trl_trainer):
    """Two optimizer steps a batch; TRL sees each as two micro-batches of one (its steps_per_generation is then 4)."""
    config = run_config(loss_type=loss_type, steps_per_generation=2)
    step = Step(model, per_token=True, truncated=[False] * 4)
    set_up(trl_trainer, config, accumulation=2, steps_per_generation=4)
    for mini in ([2, 0], [3, 1]):
        expected = sum(step.theirs(trl_trainer, [i], config) for i in mini)
        torch.testing.assert_close(step.ours(model, mini, config)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
def test_uniform_credit_is_plain_grpo_bit_for_bit(scale_rewards):
    rollouts = make_rollouts([2, 3, 1, 4, 2, 2], [5, 3, 9, 1, 4, 12], group_size=3)
    generator = torch.Generator().manual_seed(3)
    count = len(rollouts.token_ids)
    old = -2 * torch.rand(count, generator=generator)
    logps = (old + 0.3 * torch.randn(count, generator=generator)).requires_grad_()
    rewards = torch.tensor([1.0, 0.1, 0.0, 0.3, 0.3, 1.0])

    advantages, _ = group_relative(rewards, rollouts.group_ids, scale_rewards)
    entropy = torch.rand(count, generator=generator)
    scores = Scores(old, entropy, signals_of(rollouts))
    gamma, _ = assign(rollouts, scores, advantages, CreditConfig(name="uniform"), seed=0, step=0)
    shaped = gamma * advantages[rollouts.sequence_ids]
    token_loss, _ = policy_loss(logps, old, shaped, epsilon=0.2)
    weights = token_weights(rollouts, range(6), run_config())
    loss = (weights * token_loss)[rollouts.response_mask].sum()
    (gradient,) = torch.autograd.grad(loss, logps)

    # Plain GRPO: no credit anywhere.
    plain_advantages = []
    for group in (rewards[:3].double(), rewards[3:].double()):
        scale = {"group": group.std() + 1e-4, "batch": rewards.double().std() + 1e-4, "none": 1.0}[scale_rewards]
        plain_advantages += [(reward - group.mean()) / scale for reward in group]
    terms = []
    for i, advantage in enumerate(plain_advantages):
        start, end = int(rollouts.cu_seqlens[i] + rollouts.prompt_lengths[i]), int(rollouts.cu_seqlens[i + 1])
        ratio = torch.exp(logps[start:end] - old[start:end])
        clipped = torch.clamp(ratio, 1 - 0.2, 1 + 0.2)
        per_token = -torch.min(ratio * advantage.float(), clipped * advantage.float())
        terms.append(1 / torch.tensor(6.0 * (end - start)) * per_token)
    plain = torch.cat(terms)
    (plain_gradient,) = torch.autograd.grad(plain.sum(), logps)

    assert torch.equal((weights * token_loss)[rollouts.response_mask], plain)
    assert torch.equal(loss, plain.sum())
    assert torch.equal(gradient, plain_gradient)


def test_weights_by_hand():
    rollouts = make_rollouts([1, 2, 1], [2, 3, 5]).replace(truncated=torch.tensor([False, False, True]))

    def weights(chosen, **algorithm):
        whole = token_weights(rollouts, chosen, run_config(**algorithm))
        assert not whole[~rollouts.response_mask].any()
        return [sorted(set(part.tolist())) for part in Step.responses(_Holder(rollouts), whole, range(3))]

    close = pytest.approx
    assert weights([0, 1], loss_type="grpo") == [[close(1 / 4)], [close(1 / 6)], [0]]
    assert weights([0, 1], loss_type="dr_grpo") == [[close(1 / 24)], [close(1 / 24)], [0]]
    assert weights([0, 1], loss_type="bnpo") == [[close(1 / 5)], [close(1 / 5)], [0]]
    assert weights([0, 1], loss_type="dapo", steps_per_generation=2) == [[close(2 / 10)], [close(2 / 10)], [0]]
    masked = {"mask_truncated_completions": True}
    assert weights([0, 2], loss_type="grpo", **masked) == [[close(1 / 4)], [0], [0]]
    assert weights([0, 2], loss_type="dr_grpo", **masked) == [[close(1 / 24)], [0], [0]]
    assert weights([0, 2], loss_type="bnpo", **masked) == [[close(1 / 2)], [0], [0]]
    assert weights([0, 2], loss_type="dapo", **masked) == [[close(1 / 5)], [0], [0]]
    for loss_type in ("grpo", "dr_grpo", "bnpo", "dapo"):
        assert weights([2], loss_type=loss_type, **masked) == [[0], [0], [0]]


class _Holder:
    def __init__(self, rollouts):
        self.rollouts = rollouts


def test_clipping_by_hand():
    ratio = torch.tensor([0.5, 0.5, 1.0, 1.5, 1.5])
    advantages = torch.tensor([2.0, -2.0, 2.0, 2.0, -2.0])
    logps = ratio.log().requires_grad_()
    loss, clipped = policy_loss(logps, torch.zeros(5), advantages, epsilon=0.2, epsilon_high=0.3)
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.0, 1.6, -2.0, -2.6, 3.0]))
    assert clipped.low.tolist() == [False, True, False, False, False]
    assert clipped.high.tolist() == [False, False, False, True, False]
    loss.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([-1.0, 0.0, -2.0, 0.0, 3.0]))


def test_k3_by_hand():
    logps = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.bfloat16)
    kl = kl_k3(logps, torch.tensor([-1.0, -1.0, -1.5]))
    assert kl.dtype == torch.float32
    assert kl.tolist() == pytest.approx([0, math.e - 2, math.exp(-1)])
    corrected = kl_k3(logps, torch.tensor([-1.0, -1.0, -1.5]), torch.tensor([-2.0, -3.0, -0.5]))
    assert corrected.tolist() == pytest.approx([0, math.e * (math.e - 2), math.exp(-1)])


def test_shapes_never_broadcast():
    with pytest.raises(ValueError, match=r"advantages \(1,\)"):
        policy_loss(torch.zeros(3), torch.zeros(3), torch.zeros(1), epsilon=0.2)
    with pytest.raises(ValueError, match=r"reference_logps \(\)"):
        kl_k3(torch.zeros(3), torch.zeros(()))
    with pytest.raises(ValueError, match=r"old_logps \(1,\)"):
        kl_k3(torch.zeros(3), torch.zeros(3), torch.zeros(1))
