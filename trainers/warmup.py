"""The warm start: a small Qwen3-shaped policy that has learned the task's form and some of its skill by SFT.

The model imitates `task.worked_solution`, whose quality is mixed on purpose: see there what RL is left to find.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock, Timeout
from rich.progress import Progress
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import WordLevelTrainer
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
    set_seed,
)
from transformers.utils import is_torch_tf32_available, logging

from rlattn.config import ConfigError, RunConfig, WarmupConfig
from rlattn.tasks import TeachableTask, load_task

if TYPE_CHECKING:
    from trl import SFTConfig

VERSION = 1
"""Raise it where a change of code changes the model: cached models of another version are not used."""

# A word keeps the space before it, so joined tokens give the text back; 15, =15, ~15 and tags are single tokens.
WORDS = r" ?</?[a-z]+>| ?[=~]?[0-9]+| ?[A-Za-z]+|\s| ?[^\s]"
CONTEXT = 2048
WAIT_S = 3600.0
"""Longest wait for another process that makes the same model."""
PERIODS = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 16, 20, 27, 35, 50, 70, 100, 150, 200)


def warmup(config: RunConfig, progress: Progress) -> Path:
    """Make the starting model of a run, or find it in the cache.

    Returns:
        Folder with a Hugging Face model (fp32) and tokenizer, under `config.model.warmup.cache_dir`.

    Raises:
        ConfigError: the task has no worked solutions to learn from, or a bad option.
        TimeoutError: another process that makes the same model did not end within `WAIT_S`.
    """
    settings = config.model.warmup
    folder = settings.cache_dir / cache_key(config)
    if folder.is_dir():
        return folder
    settings.cache_dir.mkdir(parents=True, exist_ok=True)
    with _alone(settings.cache_dir / f".{folder.name}.lock", progress):
        if not folder.is_dir():
            _make(config, folder, progress)
    return folder


@contextmanager
def _alone(path: Path, progress: Progress) -> Iterator[None]:
    """Of runs that start together one makes the model, and the others wait and say so."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        bar = progress.add_task("warm start: waiting for another process that makes the same model", total=None)
        try:
            lock.acquire(timeout=WAIT_S)
        except Timeout:
            raise TimeoutError(
                f"another process has been making the starting model for {WAIT_S / 60:.0f} minutes, and holds {path}; "
                "end it, or set model.warmup.cache_dir to another folder"
            ) from None
        progress.remove_task(bar)
    try:
        yield
    finally:
        lock.release()


