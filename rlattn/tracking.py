"""What a run writes down as it goes: `metrics.jsonl` and `completions.jsonl`, and TensorBoard, W&B, trackio on request.

A line is one JSON object, appended whole by one write, its floats unrounded. A number that is not finite is written as
`null`: strict JSON has neither NaN nor infinity, and readers get `None`. A process killed in the middle of a write
leaves at most a line without its newline, which reading and resuming drop.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

METRICS, COMPLETIONS = "metrics.jsonl", "completions.jsonl"


class TrackingError(RuntimeError):
    """Something could not be recorded or read back; the message is one line that says what to do."""


@dataclass(frozen=True)
class CompletionRecord:
    """One completion with what attention and the strategy said about its tokens (n of them).

    Attributes:
        prompt: exact text the model saw.
        problem_id: `Problem.id`.
        reward: total reward.
        advantage: the sequence's advantage, before credit shapes it.
        truncated: stopped by `max_completion_length`.
        tokens: n pieces of text; joined, they read as the completion.
        waad: n values [Li 2026, eq. 9], tokens.
        fai: n values [Li 2026, eq. 10], attention mass.
        gamma: n factors on the advantage.
        entropy: n predictive entropies, nats.
        policy_version: optimizer version of the weights that sampled it.
    """

    prompt: str
    problem_id: str
    reward: float
    advantage: float
    truncated: bool
    tokens: list[str]
    waad: list[float]
    fai: list[float]
    gamma: list[float]
    entropy: list[float]
    policy_version: int

    def __post_init__(self) -> None:
        for name in ("waad", "fai", "gamma", "entropy"):
            if len(getattr(self, name)) != len(self.tokens):
                raise ValueError(f"{name} has {len(getattr(self, name))} values for {len(self.tokens)} tokens")


@dataclass(frozen=True)
class _Sink:
    log: Callable[[int, dict[str, float]], None]
    close: Callable[[], None]


class Tracker:
    """Records one run in `output_dir`; a context manager.

    Files are opened for each line, so nothing is held between steps. The trackers of `report_to` are looked up here and
    started at the first `log`, after a possible `resume`. W&B and trackio use the project `rlattn`; trackio stays on
    this machine, and so does W&B with `WANDB_MODE=offline`.

    Args:
        output_dir: where the two files go; made if missing.
        report_to: any of tensorboard, wandb, trackio.
        run_name: the run's name in trackers; None means the folder's name.
        config: the resolved configuration, shown by trackers.

    Raises:
        TrackingError: a tracker that is not installed (the message names its extra), or a folder that cannot be made.
        ValueError: a tracker that rlattn does not know.
    """

    def __init__(
        self,
        output_dir: Path,
        report_to: Sequence[str] = (),
        run_name: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        for name in report_to:
            if name not in _SINKS:
                raise ValueError(f"report_to has {name!r}; known: {', '.join(_SINKS)}")
            if find_spec(name) is None:
                raise TrackingError(f"report_to has {name!r}, which is not installed: pip install 'rlattn[{name}]'")
        self.output_dir = Path(output_dir)
        with one_line(self.output_dir):
            self.output_dir.mkdir(parents=True, exist_ok=True)
        self._report_to = list(report_to)
        self._run_name = run_name or self.output_dir.resolve().name
        self._config = config or {}
        self._resumed_at: int | None = None
        self._sinks: list[_Sink] | None = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Append one line of metrics, its keys sorted after `step`, and pass them to the trackers.

        Raises:
            TrackingError: the line could not be written (disk full); the file is then as it was before.
        """
        values = {key: float(metrics[key]) for key in sorted(metrics)}
        _append(self.output_dir / METRICS, [{"step": step, **values}])
        if self._sinks is None:
            self._sinks = [self._start(name) for name in self._report_to]
        for sink in self._sinks:
            sink.log(step, values)

    def log_completions(self, step: int, kind: str, items: Iterable[CompletionRecord]) -> None:
        """Append one line per completion; `kind` says what made them, such as `train` or `eval`.

        Raises:
            TrackingError: the lines could not be written (disk full); the file is then as it was before.
        """
        _append(self.output_dir / COMPLETIONS, [{"step": step, "kind": kind, **asdict(item)} for item in items])

    def resume(self, step: int) -> None:
        """Drop every line after `step`, atomically, so that the files continue as if the run had never stopped.

        To start afresh in a used folder, resume at -1.
        """
        for path in (self.output_dir / METRICS, self.output_dir / COMPLETIONS):
            if path.exists():
                write_atomically(path, b"".join(raw for raw, line in _lines(path) if line["step"] <= step))
        self._resumed_at = step if step >= 0 else None

    def close(self) -> None:
        """Finish the trackers; the files need no closing."""
        for sink in self._sinks or []:
            sink.close()
        self._sinks = None

    def _start(self, name: str) -> _Sink:
        try:
            return _SINKS[name](self.output_dir, self._run_name, self._config, self._resumed_at)
        except Exception as error:  # each tracker has its own exceptions; none may end as a page of traceback
            hint = "; log in with `wandb login`, or set WANDB_MODE=offline" if name == "wandb" else ""
            raise TrackingError(f"{name} did not start: {' '.join(str(error).split())}{hint}") from error


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, in file order; empty where there is none."""
    return [line for _, line in _lines(Path(run_dir) / METRICS)]


def read_completions(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of `completions.jsonl` (`CompletionRecord` fields plus step and kind); empty where there is none."""
    return [line for _, line in _lines(Path(run_dir) / COMPLETIONS)]


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Replace a file's content, or leave it as it was: readers never see a half-written one.

    Unless `durable`, a power cut may lose both.

    Raises:
        TrackingError: it could not be written (disk full, no permission).
    """
    temporary = path.with_name(f".{path.name}.tmp")  # one name: what a kill leaves, the next write replaces
    try:
        with one_line(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _append(path: Path, records: list[dict[str, Any]]) -> None:
    data = b"".join(json.dumps(_finite(r), allow_nan=False).encode() + b"\n" for r in records)
    with one_line(path), open(path, "ab", buffering=0) as file:
        start = file.tell()
        try:
            written = file.write(data)
            if written < len(data):  # a nearly full disk takes what fits; the rest then names the reason
                file.write(data[written:])
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(start)
            raise


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return []
    with one_line(path):
        whole = [raw for raw in path.read_bytes().splitlines(keepends=True) if raw.endswith(b"\n")]
    lines = []
    for number, raw in enumerate(whole, 1):
        try:
            line = json.loads(raw)
            lines.append((raw, {"step": int(line["step"]), **line}))
        except (ValueError, KeyError, TypeError):
            raise TrackingError(f"{path} line {number} is damaged; delete that line to go on") from None
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value


@contextlib.contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Turn what goes wrong with a file inside into a TrackingError of one line that names it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise TrackingError(f"cannot use {path}: {reason}; free disk space or check permissions") from None


def _tensorboard(output_dir: Path, run_name: str, config: dict[str, Any], resumed_at: int | None) -> _Sink:
    from torch.utils.tensorboard import SummaryWriter

    purge = None if resumed_at is None else resumed_at + 1
    writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=purge)
    writer.add_text("config", f"```\n{json.dumps(config, indent=2, default=str)}\n```")

    def log(step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    return _Sink(log, writer.close)


def _wandb(output_dir: Path, run_name: str, config: dict[str, Any], resumed_at: int | None) -> _Sink:
    import wandb

    settings = wandb.Settings(console="off")  # capturing the terminal would garble the progress display
    # "auto" continues the run that was cut off in this folder, if there is one
    run = wandb.init(
        project="rlattn", name=run_name, dir=str(output_dir), config=config, resume="auto", settings=settings
    )
    return _Sink(lambda step, metrics: run.log(metrics, step=step), run.finish)


def _trackio(output_dir: Path, run_name: str, config: dict[str, Any], resumed_at: int | None) -> _Sink:
    import trackio

    resume = "never" if resumed_at is None else "allow"
    trackio.init(project="rlattn", name=run_name, config=config, resume=resume)
    return _Sink(lambda step, metrics: trackio.log(metrics, step=step), trackio.finish)


_SINKS: dict[str, Callable[[Path, str, dict[str, Any], int | None], _Sink]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
