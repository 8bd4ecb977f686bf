"""Scoring and updating a policy: tokens a second and peak memory beside TRL's GRPOTrainer, on the same batch.

    python -P benchmarks/policy_vs_trl.py                  # H100: 0.6B and 4B shapes, 1K and 8K tokens
    python -P benchmarks/policy_vs_trl.py --cases 32k --out benchmarks/results/policy_vs_trl_32k.json
    python -P benchmarks/policy_vs_trl.py --shapes 4b --cases 1k --sides ours --zero '{"stage": 1, "offload_optimizer":
        {"device": "cpu"}}' --out benchmarks/results/policy_offload.json
    python -P benchmarks/policy_vs_trl.py --shapes tiny    # a CPU, to see that it runs

Random weights of Qwen3's shapes, no generation. `score` gives old log-probs (ours: entropy and attention signals too),
`update` is forward, backward, clipping and AdamW. Each side runs in a process of its own, with gradient checkpointing
and the whole batch in one micro-batch where it fits 16,384 tokens. TRL pads, as it does for its users; ours is packed.

TRL runs twice: with fp32 weights under autocast (`theirs`, its default), whose optimizer is as exact as ours but whose
forward keeps an fp32 residual stream; and with bf16 weights (`theirs-bf16`), whose forward is as exact as ours but
whose optimizer is not (no fp32 master weights and moments). Log-probs of the three are compared with an fp32 forward,
before anything is learned; losses and gradient norms with each other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parent))  # which -P leaves off
from shapes import DEVICE, SHAPES, save_model, vocabulary

CASES = {  # prompt tokens, longest and shortest completion, sequences
    "1k": (128, 896, 128, 16),
    "1k-equal": (128, 896, 896, 16),
    "8k": (128, 8064, 1024, 4),
    "8k-equal": (128, 8064, 8064, 2),
    "32k": (128, 32_640, 32_640, 2),
    "tiny": (8, 56, 8, 8),
}
ASKED_FOR = ("32k", "tiny")  # not in the default run
TOKENS_PER_MICRO_BATCH = 16384
EXACT_TOKENS = 8192
RUNS = 3
SIDES = ("ours", "theirs", "theirs-bf16")


def budget(cases: list[str]) -> int:
    """Tokens of a micro-batch: TOKENS_PER_MICRO_BATCH, or the longest sequence."""
    return max(TOKENS_PER_MICRO_BATCH, *(CASES[case][0] + CASES[case][1] for case in cases))


def batch(case: str, tokens: int):
    """Rollouts with rewards, and advantages [B]; the same on both sides."""
    from rlattn.estimators.grpo import group_relative
    from rlattn.problem import Problem
    from rlattn.types import Rollouts

    prompt, longest, shortest, count = CASES[case]
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    lengths[0] = longest
    total = int((lengths + prompt).sum())
    rewards, groups = torch.rand(count, generator=generator), torch.arange(count) // 2
    rollouts = Rollouts(
        token_ids=torch.randint(0, tokens, (total,), generator=generator),
        cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int64), (lengths + prompt).cumsum(0)]),
        prompt_lengths=torch.full((count,), prompt),
        sampled_logps=torch.zeros(total),
        group_ids=groups,
        truncated=torch.zeros(count, dtype=torch.bool),
        policy_version=torch.zeros(count, dtype=torch.int64),
        rewards=rewards,
        texts=[""] * count,
        problems=[Problem(str(i), "", None) for i in range(count)],
        reward_parts={},
    )
    return rollouts, group_relative(rewards, groups, "group")[0]


def timed(call, device, peak):
    """Median seconds of RUNS calls after one to warm up, and the most memory of these, GiB."""
    call()
    peak()
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "gib": peak() / 2**30}


def ours(model: str, shape: str, cases: list[str], device: str, write, zero: dict) -> None:
    import ray

    from rlattn.config import RunConfig
    from rlattn.rollout.cluster import reserve, start_ray
    from rlattn.rollout.placement import plan
    from rlattn.trainers.policy import Policy

    longest = max(CASES[case][1] for case in cases)
    config = RunConfig.model_validate(
        {
            "model": {"path": model, "dtype": "bfloat16" if device == "cuda" else "float32"},
            "rollout": {"max_prompt_length": 128, "max_completion_length": longest, "num_generations": 2},
            "policy": {
                "gpus_per_rank": 0.5
                if device == "cuda"
                else 0,  # the plan seats an engine beside it, which is not started
                "cpus_per_rank": 4 if device == "cuda" else 1,
                "gradient_checkpointing": True,
                "tokens_per_micro_batch": budget(cases),
                # 4B: fp32 gradients beside fp32 master weights and moments do not fit an H100
                "deepspeed": {"zero_optimization": zero}
                | ({"data_types": {"grad_accum_dtype": "bf16"}} if shape == "4b" else {}),
            },
            "trainer": {"prompts_per_step": 1},
            "ray": {"placement": "colocate"},
        }
    )
    layout = plan(config)
    start_ray(config, layout)
    group = reserve(config, layout)
    policy = Policy(config, layout, group)
    policy.load(model, model, None)
    batches = {case: batch(case, vocabulary(shape)) for case in cases}
    starting = {case: policy.score(rollouts) for case, (rollouts, _) in batches.items()}  # before anything is learned
    for case, (rollouts, advantage) in batches.items():
        shaped = advantage[rollouts.sequence_ids]
        scores = policy.score(rollouts)
        first = policy.update(rollouts, scores, shaped, 0)
        checks = {
            "logps": starting[case].logps[rollouts.response_mask].tolist(),
            "loss": first["loss"],
            "grad_norm": first["grad_norm"],
        }
        scoring = timed(lambda r=rollouts: policy.score(r), device, policy.peak_memory)
        updating = timed(lambda r=rollouts, s=scores, a=shaped: policy.update(r, s, a, 0), device, policy.peak_memory)
        write(case, {"tokens": len(rollouts.token_ids), "score": scoring, "update": updating}, checks)
    ray.shutdown()


def padded(rows, side):
    width = max(len(row) for row in rows)
    ids, mask = torch.zeros(len(rows), width, dtype=torch.int64), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, where], mask[i, where] = row, 1
    return ids, mask


def theirs(model: str, shape: str, cases: list[str], device: str, write, dtype: str) -> None:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    words = {f"w{i}": i for i in range(50)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), eos_token="w1", pad_token="w2"
    )
    gpu = device == "cuda"
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=not gpu,
        bf16=gpu,
        model_init_kwargs={"dtype": dtype},
        gradient_checkpointing=True,
        report_to=[],
        max_completion_length=max(CASES[case][1] for case in cases),
        num_generations=2,
        per_device_train_batch_size=2,
        beta=0.0,
        loss_type="grpo",
        learning_rate=1e-6,
        max_grad_norm=1.0,
    )
    data = Dataset.from_list([{"prompt": "w3"}] * 4)
    trainer = GRPOTrainer(
        model, reward_funcs=lambda completions, **_: [0.0], args=args, train_dataset=data, processing_class=tokenizer
    )
    trainer.create_optimizer()
    network, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1
    if args.gradient_checkpointing:
        network.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs or {"use_reentrant": False})

    def peak() -> int:
        if not gpu:
            return 0
        most = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return most

    prepared = {case: _padded_case(trainer, network, case, shape, device, exact=dtype == "float32") for case in cases}
    for case, (inputs, score, pieces, checks) in prepared.items():
        old = score()

        def update(inputs=inputs, old=old, pieces=pieces):
            network.train()
            whole, total = inputs | {"old_per_token_logps": old}, 0.0
            for piece in pieces:
                part = {name: tensor[piece] if tensor.ndim else tensor for name, tensor in whole.items()}
                share = len(part["advantages"]) / len(whole["advantages"])
                loss = trainer._compute_loss(network, part) * share
                trainer.accelerator.backward(loss)
                total += loss.item()
            norm = trainer.accelerator.clip_grad_norm_(network.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            return total, float(norm)

        checks["loss"], checks["grad_norm"] = update()
        scoring, updating = timed(score, device, peak), timed(update, device, peak)
        tokens = int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        write(case, {"tokens": tokens, "score": scoring, "update": updating}, checks)


def _padded_case(trainer, network, case, shape, device, *, exact):
    """A case as TRL has it: its inputs, what scores them, its micro-batches, and its log-probs before any update."""
    rollouts, advantage = batch(case, vocabulary(shape))
    begins, ends = rollouts.cu_seqlens[:-1].tolist(), rollouts.cu_seqlens[1:].tolist()
    starts = (rollouts.cu_seqlens[:-1] + rollouts.prompt_lengths).tolist()
    prompt_ids, prompt_mask = padded([rollouts.token_ids[a:b] for a, b in zip(begins, starts, strict=True)], "left")
    completions = [rollouts.token_ids[a:b] for a, b in zip(starts, ends, strict=True)]
    completion_ids, completion_mask = padded(completions, "right")
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": advantage,
        "num_items_in_batch": completion_mask.sum(),
    }
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    width = completion_ids.shape[1]
    rows = max(1, budget([case]) // (prompt_ids.shape[1] + width))  # padded tokens count
    pieces = [slice(i, i + rows) for i in range(0, len(begins), rows)]
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)

    def score():
        network.eval()
        with torch.no_grad():
            return trainer._get_per_token_logps_and_entropies(network, ids, mask, width, rows)[0]

    checks = {"logps": score()[inputs["completion_mask"].bool()].tolist()}
    if exact:  # the first sequence by a plain fp32 forward, whose attention torch writes out as maps
        tokens, start = rollouts.token_ids[begins[0] : ends[0]][:EXACT_TOKENS].to(device), starts[0]
        with torch.no_grad(), torch.autocast(device, enabled=False):
            base = trainer.accelerator.unwrap_model(network).eval()
            hidden = base.get_decoder()(input_ids=tokens[None]).last_hidden_state[0, start - 1 : -1]
            parts = zip(hidden.split(512), tokens[start:].split(512), strict=True)
            tables = (base.lm_head(rows).float().log_softmax(-1).gather(1, own[:, None])[:, 0] for rows, own in parts)
            checks["reference"] = torch.cat(list(tables)).tolist()
    return inputs, score, pieces, checks


def agreement(sides: dict[str, dict]) -> dict:
    """How far the sides' first scores and updates are apart.

    `equal`: our log-probs are no further from those of an fp32 forward than those of TRL's bf16 weights (a tenth for
    chance), gradient norms differ by less than 1% from either's, and losses by less than 1e-3.
    """
    exact = torch.tensor(sides["theirs"]["reference"])
    errors = {
        name: (torch.tensor(side["logps"])[: len(exact)] - exact).abs().mean().item() for name, side in sides.items()
    }
    found: dict = {"logps_error_against_fp32": errors}
    for name in ("loss", "grad_norm"):
        found[name] = {side: values[name] for side, values in sides.items()}
    own, others = sides["ours"], [sides["theirs"], sides["theirs-bf16"]]
    found["equal"] = errors["ours"] < 1.1 * errors["theirs-bf16"] and all(
        abs(own["grad_norm"] / other["grad_norm"] - 1) < 0.01 and abs(own["loss"] - other["loss"]) < 1e-3
        for other in others
    )
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", default=["0.6b", "4b"], choices=SHAPES)
    parser.add_argument("--cases", nargs="+", default=None, choices=CASES)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/policy_vs_trl.json"))
    parser.add_argument("--sides", nargs="+", default=SIDES, choices=SIDES)
    parser.add_argument("--zero", type=json.loads, default={"stage": 1}, help="our zero_optimization block")
    parser.add_argument("--side", choices=SIDES, help="(what a child runs)")
    parser.add_argument("--model")
    args = parser.parse_args()
    device = DEVICE
    if args.side:
        (shape,) = args.shapes

        def write(case: str, measured: dict, checks: dict) -> None:
            args.out.mkdir(parents=True, exist_ok=True)
            (args.out / f"{case}-{args.side}.json").write_text(json.dumps({"measured": measured, "checks": checks}))

        if args.side == "ours":
            return ours(args.model, shape, args.cases, device, write, args.zero)
        dtype = "bfloat16" if args.side == "theirs-bf16" else "float32"
        return theirs(args.model, shape, args.cases, device, write, dtype)

    from rlattn.versions import installed_versions

    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    packages = installed_versions(["torch", "transformers", "trl", "deepspeed", "ray", "triton"])
    result: dict = {"device": name, "versions": packages, "runs": RUNS, "zero": args.zero, "cases": {}}
    for shape in args.shapes:
        cases = args.cases or (["tiny"] if shape == "tiny" else [case for case in CASES if case not in ASKED_FOR])
        with tempfile.TemporaryDirectory() as folder:
            save_model(shape, folder)
            for side in args.sides:
                command = [sys.executable, "-P", __file__, "--side", side, "--shapes", shape, "--model", folder]
                command += ["--out", f"{folder}/out", "--zero", json.dumps(args.zero), "--cases", *cases]
                done = subprocess.run(command, env=os.environ | {"PYTHONWARNINGS": "ignore"}, timeout=900)
                if done.returncode:
                    print(f"{shape} {side}: failed with {done.returncode}", file=sys.stderr)
            for case in cases:
                found = {side: Path(folder, "out", f"{case}-{side}.json") for side in SIDES}
                sides = {side: json.loads(path.read_text()) for side, path in found.items() if path.exists()}
                line: dict = {side: both["measured"] for side, both in sides.items()}
                for own in line.values():
                    for phase in ("score", "update"):
                        own[phase]["tokens_per_second"] = own["tokens"] / own[phase]["seconds"]
                if len(sides) == len(SIDES):
                    line["agreement"] = agreement({side: both["checks"] for side, both in sides.items()})
                    line["speedup"] = {
                        side: {p: line[side][p]["seconds"] / line["ours"][p]["seconds"] for p in ("score", "update")}
                        for side in SIDES[1:]
                    }
                result["cases"][f"{shape} {case}"] = line
                print(shape, case, json.dumps(line))
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
