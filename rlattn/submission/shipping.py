"""What a job takes with it: this code, its config, and the local files that the config names."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlattn.config import ConfigError, RunConfig, load_config, validate

CONFIG = "config.yaml"
FILES = "files"
"""Folder of a job's working directory that the local files are in."""
MIB = 1 << 20


@dataclass(frozen=True)
class Shipped:
    """A local file or folder that goes along.

    Attributes:
        key: of the config that names it.
        source: here.
        place: in the job's working directory, where the shipped config looks for it.
        size: bytes.
    """

    key: str
    source: Path
    place: str
    size: int


@dataclass(frozen=True)
class Shipment:
    """A config for the cluster, and what goes along."""

    config: RunConfig
    files: tuple[Shipped, ...]

    def write(self, folder: Path) -> None:
        """Everything but the code, as it will lie in the job's working directory."""
        (folder / FILES).mkdir(parents=True)
        for item in self.files:
            if item.source.is_dir():
                shutil.copytree(item.source, folder / item.place)
            else:
                shutil.copyfile(item.source, folder / item.place)
        tree = self.config.model_dump(mode="json", exclude_unset=True)
        (folder / CONFIG).write_text(yaml.safe_dump(tree, sort_keys=False))


def prepare(config: str, overrides: Sequence[str], shared: Sequence[Path], limit_mib: float) -> Shipment:
    """The config as the cluster will read it, and the local files that it names.

    A path that exists here goes along, unless it lies under a `shared` one, which the cluster sees too; one that does
    not is taken for the cluster's own.

    Raises:
        ConfigError: the config is wrong, keeps its results where nobody finds them, or names more than `limit_mib`.
    """
    here = load_config(config, list(overrides))
    if here.ray.address not in (None, "auto"):
        raise ConfigError(
            f"`ray.address` = {here.ray.address!r}: a submitted run uses the cluster it is sent to; leave it out"
        )
    _check_kept(here)
    tree = here.model_dump(mode="json", exclude_unset=True)
    tree.setdefault("ray", {})["address"] = "auto"
    files: list[Shipped] = []
    for key, holder, index in _paths(tree):
        path, suffix = _split(holder[index])
        source = Path(path)
        if not source.exists() or any(source.absolute().is_relative_to(folder.absolute()) for folder in shared):
            continue
        known = next((item for item in files if item.source.samefile(source)), None)
        if known is None:
            known = Shipped(key, source, f"{FILES}/{len(files)}-{source.resolve().name}", _size(source))
            files.append(known)
        holder[index] = known.place + suffix
    total = sum(item.size for item in files)
    if total > limit_mib * MIB:
        largest = max(files, key=lambda item: item.size)
        raise ConfigError(
            f"the files to ship take {total / MIB:,.0f} MiB, more than --ship-limit {limit_mib:g}; the largest is "
            f"`{largest.key}` = {str(largest.source)!r}, {largest.size / MIB:,.0f} MiB: put it on storage that the "
            "cluster shares, give its path there, and if that path exists here too, --shared DIR"
        )
    return Shipment(validate(RunConfig, tree), tuple(files))


def _check_kept(config: RunConfig) -> None:
    """What a run leaves behind must outlive its job's own folder, and be seen by all nodes."""
    kept = {"output_dir": config.output_dir}
    if config.model.path is None:
        kept["model.warmup.cache_dir"] = config.model.warmup.cache_dir
    wrong = [f"`{key}` = {str(path)!r}" for key, path in kept.items() if not path.is_absolute()]
    if wrong:
        raise ConfigError(
            f"{' and '.join(wrong)}: relative to the job's own folder, which is gone after it; give absolute paths on "
            "storage that all nodes share"
        )


def _paths(tree: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(key, holder, index) of each value that may be a path of something to read."""
    model, task, trainer = (tree.get(name, {}) for name in ("model", "task", "trainer"))
    if model.get("path"):
        yield "model.path", model, "path"
    if tree.get("ppo", {}).get("critic_path"):
        yield "ppo.critic_path", tree["ppo"], "critic_path"
    for index, function in enumerate(tree.get("rewards", {}).get("functions", [])):
        yield f"rewards.functions.{index}.function", function, "function"
    tasks = {"task": task} | {f"trainer.eval_tasks.{i}": own for i, own in enumerate(trainer.get("eval_tasks", []))}
    for name, own in tasks.items():
        for option, value in own.get("options", {}).items():
            if isinstance(value, str) and value:
                yield f"{name}.options.{option}", own["options"], option


def _split(value: str) -> tuple[str, str]:
    """A path and what follows it: `my/rewards.py:exact` names a function of a file."""
    file, colon, function = value.rpartition(":")
    return (file, colon + function) if file.endswith(".py") else (value, "")


def _size(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
