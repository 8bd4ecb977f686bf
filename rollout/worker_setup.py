"""What every Ray worker of a run does first (Ray's `worker_process_setup_hook`), and before it has children."""

import os
import sys
from pathlib import Path


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


def leave_source_tree() -> None:
    """Take rlattn's source tree off this worker's path, where Ray puts it if it is the driver's working directory.

    Processes that this one starts by `multiprocessing`, as vLLM does for each tensor-parallel rank, get the path but
    not the hook, so to them that tree's `kernels` would be the PyPI package.
    """
    rooms = ("kernels", "rlattn")
    sys.path[:] = [entry for entry in sys.path if not all(Path(entry, room).is_dir() for room in rooms)]
