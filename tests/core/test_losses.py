"""The loss of an optimizer step against TRL's own `GRPOTrainer`, and against a plain GRPO step written out here."""

import math

import pytest
import torch

from rlattn.config import CreditConfig, RunConfig
from rlattn.credit import assign
from rlattn.estimators.grpo import group_relative
from rlattn.logprobs import token_logps
from rlattn.losses import mean_weights, token_weights
from rlattn.losses.inputs import LossInputs
from rlattn.losses.kl import kl_k3
from rlattn.losses.token import micro_batch_loss
from rlattn.objectives import cispo, clip
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
        self.sampled = self.old + 0.3 * torch.randn(count, generator=generator)
        self.sequence_advantages = torch.tensor([1.3, -0.7, -1.1, 0.4])
        gamma = 1 + 0.5 * torch.rand(count, generator=generator).round() if per_token else torch.ones(count)
        self.advantages = gamma * self.sequence_advantages[self.rollouts.sequence_ids]
        self.per_token = per_token

    def responses(self, column, chosen):
        r = self.rollouts
        return [column[r.cu_seqlens[i] + r.prompt_lengths[i] : r.cu_seqlens[i + 1]] for i in chosen]

    def logps(self, model, chosen):
        """[n] of the response tokens of `chosen`, each sequence run alone."""
        return self.both(model, chosen)[0]

    def both(self, model, chosen):
        """Log-probs and entropy, [n] each."""
        r, parts = self.rollouts, []
        for i in chosen:
            tokens, prompt = r.token_ids[r.cu_seqlens[i] : r.cu_seqlens[i + 1]], int(r.prompt_lengths[i])
            hidden = model.get_decoder()(input_ids=tokens[None]).last_hidden_state[0, prompt - 1 : -1]
            parts.append(token_logps(hidden, model.lm_head, tokens[prompt:], num_chunks=3, with_entropy=True))
        return tuple(torch.cat(column) for column in zip(*parts, strict=True))

    def ours(self, model, chosen, config):
        columns = {
            "weights": token_weights(self.rollouts, chosen, config),
            "mean_weights": mean_weights(self.rollouts, chosen, config),
            "old_logps": self.old,
            "reference_logps": self.reference,
            "sampled_logps": self.sampled,
            "advantages": self.advantages,
        }
        given = {name: torch.cat(self.responses(column, chosen)) for name, column in columns.items()}
        lengths = self.rollouts.response_lengths[list(chosen)]
        sequences = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        logps, entropy = self.both(model, chosen)
        inputs = LossInputs(logps=logps, entropy=entropy, sequences=sequences, **given)
        return micro_batch_loss(inputs, config.algorithm)

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
        if config.algorithm.vllm_importance_sampling_correction:
            inputs["importance_sampling_ratio"] = self.their_ratio(config.algorithm, inputs, chosen)
        return trainer._compute_loss(trainer.model, inputs)

    def their_ratio(self, a, inputs, chosen):
        """[B, T] or [B, 1]; written out as `_generate_and_score_completions` has it, which cannot be called alone."""
        sampled = padded(self.responses(self.sampled, chosen), "right")[0]
        difference = (inputs["old_per_token_logps"] - sampled) * inputs["completion_mask"]
        level, way = a.vllm_importance_sampling_mode.split("_")
        ratio = torch.exp(difference.sum(-1, keepdim=True) if level == "sequence" else difference)
        low, high = a.vllm_importance_sampling_clip_min or 0.0, a.vllm_importance_sampling_clip_max
        return ratio.clamp(low, high) if way == "truncate" else ratio * ((ratio >= low) & (ratio <= high))


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def set_up(trainer, config, *, accumulation, steps_per_generation):
    a = config.algorithm
    trainer.loss_type, trainer.beta = a.loss_type, a.beta
    trainer.epsilon_low = a.epsilon
    trainer.epsilon_high = a.epsilon if a.epsilon_high is None else a.epsilon_high
    trainer.importance_sampling_level = a.importance_sampling_level
    trainer.entropy_coef, trainer._entropy_bonus_enabled = a.entropy_coef, a.entropy_coef > 0
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = a.vllm_importance_sampling_correction
    trainer.current_gradient_accumulation_steps = accumulation
    trainer.args.steps_per_generation = steps_per_generation
    trainer.args.use_bias_correction_kl, trainer.args.delta = True, a.delta


