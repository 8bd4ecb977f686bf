"""The command `rlattn analyze`: which model, which responses, and where the results go."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shlex
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlattn.analysis.config import AnalysisConfig, default_folder
from rlattn.config import ConfigError, ModelConfig, load_config, override, validate
from rlattn.console import Console
from rlattn.versions import installed_versions

if TYPE_CHECKING:
    from rlattn.analysis.generate import Writer
    from rlattn.analysis.responses import Response
    from rlattn.problem import Problem
    from rlattn.rollout.model import ModelSource

PACKAGES = ("rlattn", "torch", "transformers", "numpy", "scipy", "matplotlib")
MOST_TOKENS = 1024  # of a response, where nothing else is asked for


@dataclass(frozen=True)
class Target:
    """The model, its name for people, and the settings that hold unless the command says otherwise."""

    model: str
    name: str
    tree: dict[str, Any] = field(default_factory=dict)


def run(args: argparse.Namespace) -> None:
    """`rlattn analyze`."""
    started = time.monotonic()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make a busy machine crawl: 16 s against 5
    if (Path(args.model) / "config.yaml").is_file():
        target = of_run(Path(args.model), step=args.step, best=args.best)
    elif args.best or args.step is not None:
        raise ConfigError(f"--best and --step choose a checkpoint of a run; {args.model!r} is none")
    else:
        target = _plain(args.model)
    config = settings(args, target)
    if config.task is None and args.responses is None:
        raise ConfigError(
            f"{args.model!r} is no run folder, which would bring its task: name the task whose problems are answered, "
            "--task T, or a file of --responses"
        )
    if args.responses is not None and not args.responses.is_file():
        raise ConfigError(f"no file of responses at {str(args.responses)!r}")

    from rlattn.rollout.model import open_model  # these take seconds

    source = open_model(target.model)
    folder = args.out or default_folder(target.name, _key(config, source, args.responses))
    from rlattn.analysis.analyze import analyze
    from rlattn.analysis.results import Info, check_folder, write_results

    check_folder(folder)
    check_layers(source.path, config)
    with Console() as console:
        if args.responses is not None:
            responses = _read(args.responses, source, config)
            writer = load(config, source, console)
        else:
            problems, limit = _problems(config, source, console)
            writer = load(config, source, console)
            responses = answer(problems, writer, source, config, limit, console)
        analysis = analyze(writer.model, source.tokenizer, writer, responses, config, source.context, console)
        info = Info(
            name=target.name,
            model=source.path,
            fingerprint=source.fingerprint,
            task=config.task.name if config.task else None,
            source=str(args.responses) if args.responses else None,
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            command=shlex.join(["rlattn", *sys.argv[1:]]),
            versions=installed_versions(PACKAGES),
            seconds=round(time.monotonic() - started, 1),
        )
        with console.phase("plots and page"):
            write_results(folder, analysis, config, info, source.tokenizer)
        from rlattn.analysis.tables import show

        show(analysis, console)
        for name in ("analysis.html", "analysis.json", "responses.jsonl", "plots"):
            console.note(f"{name:<16}{folder / name}")


def check_layers(path: str, config: AnalysisConfig) -> None:
    """Refuse layers that the model does not have, before anything is generated.

    Raises:
        ConfigError: names them, and those it has.
    """
    from transformers import AutoConfig

    from rlattn.analysis.layers import selections

    try:
        selections(AutoConfig.from_pretrained(path), config.signals)
    except ValueError as error:
        raise ConfigError(f"`signals.layers` = {config.signals.layers}: {error}") from None


def of_run(folder: Path, *, step: int | None = None, best: bool = False) -> Target:
    """A run's newest weights (or those of a `step`, or the `best`), with its own task, signals and sampling.

    Raises:
        ConfigError: the run has no complete checkpoint.
    """
    from rlattn.trainers.checkpoint import newest

    checkpoint = newest(folder, "analyse", step=step, best=best)
    run = load_config(folder / "config.yaml")
    tree = {
        "task": run.task.model_dump(),
        "dtype": run.model.dtype,
        "signals": run.signals.model_dump(),
        "generation": {"temperature": run.rollout.temperature, "max_tokens": run.rollout.max_completion_length},
    }
    return Target(str(checkpoint / "model"), f"{folder.resolve().name}-{checkpoint.name}", tree)


def _plain(model: str) -> Target:
    return Target(model, Path(model).resolve().name if Path(model).is_dir() else model)


def settings(args: argparse.Namespace, target: Target) -> AnalysisConfig:
    """The target's own settings, then the command's options, then its overrides.

    Raises:
        ConfigError: one line a problem, each naming the key, its value and what would be accepted.
    """
    tree = {"signals": {"fai_high": None}} | target.tree
    if args.task is not None and args.task != tree.get("task", {}).get("name"):
        tree["task"] = {"name": args.task}
    tree |= {name: value for name, value in (("n", args.n), ("seed", args.seed)) if value is not None}
    for item in args.overrides:
        override(tree, item)
    return validate(AnalysisConfig, tree)


def load(config: AnalysisConfig, source: ModelSource, console: Console) -> Writer:
    """The model, ready to write and to be measured, on the GPU where there is one.

    Raises:
        ConfigError: it cannot be loaded, or its logits are transformed in a way that entropies here do not follow.
    """
    import torch

    from rlattn.analysis.generate import Writer
    from rlattn.trainers.model import load_model

    gpu = torch.cuda.is_available()
    dtype = config.dtype or ("bfloat16" if gpu else "float32")
    with console.phase("loading the model"):
        model = load_model(ModelConfig(dtype=dtype), source.path).eval()
        if gpu:
            model.cuda()
    end = model.generation_config.eos_token_id if model.generation_config else None
    ends = {*(end if isinstance(end, list) else [end]), source.tokenizer.eos_token_id} - {None}
    return Writer(model, ends, config.tokens_per_batch)


def answer(
    problems: list[Problem], writer: Writer, source: ModelSource, config: AnalysisConfig, limit: int, console: Console
) -> list[Response]:
    """One response to each problem, of at most `limit` tokens."""
    from rlattn.analysis.responses import Response
    from rlattn.rollout.pool import encode_prompts, prompt_text

    prompts = encode_prompts(problems, source.tokenizer, source.context - 1)
    total = limit * len(writer.batches(prompts, limit))
    with console.count("answering", total) as step:
        written = writer.write(prompts, limit, temperature=config.generation.temperature, seed=config.seed, step=step)
    texts = [prompt_text(problem, source.tokenizer) for problem in problems]
    return [
        Response(problem.id, text, prompt, ids)
        for problem, text, prompt, ids in zip(problems, texts, prompts, written, strict=True)
    ]


def _problems(config: AnalysisConfig, source: ModelSource, console: Console) -> tuple[list[Problem], int]:
    from rlattn.rollout.pool import encode_prompts
    from rlattn.tasks import load_task

    assert config.task is not None
    test = load_task(config.task, config.task.seed, training=False).test
    problems = test[: config.n]
    if len(test) < config.n:
        console.note(f"{config.task.name} has {len(test)} test problems; all are answered (n={config.n})")
    room = source.context - max(map(len, encode_prompts(problems, source.tokenizer, source.context - 1)))
    asked = config.generation.max_tokens
    if asked and asked > room:
        raise ConfigError(
            f"`generation.max_tokens` = {asked} does not fit: the model's context is {source.context} tokens, and the "
            f"longest prompt leaves {room}"
        )
    return problems, asked or min(room, MOST_TOKENS)


def _read(file: Path, source: ModelSource, config: AnalysisConfig) -> list[Response]:
    from rlattn.analysis.responses import read_responses

    found = read_responses(file, source.tokenizer, config.n, config.generation.max_tokens)
    longest = max(found, key=lambda response: len(response.ids))
    if len(longest.ids) > source.context:
        raise ConfigError(
            f"{file}: the response to {longest.id!r} has {len(longest.ids)} tokens with its prompt, and the model's "
            f"context is {source.context}; cut responses with generation.max_tokens=N"
        )
    return found


def _key(config: AnalysisConfig, source: ModelSource, responses: Path | None) -> str:
    shape = [config.model_dump(mode="json"), source.fingerprint, responses and str(responses.resolve())]
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:8]
