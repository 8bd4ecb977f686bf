"""The whole loop for real: Ray, vLLM, DeepSpeed, weight transfer, checkpoints, report; killed, resumed and broken."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlattn.cli import main
from rlattn.evaluation.results import read_results
from rlattn.tracking import read_completions, read_metrics
from tests.make import TINY_RUN as TINY

pytestmark = pytest.mark.slow

RLATTN = [sys.executable, "-P", "-m", "rlattn.cli"]  # -P: the source tree must not be on the path
TIMEOUT = 400


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the warm-start model is made once for every run of this file."""
    return f"model.warmup.cache_dir={tmp_path_factory.mktemp('warmup')}"


def command(folder, cache, *extra):
    return [*RLATTN, "train", "quickstart", f"output_dir={folder}", cache, *TINY, *extra]


def finish(args, code=0):
    done = subprocess.run(args, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def here(args, code, capsys):
    """What a command says that starts nothing, and so needs no process of its own."""
    assert main(args[len(RLATTN) :]) == code
    return capsys.readouterr()


def without_time(folder):
    """Every metric that must repeat: all but what a clock measured."""
    timed = ("timing_s/", "perf/")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in read_metrics(folder)]


def weights(folder):
    newest = max((folder / "checkpoints").glob("step-*"), key=lambda p: int(p.name[5:]))
    return load_file(newest / "model" / "model.safetensors")


def test_two_steps_of_everything(tmp_path, cache):
    folder = tmp_path / "run"
    rows = [{"problem": f"{i} + 2 =", "answer": str(i + 2)} for i in range(1, 5)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    beside = f"trainer.eval_tasks=[{{name: gsm8k, options: {{data: {tmp_path}, instruction: ''}}}}]"
    args = command(
        folder, cache, "trainer.steps=2", beside, "trainer.best_metric=eval/accuracy", "trainer.trace_step=2"
    )
    done = finish(args)
    assert "test accuracy after" in done.stdout
    assert "\x1b" not in done.stdout
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert {"eval/accuracy", "eval/gsm8k/accuracy"} <= lines[0].keys() & lines[2].keys()
    for line in lines[1:]:
        # the engine's log-probs are the trainer's: the right weights moved, and both see the same tokens
        assert line["sampling/sampling_logp_difference/max"] < 1e-3
        assert line["grad_norm"] > 0
        assert 0.3 < line["credit/amplified_share"] < 0.6
        assert line["timing_s/generate"] > 0
    assert [p.name for p in sorted((folder / "checkpoints").iterdir())] == ["step-1", "step-2"]
    shown = read_completions(folder)
    assert {line["step"] for line in shown} == {1, 2}
    assert [line["policy_version"] for line in shown] == [0, 0, 1, 1]
    assert "done: all 2 steps" in finish([*RLATTN, "status", str(folder)]).stdout
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    rows = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert rows == {"driver", "engine 0", "policy rank 0", "policy rank 1"}
    named = {event["name"] for event in events if event["ph"] == "X"}
    assert {"generate", "sampling", "score", "update", "weights", "loading weights 2 (finish)"} <= named
    assert (folder / "report.html").stat().st_size > 10_000
    # its newest weights answer the run's own test problems, as its evaluation asked them
    results = tmp_path / "results"
    finish([*RLATTN, "eval", str(folder), "--out", str(results)])
    (countdown,) = read_results(results)[0]
    assert (countdown.name, countdown.problems, countdown.expected) == ("countdown", 16, 16)
    assert countdown.settings["max_tokens"] == 48
    assert countdown.settings["temperature"] == 1
    # what was trained can be used: by transformers, and as the start of another run
    assert main(["export", str(folder), str(tmp_path / "model"), "--best"]) == 0
    again = finish(command(tmp_path / "again", cache, "trainer.steps=1", f"model.path={tmp_path / 'model'}"))
    assert "step-1" in again.stdout
    start = read_metrics(tmp_path / "again")[0]["eval/accuracy"]
    assert start == pytest.approx(lines[2]["eval/accuracy"], abs=1e-9)  # same weights, same seeds
    refused = finish(command(folder, cache, "trainer.steps=2"), code=2)
    assert "already holds a run; give --resume" in refused.stderr
    # a damaged checkpoint is refused, and the one before it goes on: what two ranks saved, on one
    damaged = folder / "checkpoints" / "step-2" / "model" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    refused = finish([*args, "--resume"], code=1)
    assert "step-2 is damaged: model/model.safetensors has another SHA-256" in refused.stderr
    assert "step-1 is intact: give --resume-from 1" in refused.stderr
    finish([*args, "policy.ranks=1", "--resume-from", "step-1"])
    repeated = read_metrics(folder)
    assert [line["step"] for line in repeated] == [0, 1, 2]
    assert repeated[2]["loss"] == pytest.approx(lines[2]["loss"], abs=1e-5)
    assert repeated[2]["grad_norm"] == pytest.approx(lines[2]["grad_norm"], rel=1e-3)


def test_adapters_are_served_resumed_and_exported_while_groups_are_filtered(tmp_path, cache):
    """One rank that learns adapters, and engines that are given these alone; groups that teach nothing are redrawn."""
    folder = tmp_path / "run"
    sizes = ["policy.ranks=1", "policy.deepspeed={}", "trainer.steps=2", "policy.learning_rate=2e-3"]
    lora = ["policy.lora={r: 4, sync: adapter}", "algorithm.filter_groups=true", "algorithm.max_num_gen_batches=3"]
    args = command(folder, cache, *sizes, *lora)
    finish(args)
    lines = read_metrics(folder)
    for line in lines[1:]:
        assert line["sampling/sampling_logp_difference/max"] < 1e-3
        assert 1 <= line["filter_groups/draws"] <= 3
        assert 0 < line["filter_groups/kept"] <= 1
        full = line["filter_groups/draws"] < 3  # no draw was missing: every group of the batch differs
        assert line["frac_reward_zero_std"] == 0 or not full
    assert any(line["filter_groups/draws"] > 1 for line in lines[1:])  # the first batch was not enough, once at least
    assert 0 <= lines[2]["eval/accuracy"] <= 1
    finish([*args, "--resume-from", "1"])
    again = read_metrics(folder)
    assert again[2]["sampling/sampling_logp_difference/max"] < 1e-3
    assert without_time(folder)[2] == {k: v for k, v in lines[2].items() if not k.startswith(("timing_s/", "perf/"))}
    assert main(["export", str(folder), str(tmp_path / "adapter"), "--adapter"]) == 0
    newest = folder / "checkpoints" / "step-2"
    start = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(start), tmp_path / "adapter")
    whole = AutoModelForCausalLM.from_pretrained(newest / "model")
    tokens = torch.arange(3, 20)[None]
    torch.testing.assert_close(model(tokens).logits, whole(tokens).logits, rtol=1e-4, atol=1e-4)


