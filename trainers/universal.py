"""Checkpoints that outlive the number of ranks: DeepSpeed's universal checkpoint, made when a resumed run needs it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rlattn.config import ConfigError, PolicyConfig
from rlattn.trainers.checkpoint import CheckpointError, Checkpoints

CONVERTER = "deepspeed.checkpoint.ds_to_universal"
KIN = {0: 0, 1: 1, 2: 1, 3: 3}  # stages of one kind read each other's universal checkpoints


def sharding(policy: PolicyConfig) -> dict[str, int]:
    """How a policy's optimizer lies on its ranks; kept in a checkpoint's state."""
    return {"ranks": policy.ranks, "stage": policy.deepspeed.get("zero_optimization", {}).get("stage", 0)}


def check_sharding(saved: dict[str, int], policy: PolicyConfig) -> None:
    """Refuse what cannot be converted.

    Raises:
        ConfigError: DeepSpeed has no conversion between the two ZeRO stages.
    """
    was, now = saved["stage"], sharding(policy)["stage"]
    if KIN[was] != KIN[now]:
        raise ConfigError(
            f"`policy.deepspeed` = {policy.deepspeed}: the checkpoint was written under ZeRO stage {was}; DeepSpeed "
            "converts only between numbers of ranks and between stages 1 and 2; take that stage, or export the weights "
            "and start another run from them"
        )


@contextmanager
def loadable(checkpoint: Path | None, policy: PolicyConfig) -> Iterator[Path | None]:
    """The folder that ranks of `policy` load: the checkpoint, or a converted copy of its optimizers, gone afterwards.

    Raises:
        CheckpointError: the conversion failed, or the disk has no room for it.
    """
    saved = Checkpoints.state(checkpoint)["sharding"] if checkpoint else {}
    if checkpoint is None or not saved["stage"] or saved == sharding(policy):
        yield checkpoint  # under stage 0 every rank reads the same file
        return
    copy = checkpoint.parent / f".universal-{checkpoint.name}"
    shutil.rmtree(copy, ignore_errors=True)
    try:
        for optimizer in sorted(checkpoint.rglob("optimizer")):
            _convert(optimizer, copy / optimizer.relative_to(checkpoint), policy.timeout_s)
        yield copy
    finally:
        shutil.rmtree(copy, ignore_errors=True)


def _convert(source: Path, target: Path, timeout_s: float) -> None:
    """DeepSpeed's own tool, in a process of its own: it prints, and importing DeepSpeed takes a device."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folders = ["--input_folder", str(source), "--output_folder", str(target)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    command = [sys.executable, "-P", "-m", CONVERTER, *folders, *workers]
    try:
        done = subprocess.run(
            command,
            env=os.environ | {"DS_ACCELERATOR": "cpu"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"converting {source} took more than `policy.timeout_s` = {timeout_s:g} s; raise it, or resume with the "
            "ranks and the ZeRO stage it was saved with"
        ) from None
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(f"converting {source} for other ranks failed: {cause}")
