"""A learner's configuration from a preset and a few changes."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import msgspec

from embodied.contracts.errors import ConfigError, suggest

T = TypeVar("T")
# What `configure` accepts in a field of this type.
Count = Annotated[int, msgspec.Meta(ge=1)]
WholeNumber = Annotated[int, msgspec.Meta(ge=0)]
Sizes = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]
Positive = Annotated[float, msgspec.Meta(gt=0)]
Nonnegative = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


def configure(presets: Mapping[str, T], preset: str, changes: Mapping[str, Any], where: str) -> T:
    """The preset's frozen dataclass with some fields changed.

    Args:
        changes: field -> value; a tuple may be given as text, `128,128`, or as one number.
        where: opens every error's message, for example `train iql`.

    Raises:
        ConfigError: unknown preset or field (with a suggestion), or a value of the wrong type or out of range.
    """
    if preset not in presets:
        raise ConfigError(f"{where}: there is no preset '{preset}'.{suggest(preset, presets)}")
    base: Any = presets[preset]
    values = {field.name: getattr(base, field.name) for field in dataclasses.fields(base)}
    for name, value in changes.items():
        if name not in values:
            raise ConfigError(f"{where}: unknown setting '{name}'.{suggest(name, values)}")
        if isinstance(values[name], tuple) and isinstance(value, str | int | float):
            value = [part.strip() for part in str(value).strip("()[] ").split(",") if part.strip()]
        values[name] = value
    # strict=False reads numbers from text, which is how a tuple's parts arrive.
    for name, value in values.items():
        try:
            kind = type(base).__annotations__[name]
            values[name] = value if dataclasses.is_dataclass(value) else msgspec.convert(value, kind, strict=False)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}: setting '{name}': {error}.") from None
    return type(base)(**values)
