"""A run's folder and its copies: what is there before, and what it may do about it."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from rlattn.config import FREE, ConfigError, RunConfig, differences
from rlattn.console import Console
from rlattn.status import STATUS
from rlattn.tracking import COMPLETIONS, METRICS
from rlattn.trainers.checkpoint import Checkpoints
from rlattn.trainers.copies import CONFIG, Copies

PLACEMENT = ("policy.ranks", "policy.deepspeed", "policy.gpus_per_rank", "policy.cpus_per_rank", "rollout.num_engines")
"""Where a run computes: its results stay equal up to rounding."""
FREE_ON_RESUME = (*FREE, *PLACEMENT, "trainer.eval_")
"""What a resumed run may change, and time-outs: everything else shapes its result."""
TRACE = "trace.json"
WRITTEN = ("checkpoints", METRICS, COMPLETIONS, "report.html", CONFIG, STATUS, TRACE)


def open_output(
    config: RunConfig, console: Console, *, resume: bool, resume_from: int | None, overwrite: bool
) -> tuple[Checkpoints, Path | None]:
    """The run's checkpoints, and the verified one to go on from, if any.

    Raises:
        ConfigError: the folder or the copies' URL holds another run, or cannot be written.
        CheckpointError: the checkpoint is damaged.
    """
    url = config.trainer.checkpoint_url
    copies = Copies(url, console.note) if url else None
    if copies and (overwrite or not (config.output_dir / CONFIG).exists()):
        prepare_copies(copies, config.output_dir, console, resume, resume_from, overwrite)
    checkpoints = Checkpoints(config.output_dir.absolute() / "checkpoints", config.trainer.save_total_limit, copies)
    return checkpoints, prepare_output(config, checkpoints, resume=resume, resume_from=resume_from, overwrite=overwrite)


def prepare_copies(
    copies: Copies, folder: Path, console: Console, resume: bool, resume_from: int | None, overwrite: bool
) -> None:
    """A run that is found at its copies' URL alone is brought back, replaced, or left alone, as asked."""
    if not copies.holds_run():
        return
    if overwrite:
        copies.forget()
    elif resume or resume_from is not None:
        with console.phase(f"fetching the run from {copies.url}"):
            copies.restore(folder, resume_from)
    else:
        raise ConfigError(
            f"{copies.url} already holds a run; give --resume to go on with it, --overwrite to replace it, or another "
            "trainer.checkpoint_url=..."
        )


def prepare_output(
    config: RunConfig, checkpoints: Checkpoints, *, resume: bool, resume_from: int | None = None, overwrite: bool
) -> Path | None:
    """Make sure that this run may write to its folder; returns the checkpoint to go on from, if any."""
    folder = config.output_dir
    saved = folder / CONFIG
    if not saved.exists():
        if resume_from is not None:
            raise ConfigError(f"{folder} holds no run, so none to go on from step-{resume_from}")
        return None
    if overwrite:
        for name in WRITTEN:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        return None
    if not resume and resume_from is None:
        raise ConfigError(
            f"{folder} already holds a run; give --resume to go on with it, --overwrite to replace it, "
            "or another output_dir=..."
        )
    differing = list(differences(yaml.safe_load(saved.read_text()), config.model_dump(mode="json"), FREE_ON_RESUME))
    if differing:
        raise ConfigError(
            f"--resume needs the config that {folder} was started with; differing: {'; '.join(differing)}"
        )
    checkpoint = checkpoints.latest() if resume_from is None else checkpoints.at(resume_from)
    return checkpoints.verified(checkpoint, "--resume-from") if checkpoint else None


def save_config(config: RunConfig) -> None:
    """Write the resolved config beside the run's results."""
    config.output_dir.mkdir(parents=True, exist_ok=True)
    (config.output_dir / CONFIG).write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