def correction(mode, **options):
    return {
        "vllm_importance_sampling_correction": True,
        "vllm_importance_sampling_mode": mode,
        **{f"vllm_importance_sampling_{name}": value for name, value in options.items()},
    }


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
@pytest.mark.parametrize(
    ("options", "per_token"),
    [
        ({}, False),
        ({"epsilon_high": 0.28}, True),
        ({"beta": 0.2, "entropy_coef": 0.1}, True),
        ({"mask_truncated_completions": True, "beta": 0.1, "entropy_coef": 0.1}, True),
        ({"delta": 1.35, "epsilon_high": 0.3}, False),
        ({"importance_sampling_level": "sequence", "beta": 0.2}, True),
        (correction("token_truncate", clip_max=1.1), True),
        (correction("token_mask", clip_max=1.5), True),
        (correction("sequence_mask"), False),
        (correction("sequence_truncate", clip_min=0.8) | {"importance_sampling_level": "sequence"}, False),
    ],
)
def test_loss_and_gradients_equal_trl(loss_type, options, per_token, model, trl_trainer):
    if loss_type == "cispo":
        options = options | {"epsilon_high": 1.2}
    if loss_type == "luspo":
        options = options | {"importance_sampling_level": "sequence"}
    try:
        config = run_config(loss_type=loss_type, **options)
    except ValueError:
        pytest.skip("refused at the door: the option would have no effect")
    step = Step(model, per_token=per_token, truncated=[False, False, True, False])
    everything = list(range(len(PROMPTS)))
    set_up(trl_trainer, config, accumulation=1, steps_per_generation=1)
    expected = step.theirs(trl_trainer, everything, config)
    loss, measured = step.ours(model, everything, config)

    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    wanted = gradients(model, expected)
    assert max(gradient.abs().max() for gradient in wanted) > 1e-3
    for ours, theirs in zip(gradients(model, loss), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    by_token = config.algorithm.importance_sampling_level == "token" and loss_type in (
        "grpo",
        "dr_grpo",
        "dapo",
        "bnpo",
    )
    if by_token and not config.algorithm.mask_truncated_completions:
        logged = trl_trainer._metrics["train"]
        for name in ("clip_ratio/low_mean", "clip_ratio/high_mean"):
            assert 0 < measured[name].float().mean() < 1
            assert measured[name].float().mean().item() == pytest.approx(logged[name][-1])


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
    mask = rollouts.response_mask
    weights = token_weights(rollouts, range(6), run_config())[mask]
    inputs = LossInputs(logps[mask], old[mask], shaped[mask], weights, rollouts.sequence_ids[mask])
    loss, _ = micro_batch_loss(inputs, run_config().algorithm)
    (gradient,) = torch.autograd.grad(loss, logps, retain_graph=True)

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

    token_loss, _ = clip(inputs, inputs.logps - inputs.old_logps, run_config().algorithm)
    assert torch.equal(weights * token_loss, plain)
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


def inputs_of(ratio, advantages, sequences=None, old=None):
    """[n] tokens whose ratios to the old policy are `ratio`, with gradients at `logps`."""
    ratio, advantages = torch.tensor(ratio), torch.tensor(advantages)
    old = torch.zeros_like(ratio) if old is None else torch.tensor(old)
    logps = (old + ratio.log()).requires_grad_()
    sequences = torch.zeros(len(ratio), dtype=torch.int64) if sequences is None else torch.tensor(sequences)
    return LossInputs(logps, old, advantages, torch.ones_like(ratio), sequences)


def algorithm(**options):
    return run_config(**options).algorithm


def test_clipping_by_hand():
    inputs = inputs_of([0.5, 0.5, 1.0, 1.5, 1.5], [2.0, -2.0, 2.0, 2.0, -2.0])
    loss, clipped = clip(inputs, inputs.logps - inputs.old_logps, algorithm(epsilon=0.2, epsilon_high=0.3))
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.0, 1.6, -2.0, -2.6, 3.0]))
    assert clipped.low.tolist() == [False, True, False, False, False]
    assert clipped.high.tolist() == [False, False, False, True, False]
    loss.sum().backward()
    torch.testing.assert_close(inputs.logps.grad, torch.tensor([-1.0, 0.0, -2.0, 0.0, 3.0]))


def test_dual_clip_by_hand():
    inputs = inputs_of([1.5, 4.0, 4.0], [-1.0, -1.0, 1.0])
    loss, _ = clip(inputs, inputs.logps - inputs.old_logps, algorithm(delta=3.0))
    torch.testing.assert_close(loss.detach(), torch.tensor([1.5, 3.0, -1.2]))  # 3 in place of 4
    loss.sum().backward()
    torch.testing.assert_close(inputs.logps.grad, torch.tensor([1.5, 0.0, 0.0]))


