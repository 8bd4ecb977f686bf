"""Rows of a data set: a local file, or a data set of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rlattn.config import ConfigError, Section

READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


class DataOptions(Section):
    """Options of every task whose problems are read rather than generated."""

    data: Path | None = None
    """Folder with `<task>.jsonl` or `<task>.parquet` to test on; None takes the data set from the Hugging Face hub."""
    train_file: Path | None = None
    """JSON lines or parquet to train on, with the task's own columns; None: the task is only a benchmark."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Only the first so many test problems."""


def read_rows(name: str, hub: str, split: str, data: Path | None, *, subset: str | None = None) -> list[dict[str, Any]]:
    """Rows of `data/name.jsonl` (or `.json`, `.parquet`); without `data`, of a split of the hub's data set `hub`.

    Raises:
        ConfigError: no such file, or one that cannot be read; or the hub is out of reach.
    """
    if data is None:
        return _load(
            f"the data set {hub!r} of the Hugging Face hub (a local folder will do: `data`)", hub, subset, split
        )
    files = [data / f"{name}{suffix}" for suffix in READERS]
    found = next((file for file in files if file.is_file()), None)
    if not data.is_dir():
        raise ConfigError(f"no folder {str(data)!r}; give the one that holds {files[0].name}")
    if found is None:
        raise ConfigError(f"{data} holds no {files[0].name} (nor .json, .parquet)")
    return read_file(found)


def read_file(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines or parquet file.

    Raises:
        ConfigError: no such file, another suffix, or a file that cannot be read.
    """
    if path.suffix not in READERS:
        raise ConfigError(
            f"{path}: cannot read {path.suffix or 'a file without suffix'}; accepted: {', '.join(READERS)}"
        )
    if not path.is_file():
        raise ConfigError(f"{path}: no such file")
    return _load(str(path), READERS[path.suffix], None, "train", data_files=str(path))


def read_hub(name: str, subset: str | None, split: str) -> list[dict[str, Any]]:
    """Rows of a split of a hub's data set.

    Raises:
        ConfigError: there is none, or the hub is out of reach.
    """
    return _load(f"the data set {name!r} of the Hugging Face hub", name, subset, split)


def first_of(row: dict[str, Any], names: tuple[str, ...], where: str) -> Any:
    """The first of the columns `names` that `row` has.

    Raises:
        ConfigError: it has none of them, or it is empty; `where` names the row.
    """
    for name in names:
        if row.get(name) not in (None, "", []):
            return row[name]
    given = ", ".join(f"{name!r}: {str(value)[:40]!r}" for name, value in row.items())
    raise ConfigError(f"{where} has no {' or '.join(f'`{name}`' for name in names)}, or an empty one: {{{given}}}")


def _load(what: str, path: str, subset: str | None, split: str, **files: str) -> list[dict[str, Any]]:
    import datasets  # here: it takes a second to import

    datasets.disable_progress_bars()
    try:
        rows: list[dict[str, Any]] = datasets.load_dataset(path, subset, split=split, **files).to_list()
    except Exception as error:  # the hub, parsers and file systems raise many kinds
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"cannot read {what}: {reason[0]}") from None
    return rows
