"""The command `rlattn study`."""

from __future__ import annotations

import argparse

import yaml

from rlattn.config import ConfigError
from rlattn.console import Console
from rlattn.locking import locked
from rlattn.study.config import Run, StudyConfig, grid, load_study
from rlattn.study.process import Processes
from rlattn.study.progress import Progress, progress
from rlattn.study.runner import Launcher, execute
from rlattn.tracking import write_atomically


class StudyIncomplete(RuntimeError):
    """Runs of a study failed; the message names them."""


def run(args: argparse.Namespace) -> None:
    """`rlattn study STUDY`."""
    study = load_study(args.study, args.overrides)
    runs = grid(study)
    with Console() as console:
        if args.dry_run:
            return show_grid(study, runs, console)
        if args.report:
            return report(study, runs, console)
        failed = run_missing(study, runs, console)
        report(study, runs, console)
        if failed:
            raise StudyIncomplete(
                f"{len(failed)} of {len(runs)} runs failed: {'; '.join(failed)}. The same command tries them again"
            )


def run_missing(study: StudyConfig, runs: list[Run], console: Console) -> list[str]:
    """Run what is not finished; returns the names of the runs that failed."""
    with locked(study.output_dir, "another `rlattn study`, or a run that it started,") as lock:
        states = look(study, runs)
        missing = [run for run, found in states if not found.finished]
        saved = yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False)
        write_atomically(study.output_dir / "study.yaml", saved.encode())
        if not missing:
            return []
        launcher = _launcher(study, lock)
        return list(execute(missing, len(runs) - len(missing), launcher, study.launch.stall_timeout_s, console))


def look(study: StudyConfig, runs: list[Run]) -> list[tuple[Run, Progress]]:
    """How far each run is.

    Raises:
        ConfigError: one line for each folder that holds something else.
    """
    states, wrong = [], []
    for run in runs:
        try:
            states.append((run, progress(run, study.metrics)))
        except ConfigError as error:
            wrong.append(str(error))
    if wrong:
        raise ConfigError("\n".join(wrong))
    return states


def report(study: StudyConfig, runs: list[Run], console: Console) -> None:
    """Write and show table and curves of what is there."""
    from rlattn.study.report import notes, table, write
    from rlattn.study.summary import summarise

    summary = summarise(study, look(study, runs))
    paths = write(summary, study.output_dir)
    console.show(table(summary))
    for line in notes(summary):
        console.note(line)
    for path in paths:
        console.note(f"wrote {path}")


def show_grid(study: StudyConfig, runs: list[Run], console: Console) -> None:
    """The grid and how far each run is; starts nothing."""
    from rlattn.evaluation.formats import grid as as_table

    cells = [[run.arm, str(run.seed), str(found), " ".join(study.arms[run.arm])] for run, found in look(study, runs)]
    console.show(as_table(("arm", "seed", "progress", "overrides"), cells))
    steps = sum(run.config.trainer.steps for run in runs)
    console.note(f"{len(runs)} runs, {steps} steps, in {study.output_dir}; {study.launch.mode}")
    console.note(f"base {study.base}{''.join(f' {item}' for item in study.overrides)}")


def _launcher(study: StudyConfig, lock: int) -> Launcher:
    if study.launch.mode == "jobs":
        from rlattn.trainers.jobs import Jobs

        return Jobs(study.launch)
    return Processes(lock, study.launch.at_once)
