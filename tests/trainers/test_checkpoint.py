import errno
import random

import numpy as np
import pytest
import torch

from rlattn.config import ConfigError, RunConfig, TrainerConfig
from rlattn.data import check_same, fingerprint
from rlattn.problem import Problem
from rlattn.trainers.checkpoint import Best, CheckpointError, Checkpoints, newest
from rlattn.trainers.output import prepare_output, save_config
from rlattn.trainers.rng import load_rng, save_rng, seed_rng
from rlattn.trainers.run import better


def write(text):
    return lambda folder: (folder / "weights").write_text(text)


def test_keeps_the_newest_and_reads_their_state(tmp_path):
    checkpoints = Checkpoints(tmp_path, limit=2)
    assert checkpoints.latest() is None
    for step in (9, 10, 11):
        checkpoints.save(step, {"note": step * 2}, write(str(step)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-11"]
    assert checkpoints.latest() == tmp_path / "step-11"
    assert checkpoints.state(tmp_path / "step-11") == {"note": 22, "step": 11}


def test_a_failed_write_leaves_nothing_and_names_the_cure(tmp_path):
    checkpoints = Checkpoints(tmp_path, limit=1)
    checkpoints.save(1, {}, write("whole"))

    def full(folder):
        (folder / "weights").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match=r"step-2 was not written.*No space left.*step-1 is intact.*--resume"):
        checkpoints.save(2, {}, full)
    assert [p.name for p in tmp_path.iterdir()] == ["step-1"]


def test_an_interrupted_write_is_not_a_checkpoint(tmp_path):
    (tmp_path / ".writing-step-3").mkdir()
    (tmp_path / "step-4").mkdir()  # a name without its state: not written by us, never resumed from
    assert Checkpoints(tmp_path, limit=1).latest() is None


def test_a_damaged_state_is_an_error_that_says_so(tmp_path):
    checkpoints = Checkpoints(tmp_path, limit=1)
    folder = checkpoints.save(1, {}, write("x"))
    (folder / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoints.state(folder)


def flip(file):
    """Change one byte, not the size."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_one_wrong_byte_is_refused_and_the_one_before_offered(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", limit=3)
    folders = [checkpoints.save(step, {}, write(str(step))) for step in (1, 2, 3)]
    assert newest(tmp_path, "export") == checkpoints.verified(folders[2], "--step") == folders[2]
    flip(folders[2] / "weights")
    with pytest.raises(CheckpointError, match=r"step-3 is damaged: weights has another SHA-256.*give --step 2$"):
        newest(tmp_path, "export")
    assert newest(tmp_path, "export", step=2) == folders[1]
    (folders[1] / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"weights has another.*step-1 is intact: give --resume-from 1"):
        checkpoints.verified(folders[2], "--resume-from")
    with pytest.raises(CheckpointError, match=r"state\.json has 2 bytes instead of 11"):
        checkpoints.verified(folders[1], "--step")
    (folders[0] / "weights").unlink()
    with pytest.raises(CheckpointError, match=r"step-1 is damaged: weights is missing; no older one is intact"):
        checkpoints.verified(folders[0], "--step")
    with pytest.raises(ConfigError, match=r"no step-7; there are: 1, 2, 3"):
        checkpoints.at(7)


@pytest.mark.parametrize("text", [None, "{", "[]", '{"weights": 1}'])
def test_a_damaged_manifest_is_refused(tmp_path, text):
    checkpoints = Checkpoints(tmp_path, limit=1)
    manifest = checkpoints.save(1, {}, write("x")) / "manifest.json"
    if text is None:
        manifest.unlink()
    else:
        manifest.write_text(text)
    with pytest.raises(CheckpointError, match=r"step-1 is damaged: manifest\.json (is missing|cannot be read)"):
        checkpoints.verified(tmp_path / "step-1", "--step")


def test_the_best_outlives_the_limit(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", limit=1)
    with pytest.raises(ConfigError, match="has no best checkpoint"):
        newest(tmp_path, "export", best=True)
    for step, best in ((1, Best(1, "eval/accuracy", 0.5)), (2, None), (3, None)):
        checkpoints.save(step, {}, write(str(step)), best)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-1", "step-3"]
    assert newest(tmp_path, "export", best=True).name == "step-1"
    checkpoints.save(4, {}, write("4"), Best(4, "eval/accuracy", 0.6))
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*")) == ["step-4"]
    checkpoints.save(5, {}, write("5"))
    checkpoints.drop_after(4)  # as a run does that goes on from step 4: the best is that of its time
    assert checkpoints.best() == Best(4, "eval/accuracy", 0.6)
    checkpoints.drop_after(3)
    assert checkpoints.best() is None


def test_better_is_strictly_so():
    greatest = TrainerConfig(best_metric="eval/accuracy")
    least = TrainerConfig(best_metric="eval/accuracy", greater_is_better=False)
    now, so_far = {"eval/accuracy": 0.5}, Best(1, "eval/accuracy", 0.4)
    assert better(greatest, 2, now, None) == better(greatest, 2, now, so_far) == Best(2, "eval/accuracy", 0.5)
    assert better(least, 2, now, so_far) is None
    assert better(greatest, 2, now, so_far._replace(value=0.5)) is None
    assert better(greatest, 2, {"eval/accuracy": float("nan")}, None) is None
    assert better(TrainerConfig(), 2, now, None) is None
    assert better(greatest, 2, now, Best(1, "eval/other/accuracy", 0.9)) == Best(2, "eval/accuracy", 0.5)


def test_a_best_metric_must_be_measured():
    with pytest.raises(ValueError, match="must be null or what evaluation measures: eval/accuracy"):
        TrainerConfig(best_metric="reward")
    with pytest.raises(ValueError, match="eval_steps above 0"):
        TrainerConfig(best_metric="eval/accuracy", eval_steps=0)


def test_other_training_problems_are_refused():
    problems = [Problem(str(i), f"{i} + 1 =", i + 1) for i in range(4)]
    saved = fingerprint(problems)
    check_same(saved, fingerprint(list(problems)))
    changed = [*problems[:2], Problem("2", "2 + 1 =", 4), problems[3]]
    with pytest.raises(ConfigError, match=r"4 then, 4 now\): number 3 is the first"):
        check_same(saved, fingerprint(changed))
    with pytest.raises(ConfigError, match=r"4 then, 3 now\): number 4 is the first"):
        check_same(saved, fingerprint(problems[:3]))


def test_generators_go_on_where_they_were(tmp_path):
    def draw():
        return random.random(), np.random.random(), float(torch.rand(()))  # noqa: NPY002 - the global one is meant

    seed_rng(0, 1, 2)
    save_rng(tmp_path / "rng" / "rank-0.pt")
    expected = draw()
    assert draw() != expected
    load_rng(tmp_path / "rng" / "rank-0.pt")
    assert draw() == expected
    seed_rng(0, 1, 2)
    assert draw() == expected
    seed_rng(0, 1, 3)
    assert draw() != expected


def test_a_step_of_no_run_is_refused(tmp_path):
    config = RunConfig(output_dir=tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    assert prepare_output(config, checkpoints, resume=True, overwrite=False) is None  # a job that may be the first
    with pytest.raises(ConfigError, match="holds no run, so none to go on from step-8"):
        prepare_output(config, checkpoints, resume=False, resume_from=8, overwrite=False)


def test_a_resumed_run_may_change_where_it_computes_and_what_it_saves(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", 1)
    save_config(RunConfig(output_dir=tmp_path))
    saved = checkpoints.save(3, {}, write("x"))
    policy = {"ranks": 4, "deepspeed": {"zero_optimization": {"stage": 3}}}
    trainer = {"best_metric": "eval/accuracy", "save_steps": 7}
    moved = RunConfig.model_validate({"output_dir": tmp_path, "policy": policy, "trainer": trainer})
    assert prepare_output(moved, checkpoints, resume=True, overwrite=False) == saved
    other = RunConfig.model_validate({"output_dir": tmp_path, "policy": {"learning_rate": 1e-3}})
    with pytest.raises(ConfigError, match=r"policy\.learning_rate was 1e-06, now 0\.001"):
        prepare_output(other, checkpoints, resume=True, overwrite=False)
