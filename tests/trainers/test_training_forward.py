"""Capture while training, and head groups that are reused: the same gamma and the same step, for one forward less."""

import pytest
import torch

from rlattn import credit
from rlattn.config import RunConfig
from rlattn.estimators.grpo import group_relative
from rlattn.problem import Problem, Verdict
from rlattn.tasks import Task
from rlattn.trainers.grpo import GRPOTrainer
from rlattn.verifiers.pool import VerifierPool
from tests.make import fetch_weights, make_rollouts, policy_of

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("local_ray")]

SEED, STEP = 5, 3


def config(
    scope,
    forward="score",
    refresh_steps=10,
    ranks=1,
    stage=0,
    checkpointing=False,
    name="shuffled",
    beta=0.0,
    select="span",
):
    heads = {"scope": scope, "refresh_steps": refresh_steps, "select": select}
    return RunConfig.model_validate(
        {
            "seed": SEED,
            "model": {"dtype": "float32"},
            "rollout": {"max_prompt_length": 8, "max_completion_length": 24, "num_generations": 4},
            "signals": {"forward": forward, "heads": heads, "fai_low": 2},
            "credit": {"name": name},
            "algorithm": {"beta": beta},
            "policy": {
                "ranks": ranks,
                "gpus_per_rank": 0,
                "learning_rate": 1e-2,
                "tokens_per_micro_batch": 64,
                "logits_chunk_tokens": 16,
                "gradient_checkpointing": checkpointing,
                "deepspeed": {"zero_optimization": {"stage": stage}},
                "timeout_s": 240,
            },
            "trainer": {"prompts_per_step": 3, "steps": 6},
            "ray": {"num_cpus": 8},
        }
    )


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 24, (12,), generator=generator)
    rollouts = make_rollouts([5] * 12, lengths.tolist(), group_size=4)
    rollouts = rollouts.replace(rewards=torch.rand(12, generator=generator))
    return rollouts, group_relative(rollouts.rewards, rollouts.group_ids, "group")[0]


@pytest.mark.parametrize(
    "options",
    [
        {"scope": "calibrated", "checkpointing": True, "stage": 2},
        {"scope": "sequence", "checkpointing": True, "ranks": 2, "stage": 3, "beta": 0.1},
        {"scope": "calibrated", "select": "receiver", "name": "column_mean"},
    ],
    ids=lambda options: f"{options['scope']}-{options.get('name', 'shuffled')}",
)
def test_one_forward_does_what_two_do(model_path, batch, options):
    """`shuffled` credit: its gammas are coupled rhythm's, and show whether sequences keep their random streams."""
    rollouts, advantage = batch
    settings = config(**options)
    with policy_of(settings, model_path) as policy:
        measured = policy.score(rollouts)
        groups = measured.signals.groups.tolist() if options["scope"] == "calibrated" else None
        scores = policy.score(rollouts, groups)
        gamma, spent = credit.assign(rollouts, scores, advantage, settings.credit, seed=SEED, step=STEP)
        expected = policy.update(rollouts, scores, gamma * advantage[rollouts.sequence_ids], STEP)
        expected_weights = fetch_weights(policy.weights())
    with policy_of(settings, model_path) as policy:
        trained = policy.train(rollouts, advantage, groups, STEP)
        weights = fetch_weights(policy.weights())

    def same(actual, wanted, tolerance=1e-6):
        torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)

    assert (gamma[rollouts.response_mask] != 1).any()
    same(trained.gamma, gamma)
    assert trained.credit_metrics == pytest.approx(spent, abs=1e-6)
    for name in ("logps", "entropy") + (("reference_logps",) if settings.algorithm.beta else ()):
        same(getattr(trained.scores, name), getattr(scores, name))
    for name in ("waad", "fai", "sink_mass", "groups"):
        same(getattr(trained.scores.signals, name), getattr(scores.signals, name))
    assert scores.signals.extra.keys() == trained.scores.signals.extra.keys()
    assert ("fai_all" in scores.signals.extra) == (options.get("name") == "column_mean")
    for name, column in scores.signals.extra.items():
        same(trained.scores.signals.extra[name], column)
    same(scores.signals.waad, measured.signals.waad)
    for signals in (scores.signals, trained.scores.signals):  # reused groups come without spans
        assert (signals.span is None) == (signals.entropy is None) == (groups is not None)
    assert trained.update_metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        # Adam's first step is lr * sign(g): where g is near 0 its sign is rounding
        assert ((tensor - expected_weights[name]).abs() < 1e-4).float().mean() > 0.999, name


class Recorded:
    """Where the trainer gets its rollouts: a function of the step, so that only the policy differs between runs."""

    def generate(self, problems, num_generations, *, seed, step, first, keep, groups, extra):
        assert groups is None  # sampling measures nothing here
        count = len(problems) * num_generations
        lengths = torch.randint(1, 24, (count,), generator=torch.Generator().manual_seed(seed + step))
        rollouts = make_rollouts([5] * count, lengths.tolist(), seed=step, group_size=num_generations)
        repeated = [problem for problem in problems for _ in range(num_generations)]
        return rollouts.replace(problems=repeated, texts=[str(int(length)) for length in lengths])

    def metrics(self):
        return {}

    def load_weights(self, weights, version):
        self.weights = fetch_weights(weights())


class ShortIsGood(Task):
    bounded = True

    def __init__(self):
        self.train = self.test = [Problem(str(i), "", "") for i in range(5)]

    def verifier(self, answer, completion):
        return Verdict(False, None, None, "", "", {"short": 1 / int(completion)})


def steps_of(settings, model_path, count):
    """Metrics and head groups of each step, and the weights after the last."""
    with policy_of(settings, model_path) as policy:
        source = Recorded()
        trainer = GRPOTrainer(settings, ShortIsGood(), source, policy, VerifierPool())
        lines, groups = [], []
        for step in range(count):
            measured, _ = trainer.step(step)
            lines.append({k: v for k, v in measured.items() if not k.startswith(("timing_s/", "perf/"))})
            groups.append(trainer.groups)
    return lines, groups, source.weights


def test_calibrating_every_step_is_scope_batch_to_the_bit(model_path):
    batch = steps_of(config("batch"), model_path, 2)
    calibrated = steps_of(config("calibrated", forward="train", refresh_steps=1), model_path, 2)
    assert calibrated[:2] == batch[:2]
    assert all(torch.equal(tensor, batch[2][name]) for name, tensor in calibrated[2].items())


def test_groups_change_only_when_they_are_measured(model_path):
    lines, groups, _ = steps_of(config("calibrated", forward="train", refresh_steps=2), model_path, 5)
    assert groups[0] == groups[1] != groups[2] == groups[3] != groups[4]
    assert ["signals/head_turnover" in line for line in lines] == [False, False, True, False, True]
    assert ["signals/attention_entropy/3" in line for line in lines] == [True, False, True, False, True]
    between, refreshed = lines[1].keys(), lines[2].keys()
    only_measured = {"signals/head_turnover"} | {f"signals/attention_entropy/{layer}" for layer in (2, 3, 4)}
    assert refreshed - between == only_measured
    assert between <= refreshed
