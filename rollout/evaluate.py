"""Benchmarks on the engine pool; every finished problem is on disk at once, so that nothing is done twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray
import torch

from rlattn.config import ConfigError, RunConfig, validate
from rlattn.console import Console
from rlattn.evaluation.config import Benchmark, EvalConfig, load_benchmarks
from rlattn.evaluation.records import Record, RecordFile, Sample, samples_path
from rlattn.evaluation.results import BenchmarkResult, summarise
from rlattn.problem import Problem
from rlattn.rollout.cluster import ActorError, check_shared, reserve, start_ray
from rlattn.rollout.engine import Completion
from rlattn.rollout.engine_args import check_engine_args
from rlattn.rollout.model import ModelSource, open_model
from rlattn.rollout.placement import plan
from rlattn.rollout.pool import Ask, RolloutPool, encode_prompts, prompt_text
from rlattn.verifiers.pool import VerifierPool, judge_all

MOST_TOKENS = 32_768  # of a completion, where nothing else is asked for
OWNED = {
    "model.path": "MODEL",
    "rollout.max_prompt_length": "the longest prompt",
    "rollout.max_completion_length": "--max-tokens",
    "rollout.temperature": "--temperature",
    "rollout.top_p": "--top-p",
    "rollout.num_generations": "-k",
}


def evaluate(
    config: EvalConfig, model: str, name: str, out: Path | None, engines: dict[str, Any], console: Console
) -> tuple[Path, list[BenchmarkResult]]:
    """Ask a model the benchmarks' problems, judge its completions and sum up.

    Problems that an earlier call with the same model and settings has finished are read, not generated again.

    Args:
        config: what is asked.
        model: Hugging Face folder or hub id.
        name: of the model, for people.
        out: results folder; None is `runs/eval/<name>-<hash of model and settings>`.
        engines: sections `rollout`, `model`, `policy` and `ray` of a run's config, for the engines.
        console: where progress goes.

    Returns:
        The results folder, whose `samples/` hold every completion; and the results in the order of `config.benchmarks`.

    Raises:
        ConfigError: something in the settings, the data or the folder cannot work; nothing was started.
        ActorError: an engine failed; what was finished is kept.
    """
    benchmarks = load_benchmarks(config)
    source = open_model(model)
    run = engine_config(config, source, benchmarks, engines)
    folder = out or default_folder(config, source, name, run)
    with ExitStack() as stack:
        settings = [header(config, source, run, benchmark) for benchmark in benchmarks]
        files = [
            stack.enter_context(RecordFile(samples_path(folder, benchmark.name), kept))
            for benchmark, kept in zip(benchmarks, settings, strict=True)
        ]
        missing = [
            [problem for problem in benchmark.problems if problem.id not in file.finished()]
            for benchmark, file in zip(benchmarks, files, strict=True)
        ]
        if any(missing):
            try:
                with start(run, source, console) as pool:
                    generate(list(zip(benchmarks, files, missing, strict=True)), pool, run.seed, console)
            except ActorError as error:
                kept = f"finished problems are kept in {folder}: the same command goes on with the others"
                raise ActorError(f"{error}\n{kept}") from None
        results = [
            summarise(benchmark.name, file.finished().values(), len(benchmark.problems), kept)
            for benchmark, file, kept in zip(benchmarks, files, settings, strict=True)
        ]
    return folder, results


def generate(
    work: list[tuple[Benchmark, RecordFile, list[Problem]]], pool: RolloutPool, seed: int, console: Console
) -> None:
    """Ask each benchmark's problems and write each to its file as it finishes.

    All are asked at once, so that the engines stay full until the last benchmark's last completions.
    """
    asks = [Ask(p, benchmark.samples, benchmark.temperature) for benchmark, _, problems in work for p in problems]
    origins = [item for item in work for _ in item[2]]
    with ExitStack() as stack:
        verifiers = stack.enter_context(VerifierPool())
        bars = {
            benchmark.name: stack.enter_context(
                console.count(benchmark.name, len(benchmark.problems), len(benchmark.problems) - len(problems))
            )
            for benchmark, _, problems in work
            if problems
        }
        for index, completions in pool.stream(asks, seed=seed):
            (benchmark, file, _), problem = origins[index], asks[index].problem
            file.add(record(benchmark, problem, prompt_text(problem, pool.tokenizer), completions, verifiers))
            bars[benchmark.name]()


def record(
    benchmark: Benchmark,
    problem: Problem,
    prompt: str,
    completions: list[tuple[str, Completion]],
    verifiers: VerifierPool,
) -> Record:
    """A problem's completions with their verdicts."""
    verdicts = judge_all(benchmark.task, [(problem.answer, text) for text, _ in completions], verifiers)
    samples = [
        Sample(text, len(completion.token_ids), completion.truncated, verdict)
        for (text, completion), verdict in zip(completions, verdicts, strict=True)
    ]
    return Record(problem.id, problem.subject, prompt, samples)


