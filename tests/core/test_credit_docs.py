"""`docs/credit.md` says what is so: its table names every strategy, and its example package installs and pays."""

import re
import subprocess
import sys
from pathlib import Path

import torch
import yaml

from rlattn import registry
from rlattn.config import CreditConfig, RunConfig
from rlattn.credit import PackedResponses, assign_packed, needed

PAGE = (Path(__file__).parents[2] / "docs" / "credit.md").read_text()


def test_the_table_names_every_strategy():
    rows = re.findall(r"^\| `(\w+)` \|.*\|$", PAGE.partition("## Signals")[0], re.MULTILINE)
    assert sorted(rows) == sorted(registry.CREDIT.builtin)


def test_the_options_and_their_defaults_are_the_configs():
    table = PAGE.partition("## Signals")[2].partition("\n\nThe paper's")[0]
    rows = re.findall(r"^\| (`signals\.[^|]*) \| ([^|]*) \|", table, re.MULTILINE)
    assert len(rows) == 10
    for names, defaults in rows:
        first, *others = re.findall(r"`([\w.]+)`", names)
        for name, default in zip([first, *(f"signals.{o}" for o in others)], defaults.split(", "), strict=True):
            value = RunConfig()
            for part in name.split("."):
                value = getattr(value, part)
            assert yaml.safe_load(default.strip("`")) == value, name


def test_the_example_package_installs_and_pays(tmp_path, monkeypatch):
    project, site = tmp_path / "rlattn-surprise", tmp_path / "site"
    project.mkdir()
    blocks = re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert [name for name, _ in blocks] == ["pyproject.toml", "rlattn_surprise.py"]
    for name, text in blocks:
        (project / name).write_text(text)
    install = [sys.executable, "-P", "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*install, "--target", site, project], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(str(site))

    assert needed("surprising_anchor") == ("fai_all",)
    columns = {name: torch.zeros(6) for name in ("waad", "fai", "entropy")}
    columns["fai_all"] = torch.tensor([9.0, 0.5, 0.2, 0.4, 0.1, 0])
    columns["logps"] = -torch.tensor([9.0, 0.1, 0.9, 0.0, 3.0, 8])  # products of the response: 0.05 0.18 0 0.3 0
    response = PackedResponses(torch.tensor([1]), torch.tensor([6]), [0], torch.ones(1))
    config = CreditConfig(name="surprising_anchor")
    gamma, amplified = assign_packed(columns, response, config, seed=0, step=0)
    assert gamma.tolist() == [1, 1, 1.5, 1, 1.5, 1]
    assert amplified == 2
