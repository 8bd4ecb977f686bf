"""Studies for real: runs as processes and as Ray jobs; killed, gone on with, and with an arm that cannot work."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from rlattn.study.config import grid, load_study
from rlattn.study.progress import step_of
from rlattn.tracking import read_metrics

pytestmark = pytest.mark.slow

RLATTN = [sys.executable, "-P", "-m", "rlattn.cli"]  # -P: the source tree must not be on the path
TIMEOUT = 600
TINY = [
    "task.options.format_reward=0.5",
    "task.options.train_size=2000",
    "task.options.test_size=16",
    "model.warmup.hidden_size=64",
    "model.warmup.intermediate_size=128",
    "model.warmup.num_layers=3",
    "model.warmup.steps=60",
    "rollout.num_generations=4",
    "rollout.max_completion_length=32",
    "rollout.kv_cache_gib=0.05",
    "policy.cpus_per_rank=1",
    "trainer.prompts_per_step=4",
    "trainer.steps=3",
    "trainer.eval_steps=1",
    "trainer.save_steps=1",
    "trainer.log_completions=1",
]
NOWHERE = "model.path=/nowhere/a-model"


def write_study(path, warmup, out, **changes):
    tree = {
        "base": "quickstart",
        "output_dir": str(out),
        "overrides": [*TINY, f"model.warmup.cache_dir={warmup}"],
        "arms": {"uniform": ["credit.name=uniform"], "entropy": ["credit.name=entropy"]},
        "baseline": "uniform",
        "seeds": [0, 1],
    }
    path.write_text(yaml.safe_dump(tree | changes, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def warmup(tmp_path_factory):
    """Where the warm-start model is made once for every run of this file."""
    return tmp_path_factory.mktemp("warmup")


@pytest.fixture
def environment(tmp_path):
    """Of a machine where vLLM has never run: what it knows of models is not yet cached."""
    return os.environ | {"VLLM_CACHE_ROOT": str(tmp_path / "vllm")}


def rlattn(args, code, environment=None):
    done = subprocess.run([*RLATTN, *args], capture_output=True, text=True, timeout=TIMEOUT, env=environment)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def wait_for(condition, process):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, "the study ended before it could be killed"
        assert time.monotonic() < deadline, "time-out"
        time.sleep(0.2)


def table(folder):
    return json.loads((folder / "table.json").read_text())


def test_killed_and_called_again_gives_the_table_of_an_uninterrupted_study(tmp_path, warmup, environment):
    out, straight = tmp_path / "out", tmp_path / "straight"
    file = str(write_study(tmp_path / "study.yaml", warmup, out))
    runs = grid(load_study(file))
    study = subprocess.Popen([*RLATTN, "study", file], stdout=subprocess.DEVNULL, env=environment)
    second = runs[1]
    wait_for(lambda: (step_of(second) or 0) >= 1, study)
    os.kill(study.pid, signal.SIGKILL)
    study.wait(timeout=30)
    reached = step_of(second)
    half = rlattn(["study", file, "--report"], 0)
    assert "MISSING: 3 of 4 runs are not finished." in half.stdout
    assert f"- entropy: seed 0 at step {reached} of 3, seed 1 not started" in half.stdout
    assert "- uniform: seed 1 not started" in half.stdout
    assert table(out)["arms"]["uniform"]["scores"].keys() == {"0"}

    done = rlattn(["study", file], 0)  # at once: what the killed study had started has ended with it
    assert "[2/4] entropy, seed 0: going on" in done.stdout
    assert "uniform, seed 0: started" not in done.stdout
    assert "MISSING" not in done.stdout
    assert "\x1b" not in done.stdout
    assert [len(read_metrics(run.folder)) for run in runs] == [4] * 4  # steps 0 to 3, none twice
    log = (second.folder / "train.log").read_text()
    assert log.count("loading vLLM and the policy ...") == 2
    assert "3/3" in log

    # the run that was cut, made again in one go beside copies of the others; and an arm that cannot work stops nothing
    for run in runs:
        if run is not second:
            shutil.copytree(run.folder, straight / run.arm / f"seed-{run.seed}")
    again = ["study", file, f"output_dir={straight}", f"arms.broken=[{NOWHERE}]", "seeds=[1,0]"]
    failed = rlattn(again, 1)
    assert "2 of 6 runs failed: broken, seed 1; broken, seed 0" in failed.stderr
    assert "`model.path` = '/nowhere/a-model' is neither a folder" in failed.stdout
    assert failed.stdout.index("broken, seed 1: FAILED") < failed.stdout.index("entropy, seed 0: finished")
    expected, found = table(straight), table(out)
    assert [item["arm"] for item in expected["missing"]] == ["broken"] * 2
    for arm in ("uniform", "entropy"):
        assert found["arms"][arm] == expected["arms"][arm]
    assert found["arms"]["entropy"]["difference"]["paired"]["problems"] == 2
    assert (out / "curves.png").stat().st_size > 10_000
    nothing = rlattn(["study", file], 0)
    assert "started" not in nothing.stdout
    assert table(out) == found


@pytest.fixture
def job_server(tmp_path):
    """A one-machine Ray cluster with a job server; its address."""
    pytest.importorskip("aiohttp_cors", reason="needs ray[default]")
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    command = [sys.executable, "-P", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={ports[0]}", f"--dashboard-port={ports[1]}", "--include-dashboard=true", "--num-cpus=4"]
    command += ["--num-gpus=0", "--object-store-memory=300000000", f"--temp-dir=/tmp/rlattn-{os.getpid()}"]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    with open(tmp_path / "ray.log", "w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        wait_for(lambda: reachable(ports[1]), head)
        yield f"http://127.0.0.1:{ports[1]}"
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(f"/tmp/rlattn-{os.getpid()}", ignore_errors=True)


def reachable(port):
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_ray_jobs_outlive_the_study_which_follows_them_when_called_again(tmp_path, warmup, job_server):
    out = tmp_path / "out"
    launch = {"mode": "jobs", "address": job_server, "at_once": 2, "python": sys.executable}
    short = [*TINY, f"model.warmup.cache_dir={warmup}", "ray.address=auto", "trainer.steps=2"]
    file = str(write_study(tmp_path / "study.yaml", warmup, out, overrides=short, launch=launch, seeds=[0]))
    broken = f"arms.broken=[{NOWHERE}]"
    runs = grid(load_study(file))
    study = subprocess.Popen(
        [*RLATTN, "study", file, broken],
        stdout=subprocess.PIPE,
        text=True,
        # As under a terminal: where the tests run in the background, a shell has had them ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: any(step_of(run) is not None for run in runs), study)
    study.send_signal(signal.SIGINT)
    said = study.communicate(timeout=60)[0]
    assert study.returncode == 130
    assert "Ray jobs go on; the same command follows them" in said
    done = rlattn(["study", file, broken], 1)
    assert "1 of 3 runs failed: broken, seed 0" in done.stderr
    assert "`model.path` = '/nowhere/a-model' is neither a folder" in done.stdout
    assert [[line["step"] for line in read_metrics(run.folder)] for run in runs] == [[0, 1, 2]] * 2
    assert table(out)["arms"]["entropy"]["difference"]["paired"]["problems"] == 1
