"""Judging in processes that can be ended: a bound on the time and the memory of each completion.

Each process has a socket of its own and answers completion by completion, so the driver knows which one a process hangs
on or dies of: that one is lost and no other is judged twice. Processes are bare interpreters, not `multiprocessing`
ones: those run the driver's `__main__` again. Linux only.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import pickle
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from rlattn.problem import Verdict, Verifier

if TYPE_CHECKING:
    from rlattn.tasks import Task

BATCH = 8  # completions sent at once, so that a process need not wait for the driver after each
BATCH_CHARACTERS = 1_000_000  # a longer completion goes alone
START_S = 120.0  # seconds to start a process, send it a batch and load the verifier; ends only what is stuck for good
OUT_OF_MEMORY = 86  # exit status of a process that met its memory bound

Pair = tuple[Any, str]
"""What a verifier takes: (problem.answer, completion)."""


class VerifierPool:
    """Worker processes that judge completions; they start at first use and are kept until `close`.

    n completions that all hang take at most (n / workers + 1) * (timeout_s + a restart, some 0.1 s and the verifier's
    imports); ones that stay just inside the bound, BATCH * timeout_s more. Use from one thread at a time.

    Args:
        workers: processes at most; by default one for each core that this process may use.
        timeout_s: seconds of wall clock for one completion, counted once the verifier is loaded.
        memory_mib: MiB of address space that a process may add to the bare interpreter, verifier and imports included.

    Raises:
        ValueError: an argument that is not positive.
    """

    def __init__(self, workers: int | None = None, *, timeout_s: float = 5.0, memory_mib: int = 2048) -> None:
        self.workers = len(os.sched_getaffinity(0)) if workers is None else workers
        self.timeout_s, self.memory_mib = timeout_s, memory_mib
        for name in ("workers", "timeout_s", "memory_mib"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be positive and finite")
        self._processes: list[_Process] = []

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes at once. The pool may be used again: it starts new ones."""
        while self._processes:
            self._end(self._processes[-1])

    def judge(
        self, verifier: Verifier, pairs: Sequence[Pair], progress: Callable[[], None] | None = None
    ) -> list[Verdict]:
        """Verdicts in the order of `pairs`, which reach the verifier whole, however long they are.

        A completion that exceeds a bound, ends its process or makes the verifier raise is wrong; `reason` says what
        happened. `progress` is called after each verdict. Whatever is raised, Ctrl-C included, ends the processes.

        Raises:
            ValueError: a worker process cannot import the verifier, as when it is a lambda or defined in a script.
            RuntimeError: a process did not get as far as loading it.
        """
        try:
            pickled = pickle.dumps(verifier)
        except Exception as error:
            raise ValueError(_not_importable(error)) from None
        verdicts: dict[int, Verdict] = {}
        waiting = deque(range(len(pairs)))
        try:
            while len(verdicts) < len(pairs):
                self._hand_out(pickled, pairs, waiting)
                for index, verdict in self._collect(pairs, waiting):
                    verdicts[index] = verdict
                    if progress:
                        progress()
        except BaseException:
            self.close()
            raise
        return [verdicts[index] for index in range(len(pairs))]

    def _hand_out(self, pickled: bytes, pairs: Sequence[Pair], waiting: deque[int]) -> None:
        for process in [p for p in self._processes if not p.pending and p.popen.poll() is not None]:
            self._end(process)  # something else ended it, between two calls
        idle = [process for process in self._processes if not process.pending]
        while waiting and (idle or len(self._processes) < self.workers):
            if not idle:
                self._processes.append(_Process(self.memory_mib))
                idle.append(self._processes[-1])
            size = min(BATCH, max(1, len(waiting) // (2 * self.workers)))  # small at the end: all stay busy
            batch = [waiting.popleft()]
            room = BATCH_CHARACTERS - len(pairs[batch[0]][1])
            while len(batch) < size and (room := room - len(pairs[waiting[0]][1])) >= 0:
                batch.append(waiting.popleft())
            idle.pop().send(pickled, batch, [pairs[index] for index in batch])

    def _collect(self, pairs: Sequence[Pair], waiting: deque[int]) -> Iterator[tuple[int, Verdict]]:
        """Wait for a message or for the next deadline; the indices of `pairs` that now have a verdict."""
        busy = [process for process in self._processes if process.pending]
        timeout = min(process.deadline for process in busy) - time.monotonic()
        readable = wait([process.connection for process in busy], max(0.0, timeout))
        now = time.monotonic()
        for process in busy:
            reason = None
            if process.connection in readable:
                try:
                    message = process.connection.recv()
                except (EOFError, OSError):
                    reason = self._death(process)
                else:
                    if isinstance(message, str):
                        raise ValueError(message)
                    process.loaded, process.deadline = True, time.monotonic() + self.timeout_s
                    if message is not None:
                        yield process.pending.popleft(), message
            elif now >= process.deadline:
                if not process.loaded:
                    raise RuntimeError(f"a verifier process was not ready after {START_S:g} s")
                reason = f"verifier ran over {self.timeout_s:g} s"
            if reason is not None:
                self._end(process)
                guilty = process.pending.popleft()
                waiting.extendleft(process.pending)
                yield guilty, _failure(pairs[guilty][0], reason)

    def _death(self, process: _Process) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):  # its socket closes shortly before it has ended
            process.popen.wait(1.0)
        status = process.popen.poll()
        if status == OUT_OF_MEMORY:
            return f"verifier ran out of {self.memory_mib} MiB"
        how = signal.strsignal(-status) if status is not None and status < 0 else f"exit status {status}"
        if not process.loaded:
            raise RuntimeError(f"a verifier process ended before it judged anything: {how}")
        return f"verifier died: {how}"

    def _end(self, process: _Process) -> None:
        self._processes.remove(process)
        process.popen.kill()
        process.connection.close()
        process.popen.communicate(timeout=10)


class _Process:
    """A worker process as the driver sees it; `pending` are the completions it has, in the order it judges them."""

    def __init__(self, memory_mib: int) -> None:
        ours, theirs = socket.socketpair()
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
            ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(START_S), 0))
        program = f"import sys; sys.path[:] = {sys.path!r}; import {__name__} as pool; pool.serve(*sys.argv[1:])"
        command = [sys.executable, "-P", "-c", program, str(theirs.fileno()), str(memory_mib)]
        with theirs:
            self.popen = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # never written to: see `_end_with_driver`
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                process_group=0,  # Ctrl-C in the terminal is for the driver alone
            )
        self.connection = Connection(ours.detach())
        self.pending: deque[int] = deque()
        self.loaded = False
        self.deadline = math.inf

    def send(self, pickled: bytes, batch: list[int], pairs: list[Pair]) -> None:
        self.pending.extend(batch)
        self.loaded, self.deadline = False, time.monotonic() + START_S
        with contextlib.suppress(OSError):  # it has ended, which shows when its answer is read
            self.connection.send((sys.path, pickled, pairs))