def test_engines_that_sleep_while_the_policy_learns_or_measure_its_signals_change_nothing(tmp_path, cache):
    small = ["policy.ranks=1", "policy.deepspeed={}", "trainer.steps=2", "ray.placement=colocate"]
    lines = {}
    for name, source, sleep in (
        ("awake", "policy", "false"),
        ("asleep", "policy", "true"),
        ("scores", "rollout", "true"),
    ):
        finish(command(tmp_path / name, cache, *small, f"signals.source={source}", f"rollout.sleep={sleep}"))
        lines[name] = read_metrics(tmp_path / name)
    assert "timing_s/sleep" in lines["asleep"][-1]
    assert "timing_s/sleep" not in lines["awake"][-1]
    for name in ("reward", "loss", "grad_norm", "completions/mean_length"):
        awake, asleep, scores = ([line[name] for line in lines[run][1:]] for run in ("awake", "asleep", "scores"))
        assert asleep == awake, name
        assert scores == pytest.approx(awake, rel=1e-3, abs=1e-5), name
    own, other = lines["awake"][1], lines["scores"][1]
    assert "entropy" in own
    assert "entropy" not in other  # which no forward of the policy has measured
    assert 0.3 < other["credit/amplified_share"] < 0.6
    measured = [name for name in other if name.startswith(("signals/", "credit/"))]
    assert len(measured) > 5
    for name in measured:
        assert other[name] == pytest.approx(own[name], rel=1e-3, abs=1e-5), name
    assert lines["asleep"][-1]["eval/accuracy"] == lines["awake"][-1]["eval/accuracy"]


