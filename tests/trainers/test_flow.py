"""Flow credit from the config through the policy, against the dense computation on the eager model's attention maps."""

import numpy as np
import pytest
import torch
from scipy.linalg import solve_triangular
from transformers import AutoModelForCausalLM

from rlattn import credit
from rlattn.config import CreditConfig, RunConfig
from rlattn.credit.selection import select
from rlattn.problem import Problem, Verdict
from rlattn.tasks import Task
from rlattn.trainers.grpo import GRPOTrainer
from rlattn.trainers.memory import estimate
from rlattn.verifiers.pool import VerifierPool
from tests.make import fetch_weights, make_rollouts, policy_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

PROMPTS, RESPONSES = [5, 3, 8, 6, 4, 7], [23, 7, 18, 12, 1, 9]


def config(ranks=1, stage=0, forward="score", checkpointing=False, storage="float32", fallback=3):
    heads = {"scope": "calibrated" if forward == "train" else "batch"}
    return RunConfig.model_validate(
        {
            "model": {"dtype": "float32"},
            "rollout": {"max_prompt_length": 8, "max_completion_length": 24, "num_generations": 3},
            "signals": {
                "forward": forward,
                "heads": heads,
                "flow": {"storage": storage, "fallback_tokens": fallback},
            },
            "credit": {"name": "flow"},
            "policy": {
                "ranks": ranks,
                "gpus_per_rank": 0,
                "learning_rate": 1e-2,
                "tokens_per_micro_batch": 64,
                "gradient_checkpointing": checkpointing,
                "deepspeed": {"zero_optimization": {"stage": stage}},
                "timeout_s": 240,
            },
            "trainer": {"prompts_per_step": 2, "steps": 4},
            "ray": {"num_cpus": 8},
        }
    )