def _make(config: RunConfig, folder: Path, progress: Progress) -> None:
    settings = config.model.warmup
    bar = progress.add_task("warm start: solutions", total=settings.steps)
    task = load_task(config.task, config.task.seed)
    if not isinstance(task, TeachableTask):
        raise ConfigError(f"task {config.task.name!r} has no worked solutions to learn from; set model.path")
    rows = worked_solutions(task, settings.steps * settings.batch_size, settings.seed)
    rows = group_by_length(rows, settings.batch_size, settings.seed)
    texts = [row["prompt"] + row["completion"] for row in rows] + [p.prompt for p in task.train + task.test]
    tokenizer = build_tokenizer(texts)
    set_seed(settings.seed)
    model = build_model(settings, tokenizer)
    with tempfile.TemporaryDirectory(dir=settings.cache_dir, prefix=".unfinished-") as scratch:
        progress.update(bar, description=f"warm start: SFT, {model.num_parameters() / 1e6:.1f}M parameters")
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # TRL brings DeepSpeed, which warns where it has to guess
        # Here, since a model is seldom made and these take seconds.
        import datasets
        from trl import SFTTrainer

        datasets.disable_progress_bars()
        logging.disable_progress_bar()
        trainer = SFTTrainer(
            model,
            args=_arguments(settings, scratch),
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[_Bar(progress, bar)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        finished = Path(scratch) / "model"
        model.save_pretrained(finished)
        tokenizer.save_pretrained(finished)
        os.replace(finished, folder)


def cache_key(config: RunConfig) -> str:
    """Hash of everything that shapes the model: its settings, the task with its data files, this code."""
    files = [Path(value) for name, value in sorted(config.task.options.items()) if name.endswith("_file") and value]
    shape = {
        "version": VERSION,
        "task": config.task.model_dump(mode="json"),
        "files": [hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.is_file()],
        "warmup": config.model.warmup.model_dump(mode="json", exclude={"cache_dir"}),
    }
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:16]


def worked_solutions(task: TeachableTask, count: int, seed: int) -> list[dict[str, str]]:
    """`count` rows of `prompt` and `completion` over the training problems, each problem as often as any other."""
    rng = random.Random(f"worked solutions {seed}")
    problems = [problem for _ in range(-(-count // len(task.train))) for problem in task.train][:count]
    return [{"prompt": problem.prompt, "completion": task.worked_solution(problem, rng)} for problem in problems]


def group_by_length(rows: list[dict[str, str]], batch_size: int, seed: int) -> list[dict[str, str]]:
    """The rows in an order whose batches hold completions of like length, as padding would cost as much as the text.

    Rows move within windows of eight batches only: where neighbouring batches are alike too, the model learns worse.
    """
    rng = random.Random(f"batches {seed}")
    ordered = []
    for start in range(0, len(rows), 8 * batch_size):
        window = sorted(rows[start : start + 8 * batch_size], key=lambda row: len(row["completion"]))
        batches = [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
        rng.shuffle(batches)
        ordered += [row for batch in batches for row in batch]
    return ordered


def build_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer with every word of `texts`; decode(encode(text)) == text for texts of those words.

    Other words become `<unk>`. A prompt's tokens are a prefix of the tokens of prompt + completion wherever the
    completion starts with a space.
    """
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    tokenizer.train_from_iterator(texts, WordLevelTrainer(special_tokens=list(special.values()), show_progress=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=CONTEXT, **special
    )


def model_shape(settings: WarmupConfig, vocab_size: int, **tokens: Any) -> Qwen3Config:
    """The Qwen3 shape that `settings` describe; `tokens` are its special token ids."""
    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_kv_heads,
        head_dim=settings.head_dim,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.06,
        **tokens,
    )


def build_model(settings: WarmupConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 of the configured shape, fp32, with tied embeddings."""
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = model_shape(settings, len(tokenizer), **ids)
    model = Qwen3ForCausalLM(config).float()
    with torch.no_grad():
        # At Qwen3's 0.02 a narrow model's embeddings drown in the first layers' outputs, and copying is learned late.
        embedding = model.get_input_embeddings().weight.normal_(std=0.15)
        for token, index in tokenizer.get_vocab().items():
            if (digits := token.strip(" =~")).isdigit():
                waves = _waves(int(digits))[: settings.hidden_size]
                embedding[index, : len(waves)] = 0.6 * waves
        for layer in model.model.layers:
            for output in (layer.self_attn.o_proj, layer.mlp.down_proj):
                output.weight.div_((2 * settings.num_layers) ** 0.5)
    return model


def _waves(number: int) -> torch.Tensor:
    """[2 * len(PERIODS)] fp32: a number's place on circles of several sizes, where adding is turning.

    Trained models embed numbers so (Zhou et al., arXiv 2406.03445); starting there saves two minutes of finding it.
    """
    angles = 2 * torch.pi * number / torch.tensor(PERIODS, dtype=torch.float32)
    return torch.cat([angles.cos(), angles.sin()])


def _arguments(settings: WarmupConfig, folder: str) -> SFTConfig:
    from trl import SFTConfig

    return SFTConfig(
        output_dir=folder,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, settings.steps // 20),
        train_sampling_strategy="sequential",  # the rows come ordered
        max_length=CONTEXT,
        adam_beta2=0.99,
        bf16=False,
        tf32=is_torch_tf32_available() or None,
        dataloader_pin_memory=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
        seed=settings.seed,
    )


class _Bar(TrainerCallback):
    """Moves a rich progress bar with the trainer's steps."""

    def __init__(self, progress: Progress, bar: Any) -> None:
        self.progress, self.bar = progress, bar

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.progress.update(self.bar, completed=state.global_step)