def test_attention_is_measured_while_engines_sample(tmp_path, cache):
    """The first step has no head groups yet and scores, the second takes its signals from sampling."""
    decode = "signals={source: rollout, forward: decode, heads: {scope: calibrated}}"
    small = ["policy.ranks=1", "policy.deepspeed={}", "trainer.steps=2", "trainer.eval_steps=0"]
    finish(command(tmp_path, cache, *small, "ray.placement=colocate", "rollout.sleep=true", decode))
    first, second = read_metrics(tmp_path)
    assert (first["rollout/decoded_share"], second["rollout/decoded_share"]) == (0, 1)
    assert any(name.startswith("signals/attention_entropy") for name in first)
    assert not any(name.startswith("signals/attention_entropy") for name in second)
    for name in ("signals/waad_mean", "signals/fai_top_share", "credit/amplified_share", "credit/mean_gamma"):
        assert second[name] == pytest.approx(first[name], rel=0.3), name


def test_a_run_comes_back_from_its_copies(tmp_path, cache):
    small = ["policy.ranks=1", "policy.deepspeed={}", "trainer.eval_steps=0", "trainer.steps=12"]
    url = f"trainer.checkpoint_url=file://{tmp_path}/copies"
    straight, lost = tmp_path / "straight", tmp_path / "lost"
    finish(command(straight, cache, *small))
    driver = subprocess.Popen(command(lost, cache, *small, url))
    wait_for((tmp_path / "copies/config.yaml").exists, driver)
    driver.send_signal(signal.SIGTERM)
    assert driver.wait(timeout=TIMEOUT) == 143
    stopped = read_metrics(lost)[-1]["step"]
    shutil.rmtree(lost)
    again = finish(command(lost, cache, *small, url), 2)
    assert "already holds a run; give --resume" in again.stderr
    finish([*command(lost, cache, *small, url), "--resume"])
    assert stopped < 12
    assert without_time(lost) == without_time(straight)
    for name, weight in weights(straight).items():
        assert torch.equal(weights(lost)[name], weight), name
    assert [path.name for path in sorted((tmp_path / "copies").glob("step-*"))] == ["step-11", "step-12"]


def test_a_step_ahead_learns_from_weights_one_update_older(tmp_path, cache):
    folder = tmp_path / "run"
    small = [
        "policy.ranks=1",
        "policy.deepspeed={}",
        "trainer.steps=4",
        "trainer.eval_steps=4",
        "policy.learning_rate=1e-3",
    ]
    ahead = ["rollout.steps_ahead=1", "algorithm.vllm_importance_sampling_correction=true", "trainer.trace_step=2"]
    finish(command(folder, cache, *small, *ahead))
    lines = read_metrics(folder)[1:]
    assert [line["rollout/staleness"] for line in lines] == [0, 1, 1, 1]
    differences = [line["sampling/sampling_logp_difference/max"] for line in lines]
    assert differences[0] < 1e-3 < min(differences[1:])  # an update lies between engine and trainer
    assert all("sampling/corrected_ratio_mean" in line for line in lines)
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    rows = {event["args"]["name"]: event["tid"] for event in events if event["ph"] == "M"}
    spans = {(event["tid"], event["name"]): event for event in events if event["ph"] == "X"}
    taken, learned = (spans[rows["driver"], phase] for phase in ("generate", "update"))
    ahead = spans[rows["driver, a step ahead"], "generate"]  # the next batch, as this one is learned
    assert taken["ts"] + taken["dur"] <= ahead["ts"] < learned["ts"] + learned["dur"]