def engine_config(
    config: EvalConfig, source: ModelSource, benchmarks: list[Benchmark], engines: dict[str, Any]
) -> RunConfig:
    """The run's config that the engine pool needs: on a GPU in bfloat16 where there is one, else on the CPU in float32.

    Raises:
        ConfigError: a key that other settings own, or a prompt that leaves no room for a completion.
    """
    for section, values in engines.items():
        for key in values:
            if owner := OWNED.get(f"{section}.{key}"):
                raise ConfigError(f"`{section}.{key}` is set by {owner}; remove it")
    prompts = [problem for benchmark in benchmarks for problem in benchmark.problems]
    longest = max(len(ids) for ids in encode_prompts(prompts, source.tokenizer, source.context - 1))
    room = source.context - longest
    if config.max_tokens and config.max_tokens > room:
        raise ConfigError(
            f"--max-tokens {config.max_tokens} does not fit: the model's context is {source.context} tokens and the "
            f"longest prompt has {longest}, which leaves {room}"
        )
    tokens = config.max_tokens or min(room, MOST_TOKENS)
    gpu = torch.cuda.is_available()
    sampling = {"max_prompt_length": longest, "max_completion_length": tokens, "top_p": config.top_p}
    tree = {
        "seed": config.seed,
        "model": {"dtype": "bfloat16" if gpu else "float32"} | engines.get("model", {}) | {"path": source.path},
        "rollout": engines.get("rollout", {}) | sampling,
        "policy": {"gpus_per_rank": int(gpu), "tokens_per_micro_batch": longest + tokens} | engines.get("policy", {}),
        "ray": engines.get("ray", {}),
    }
    run = validate(RunConfig, tree)
    check_engine_args(run)
    return run


def header(config: EvalConfig, source: ModelSource, run: RunConfig, benchmark: Benchmark) -> dict[str, Any]:
    """What a benchmark's numbers depend on."""
    return {
        "benchmark": benchmark.name,
        "model": source.path,
        "fingerprint": source.fingerprint,
        "dtype": run.model.dtype,
        "samples": benchmark.samples,
        "temperature": benchmark.temperature,
        "top_p": config.top_p,
        "max_tokens": run.rollout.max_completion_length,
        "seed": config.seed,
        "problems": len(benchmark.problems),
        "data_hash": benchmark.data_hash,
    }


def default_folder(config: EvalConfig, source: ModelSource, name: str, run: RunConfig) -> Path:
    """`runs/eval/<name>-<hash>`: other settings, or another model of that name, have a folder of their own."""
    settings = config.model_dump(mode="json", exclude={"benchmarks"}) | {"dtype": run.model.dtype}
    key = hashlib.sha256(json.dumps([settings, source.fingerprint], sort_keys=True).encode()).hexdigest()[:8]
    short = Path(name).resolve().name if Path(name).is_dir() else name.replace("/", "--")
    return Path("runs/eval") / f"{short}-{key}"


@contextmanager
def start(run: RunConfig, source: ModelSource, console: Console) -> Iterator[RolloutPool]:
    """Ray and the engines, gone when the block ends."""
    layout = plan(run, policy=False)
    with console.phase("starting Ray"):
        logs = start_ray(run, layout)
    console.note(f"logs of Ray and of the engines: {logs}")
    try:
        group = reserve(run, layout, console.note)
        check_shared(group, {"model": Path(source.path)})
        with console.phase("loading vLLM"):
            pool = RolloutPool(run, source.path, source.tokenizer, plan=layout, group=group)
        yield pool
    finally:
        ray.shutdown()
