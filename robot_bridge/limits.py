"""What a robot may be asked to do, per joint. A limit that is not stated is refused, never assumed."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, suggest

_KEYS = ("position", "velocity", "acceleration", "jerk", "max_step")


@dataclasses.dataclass(frozen=True)
class Limits:
    """Arrays of shape (J,), in the order of `names`; SI units (a gripper joint is in metres).

    Attributes:
        low, high: position box [rad].
        velocity, acceleration, jerk: magnitudes [rad/s], [rad/s²], [rad/s³], already scaled.
        max_step: how far a command may be from the measured position [rad].
    """

    names: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray
    max_step: np.ndarray

    def clip_position(self, position: np.ndarray) -> np.ndarray:
        """(..., J) inside the box."""
        return np.clip(position, self.low, self.high)

    def narrowed(self, margin: np.ndarray) -> "Limits":
        """The same with `margin` (J,) taken off each end of the position box.

        Raises:
            ConfigError: nothing is left.
        """
        low, high = self.low + margin, self.high - margin
        if (low >= high).any():
            joint = self.names[int(np.argmax(low - high))]
            raise ConfigError(f"position_margin {margin.max():g} leaves joint '{joint}' no range.")
        return dataclasses.replace(self, low=low, high=high)


def read_limits(names: Sequence[str], table: Mapping[str, Mapping[str, Any]], scale: float, source: str) -> Limits:
    """Limits of `names` from a profile's table.

    Args:
        table: joint -> {position: [low, high], velocity, acceleration, jerk, max_step}.
        scale: factor in (0, 1] on velocity, acceleration and jerk, for first runs on a robot.
        source: file name for messages.

    Raises:
        ConfigError: a joint or a limit is missing, unknown, not positive, or the box is empty.
    """
    if not 0 < scale <= 1:
        raise ConfigError(f"{source}: limit scale {scale} must lie in (0, 1].")
    for name in table:
        if name not in names:
            raise ConfigError(f"{source}: limits for '{name}', which is no joint.{suggest(name, names)}")
    rows = []
    for name in names:
        if name not in table:
            raise ConfigError(f"{source}: joint '{name}' has no limits; add {', '.join(_KEYS)}.")
        rows.append(_row(name, table[name], source))
    box, rates = np.array([r[0] for r in rows]), np.array([r[1] for r in rows])
    velocity, acceleration, jerk = rates[:, :3].T * scale
    return Limits(tuple(names), box[:, 0], box[:, 1], velocity, acceleration, jerk, rates[:, 3])


def _row(name: str, entry: Mapping[str, Any], source: str) -> tuple[list[float], list[float]]:
    for key in entry:
        if key not in _KEYS:
            raise ConfigError(f"{source}: unknown limit '{key}' of joint '{name}'.{suggest(key, _KEYS)}")
    for key in _KEYS:
        if key not in entry:
            raise ConfigError(f"{source}: joint '{name}' has no '{key}' limit; the bridge assumes none.")
    try:
        low, high = (float(x) for x in entry["position"])
        rates = [float(entry[key]) for key in _KEYS[1:]]
    except (TypeError, ValueError):
        raise ConfigError(f"{source}: limits of joint '{name}' must be numbers, position: [low, high].") from None
    if not (np.isfinite([low, high, *rates]).all() and low < high and min(rates) > 0):
        raise ConfigError(f"{source}: limits of joint '{name}' must be finite and positive, with low < high.")
    return [low, high], rates
