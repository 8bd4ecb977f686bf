"""A run from config to report: checks at the door, start-up, the loop, checkpoints."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import ray
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlattn import trace
from rlattn.config import RunConfig, TrainerConfig
from rlattn.console import Console
from rlattn.data import check_same, fingerprint
from rlattn.locking import locked
from rlattn.metrics import completion_records
from rlattn.report import write_report
from rlattn.reward_functions import load_function
from rlattn.rollout.cluster import ActorLost, check_shared, local_cpus, reserve, start_ray
from rlattn.rollout.engine_args import check_engine_args
from rlattn.rollout.placement import plan
from rlattn.rollout.pool import RolloutPool, encode_prompts
from rlattn.status import DONE, STOPPED, StatusFile
from rlattn.stopping import Stopped, stoppable
from rlattn.tasks import Task, load_task
from rlattn.tracking import Tracker, read_metrics
from rlattn.trainers.checkpoint import Best, Checkpoints
from rlattn.trainers.critic import Critic
from rlattn.trainers.grpo import GRPOTrainer
from rlattn.trainers.memory import shape_of
from rlattn.trainers.model import captured_layers, out_of_reach
from rlattn.trainers.output import TRACE, open_output, save_config
from rlattn.trainers.policy import Policy
from rlattn.trainers.ppo import PPOTrainer
from rlattn.trainers.reward_pool import RewardPool
from rlattn.trainers.rng import load_rng, save_rng
from rlattn.trainers.trainer import Trainer
from rlattn.trainers.universal import check_sharding, loadable, sharding
from rlattn.trainers.warmup import warmup
from rlattn.verifiers.pool import VerifierPool

DRIVER = "driver.pt"
DRIVER_THREADS = 4


def train(
    config: RunConfig,
    console: Console,
    *,
    resume: bool = False,
    resume_from: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Run `config` to its last step; returns the report's path.

    `resume` goes on from the newest checkpoint, `resume_from` from that of a step.

    Raises:
        ConfigError: something in the config, the task's data or the output folder cannot work; nothing was started.
        CheckpointError: the checkpoint to go on from is damaged; nothing was started.
    """
    check(config)
    task = load_task(config.task, config.task.seed)
    benchmarks = [load_task(named, named.seed, training=False) for named in config.trainer.eval_tasks]
    with locked(config.output_dir, "another `rlattn train`"):
        checkpoints, checkpoint = open_output(
            config, console, resume=resume, resume_from=resume_from, overwrite=overwrite
        )
        return run(config, console, task, benchmarks, checkpoints, checkpoint)


def check(config: RunConfig) -> None:
    """Refuse what cannot work, before anything is read or started."""
    check_engine_args(config)
    local_cpus(config, plan(config))
    captured_layers(config.signals, shape_of(config))
    for function in config.rewards.functions:
        load_function(function)


def run(
    config: RunConfig,
    console: Console,
    task: Task,
    benchmarks: list[Task],
    checkpoints: Checkpoints,
    checkpoint: Path | None,
) -> Path:
    """From an open output folder to the report."""
    data = fingerprint(task.train)
    if checkpoint:
        state = checkpoints.state(checkpoint)
        check_sharding(state["sharding"], config.policy)
        check_same(state["data"], data)
    if config.model.path:
        start_model = config.model.path
    else:
        with console.phase("preparing the starting model"):
            start_model = str(warmup(config, console.progress).absolute())
    tokenizer = load_tokenizer(start_model)
    asked = [problem for benchmark in benchmarks for problem in benchmark.test]
    encode_prompts([*task.train, *task.test, *asked], tokenizer, config.rollout.max_prompt_length)
    save_config(config)

    with Tracker(config.output_dir, config.trainer.report_to, config=config.model_dump(mode="json")) as tracker:

        def attempt(checkpoint: Path | None, started: Callable[[], None]) -> None:
            with start(config, task, benchmarks, tokenizer, start_model, checkpoint, console) as trainer:
                started()
                loop(config, trainer, tracker, checkpoints, checkpoint, tokenizer, console, data)

        keep_going(attempt, checkpoints, checkpoint, config.trainer.max_restarts, console)
    if checkpoints.copies:
        with console.phase("copying the last checkpoint"):
            checkpoints.copies.finish()
    StatusFile(config.output_dir, config.trainer.steps).phase(config.trainer.steps, DONE)
    report = write_report(config.output_dir)
    accuracy = [line["eval/accuracy"] for line in read_metrics(config.output_dir) if "eval/accuracy" in line]
    before, after = (accuracy[0], accuracy[-1]) if accuracy else (None, None)
    console.result(before, after, report, checkpoints.latest())
    return report


def keep_going(
    attempt: Callable[[Path | None, Callable[[], None]], None],
    checkpoints: Checkpoints,
    checkpoint: Path | None,
    max_restarts: int,
    console: Console,
) -> None:
    """Make `attempt`s until one comes to its end: after an actor was lost, from the newest checkpoint.

    `attempt` is told the checkpoint and what to call once everything is started: what cannot even start is not tried
    again. At most `max_restarts` in a row that bring no newer checkpoint, after 1, 2, 4, ... seconds.

    Raises:
        ActorLost: once more than that.
        CheckpointError: the newest checkpoint is damaged.
    """
    losses, running = 0, False

    def started() -> None:
        nonlocal running
        running = True

    while True:
        try:
            return attempt(checkpoint, started)
        except ActorLost as error:
            newest = checkpoints.latest()
            losses = losses + 1 if newest == checkpoint else 1
            if not running or losses > max_restarts:
                raise
            checkpoint = checkpoints.verified(newest, "--resume-from") if newest else None
            first = str(error).splitlines()[0].rstrip(":")
            console.note(f"{first}; starting again from {checkpoint.name if checkpoint else 'the beginning'}")
            time.sleep(2.0 ** (losses - 1))


