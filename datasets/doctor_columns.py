"""Checks of `data doctor` on the columns of arrays: constant ones, jumps, actions out of range, rewards, labels."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from embodied.contracts.specs import ActionSpec, ArraySpec
from embodied.datasets.doctor_checks import listed
from embodied.datasets.finding import Finding

SAMPLED_ROWS = 20_000
# A step is a jump when it is this many times the 97.5 % quantile of its column's steps, that many robust deviations
# (median and MAD) above their median, and this share of the column's range: a slow joint may twitch.
JUMP_QUANTILES, JUMP_DEVIATIONS, JUMP_RANGE = 8.0, 20.0, 0.15
FAR = 0.4  # of a column's range: one element that jumps so far is no twitch
SATURATED_SHARE = 0.2  # of actions at the edge of their range


def element_names(spec: ArraySpec) -> list[str]:
    """A name per element of a flattened row: the spec's, or its index."""
    size = int(np.prod(spec.shape, dtype=np.int64))
    if len(spec.names) == size:
        return list(spec.names)
    return [str(i) for i in range(size)]


class Column:
    """Range, finiteness and typical steps of one array over all episodes; rows are flattened to (n, D).

    Args:
        num_frames: of the whole store; decides how densely steps are sampled. Memory: at most 4 million numbers.
    """

    def __init__(self, spec: ArraySpec, num_frames: int) -> None:
        self.spec, self.names = spec, element_names(spec)
        size = len(self.names)
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)
        self.count = 0
        self._stride = max(1, -(-num_frames // max(1, min(SAMPLED_ROWS, 4_000_000 // max(1, size)))))
        self._steps: list[np.ndarray] = []
        self._seen = 0

    def add(self, rows: np.ndarray) -> None:
        rows = rows.reshape(len(rows), -1)
        finite = rows[np.isfinite(rows).all(1)]
        if len(finite):
            self.low, self.high = np.minimum(self.low, finite.min(0)), np.maximum(self.high, finite.max(0))
        self.count += len(rows)

    def add_steps(self, rows: np.ndarray) -> None:
        """Sample |x[t + 1] - x[t]| of one episode."""
        rows = rows.reshape(len(rows), -1)
        at = np.arange(-self._seen % self._stride, len(rows) - 1, self._stride)
        self._seen += max(0, len(rows) - 1)
        if len(at):
            steps = np.abs(rows[at + 1].astype(np.float64) - rows[at])
            self._steps.append(steps[np.isfinite(steps).all(1)].astype(np.float32))

    def constant(self) -> list[str]:
        return [name for name, low, high in zip(self.names, self.low, self.high, strict=True) if low == high]

    def jump_limit(self) -> np.ndarray:
        """(D,): the step from which on an element jumps; infinite where too few steps move to tell."""
        limit = np.full(len(self.names), np.inf)
        steps = np.concatenate(self._steps) if self._steps else np.zeros((0, len(limit)))
        for element in range(len(limit)):
            moving = steps[:, element][steps[:, element] > 0]
            if len(moving) < 20:
                continue
            median = float(np.median(moving))
            deviation = 1.4826 * float(np.median(np.abs(moving - median)))
            limit[element] = max(
                JUMP_QUANTILES * float(np.quantile(moving, 0.975)),
                median + JUMP_DEVIATIONS * deviation,
                JUMP_RANGE * float(self.high[element] - self.low[element]),
            )
        return limit


@dataclasses.dataclass(frozen=True)
class Jump:
    """A step of one episode that no other step of the dataset resembles.

    Attributes:
        row: the frame after the jump.
        share: of the moving elements of all keys that jump together; near 1 it is a reset.
        text: which elements, by how much.
        alone: one element, and not far: a finger or a sensor that twitched.
    """

    row: int
    share: float
    text: str
    alone: bool


def jumps(
    rows: Mapping[str, np.ndarray], columns: Mapping[str, Column], limits: Mapping[str, np.ndarray]
) -> list[Jump]:
    """Jumps of one episode. Angles that wrap by 2 pi and quaternions that change sign as a whole are none."""
    found: dict[int, list[tuple[float, float, str]]] = {}
    moving = sum(int(np.isfinite(limit).sum()) for limit in limits.values())
    for name, limit in limits.items():
        array = rows[name].reshape(len(rows[name]), -1).astype(np.float64)
        change = np.diff(array, axis=0)
        steps = np.abs(change)
        with np.errstate(invalid="ignore"):
            over = steps > limit
        over &= ~(np.abs(steps - 2 * np.pi) < 0.3)
        flipped = np.abs(array[1:] + array[:-1]) < 0.2 * np.abs(array[1:]) + 1e-9
        over &= ~(flipped & (np.abs(array[1:]) <= 1))
        for row, element in np.argwhere(over):
            column, step = columns[name], float(steps[row, element])
            reach = step / float(column.high[element] - column.low[element])
            text = f"{name.removeprefix('observation/')}[{column.names[element]}] by {change[row, element]:+.3g}"
            found.setdefault(int(row) + 1, []).append((step / float(limit[element]), reach, text))
    return [
        Jump(
            row,
            len(items) / max(1, moving),
            listed([text for _, _, text in sorted(items, reverse=True)], 3),
            alone=len(items) == 1 and items[0][1] < FAR,
        )
        for row, items in sorted(found.items())
    ]


def jump_findings(episode: int, found: Sequence[Jump]) -> Iterator[Finding]:
    """One finding for all jumps of an episode, one for all twitches."""
    if twitches := [jump for jump in found if jump.alone]:
        where = listed([jump.row for jump in twitches], 5)
        yield Finding(
            "twitch",
            "note",
            f"one element alone makes a sudden step at frame {where}: {twitches[0].text}",
            "A sensor or a finger that twitched, rarely more.",
            episode,
        )
    found = [jump for jump in found if not jump.alone]
    if not found:
        return
    first, reset = found[0], max(jump.share for jump in found) > 0.4
    where = f"frame {listed([jump.row for jump in found], 5)}"
    what = "Most of the observation changes at once: the end of an episode is missing there. " if reset else ""
    yield Finding(
        "jump",
        "error" if reset else "warning",
        f"it jumps at {where}: {first.text}",
        what + "A learner would take the jump for an effect of the action: --repair cuts the episode there.",
        episode,
    )


def column_findings(name: str, column: Column) -> Iterator[Finding]:
    """Columns that never change."""
    spec, label = column.spec, name.removeprefix("observation/")
    constant = column.constant()
    if constant and isinstance(spec, ActionSpec):
        yield Finding(
            "dead-action",
            "warning",
            f"action element {listed(constant)} of {len(column.names)} never changes",
            "A policy cannot learn to use it; check that the recorder wrote the command that was sent.",
        )
    elif constant:
        all_of_it = len(constant) == len(column.names) > 1
        yield Finding(
            "constant-column",
            "note",
            f"'{label}' never changes" if all_of_it else f"'{label}': element {listed(constant)} never changes",
            f"It tells a policy nothing. Without it: embodied data drop STORE OUT --keys {label}" if all_of_it else "",
        )


def unnamed_findings(columns: Mapping[str, Column]) -> Iterator[Finding]:
    unnamed = [
        f"'{name.removeprefix('observation/')}' ({len(column.names)})"
        for name, column in columns.items()
        if len(column.names) > 1 and not column.spec.names and not column.spec.privileged
    ]
    if unnamed:
        yield Finding(
            "unnamed-joints",
            "note",
            f"the elements of {listed(unnamed)} have no names",
            "Joints are matched by name when a policy is deployed: name them in the source.",
        )


class CopiedAction:
    """Observations that are the action itself: a policy that sees them copies, and stands still when deployed."""

    def __init__(self, observations: Mapping[str, ArraySpec], action: ActionSpec) -> None:
        self._same = {key for key, spec in observations.items() if spec.shape == action.shape}

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        valid = rows["step_valid"]
        action = rows["action"][valid]
        self._same = {key for key in self._same if np.array_equal(rows[f"observation/{key}"][valid], action)}

    def findings(self) -> Iterator[Finding]:
        for key in sorted(self._same):
            yield Finding(
                "action-in-observation",
                "warning",
                f"the observation '{key}' is the action itself, at every step",
                f"A policy that sees it learns to copy it. Without it: embodied data drop STORE OUT --keys {key}",
            )


class ActionRange:
    """How far actions lie outside what the spec allows, and how many stand at its edge."""

    def __init__(self, spec: ActionSpec) -> None:
        size = int(np.prod(spec.shape, dtype=np.int64))
        self.known = True
        self.what = "its bounds"
        if len(spec.low) == size and len(spec.high) == size:
            self.low, self.high = np.array(spec.low), np.array(spec.high)
        elif spec.scale:
            self.low, self.high, self.what = np.full(size, -1.0), np.full(size, 1.0), "[-1, 1]"
        else:
            self.known = False
            self.low, self.high = np.full(size, -np.inf), np.full(size, np.inf)
        self.outside, self.at_edge = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self.worst = np.zeros(size)
        self.count = self.any_outside = 0
        self._names = element_names(spec)

    def add(self, rows: Mapping[str, np.ndarray]) -> None:
        action = rows["action"][rows["step_valid"]].astype(np.float64)
        action = action.reshape(len(action), -1)
        if not self.known or not len(action):
            return
        width = self.high - self.low
        over = np.maximum(self.low - action, action - self.high)
        outside = over > 1e-6 * np.maximum(1.0, np.abs(width))
        self.outside += outside.sum(0)
        self.any_outside += int(outside.any(1).sum())
        self.at_edge += (np.abs(over) <= 1e-6 * np.maximum(1.0, np.abs(width))).sum(0)
        self.worst = np.maximum(self.worst, over.max(0))
        self.count += len(action)

    def findings(self) -> Iterator[Finding]:
        if not self.count:
            return
        if self.any_outside:
            order = np.argsort(-self.outside)
            worst = [f"{self._names[i]} by up to {self.worst[i]:.3g}" for i in order if self.outside[i]]
            share = 100 * self.any_outside / self.count
            yield Finding(
                "action-range",
                "warning",
                f"{self.any_outside} of {self.count} actions ({share:.2g} %) lie outside {self.what}: "
                f"{listed(worst, 4)}",
                "Training clips them: what is learned is not what was done. Check unit and scale of the source.",
            )
        share = self.at_edge / self.count
        if saturated := [f"{self._names[i]} {100 * s:.0f} %" for i, s in enumerate(share) if s > SATURATED_SHARE]:
            yield Finding(
                "action-saturated",
                "note",
                f"actions stand at the edge of {self.what}: {listed(saturated)}",
                "Usual for a gripper that opens and closes; otherwise the operator's input was clipped.",
            )


def reward_findings(column: Column, terminated: bool) -> Iterator[Finding]:
    low, high = float(column.low[0]), float(column.high[0])
    if low == high:
        what = "zero" if low == 0 else f"{low:g}"
        more = ", although episodes terminate" if terminated else ""
        yield Finding(
            "constant-reward",
            "warning",
            f"the recorded reward is {what} at every step{more}",
            "Nothing can be learned from it. Label the frames: embodied label clip, or relabel from the goal.",
        )


def label_findings(name: str, score: np.ndarray) -> Iterator[Finding]:
    """Scores that say nothing. score: (F,)."""
    where = f"label set '{name}'"
    if bad := int((~np.isfinite(score)).sum()):
        yield Finding(
            "label-not-finite", "error", f"{where}: {bad} of {len(score)} scores are NaN or infinite", "Label again."
        )
        return
    low, high = float(score.min()), float(score.max())
    if low == high:
        yield Finding(
            "label-constant", "warning", f"{where} is {low:g} everywhere", "It says nothing. Check the goal text."
        )
        return
    for edge in (low, high):
        if (share := float((score == edge).mean())) > 0.5:
            yield Finding(
                "label-saturated",
                "note",
                f"{where}: {100 * share:.0f} % of its scores are exactly {edge:g}",
                "It is clipped or was not computed there; look at it: embodied data view STORE --episode 0 --out FILE",
            )
