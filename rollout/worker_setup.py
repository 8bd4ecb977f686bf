"""Runs first in every Ray worker of a run (Ray's `worker_process_setup_hook`)."""

import os
import sys


def claim_kernels() -> None:
    """Settle what `import kernels` means before Ray puts the driver's working directory on this worker's path.

    Where that directory is rlattn's source tree, its folder `kernels` would stand in for the PyPI package of that name,
    which transformers looks for. The same goes for what the worker starts by `python -m`, as vLLM does to look at a
    model's class that its cache does not know yet.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        import kernels  # noqa: F401
    except ImportError:
        sys.modules["kernels"] = None  # type: ignore[assignment]  # the documented way to say: not importable
