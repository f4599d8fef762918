"""What a robot may be asked to do, per joint. A limit that nobody states is refused, never assumed.

Several sources may state the same limit: the profile, a URDF, a joint_limits.yaml. The strictest of them holds, for
each joint and quantity by itself, and every disagreement is said aloud (`Limits.notes`).
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import ConfigError, suggest

QUANTITIES = ("position", "velocity", "acceleration", "jerk", "max_step")
UNITS = {"position": "rad", "velocity": "rad/s", "acceleration": "rad/s²", "jerk": "rad/s³", "max_step": "rad"}
LARGEST = 1e6  # no robot's limit; what is above is a slip
MAX_STEP = 0.1  # [rad]; a bound of the bridge's own, hence the one that has a default


@dataclasses.dataclass(frozen=True)
class LimitSource:
    """What one file states.

    Attributes:
        name: for messages, such as panda.urdf.
        joints: joint -> quantity -> number, or (low, high) for position.
    """

    name: str
    joints: Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Limits:
    """Arrays of shape (J,), in the order of `names`; SI units (a gripper joint may be in metres).

    Attributes:
        low, high: position box after the margin [rad].
        velocity, acceleration, jerk: magnitudes [rad/s], [rad/s²], [rad/s³], already scaled.
        max_step: how far a command may be from the measured position [rad].
        sources: joint -> quantity -> ((source, value as stated there), ...), unscaled and without margin.
        notes: where sources disagree, and which value is used.
    """

    names: tuple[str, ...]
    low: np.ndarray
    high: np.ndarray
    velocity: np.ndarray
    acceleration: np.ndarray
    jerk: np.ndarray
    max_step: np.ndarray
    sources: Mapping[str, Mapping[str, tuple[tuple[str, Any], ...]]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

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
            worst = int(np.argmax(low - high))
            raise ConfigError(
                f"joint '{self.names[worst]}' may move from {self.low[worst]:g} to {self.high[worst]:g};\n"
                f"a position_margin of {margin[worst]:g} at each end leaves nothing. Lower it."
            )
        return dataclasses.replace(self, low=low, high=high)

    def braking(self, velocity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Time [s] and distance [rad] (J,) in which a joint at constant `velocity` (J,) stops, within these limits.

        The deceleration rises and falls at the jerk limit, and is constant between if there is time for it.
        """
        speed = np.abs(velocity)
        ramps = self.acceleration / self.jerk
        time = np.where(
            speed >= self.acceleration * ramps, speed / self.acceleration + ramps, 2 * np.sqrt(speed / self.jerk)
        )
        return time, speed * time / 2  # the profile is symmetric, so the mean velocity is half


def read_limits(
    names: Sequence[str],
    table: Mapping[str, Mapping[str, Any]],
    scale: float,
    source: str,
    others: Sequence[LimitSource] = (),
) -> Limits:
    """Limits of `names` from a profile's table and other sources.

    Args:
        table: joint -> any of {position: [low, high], velocity, acceleration, jerk, max_step}.
        scale: factor in (0, 1] on velocity, acceleration and jerk, for first runs on a robot.
        source: name of the table for messages.
        others: what else states limits; joints may stand there with a prefix more or less (`match_joints`).

    Raises:
        ConfigError: a joint or a limit is missing everywhere, unknown, not positive, or the box is empty.
    """
    if not 0 < scale <= 1:
        raise ConfigError(f"{source}: limit_scale {scale:g} must lie in (0, 1]; limits are never exceeded.")
    for name in table:
        if name not in names:
            raise ConfigError(f"{source}: limits for '{name}', which is no joint.{suggest(str(name), names)}")
    every = [(one, match_joints(names, one.joints)) for one in (*others, LimitSource(source, table))]
    rows, stated, notes = [], {}, []
    for name in names:
        stated[name] = _stated(name, every)
        if not any(stated[name].values()):
            raise ConfigError(f"{source}: joint '{name}' has no limits; add {', '.join(QUANTITIES[:-1])} under limits.")
        row = []
        for quantity in QUANTITIES:
            values = stated[name][quantity]
            if not values:
                value = "[low, high]" if quantity == "position" else f"<{UNITS[quantity]}>"
                raise ConfigError(
                    f"{source}: joint '{name}' has no '{quantity}' limit{_looked_in(others)}.\n"
                    f"The bridge assumes none; add it: limits: {{{name}: {{{quantity}: {value}}}}}"
                )
            used = _strictest(quantity, values)
            row.append(used)
            if any(not _equal(value, used) for _, value in values):
                texts = ", ".join(f"{where} {_text(value)}" for where, value in values)
                notes.append(f"{name} {quantity}: {texts}; {_text(used)} is used")
        if row[0][0] >= row[0][1]:
            texts = ", ".join(f"{where} {_text(value)}" for where, value in stated[name]["position"])
            raise ConfigError(f"{source}: joint '{name}' must have low < high; stated are {texts}.")
        rows.append(row)
    box = np.array([row[0] for row in rows])
    rates = np.array([row[1:] for row in rows])
    velocity, acceleration, jerk = rates[:, :3].T * scale
    return Limits(tuple(names), box[:, 0], box[:, 1], velocity, acceleration, jerk, rates[:, 3], stated, tuple(notes))


