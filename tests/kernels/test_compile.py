"""The Triton kernels compile for Hopper, in 16 bits without spilling registers, on a machine that has no GPU."""

from __future__ import annotations

import importlib
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
compiler = pytest.importorskip("triton.compiler")
backends = pytest.importorskip("triton.backends.compiler")

SHARED = {"SLIDING_WINDOW": 0, "HAS_SOFTCAP": False, "HAS_SINKS": False}
ELEMENT = {"bf16": 2, "fp32": 4}


def compiled(kernel, constants, inputs, warps, stages, registers=None):
    """As a launch with aligned pointers and strides would compile it."""
    kinds = {"q": inputs, "k": inputs, "sinks": inputs, "lse": "*fp32", "kept_lse": "*fp32"}
    kinds |= {"first_key": "*i32", "keys_counted": "*i32", "rows_counted": "*i32"}
    kinds |= {"scale": "fp32", "softcap": "fp32", "tokens": "i32"}
    kinds |= {name: "*fp32" for name in kernel.arg_names if name.endswith("_out")}
    kinds |= {name: "i32" for name in kernel.arg_names if name.startswith("stride")}
    signature = {name: "constexpr" if name in constants else kinds[name] for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*") or name.startswith("stride")
    }
    source = compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton.compile(
        source,
        target=backends.GPUTarget("cuda", 90, 32),
        options={"num_warps": warps, "num_stages": stages, "maxnreg": registers},
    )


def local_memory_accesses(cubin: bytes, folder: Path) -> int:
    binary = folder / "kernel.cubin"
    binary.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    listing = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True, timeout=120).stdout
    return listing.count(" LDL") + listing.count(" STL")


@pytest.mark.parametrize(("kind", "dim"), [("bf16", 64), ("bf16", 128), ("bf16", 256), ("fp32", 128)])
@pytest.mark.parametrize("name", ["full", "band"])
def test_kernel_compiles(name, kind, dim, tmp_path):
    module = importlib.import_module(f"rlattn.kernels.{name}")
    rows, keys, *launch = module._tile(dim, ELEMENT[kind])
    constants = SHARED | {"GROUP": 4, "DIM": dim, "BLOCK_D": dim, "N": keys}
    if name == "full":
        constants |= {"M": rows, "LANES": module.LANES, "SINK_TOKENS": 0}
    else:
        constants |= {"HEADS": 4, "STEP": rows // 4, "NEAR": 32, "NEAR_TILES": 1, "WAAD_WINDOW": 10, "FAI_LOW": 10}
        constants |= {"HAS_KEPT_LSE": False}
    kernel = compiled(getattr(module, f"{name}_kernel"), constants, f"*{kind}", *launch)
    if kind == "bf16":
        assert "wgmma" in kernel.asm["ptx"]  # Hopper's own matrix instructions
        assert local_memory_accesses(kernel.asm["cubin"], tmp_path) == 0
