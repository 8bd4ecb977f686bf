"""From YAML and overrides to a validated tree, with errors that name the key."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

import rlattn
from rlattn.config.run import FREE, RunConfig
from rlattn.config.section import ConfigError

Schema = TypeVar("Schema", bound=BaseModel)


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML config, apply `a.b=value` overrides (values parsed as YAML) and validate.

    A bare name such as `quickstart` means the shipped `rlattn.configs` file of that name.

    Raises:
        ConfigError: one line a problem, each naming the key, its value and what would be accepted.
    """
    return validate(RunConfig, read_tree(path, overrides))


def read_tree(path: str | Path, overrides: list[str] | None = None, shelf: str = "") -> dict[str, Any]:
    """The sections of a YAML file, or of the shipped one of that name, with `a.b=value` overrides; not validated.

    `shelf` is the folder of `rlattn.configs` where shipped files of the kind are.

    Raises:
        ConfigError: no such file, not a YAML mapping, or a malformed override.
    """
    source = _find(path, shelf)
    try:
        tree = yaml.safe_load(source.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{source} must hold a mapping of sections, not {type(tree).__name__}")
    for item in overrides or []:
        override(tree, item)
    return tree


def validate(schema: type[Schema], tree: dict[str, Any]) -> Schema:
    """What a tree of sections describes: a `RunConfig`, or any other schema.

    Raises:
        ConfigError: one line a problem, each naming the key, its value and what would be accepted.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(describe(schema, item) for item in error.errors())) from None


def describe(root: type[BaseModel], error: Any) -> str:
    """One pydantic error as a line that names the key, the value and what would be accepted."""
    path = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key `{path}`{_nearest(root, error['loc'])}"
    message = error["msg"].removeprefix("Value error, ")
    if not path:
        return message
    return f"`{path}` = {error['input']!r}: {message[0].lower()}{message[1:]}"


def differences(old: Any, new: Any, free: tuple[str, ...] = FREE, prefix: str = "") -> Iterator[str]:
    """Each key whose value differs between two trees of sections, but time-outs and those that begin with a `free`."""
    for key in sorted(old.keys() | new.keys()):
        path = f"{prefix}{key}"
        if path.startswith(free) or path.endswith("timeout_s"):
            continue
        was, now = old.get(key), new.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from differences(was, now, free, f"{path}.")
        elif was != now:
            yield f"{path} was {was!r}, now {now!r}"


def override(tree: dict[str, Any], item: str) -> None:
    """Set one `a.b=value` (the value parsed as YAML) in a tree of sections.

    Raises:
        ConfigError: not of that form.
    """
    key, equals, text = item.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {item!r} is not of the form key=value, such as credit.top_q=0.2")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {item!r}: `{section}` is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {item!r}: {' '.join(str(error).split())}") from None


def _find(path: str | Path, shelf: str) -> Path:
    beside = Path(rlattn.__file__).parent / "configs"
    shipped = beside if beside.is_dir() else _configs_folder()
    shipped /= shelf
    for candidate in (Path(path), shipped / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    names = sorted(p.stem for p in shipped.glob("*.yaml"))
    raise ConfigError(f"no config file at {str(path)!r}; give a YAML file or a shipped name ({', '.join(names)})")


def _configs_folder() -> Path:
    from rlattn import configs

    return Path(configs.__path__[0])


def _nearest(root: type[BaseModel], loc: tuple[str | int, ...]) -> str:
    section: Any = root
    for part in loc[:-1]:
        section = section.model_fields[part].annotation
    known = list(section.model_fields)
    everywhere = _all_keys(root)
    close = difflib.get_close_matches(str(loc[-1]), known, n=1, cutoff=0.6)
    prefix = ".".join(str(p) for p in loc[:-1])
    if close:
        return f"; did you mean `{prefix + '.' if prefix else ''}{close[0]}`?"
    elsewhere = difflib.get_close_matches(str(loc[-1]), list(everywhere), n=1, cutoff=0.75)
    if elsewhere:
        return f"; did you mean `{everywhere[elsewhere[0]]}`?"
    return f"; known here: {', '.join(sorted(known))}"


def _all_keys(root: type[BaseModel], prefix: str = "") -> dict[str, str]:
    keys: dict[str, str] = {}
    for name, field in root.model_fields.items():
        keys.setdefault(name, prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            for inner, path in _all_keys(field.annotation, f"{prefix}{name}.").items():
                keys.setdefault(inner, path)
    return keys