def match_joints(names: Sequence[str], candidates: Iterable[str]) -> dict[str, str]:
    """Which candidate each name means: itself, or, where none is itself, all with one prefix more or less.

    joint1 to joint7 are panda_joint1 to panda_joint7, and joint1 is then not panda_finger_joint1, whose prefix differs.

    Raises:
        ConfigError: two prefixes fit equally well.
    """
    candidates = list(candidates)
    if exact := {name: name for name in names if name in candidates}:
        return exact
    by_prefix: dict[tuple[str, str], dict[str, str]] = {}
    for name in names:
        for key in candidates:
            if name.endswith(f"_{key}"):
                by_prefix.setdefault((name[: -len(key)], ""), {})[name] = key
            elif key.endswith(f"_{name}"):
                by_prefix.setdefault(("", key[: -len(name)]), {})[name] = key
    found = sorted(by_prefix.values(), key=len, reverse=True)
    if len(found) > 1 and len(found[0]) == len(found[1]):
        name = next(iter(found[0]))
        either = " or ".join(match.get(name, next(iter(match.values()))) for match in found[:2])
        raise ConfigError(f"joint '{name}' may be {either}; give it the description's own name.")
    return found[0] if found else {}


def _stated(
    name: str, sources: Sequence[tuple[LimitSource, Mapping[str, str]]]
) -> dict[str, tuple[tuple[str, Any], ...]]:
    found: dict[str, list[tuple[str, Any]]] = {quantity: [] for quantity in QUANTITIES}
    for source, matches in sources:
        entry = source.joints[matches[name]] if name in matches else {}
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{source.name}: limits of joint '{name}' must be a mapping of {', '.join(QUANTITIES)}.")
        for quantity, value in entry.items():
            if quantity not in QUANTITIES:
                raise ConfigError(
                    f"{source.name}: unknown limit '{quantity}' of joint '{name}'.{suggest(str(quantity), QUANTITIES)}"
                )
            found[quantity].append((source.name, _checked(quantity, value, f"{source.name}: joint '{name}'")))
    if not found["max_step"] and any(found.values()):
        found["max_step"] = [("default", MAX_STEP)]
    return {quantity: tuple(values) for quantity, values in found.items()}


def _checked(quantity: str, value: Any, where: str) -> Any:
    try:
        numbers = tuple(float(x) for x in value) if quantity == "position" else (float(value),)
    except (TypeError, ValueError, OverflowError):
        raise ConfigError(f"{where}: limits must be numbers, position: [low, high]; {quantity} is {value!r}.") from None
    if not all(abs(number) < LARGEST for number in numbers):
        raise ConfigError(f"{where}: {quantity} is {value!r}; it must be finite and below {LARGEST:g}.")
    if quantity == "position":
        if len(numbers) != 2 or numbers[0] >= numbers[1]:
            raise ConfigError(f"{where}: position is {value!r}; it must be [low, high] with low < high.")
        return numbers
    if numbers[0] <= 0:
        raise ConfigError(f"{where}: {quantity} is {value!r}; it must be positive.")
    return numbers[0]


def _strictest(quantity: str, values: Sequence[tuple[str, Any]]) -> Any:
    if quantity == "position":
        return max(value[0] for _, value in values), min(value[1] for _, value in values)
    return min(value for _, value in values)


def _equal(one: Any, other: Any) -> bool:
    return bool(np.allclose(one, other, rtol=1e-4, atol=1e-6))  # degrees are rounded in many files


def _text(value: Any) -> str:
    """A limit for people, with the digits that the source has: ±2.8973, [-3.0718, -0.0698] or 2.175."""
    if not isinstance(value, tuple):
        return f"{value:.6g}"
    low, high = value
    return f"±{high:.6g}" if math.isclose(low, -high) else f"[{low:.6g}, {high:.6g}]"


def _looked_in(others: Sequence[LimitSource]) -> str:
    return f", neither in {', '.join(other.name for other in others)}" if others else ""