@pytest.fixture(scope="module")
def rollouts():
    """Answers at the end, before it, of one token, and in two sequences none."""
    spans = [[p + r - 4, p + r - 2] for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    spans[1] = [9, 10]
    spans[3], spans[4] = [18, 18], [5, 5]
    return make_rollouts(PROMPTS, RESPONSES, group_size=3).replace(answer_spans=torch.tensor(spans))


@pytest.fixture(scope="module")
def expected(model_path, rollouts):
    """[T] float64: flow by the definitions on the mean of the maps of layers 2 to 4, 0 on prompts."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32, attn_implementation="eager")
    flows = []
    pieces = rollouts.token_ids.split(rollouts.lengths.tolist())
    for ids, prompt, (first, last) in zip(pieces, PROMPTS, rollouts.answer_spans.tolist(), strict=True):
        with torch.no_grad():
            maps = torch.cat(model(ids[None], output_attentions=True).attentions).double()  # [L, H, N, N]
        edges = np.tril(maps[2:5].mean((0, 1)).numpy(), -1)
        n = len(edges)
        target, source = np.zeros(n), np.zeros(n)
        target[slice(first, last) if first < last else slice(max(prompt, n - 3), n)] = 1.0
        source[:prompt] = 1 / prompt
        h = solve_triangular(np.eye(n) - edges.T, target, lower=False)
        out = edges * h[:, None] / np.where(h > 0, h, 1.0)
        f = solve_triangular(np.eye(n) - out, source * (h > 0), lower=True) * (h > 0)
        flows.append(torch.from_numpy(f * (np.arange(n) >= prompt)))
    return torch.cat(flows)


@pytest.mark.parametrize(("ranks", "stage", "storage"), [(1, 0, "float32"), (2, 3, "bfloat16")])
def test_score_equals_the_dense_flow(model_path, rollouts, expected, ranks, stage, storage):
    settings = config(ranks, stage, storage=storage)
    with policy_of(settings, model_path) as policy:
        scores = policy.score(rollouts)
    assert scores.signals.layers == [2, 3, 4]
    found = scores.signals.extra["flow"].double()
    tolerance = 1e-4 if storage == "float32" else 2**-6  # the model's own fp32 is in it too
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=1e-6)
    gamma, metrics = credit.assign(rollouts, scores, torch.ones(6), settings.credit, seed=0, step=0)
    if storage == "float32":
        for start, n in zip((rollouts.cu_seqlens[:-1] + rollouts.prompt_lengths).tolist(), RESPONSES, strict=True):
            own = slice(start, start + n)
            assert torch.equal(gamma[own] > 1, select(expected[own].float(), 0.4))
    assert metrics["credit/amplified_share"] == pytest.approx(sum(-(-2 * n // 5) for n in RESPONSES) / sum(RESPONSES))


def test_the_training_forward_traces_the_same_flow(model_path, rollouts, expected):
    """Under gradient checkpointing, where every layer runs twice."""
    settings = config(stage=2, forward="train", checkpointing=True)
    with policy_of(settings, model_path) as policy:
        groups = [[-1, 1, 0, 0]] * 3
        trained = policy.train(rollouts.replace(rewards=torch.rand(6)), torch.linspace(-1, 1, 6), groups, 0)
    torch.testing.assert_close(trained.scores.signals.extra["flow"].double(), expected, rtol=1e-4, atol=1e-6)
    assert (trained.gamma[rollouts.response_mask] > 1).any()


def test_the_map_is_in_the_memory_estimate(model_path):
    settings = config()
    settings = settings.model_copy(update={"model": settings.model.model_copy(update={"path": model_path})})
    assert estimate(settings).policy["flow map"] == 64 * (8 + 24) * 2  # tokens of a micro-batch, longest sequence, fp32
    plain = settings.model_copy(update={"credit": CreditConfig(name="uniform")})
    assert estimate(plain).policy["flow map"] == 0


class Numbers:
    """A tokenizer whose token i reads `i `."""

    def decode(self, token_ids, *, skip_special_tokens):
        return "".join(f"{i} " for i in token_ids)


class Recorded:
    tokenizer = Numbers()

    def generate(self, problems, num_generations, *, seed, step, first, keep, groups, extra):
        assert groups is None  # sampling measures nothing here
        count = len(problems) * num_generations
        lengths = torch.randint(4, 24, (count,), generator=torch.Generator().manual_seed(step)).tolist()
        rollouts = make_rollouts([5] * count, lengths, seed=step, group_size=num_generations)
        texts = [
            self.tokenizer.decode(ids[5:].tolist(), skip_special_tokens=True)
            for ids in rollouts.token_ids.split(rollouts.lengths.tolist())
        ]
        return rollouts.replace(problems=[p for p in problems for _ in range(num_generations)], texts=texts)

    def metrics(self):
        return {}

    def load_weights(self, weights, version):
        self.weights = fetch_weights(weights())


class ThirdWord(Task):
    """The answer is the third token, so tokens behind it cannot be amplified before those up to it."""

    bounded = True

    def __init__(self):
        self.train = self.test = [Problem(str(i), "", "") for i in range(4)]

    def verifier(self, answer, completion):
        return Verdict(False, None, None, "", "", {"length": len(completion) / 100})

    def answer_span(self, completion):
        first, second, third, *_ = completion.split()
        start = len(first) + len(second) + 2
        return start, start + len(third)


@pytest.mark.parametrize("forward", ["score", "train"])
def test_steps_of_the_trainer(model_path, forward):
    settings = config(forward=forward, storage="bfloat16")
    with policy_of(settings, model_path) as policy:
        source = Recorded()
        trainer = GRPOTrainer(settings, ThirdWord(), source, policy, VerifierPool())
        before = None
        for step in range(3):
            metrics, batch = trainer.step(step)
            assert batch.rollouts.answer_spans.tolist() == [[7, 8]] * 6
            flow = batch.scores.signals.extra["flow"]
            for start, end in zip(batch.rollouts.cu_seqlens[:-1], batch.rollouts.cu_seqlens[1:], strict=True):
                assert flow[start + 7] == pytest.approx(1, rel=1e-5)  # everything arrives at the only answer token
                assert (flow[start + 5 : start + 8] > 0).all()
                assert not flow[start + 8 : end].any()
                assert (batch.gamma[start + 5 : start + 8] > 1).sum() == min(3, -(-2 * (end - start - 5) // 5))
            assert metrics["loss"] == metrics["loss"]
            if before is not None:
                assert any(not torch.equal(before[name], source.weights[name]) for name in before)
            before = source.weights
