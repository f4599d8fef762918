"""Chunks of timed joint targets from a policy: what is wrong with one, and the path that several make together. Pure.

Times are seconds on one monotonic clock that the caller passes in.
"""

import dataclasses
import math

import numpy as np

from embodied.robot_bridge.limits import Limits
from embodied.robot_bridge.profile import Safety

_MAX_POINTS = 1000
_ABSURD = 1e6  # [rad, m]: no target of any robot, and far from where arithmetic overflows
_SHORTEST = 1e-3  # [s]


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Absolute joint targets from a policy.

    Attributes:
        run, sequence: sequence rises within a run.
        observed_at: when the newest observation was made [s].
        received_at: when the chunk arrived [s].
        times: (K,) seconds after `observed_at`, strictly rising.
        positions: (K, J) [rad, m], columns named by `names` in any order.
    """

    run: str
    sequence: int
    observed_at: float
    received_at: float
    names: tuple[str, ...]
    times: np.ndarray
    positions: np.ndarray


@dataclasses.dataclass(frozen=True)
class Timeline:
    """A piecewise linear path through knots (K >= 2), constant before the first, straight on after the last.

    Attributes:
        times: (K,) strictly rising [s].
        positions: (K, J) [rad, m].
        slopes: (K - 1, J) between them [rad/s].
    """

    times: np.ndarray
    positions: np.ndarray
    slopes: np.ndarray

    @property
    def end(self) -> float:
        return float(self.times[-1])

    def at(self, times: np.ndarray) -> np.ndarray:
        """(F, J) positions at `times`, (F, 1) or a time of its own for each joint (F, J)."""
        piece = self._piece(times)
        since = np.maximum(times - self.times[piece], 0.0)
        if times.shape[1] == 1:
            rows = piece[:, 0]
            return self.positions[rows] + since * self.slopes[rows]
        joint = np.arange(self.positions.shape[1])
        return self.positions[piece, joint] + since * self.slopes[piece, joint]

    def velocity(self, times: np.ndarray) -> np.ndarray:
        """(F, J) slopes at `times` (F, 1)."""
        return self.slopes[self._piece(times)[:, 0]]

    def _piece(self, times: np.ndarray) -> np.ndarray:
        return np.minimum(np.maximum(self.times.searchsorted(times, side="right") - 1, 0), len(self.slopes) - 1)


def timeline(times: np.ndarray, positions: np.ndarray) -> Timeline:
    """A timeline through (K,) `times` and (K, J) `positions`."""
    return Timeline(times, positions, (positions[1:] - positions[:-1]) / (times[1:] - times[:-1])[:, None])


def malformed(chunk: Chunk, names: tuple[str, ...]) -> str:
    """Why the chunk is refused as a whole, whatever the time is; empty if it is sound. Nothing is ever mended."""
    if chunk.names != names and sorted(chunk.names) != sorted(names):
        return f"its joints are {', '.join(map(str, chunk.names))}"
    times, positions = np.asarray(chunk.times), np.asarray(chunk.positions)
    if times.ndim != 1 or not len(times) or positions.shape != (len(times), len(names)):
        return f"its positions have shape {positions.shape} for {len(times) if times.ndim else 'no'} times"
    if len(times) > _MAX_POINTS:
        return f"it has {len(times)} points, more than {_MAX_POINTS}"
    if not (np.isfinite(times).all() and np.isfinite(positions).all() and np.isfinite(chunk.observed_at)):
        return "it is not finite"
    if max(positions.max(), -positions.min()) > _ABSURD:
        return f"it holds the target {positions.flat[int(np.argmax(np.abs(positions)))]:g}"
    if times[0] < 0 or (times[1:] <= times[:-1]).any():
        return "its times do not rise"
    return ""


def untimely(chunk: Chunk, now: float, config: Safety) -> str:
    """Why a sound chunk cannot be executed at `now`; empty if it can."""
    age = now - chunk.observed_at
    if age < -config.clock_skew_max:
        return f"its stamp lies {-age:.3f} s in the future"
    if age > config.chunk_max_age:
        return f"its observation is {age:.3f} s old"
    late = age - float(chunk.times[-1]) - config.action_delay
    if late >= 0:
        return f"its last point passed {late:.3f} s ago"
    return ""


def out_of_reach(
    chunk: Chunk, positions: np.ndarray, now: float, here: np.ndarray, limits: Limits, config: Safety
) -> str:
    """Whether the first coming target (K, J) of a policy that takes over is too far from `here` (J,)."""
    due = chunk.observed_at + np.asarray(chunk.times) + config.action_delay
    away = np.abs(positions[int(np.argmax(due > now))] - here)
    worst = int(np.argmax(away - limits.max_step))
    if away[worst] <= limits.max_step[worst] + config.arm_max_initial_error:
        return ""
    return f"the first target of {limits.names[worst]} is too far away: {away[worst]:.3f}"


def schedule(
    chunk: Chunk, positions: np.ndarray, now: float, here: np.ndarray, previous: Timeline | None, config: Safety
) -> Timeline:
    """The path from `now` on: through the chunk's coming points, up to the chunk horizon.

    Points that are past are dropped. A chunk whose points all lie ahead is reached in a straight line from where the
    path is now; into one that had begun already, the path is faded over `config.chunk_blend` seconds.

    Args:
        chunk: sound and timely.
        positions: (K, J) its targets in the order of the limits.
        here: (J,) where the path starts if there is no `previous` that lasts until now.
    """
    due = chunk.observed_at + np.asarray(chunk.times, np.float64) + config.action_delay
    end = max(min(float(due[-1]), min(chunk.received_at, now) + config.chunk_horizon), now + _SHORTEST)
    if previous is not None and previous.end <= now:
        previous = None
    if previous is not None:
        here = previous.at(np.array([[now]]))[0]
    if due[0] > now:
        whole = timeline(np.concatenate([(now,), due]), np.concatenate([here[None], positions]))
        begun = False
    else:
        whole = timeline(np.concatenate([due, due[-1:] + 1.0]), np.concatenate([positions, positions[-1:]]))
        begun = True
    blend = max(config.chunk_blend, _SHORTEST)
    until = min(now + blend, end)
    knots = {now, end, *(time for time in whole.times.tolist() if now < time < end)}
    if begun:
        knots.add(until)
        if previous is not None:
            knots.update(time for time in previous.times.tolist() if now < time < until)
    rising = sorted(knots)
    kept = [time for before, time in zip([-math.inf, *rising], rising, strict=False) if time - before > _SHORTEST / 10]
    times = np.array(kept)
    rows = whole.at(times[:, None])
    if begun:
        # A path that has ended, or never was, fades from where it stands.
        old = previous.at(np.minimum(times, previous.end)[:, None]) if previous is not None else here
        weight = np.minimum(np.maximum((times - now) / blend, 0.0), 1.0)
        rows = old + (rows - old) * weight[:, None]
    return timeline(times, rows)