def loop(
    config: RunConfig,
    trainer: Trainer,
    tracker: Tracker,
    checkpoints: Checkpoints,
    checkpoint: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
    data: str,
) -> None:
    """Steps from the checkpoint's (or 0) to the last; each logs a line, some evaluate, some are saved.

    `data` is the training problems' fingerprint.

    Raises:
        Stopped: asked to by SIGTERM, after the step that was going on and its checkpoint.
    """

    def write(folder: Path) -> None:
        trainer.save(folder)
        tokenizer.save_pretrained(folder / "model")
        save_rng(folder / "rng" / DRIVER)

    first, last = 0, config.trainer.steps
    status = StatusFile(config.output_dir, last)
    trainer.tell = lambda step, phase: status.phase(step + 1, phase)
    trainer.rollout.fleet.watch = status.detail
    if checkpoint:
        state = checkpoints.state(checkpoint)
        first, trainer.groups = state["step"], state["head_groups"]
        checkpoints.drop_after(first)
        load_rng(checkpoint / "rng" / DRIVER)
    tracker.resume(first if checkpoint else -1)
    if not checkpoint and config.trainer.eval_steps:
        with console.phase("evaluating the starting model"):
            tracker.log(0, trainer.evaluate())

    def one(step: int, stopping: Callable[[], bool]) -> None:
        done = step + 1
        with trace.recording(config.output_dir / TRACE if done == config.trainer.trace_step else None):
            metrics, batch = trainer.step(step)
        evaluating = _due(done, config.trainer.eval_steps, last)
        if evaluating:
            trainer.tell(step, "eval")
            metrics |= trainer.evaluate()
        if evaluating or step == 0:
            records = completion_records(*batch, tokenizer, config.trainer.log_completions)
            tracker.log_completions(done, "train", records)
        tracker.log(done, metrics)
        console.step(done, last, metrics)
        best = better(config.trainer, done, metrics, checkpoints.best()) if evaluating else None
        stop = stopping() and done < last
        if best or stop or done == last or _due(done, config.trainer.save_steps, last):
            trainer.tell(step, "save")
            state = {"head_groups": trainer.groups, "sharding": sharding(config.policy), "data": data}
            checkpoints.save(done, state, write, best)
        if stop:
            trainer.tell(step, STOPPED)
            if checkpoints.copies:
                checkpoints.copies.finish()
            raise Stopped(
                f"stopped after step {done} of {last}, as asked; --resume goes on from checkpoint step-{done}"
            )

    with stoppable(console.note) as stopping:
        for step in range(first, last):
            one(step, stopping)


@contextmanager
def start(
    config: RunConfig,
    task: Task,
    benchmarks: list[Task],
    tokenizer: PreTrainedTokenizerBase,
    reference_path: str,
    checkpoint: Path | None,
    console: Console,
) -> Iterator[Trainer]:
    """Ray, engines and policy, loaded side by side; all of it gone when the block ends."""
    if "OMP_NUM_THREADS" not in os.environ:
        # What is left to do here is small, and each of it waits for all threads: 32 took 2 s of an 8 s step.
        torch.set_num_threads(min(DRIVER_THREADS, torch.get_num_threads()))
    layout = plan(config)
    model_path = str(checkpoint / "model") if checkpoint else reference_path
    with console.phase("starting Ray"):
        logs = start_ray(config, layout)
        console.note(f"logs of Ray and of the actors: {logs}")
    try:
        group = reserve(config, layout, console.note)
        check_shared(group, {"output_dir": config.output_dir, "model.path": Path(reference_path)})
        with (
            console.phase("loading vLLM and the policy"),
            loadable(checkpoint, config.policy) as source,
            ThreadPoolExecutor(1) as side,
        ):
            policy = Policy(config, layout, group)
            critic = Critic(config, layout, group) if layout.critic else None

            def load() -> None:
                policy.load(model_path, reference_path, source)
                if critic:
                    path = str(checkpoint / "critic" / "model") if checkpoint else config.ppo.critic_path
                    critic.load(path or reference_path, source / "critic" if source else None)

            loaded = side.submit(load)
            # vLLM measures what others leave it of its GPU, so the policy loads first where they share one.
            ready = loaded.result if layout.shares_gpus else lambda: None
            version = Checkpoints.step_of(checkpoint) if checkpoint else 0
            served = reference_path if config.policy.sends_adapters else model_path
            rollout = RolloutPool(
                config, served, tokenizer, plan=layout, group=group, version=version, note=console.note, ready=ready
            )
            loaded.result()
            if checkpoint and config.policy.sends_adapters:
                rollout.load_adapter(policy.adapter, version)
        with VerifierPool() as verifiers:
            functions = RewardPool(config.rewards) if config.rewards.functions else None
            parts = config, task, rollout, policy, verifiers, benchmarks, functions
            trainer = PPOTrainer(*parts, critic=critic) if critic else GRPOTrainer(*parts)
            try:
                yield trainer
            finally:
                rollout.shutdown()
                trainer.close()
    finally:
        ray.shutdown()


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer at `path`, or a ConfigError that names the path."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise out_of_reach(path, error) from None


def better(config: TrainerConfig, step: int, metrics: dict[str, float], best: Best | None) -> Best | None:
    """`step` as the best checkpoint, where its metrics surpass those of the `best` so far."""
    name = config.best_metric
    if name is None:
        return None
    value = metrics[name]
    surpasses = value == value  # NaN is never the best
    if best and best.metric == name:
        surpasses = value > best.value if config.greater_is_better else value < best.value
    return Best(step, name, value) if surpasses else None


def _due(done: int, every: int, last: int) -> bool:
    return every > 0 and (done % every == 0 or done == last)
