import random
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from filelock import FileLock
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlattn.config import RunConfig
from rlattn.tasks import load_task
from rlattn.trainers import warmup as module
from rlattn.trainers.warmup import build_tokenizer, cache_key, warmup, worked_solutions

OPTIONS = {"number_high": 20, "target_low": 5, "target_high": 40, "train_size": 200, "test_size": 50}


def run_config(folder, seed=0, steps=3, **options) -> RunConfig:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1}
    return RunConfig.model_validate(
        {
            "task": {"options": {**OPTIONS, **options}},
            "model": {"warmup": {**shape, "seed": seed, "steps": steps, "batch_size": 4, "cache_dir": folder}},
        }
    )


@pytest.mark.parametrize("prompt", ["tinyzero", "compact"])
def test_tokenizer_is_lossless_on_the_task(tmp_path, prompt):
    task = load_task(run_config(tmp_path, prompt=prompt).task, 0)
    rows = worked_solutions(task, 2000, 0)
    tokenizer = build_tokenizer([row["prompt"] + row["completion"] for row in rows] + [p.prompt for p in task.test])
    for row in rows[:300] + [{"prompt": p.prompt, "completion": ""} for p in task.test]:
        text = row["prompt"] + row["completion"]
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
        assert ids == tokenizer(row["prompt"]).input_ids + tokenizer(row["completion"]).input_ids
    assert len(tokenizer(" 17 =17 ~17").input_ids) == 3
    assert tokenizer.unk_token_id in tokenizer("Ünknown 123456 \n\t words").input_ids
    assert len({tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id}) == 3


def test_warmup_makes_a_model_once(tmp_path):
    config = run_config(tmp_path)
    with Progress(disable=True) as progress:
        folder = warmup(config, progress)
        stamp = (folder / "model.safetensors").stat().st_mtime_ns
        assert warmup(config, progress) == folder
        assert (folder / "model.safetensors").stat().st_mtime_ns == stamp
        again = warmup(config.model_copy(update={"model": run_config(tmp_path / "again").model}), progress)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "." and path.name != "again"] == [folder.name]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "qwen3"
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert model.dtype == torch.float32
    ids = tokenizer("Use 3 4 to make 7.\n<think>", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(again)(ids).logits)


def test_who_waits_for_another_process_says_so_and_not_for_ever(tmp_path, monkeypatch):
    config = run_config(tmp_path)
    lock = FileLock(tmp_path / f".{cache_key(config)}.lock")
    with Progress(disable=True) as progress, ThreadPoolExecutor() as pool:
        with lock:
            waiting = pool.submit(warmup, config, progress)
            deadline = time.monotonic() + 60
            while not progress.tasks and time.monotonic() < deadline:
                time.sleep(0.01)
            assert [task.description for task in progress.tasks] == [
                "warm start: waiting for another process that makes the same model"
            ]
        assert (waiting.result(timeout=60) / "model.safetensors").is_file()
        assert not any("waiting" in task.description for task in progress.tasks)
        monkeypatch.setattr(module, "WAIT_S", 0.1)
        elsewhere = run_config(tmp_path, seed=1)
        other = FileLock(tmp_path / f".{cache_key(elsewhere)}.lock")
        with other, pytest.raises(TimeoutError, match=r"holds .*lock; end it, or set model.warmup.cache_dir"):
            pool.submit(warmup, elsewhere, progress).result(timeout=60)


def test_cache_key_names_all_that_shapes_the_model(tmp_path):
    base = cache_key(run_config(tmp_path))
    assert cache_key(run_config(tmp_path / "elsewhere")) == base
    others = [run_config(tmp_path, seed=1), run_config(tmp_path, steps=4), run_config(tmp_path, number_high=21)]
    assert len({base, *map(cache_key, others)}) == 4


def test_data_files_are_part_of_the_key(tmp_path):
    file = tmp_path / "train.jsonl"
    keys = set()
    for target in (random.Random(0).randint(1, 9), 10):
        file.write_text(f'{{"nums": [3, 5], "target": {target}}}\n')
        keys.add(cache_key(run_config(tmp_path, train_file=str(file), test_file=str(file))))
    assert len(keys) == 2
