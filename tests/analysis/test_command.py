"""`rlattn analyze` from the command line: what it writes, what it reads again, what it refuses."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from rlattn.cli import main
from rlattn.config import RunConfig, load_config
from rlattn.trainers.manifest import write_manifest

COUNT = 6
TASK = ["--task", "countdown", "task.options.prompt=compact"]


def strict(path):
    def refuse(name):
        raise AssertionError(f"{path} holds {name}, which is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_folder(analysed):
    numbers = strict(analysed / "analysis.json")
    assert numbers["responses"] == COUNT
    assert numbers["settings"]["signals"]["fai_high"] is None  # the analyses look to the end
    assert numbers["settings"]["seed"] == 0
    assert {"rlattn", "torch", "matplotlib"} <= set(numbers["info"]["versions"])
    assert numbers["info"]["task"] == "countdown"
    assert list(numbers["selections"]) == ["signals", "all", "bottom", "middle", "top"]
    lines = [json.loads(line) for line in (analysed / "responses.jsonl").read_text().splitlines()]
    assert [line["problem_id"] for line in lines] == [f"countdown-{i}" for i in range(COUNT)]
    for line in lines:
        assert len({len(line[name]) for name in ("tokens", "token_ids", "waad", "fai", "entropy")}) == 1
        assert len(line["tokens"]) <= 48
    assert numbers["tokens"] == sum(len(line["tokens"]) for line in lines)
    names = {
        "couplings",
        "alignment",
        "head_map",
        "sink_entropy",
        "perturbation",
        "maps_1",
        "curves_1",
        "maps_2",
        "curves_2",
    }
    for name in names:
        with Image.open(analysed / "plots" / f"{name}.png") as image:
            assert image.width >= 900  # 300 dpi
            assert min(band[0] for band in image.convert("RGB").getextrema()) < 128  # something is drawn
        assert "<svg" in (analysed / "plots" / f"{name}.svg").read_text()
    assert {p.stem for p in (analysed / "plots").iterdir()} == names
    assert not list(analysed.rglob(".*"))  # no half-written file


def test_its_own_responses_give_its_numbers_again(analysed, model_path, tmp_path):
    arguments = [
        "analyze",
        str(model_path),
        "--responses",
        str(analysed / "responses.jsonl"),
        "perturbation.max_tokens=8",
    ]
    assert main([*arguments, "--out", str(tmp_path / "again")]) == 0
    first, second = (strict(folder / "analysis.json") for folder in (analysed, tmp_path / "again"))
    for part in ("selections", "heads", "perturbation", "entropy", "tokens"):
        assert first[part] == second[part], part
    assert (analysed / "responses.jsonl").read_bytes() == (tmp_path / "again" / "responses.jsonl").read_bytes()


def test_a_run_is_analysed_with_its_own_task_and_signals(model_path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    import yaml

    run = RunConfig.model_validate(
        {
            "task": {"name": "countdown", "options": {"prompt": "compact"}, "seed": 3},
            "model": {"dtype": "float32"},
            "signals": {"layers": [1, 4], "fai_high": 20, "heads": {"select": "receiver"}},
            "rollout": {"max_completion_length": 30, "temperature": 0.8},
        }
    )
    checkpoint = tmp_path / "run" / "checkpoints" / "step-4"
    checkpoint.mkdir(parents=True)
    shutil.copytree(model_path, checkpoint / "model")
    (checkpoint / "state.json").write_text('{"step": 4}')
    write_manifest(checkpoint)
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    assert load_config(tmp_path / "run" / "config.yaml") == run
    assert main(["analyze", "run", "-n", "3", "perturbation.positions=0", "signals.fai_low=5", "--seed", "7"]) == 0
    (folder,) = (tmp_path / "runs" / "analysis").iterdir()
    assert folder.name.startswith("run-step-4-")
    numbers = strict(folder / "analysis.json")
    assert numbers["selections"]["signals"]["layers"] == [1, 4]
    signals = numbers["settings"]["signals"]
    assert (signals["fai_low"], signals["fai_high"]) == (5, 20)
    assert numbers["settings"]["task"] == {"name": "countdown", "options": {"prompt": "compact"}, "seed": 3}
    assert numbers["settings"]["generation"] == {"temperature": 0.8, "max_tokens": 30}
    assert numbers["settings"]["seed"] == 7
    assert numbers["perturbation"] is None
    own = numbers["selections"]["signals"]
    assert own["receivers_among_global"] == 2  # select: receiver makes them the same heads
    assert own["couplings"][1]["observed"]["value"] == 1.0
    assert "couplings" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["{model}", "--task", "countdwn"], "did you mean 'countdown'"),
        (["{model}", *TASK, "-n", "0"], "`n` = 0"),
        (["{model}", *TASK, "-n", "-3"], "`n` = -3"),
        (["{model}", *TASK, "peaks.prominance=1"], "did you mean `peaks.prominence`"),
        (["{model}", *TASK, "peaks.prominence=-1"], "`peaks.prominence` = -1"),
        (["{model}", *TASK, "task.options.prompt=long"], "`task.options.prompt`"),
        (["{model}", *TASK, "generation.max_tokens=300"], "context is 256"),
        (["{model}"], "--task"),
        (["no/such/model", *TASK], "no/such/model"),
        (["{empty}", *TASK], "neither a folder with a Hugging Face model"),
        (["{model}", "--responses", "nowhere.jsonl"], "nowhere.jsonl"),
        (["{model}", "--responses", "{lacking}"], "lacks 'prompt'"),
        (["{model}", "--responses", "{long}"], "context is 256"),
        (["{model}", *TASK, "signals.layers=[9]"], r"\[9\]"),
        (["{model}", *TASK, "--out", "{full}"], "no analysis"),
    ],
)
def test_bad_input_is_refused_at_the_door(arguments, says, model_path, tmp_path, capsys, monkeypatch):
    import re

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "lacking.jsonl").write_text('{"completion": "x"}\n')
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x", "completion": "y" * 300}) + "\n")
    names = {"{model}": model_path, "{empty}": tmp_path / "empty", "{full}": tmp_path / "full"}
    names |= {"{lacking}": tmp_path / "lacking.jsonl", "{long}": tmp_path / "long.jsonl"}
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert main(["analyze", *(str(names.get(a, a)) for a in arguments), *out]) == 2
    captured = capsys.readouterr()
    assert re.search(says, captured.err)
    assert "answering" not in captured.out  # before anything was generated
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "thesis.txt").read_text() == "mine"
