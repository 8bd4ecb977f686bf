"""A run submitted over HTTP to a cluster of three nodes, each in a network of its own, two of which die on the way."""

import json
import subprocess
import sys

import pytest

from rlattn.tracking import read_metrics
from rlattn.trainers.manifest import damage
from tests.make import TINY_RUN
from tests.nodes import Nodes, namespaces_allowed, wait_for

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not namespaces_allowed(), reason="needs root, for network namespaces"),
]

RLATTN = [sys.executable, "-P", "-m", "rlattn.cli"]
TIMEOUT = 500
TINY = [
    *TINY_RUN,
    "rewards.functions=[{function: 'my_rewards.py:brevity'}]",
    "trainer.eval_tasks=[{name: gsm8k, options: {data: data, instruction: ''}}]",
    "trainer.eval_steps=12",
    "ray.policy_labels={role: policy}",
    "ray.rollout_labels={role: rollout}",
]
REWARD = """
def brevity(prompts, completions, **columns):
    return [1 / (1 + len(text)) for text in completions]
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """The head and a second node for the policy, a third for the engine."""
    with Nodes(tmp_path_factory.mktemp("nodes")) as nodes:
        nodes.start(0, 1, role="policy")
        nodes.start(1, 1, role="policy")
        nodes.start(2, 1, role="rollout")
        yield nodes


@pytest.fixture(scope="module")
def warmup(tmp_path_factory):
    return tmp_path_factory.mktemp("warmup")


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's folder with data and a reward function."""
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": f"{i} + 2 =", "answer": str(i + 2)} for i in range(1, 5)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data/gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_rewards.py").write_text(REWARD)
    return tmp_path


def submit(cluster, project, warmup, *extra):
    return [
        *cluster.client,
        *RLATTN,
        "submit",
        "quickstart",
        f"--address={cluster.address}",
        f"--python={sys.executable}",
        f"output_dir={project / 'run'}",
        f"model.warmup.cache_dir={warmup}",
        *TINY,
        *extra,
    ]


def rlattn(cluster, command, code=0, **environment):
    done = subprocess.run(
        command, env=cluster.environment | environment, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def jobs(cluster):
    return rlattn(cluster, [*cluster.client, *RLATTN, "jobs", f"--address={cluster.address}"]).stdout


def steps(project):
    return [line["step"] for line in read_metrics(project / "run")]


def test_nobody_gets_in_without_the_token_and_nothing_starts_that_cannot_fit(cluster, project, warmup, tmp_path):
    asked = submit(cluster, project, warmup)
    stranger = rlattn(cluster, asked, 2, RAY_AUTH_TOKEN="0" * 64)
    assert "no Ray job server to use: Authentication failed" in stranger.stderr
    assert "RAY_AUTH_TOKEN_PATH" in stranger.stderr
    large = rlattn(cluster, [*asked, "policy.ranks=4"], 2)
    assert "2 CPUs short: policy rank 0-3 ask for 4" in large.stderr
    assert "labelled {'role': 'policy'} have 2" in large.stderr
    shown = rlattn(cluster, [*asked, "--dry-run"]).stdout
    assert "data (0.0 MiB) as files/1-data: `trainer.eval_tasks.0.options.data`" in shown
    assert "10.213.0.3 (0 GPUs, 1 CPUs): engine 0" in shown
    assert jobs(cluster).strip() == "no rlattn jobs"
    assert not (project / "run").exists()


def test_a_job_outlives_the_loss_of_its_nodes_and_ends_as_it_would_have_here(cluster, project, warmup):
    here = ["ray.policy_labels={}", "ray.rollout_labels={}", f"output_dir={project / 'here'}", "trainer.steps=12"]
    local = [*RLATTN, "train", "quickstart", f"model.warmup.cache_dir={warmup}", *TINY, *here]
    assert subprocess.run(local, capture_output=True, timeout=TIMEOUT).returncode == 0
    expected = read_metrics(project / "here")

    command = [*submit(cluster, project, warmup, "trainer.steps=12"), "--name=hit"]
    hit = subprocess.Popen(
        command, env=cluster.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: len(steps(project)) >= 2, "two steps", 300)
    cluster.kill(2)
    cluster.start(3, 1, role="rollout")
    seen = len(steps(project))
    wait_for(lambda: len(steps(project)) >= seen + 2, "two more steps", 300)
    cluster.kill(1)
    cluster.start(4, 1, role="policy")
    said = hit.communicate(timeout=TIMEOUT)[0]
    assert hit.returncode == 0, said[-3000:]
    assert "engine 0 is back" in said
    assert "starting again from step-" in said
    assert not any(noise in said for noise in ("(raylet)", "raylet has", "state-dump"))
    found = read_metrics(project / "run")
    assert [line["step"] for line in found] == [line["step"] for line in expected] == list(range(13))
    for name in ("reward", "rewards/brevity/mean", "loss", "grad_norm", "completions/mean_length"):
        kept, wanted = ([line[name] for line in lines[1:]] for lines in (found, expected))
        assert kept == pytest.approx(wanted, rel=1e-3, abs=1e-6), name
    assert found[-1]["eval/accuracy"] == expected[-1]["eval/accuracy"]
    assert "eval/gsm8k/accuracy" in found[-1]


def test_storage_that_a_node_does_not_see_is_named_before_anything_is_loaded(cluster, project, warmup):
    (project / "mine").mkdir()
    cluster.start(5, 1, private=project / "mine", role="blind")
    apart = ["ray.rollout_labels={role: blind}", f"output_dir={project / 'mine/run'}"]
    said = rlattn(cluster, submit(cluster, project, warmup, *apart), 2).stdout
    assert f"`output_dir` = '{project}/mine/run' is not there on node 10.213.0.6; put it on storage that all" in said
    assert "loading vLLM" not in said


def test_stop_saves_first_the_same_submission_goes_on_and_a_lost_head_is_told(cluster, project, warmup):
    command = [*submit(cluster, project, warmup, "trainer.steps=200", "trainer.save_steps=0"), "--name=long"]
    detached = rlattn(cluster, [*command, "--no-wait"]).stdout
    job = next(word for word in detached.split() if word.startswith("long-"))
    wait_for(lambda: steps(project)[-1:] >= [2], "two steps", 300)
    rlattn(cluster, [*cluster.client, *RLATTN, "stop", job, f"--address={cluster.address}"])
    last = steps(project)[-1]
    assert last < 200
    assert [path.name for path in (project / "run/checkpoints").iterdir()] == [f"step-{last}"]
    logs = rlattn(cluster, [*cluster.client, *RLATTN, "logs", job, f"--address={cluster.address}"], 143).stdout
    assert f"stopped after step {last} of 200, as asked" in logs
    assert [job, "stopped"] in [line.split()[:2] for line in jobs(cluster).splitlines()]
    out = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    again = subprocess.Popen([*command, "--resume"], env=cluster.environment, **out)
    wait_for(lambda: steps(project)[-1] > last, "a further step", 300)
    assert steps(project)[: last + 2] == list(range(last + 2))
    for number in list(cluster.running):  # the head with the driver among them
        cluster.kill(number)
    said = again.communicate(timeout=240)[0]
    assert again.returncode == 1
    assert "no connection to http://10.213.0.1:8265 for 60 s" in said
    assert "submit again with --resume" in said
    assert damage(project / f"run/checkpoints/step-{last}") is None
