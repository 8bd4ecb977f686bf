"""This very code as a wheel, so that what runs here runs there."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

from rlattn.config import ConfigError

BUILD_S = 120.0


def build_wheel(folder: Path) -> Path:
    """A wheel of the rlattn that runs here, written into `folder`: built from its source tree, or as installed.

    Raises:
        ConfigError: it cannot be built; says why.
    """
    try:
        installed = distribution("rlattn")
    except PackageNotFoundError:
        raise ConfigError(
            "rlattn is not installed here, so there is nothing to build from; give --wheel FILE"
        ) from None
    source = source_tree(installed)
    return _from_source(source, folder) if source else _as_installed(installed, folder)


def unpack(wheel: Path, folder: Path) -> None:
    """A wheel's packages into `folder`, from where they can be imported.

    Raises:
        ConfigError: `wheel` is no wheel of rlattn.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            if "rlattn/__init__.py" not in archive.namelist():
                raise ConfigError(f"{wheel} is not a wheel of rlattn")
            archive.extractall(folder)
    except (OSError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{wheel} is not a wheel that can be read: {error}") from None


def source_tree(installed: Distribution) -> Path | None:
    """Where an editable installation has its sources; None for one that is a copy of them."""
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if not origin.get("dir_info", {}).get("editable"):
        return None
    return Path(unquote(urlparse(origin["url"]).path))


def _from_source(source: Path, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    built = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(source)], capture_output=True, text=True, timeout=BUILD_S
    )
    found = list(folder.glob("rlattn-*.whl"))
    if built.returncode or len(found) != 1:
        said = built.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise ConfigError(f"no wheel could be built of {source}: {said[0]}; give --wheel FILE")
    return found[0]


def _as_installed(installed: Distribution, folder: Path) -> Path:
    wheel = folder / f"rlattn-{installed.version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in installed.files or []:
            if file.parts[0].startswith("rlattn") and "__pycache__" not in file.parts:
                archive.write(Path(str(file.locate())), str(file))
    return wheel
