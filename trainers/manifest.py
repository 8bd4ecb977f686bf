"""Proof that a checkpoint's files are those that were written: sizes and checksums in `manifest.json`."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_manifest(folder: Path) -> None:
    """Write size (bytes) and SHA-256 of every file under `folder` to its manifest."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    names = [name for name in names if name != MANIFEST]
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter to others
        entries = dict(zip(names, pool.map(lambda name: _entry(folder / name), names), strict=True))
    (folder / MANIFEST).write_text(json.dumps(entries, indent=1))


def damage(folder: Path) -> str | None:
    """What is wrong with a folder, beginning with the file's name; None where every file is as it was written."""
    try:
        entries = json.loads((folder / MANIFEST).read_text())
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in entries.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _fault(folder / name, *expected[name]), expected)
        return next((f"{name} {fault}" for name, fault in zip(expected, found, strict=True) if fault), None)


def _fault(path: Path, size: int, digest: str) -> str | None:
    try:
        if (now := path.stat().st_size) != size:
            return f"has {now} bytes instead of {size}"
        return None if _entry(path)["sha256"] == digest else "has another SHA-256 than when it was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _entry(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
