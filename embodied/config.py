"""Fill a frozen dataclass from YAML or JSON: unknown keys and wrong types are errors that say what would be right."""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from embodied.contracts.errors import ConfigError, InputError, suggest

T = TypeVar("T")
Setting = int | float | bool | str  # a value of a learner's own configuration, as YAML and command line give it


def check_keys(data: Mapping[str, Any], valid: set[str], where: str) -> None:
    """Raise ConfigError naming the first key of `data` that is not in `valid`."""
    for key in data:
        if key not in valid:
            raise ConfigError(f"{where}: unknown key '{key}'.{suggest(str(key), valid)}")


def fill(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """An instance of the dataclass `kind` with the values of `data`; `where` opens every error's message."""
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    check_keys(data, {f.name for f in fields}, where)
    for field in fields:
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and field.name not in data:
            raise ConfigError(f"{where}: the key '{field.name}' is missing.")
    try:
        return msgspec.convert(dict(data), kind, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise msgspec.ValidationError(f"expected {kind.__name__}, got {type(value).__name__} {value!r}")


def check_result_path(path: Path | None) -> None:
    """Raise InputError, or the system's own refusal, where no file can be written; before the work, not after it."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{path} is a folder; name a file to write the result to.")
    path.parent.mkdir(parents=True, exist_ok=True)


def write_result(path: Path, result: Any) -> None:
    """A JSON file, whole or not at all."""
    check_result_path(path)
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_text(json.dumps(result, indent=1))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def to_json(config: Any) -> Any:
    """A dataclass, path, tuple or mapping as plain JSON values."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(k): to_json(v) for k, v in config.items()}
    if isinstance(config, list | tuple):
        return [to_json(v) for v in config]
    return str(config) if isinstance(config, Path) else config


def torch_device(name: str) -> str:
    """`name` if torch can use it; a ConfigError that says what there is otherwise."""
    import torch

    if name == "cuda" and "LOCAL_RANK" in os.environ:  # torchrun: one GPU per process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError):
        here = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        raise ConfigError(f"--device: '{name}' cannot be used here. There is: {', '.join(here)}.") from None
    return name


def plain_lines(value: Mapping[str, Any], indent: str = "") -> list[str]:
    """Nested mappings as indented `key: value` lines; long lists are cut to their length."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict) and item:
            lines += [f"{indent}{key}:", *plain_lines(item, indent + "  ")]
        elif isinstance(item, list) and (len(item) > 12 or any(isinstance(i, dict | list) for i in item)):
            lines.append(f"{indent}{key}: {len(item)} entries")
        elif isinstance(item, list):
            lines.append(f"{indent}{key}: {', '.join(map(_short, item))}")
        else:
            lines.append(f"{indent}{key}: {_short(item)}")
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
