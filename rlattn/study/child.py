"""`rlattn` as a study's child process, which dies with its parent however that ends (Linux).

A run that outlived a killed study would write into its folder beside the one that goes on with it.
"""

import ctypes
import os
import signal
import sys

from rlattn.cli import main

PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when process `parent`, which started it, ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before the call
            sys.exit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    sys.exit(main(sys.argv[2:]))
