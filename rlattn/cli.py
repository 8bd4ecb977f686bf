"""The command line: `rlattn train|eval|analyze|study|submit|...`.

Heavy imports happen in the command that needs them.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from rlattn import __version__
from rlattn.analysis.arguments import add_arguments as add_analyze_arguments
from rlattn.checkpoint_choice import add_choice, step_number
from rlattn.config import ConfigError, RunConfig, load_config
from rlattn.evaluation.arguments import add_arguments as add_eval_arguments
from rlattn.stopping import EXIT_CODE, Stopped
from rlattn.study.arguments import add_arguments as add_study_arguments
from rlattn.submission.arguments import add_address, add_job, add_submit


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 on success, 2 on bad input, 1 on a failure while running, 130 when interrupted, 143 when asked
    to stop by SIGTERM; `submit` and `logs` give the job's."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)  # argparse takes overrides on one side of an option only
    if rest and ("overrides" not in args or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return args.command(args) or 0
    except Stopped as stopped:
        print(f"rlattn: {stopped}", file=sys.stderr)
        return EXIT_CODE
    except ConfigError as error:
        print(f"rlattn: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("rlattn: interrupted", file=sys.stderr)
        return 130
    except (OSError, RuntimeError, ValueError) as error:
        if os.environ.get("RLATTN_TRACEBACK"):
            raise
        print(f"rlattn: {_line(error)} (RLATTN_TRACEBACK=1 shows where)", file=sys.stderr)
        return 1


def train(args: argparse.Namespace) -> None:
    """`rlattn train CONFIG`."""
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        return dry_run(config)
    from rlattn.console import Console
    from rlattn.trainers.run import train as run

    with Console() as console:
        run(config, console, resume=args.resume, resume_from=args.resume_from, overwrite=args.overwrite)


def dry_run(config: RunConfig) -> None:
    """Print the resolved config, the placement and a memory estimate; start nothing."""
    import yaml

    from rlattn.rollout.placement import describe, plan
    from rlattn.trainers.memory import estimate

    print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    print("\n".join(describe(plan(config))))
    print("memory (estimate)\n  " + "\n  ".join(estimate(config).lines()))


def warmup(args: argparse.Namespace) -> None:
    """`rlattn warmup CONFIG`."""
    from rlattn.console import Console
    from rlattn.trainers.warmup import warmup as run

    config = load_config(args.config, args.overrides)
    with Console() as console:
        console.note(f"model: {run(config, console.progress)}")


def evaluate(args: argparse.Namespace) -> None:
    """`rlattn eval`."""
    from rlattn.evaluation.command import run

    run(args)


def analyze(args: argparse.Namespace) -> None:
    """`rlattn analyze`."""
    from rlattn.analysis.command import run

    run(args)


def study(args: argparse.Namespace) -> None:
    """`rlattn study`."""
    from rlattn.study.command import run

    run(args)


def report(args: argparse.Namespace) -> None:
    """`rlattn report RUN_DIR`."""
    from rlattn.report import write_report

    print(write_report(_run_dir(args.run_dir)))


def status(args: argparse.Namespace) -> None:
    """`rlattn status RUN_DIR`."""
    from rlattn.status import describe

    print("\n".join(describe(_run_dir(args.run_dir))))


def submit(args: argparse.Namespace) -> int:
    """`rlattn submit CONFIG`."""
    return _job_commands().submit(args)


def jobs(args: argparse.Namespace) -> None:
    """`rlattn jobs`."""
    _job_commands().jobs(args)


def logs(args: argparse.Namespace) -> int:
    """`rlattn logs JOB`."""
    return _job_commands().logs(args)


def stop(args: argparse.Namespace) -> int:
    """`rlattn stop JOB`."""
    return _job_commands().stop(args)


def _job_commands() -> ModuleType:
    try:
        from rlattn.trainers import submit
    except ImportError as error:
        raise ConfigError(f'Ray\'s job client is not installed ({error}); pip install "rlattn[jobs]"') from None
    return submit


def plan(args: argparse.Namespace) -> None:
    """`rlattn plan CONFIG`."""
    from rlattn.trainers.sizing import run

    run(args)


def doctor(args: argparse.Namespace) -> int:
    """`rlattn doctor`."""
    from rlattn.trainers.doctor import run

    return run(args)


def export(args: argparse.Namespace) -> None:
    """`rlattn export RUN_DIR OUT`."""
    from rlattn.trainers.checkpoint import newest

    checkpoint = newest(_run_dir(args.run_dir), "export", step=args.step, best=args.best)
    if args.out.exists():
        raise ConfigError(f"{args.out} exists already; give a folder that does not")
    source = checkpoint / ("adapter" if args.adapter else "model")
    if not source.is_dir():
        raise ConfigError(f"{checkpoint} holds no adapter, as the run has no policy.lora; export without --adapter")
    shutil.copytree(source, args.out)
    print(f"{checkpoint.name} exported to {args.out}")


def _run_dir(path: Path) -> Path:
    if not (path / "config.yaml").is_file():
        raise ConfigError(f"{path} holds no run (no config.yaml); give the output_dir of a `rlattn train`")
    return path


def _line(error: BaseException) -> str:
    """Our own errors whole, as they are written for people; of others the first line and the last."""
    if type(error).__module__.startswith("rlattn."):
        return str(error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="rlattn", description="RL fine-tuning with attention credit.")
    parser.add_argument("--version", action="version", version=f"rlattn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], int | None], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(command=run)
        return command

    def add_config(command: argparse.ArgumentParser) -> None:
        command.add_argument("config", help="a YAML file, or the name of a shipped config such as `quickstart`")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="such as credit.name=uniform seed=1")

    def add_again(command: argparse.ArgumentParser) -> None:
        again = command.add_mutually_exclusive_group()
        again.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in output_dir")
        again.add_argument(
            "--resume-from", type=step_number, metavar="STEP", help="go on from step-STEP; newer are dropped"
        )
        again.add_argument("--overwrite", action="store_true", help="replace the run that output_dir holds")

    command = add("train", train, "Train a policy with RL.")
    add_config(command)
    command.add_argument("--dry-run", action="store_true", help="print config, placement and memory; start nothing")
    add_again(command)
    add_eval_arguments(add("eval", evaluate, "Evaluate a model on reasoning benchmarks."))
    add_analyze_arguments(add("analyze", analyze, "Analyse a model's attention on a task's responses."))
    add_study_arguments(add("study", study, "Compare arms over seeds: table with intervals and learning curves."))
    add_config(add("warmup", warmup, "Make (or find) the small starting model of a config."))
    command = add("report", report, "Write report.html for a run.")
    command.add_argument("run_dir", type=Path)
    command = add("status", status, "What a run is doing: step, phase, engines, newest checkpoint.")
    command.add_argument("run_dir", type=Path)
    command = add("submit", submit, "Train on a Ray cluster: ship config and code, follow the log.")
    add_config(command)
    add_again(command)
    add_submit(command)
    add_address(add("jobs", jobs, "The runs on a cluster."))
    add_job(add("logs", logs, "A submitted run's log, followed to its end."))
    command = add("stop", stop, "End a submitted run after its step, with a checkpoint.")
    add_job(command)
    command.add_argument("--timeout", type=float, default=1800.0, metavar="S", help="longest wait (default: 1800)")
    command = add("plan", plan, "Whether a config fits a cluster on paper: who sits where, bytes per GPU.")
    add_config(command)
    command.add_argument("--nodes", type=int, required=True, help="nodes of the cluster, all alike")
    command.add_argument("--gpus", type=int, default=8, help="GPUs of a node (default: 8)")
    command.add_argument("--gpu-memory", type=float, default=80, metavar="GIB", help="memory of a GPU (default: 80)")
    command.add_argument("--cpus", type=int, default=64, help="CPUs of a node (default: 64)")
    add_address(add("doctor", doctor, "What of this machine, and of a cluster, would stop or slow a run."))
    command = add("export", export, "Copy a checkpoint's Hugging Face model: the newest's unless told.")
    command.add_argument("run_dir", type=Path)
    command.add_argument("out", type=Path)
    command.add_argument("--adapter", action="store_true", help="the LoRA adapter alone, in PEFT's format")
    add_choice(command)
    return parser


if __name__ == "__main__":
    sys.exit(main())