def judge_all(task: Task, pairs: Sequence[Pair], pool: VerifierPool) -> list[Verdict]:
    """Verdicts of the task's verifier in the order of `pairs`: here if it bounds itself, else in `pool`."""
    if task.bounded:
        return [task.verifier(answer, completion) for answer, completion in pairs]
    return pool.judge(task.verifier, pairs)


def serve(descriptor: str, memory_mib: str) -> None:
    """The life of a worker process: a verifier and a batch in; None once that is loaded, then each verdict out."""
    _end_with_driver()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # whoever sends it to all of a run's processes means the driver
    _bound_memory(int(memory_mib) * 2**20)
    connection = Connection(int(descriptor))
    loaded = None
    try:
        while True:
            path, pickled, pairs = connection.recv()
            if pickled != loaded:
                sys.path[:] = path  # it may have grown since this process started
                try:
                    verifier = pickle.loads(pickled)
                except Exception as error:
                    connection.send(_not_importable(error))
                    continue
                loaded = pickled
            connection.send(None)
            for answer, completion in pairs:
                connection.send_bytes(_judge(verifier, answer, completion))
    except MemoryError:
        os._exit(OUT_OF_MEMORY)
    except (EOFError, ConnectionError):
        return  # the driver has closed the pool


def _judge(verifier: Verifier, answer: Any, completion: str) -> bytes:
    try:
        verdict = verifier(answer, completion)
        if not isinstance(verdict, Verdict):
            raise TypeError(f"returned {type(verdict).__name__}, not Verdict")
        return pickle.dumps(verdict)
    except MemoryError:
        raise
    except BaseException as error:  # SystemExit too
        return pickle.dumps(_failure(answer, f"verifier raised {_describe(error)}"))


def _failure(answer: Any, reason: str) -> Verdict:
    return Verdict(right=False, extracted=None, normalised=None, gold=str(answer), reason=reason)


def _not_importable(error: Exception) -> str:
    return f"no worker process can import the verifier; define it as a function of a module. {_describe(error)}"


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _end_with_driver() -> None:
    # The kernel signals the other end of a pipe when the driver is gone, however it went and whatever this process is
    # doing; SIGIO ends a process unless it is handled. (PR_SET_PDEATHSIG would go by the thread that started it.)
    fcntl.fcntl(0, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(0, fcntl.F_SETFL, fcntl.fcntl(0, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([0], [], [], 0)[0]:
        sys.exit(0)  # gone already


def _bound_memory(extra: int) -> None:
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    limit = used + extra if hard == resource.RLIM_INFINITY else min(used + extra, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # writing out a crashed process takes long