def test_cispo_by_hand():
    inputs = inputs_of([0.5, 2.0, 8.0], [1.0, -1.0, 2.0], old=[-1.0, -2.0, -3.0])
    loss, clipped = cispo(inputs, inputs.logps - inputs.old_logps, algorithm(loss_type="cispo", epsilon_high=5.0))
    loss.sum().backward()
    torch.testing.assert_close(inputs.logps.grad, torch.tensor([-0.5, 2.0, -10.0]))  # -min(r, 5) A: none is lost
    assert clipped.high.tolist() == [False, False, True]


def test_gspo_and_gspo_token_by_hand():
    ratio, sequences = [1.0, 1.1, 0.9, 1.05], [0, 0, 0, 1]
    mean = math.exp((math.log(1.0) + math.log(1.1) + math.log(0.9)) / 3)
    grads = {}
    for level in ("sequence", "sequence_token"):
        for name, advantages in {"equal": [2.0, 2.0, 2.0, -1.0], "differing": [3.0, 2.0, 1.0, -1.0]}.items():
            inputs = inputs_of(ratio, advantages, sequences)
            loss, _ = micro_batch_loss(inputs, algorithm(importance_sampling_level=level))
            loss.backward()
            assert loss.item() == pytest.approx(-mean * sum(advantages[:3]) + 1.05, rel=1e-5)
            grads[level, name] = inputs.logps.grad
    # With one advantage a sequence the two agree; else GSPO spreads their mean, and GSPO-token pays each its own.
    torch.testing.assert_close(grads["sequence", "equal"], grads["sequence_token", "equal"])
    torch.testing.assert_close(grads["sequence", "differing"], torch.tensor([-2 * mean] * 3 + [1.05]))
    expected = torch.tensor([-3 * mean, -2 * mean, -mean, 1.05])
    torch.testing.assert_close(grads["sequence_token", "differing"], expected)


@pytest.mark.parametrize("loss_type", ["grpo", "cispo", "sapo", "vespo"])
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
def test_a_micro_batch_without_tokens_keeps_its_graph(loss_type, level):
    if loss_type == "vespo" and level != "token":
        pytest.skip("refused at the door")
    none = torch.zeros(0)
    logps = none.clone().requires_grad_()
    inputs = LossInputs(logps, none, none, none, none.long(), logps * 1, none, none, none)
    options = algorithm(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=0.1,
        entropy_coef=0.1,
        epsilon_high=2.0,
        **correction("token_truncate"),
    )
    loss, _ = micro_batch_loss(inputs, options)
    loss.backward()
    assert loss.item() == 0


def test_k3_by_hand():
    logps = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.bfloat16)
    kl = kl_k3(logps, torch.tensor([-1.0, -1.0, -1.5]))
    assert kl.dtype == torch.float32
    assert kl.tolist() == pytest.approx([0, math.e - 2, math.exp(-1)])
    corrected = kl_k3(logps, torch.tensor([-1.0, -1.0, -1.5]), torch.tensor([1.0, 1.0, 0.0]))
    assert corrected.tolist() == pytest.approx([0, math.e * (math.e - 2), math.exp(-1)])


def test_shapes_never_broadcast():
    three, one = torch.zeros(3), torch.zeros(1)
    with pytest.raises(ValueError, match=r"advantages \(1,\)"):
        LossInputs(three, three, one, three, three.long())
    with pytest.raises(ValueError, match=r"reference_logps \(\)"):
        kl_k3(three, torch.zeros(()))
    with pytest.raises(ValueError, match=r"log_ratio \(1,\)"):
        kl_k3(three, three, one)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "cispo"}, "epsilon_high=None"),
        ({"loss_type": "luspo"}, "importance_sampling_level"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "no effect"),
        ({"loss_type": "sapo", "delta": 3.0}, "no effect"),
        ({"delta": 1.1}, "above the upper clip range, 1.2"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "below vllm_importance_sampling_clip_max=3.0"),
        ({"loss_type": "vespo", "vllm_importance_sampling_correction": True}, "token_truncate or token_mask"),
        ({"overlong_buffer_tokens": LIMIT + 1}, "at most rollout.max_completion_length"),
    ],
)
def test_settings_without_effect_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run_config(**options)