CALIBRATED = [  # the most that a run keeps: head groups of step 0, used by the training forward of steps 1 and 2
    "signals.heads.scope=calibrated",
    "signals.heads.refresh_steps=3",
    "signals.forward=train",
    "algorithm.steps_per_generation=1",
    "policy.gradient_checkpointing=true",
    "trainer.steps=4",
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory, cache):
    """A run of four steps that nothing happens to."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    finish(command(folder, cache, "trainer.steps=4"))
    return folder


def equal(broken, straight):
    assert without_time(broken) == without_time(straight)
    expected = weights(straight)
    for name, tensor in weights(broken).items():
        assert torch.equal(tensor, expected[name]), name


def killed(start, folder, kills):
    """Runs, killed one after the other in the step after so many lines of metrics, then one to the end."""
    args = start
    for enough in kills:
        driver = subprocess.Popen(args, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda n=enough: len(read_metrics(folder)) > n, driver)
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait(timeout=30)
        args = [*start, "--resume"]
    finish(args)


def test_killed_twice_and_resumed_equals_uninterrupted(tmp_path, cache, straight):
    broken = tmp_path / "broken"
    args = command(broken, cache, "trainer.steps=4")
    killed(args, broken, (1, 3))
    equal(broken, straight)
    different = finish([*args, "--resume", "credit.top_q=0.2"], code=2)
    assert "credit.top_q was 0.4, now 0.2" in different.stderr


def test_killed_between_measurements_of_head_groups(tmp_path, cache):
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    finish(command(straight, cache, *CALIBRATED))
    lines = read_metrics(straight)[1:]
    assert ["timing_s/score" in line for line in lines] == [True, False, False, True]
    assert ["signals/head_turnover" in line for line in lines] == [False, False, False, True]
    killed(command(broken, cache, *CALIBRATED), broken, (2,))
    equal(broken, straight)


def test_a_lost_policy_rank_starts_everything_again_from_the_newest_checkpoint(tmp_path, cache, straight):
    broken = tmp_path / "broken"
    args = command(broken, cache, "trainer.steps=4", "trainer.save_total_limit=3")
    driver = subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: len(read_metrics(broken)) > 2, driver)
    (victim, *_) = [pid for pid in descendants(driver.pid) if "PolicyWorker" in command_line(pid)]
    os.kill(victim, signal.SIGKILL)
    output, _ = driver.communicate(timeout=TIMEOUT)
    assert driver.returncode == 0, output[-3000:]
    (line,) = [line for line in output.splitlines() if "starting again from step-" in line]
    assert "policy rank" in line
    assert "died" in line
    equal(broken, straight)


def descendants(pid):
    """Every process below a process."""
    children = [int(c) for task in Path(f"/proc/{pid}/task").glob("*/children") for c in task.read_text().split()]
    return children + [own for child in children for own in descendants(child)]


def command_line(pid):
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def wait_for(condition, process, timeout=TIMEOUT):
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline, "time-out"
        time.sleep(0.2)


def test_a_full_disk_at_checkpoint_time(tmp_path, cache):
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", disk]).returncode:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        done = finish(command(disk / "run", cache, "trainer.steps=1"), code=1)
        assert "checkpoint step-1 was not written" in done.stderr
        assert "--resume" in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        assert list((disk / "run" / "checkpoints").iterdir()) == []
        assert len(read_metrics(disk / "run")) == 2
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["model.path=./nowhere"], "`model.path` = './nowhere'"),
        (["rollout.max_prompt_length=4"], "rollout.max_prompt_length"),
        (["task.options.train_file=none.jsonl", "task.options.test_file=none.jsonl"], "cannot read none.jsonl"),
        (["rollout.engine_args={seed: 1}"], "'seed' is set by seed"),
        (["ray.num_cpus=1"], "`ray.num_cpus` = 1"),
    ],
)
def test_bad_input_starts_nothing(tmp_path, cache, capsys, extra, message):
    said = here(command(tmp_path / "run", cache, *extra), 2, capsys).err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_dry_run_starts_nothing(tmp_path, cache, capsys):
    said = here([*command(tmp_path / "run", cache), "--dry-run"], 0, capsys).out
    assert "policy rank 1 (1 CPU)" in said
    assert "model: " in said
    assert not (tmp_path / "run").exists()


def test_data_errors_name_the_row(tmp_path, cache, capsys):
    rows = tmp_path / "rows.jsonl"
    files = [f"task.options.train_file={rows}", f"task.options.test_file={rows}"]
    for text, message in (
        ("", "holds no problems"),
        (json.dumps({"nums": [1, 2, 3]}) + "\n", "rows.jsonl:1 has no answer"),
    ):
        rows.write_text(text)
        assert message in here(command(tmp_path / "run", cache, *files), 2, capsys).err
    assert not Path(tmp_path / "run").exists()
