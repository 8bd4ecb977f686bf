"""What goes along with a submitted run, and what is refused before anything is sent."""

import json
import subprocess
import sys
import zipfile

import pytest
import yaml

from rlattn.config import ConfigError, load_config
from rlattn.submission.shipping import CONFIG, prepare
from rlattn.submission.wheel import build_wheel, unpack


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's folder: data, a model, a reward function, and a config that names them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    row = json.dumps({"problem": "1 + 2 =", "answer": "3"}) + "\n"
    for name in ("data/gsm8k.jsonl", "train.jsonl"):
        (tmp_path / name).write_text(row)
    (tmp_path / "my_rewards.py").write_text("def short(prompts, completions, **kw):\n    return [0.0] * len(prompts)\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    config = {
        "output_dir": "/shared/runs/mine",
        "model": {"path": "model"},
        "task": {"name": "gsm8k", "options": {"data": "data", "train_file": "train.jsonl"}},
        "rewards": {"functions": [{"function": "my_rewards.py:short"}]},
        "trainer": {"eval_tasks": [{"name": "gsm8k", "options": {"data": str(tmp_path / "data")}}]},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def test_local_files_go_along_once_and_the_config_finds_them(project):
    shipment = prepare("mine.yaml", ["seed=3"], [], 1)
    places = {str(item.source): item.place for item in shipment.files}
    assert places == {
        "model": "files/0-model",
        "my_rewards.py": "files/1-my_rewards.py",
        "data": "files/2-data",
        "train.jsonl": "files/3-train.jsonl",
    }
    shipment.write(project / "job")
    there = load_config(project / "job" / CONFIG)
    assert (there.seed, there.ray.address, str(there.output_dir)) == (3, "auto", "/shared/runs/mine")
    assert there.model.path == "files/0-model"
    assert there.rewards.functions[0].function == "files/1-my_rewards.py:short"
    assert there.task.options == {"data": "files/2-data", "train_file": "files/3-train.jsonl"}
    assert there.trainer.eval_tasks[0].options == {"data": "files/2-data"}  # the same folder, named otherwise
    for place in places.values():
        assert (project / "job" / place).exists()
    assert (project / "job/files/2-data/gsm8k.jsonl").read_text() == (project / "data/gsm8k.jsonl").read_text()
    given = load_config("mine.yaml", ["seed=3"]).model_dump(exclude={"model", "task", "rewards", "trainer", "ray"})
    assert there.model_dump(exclude={"model", "task", "rewards", "trainer", "ray"}) == given


def test_shared_folders_hub_names_and_paths_of_the_cluster_stay(project):
    overrides = ["model.path=Qwen/Qwen3-4B", "task.options.train_file=/cluster/only/train.jsonl", "ray.address=auto"]
    shipment = prepare("mine.yaml", overrides, [project / "data"], 1)
    assert [item.place for item in shipment.files] == ["files/0-my_rewards.py"]
    assert shipment.config.model.path == "Qwen/Qwen3-4B"
    assert shipment.config.task.options == {"data": "data", "train_file": "/cluster/only/train.jsonl"}


def test_too_much_is_refused_with_the_largest(project):
    (project / "model/model.safetensors").write_bytes(bytes(3 << 20))
    with pytest.raises(ConfigError, match=r"more than --ship-limit 2; the largest is `model\.path` = 'model', 3 MiB"):
        prepare("mine.yaml", [], [], 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["output_dir=runs/x"], r"`output_dir` = 'runs/x': relative to the job's own folder"),
        (["model.path=null"], r"`model\.warmup\.cache_dir` = 'runs/warmup': relative"),
        (["ray.address=ray://elsewhere:10001"], r"`ray\.address` = 'ray://elsewhere:10001': .* leave it out"),
        (["credit.name=nothing"], "credit.name"),
    ],
)
def test_what_cannot_work_there_is_refused_here(project, overrides, message):
    with pytest.raises(ConfigError, match=message):
        prepare("mine.yaml", overrides, [], 1)


@pytest.mark.slow
def test_the_wheel_is_this_code_and_is_found_first(tmp_path):
    wheel = build_wheel(tmp_path)
    unpack(wheel, tmp_path / "job")
    code = (
        "import rlattn, rlattn.rollout.fit, rlattn.submission.shipping, rlattn.configs; print(*rlattn.configs.__path__)"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"PYTHONPATH": str(tmp_path / "job"), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert found.stdout.strip() == str(tmp_path / "job/rlattn/configs")  # not the editable installation
    assert (tmp_path / "job/rlattn/configs/quickstart.yaml").is_file()
    assert not (tmp_path / "job/kernels").exists()


def test_what_is_no_wheel_of_ours_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a wheel that can be read"):
        unpack(tmp_path / "missing.whl", tmp_path / "job")
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/__init__.py", "")
    with pytest.raises(ConfigError, match="is not a wheel of rlattn"):
        unpack(tmp_path / "other.whl", tmp_path / "job")
