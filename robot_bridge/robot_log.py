"""What the simulated arm did, step by step, in a file that survives the process: tests assert from it.

One line of JSON, then one fixed-size record per control step. Blocks go to the operating system ten times a second, so
that a killed process loses a tenth of a second; a record that was cut off is not read.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from embodied.contracts.errors import InputError

log = logging.getLogger("mujoco_robot")

FORMAT = "embodied-robot-log"
_FLUSH_S = 0.1


def _record(joints: int, actuators: int) -> np.dtype:
    return np.dtype(
        [
            ("time", "<f8"),
            ("wall", "<f8"),
            ("late", "<f4"),
            ("stamp_ns", "<i8"),
            ("position", "<f8", (joints,)),
            ("velocity", "<f4", (joints,)),
            ("command", "<f8", (joints,)),
            ("ctrl", "<f4", (actuators,)),
            ("accepted", "<u4"),
            ("contacts", "<u2"),
            ("fault", "u1"),
        ]
    )


@dataclasses.dataclass(frozen=True)
class RobotRecord:
    """N control steps.

    Attributes:
        joints: J names, the arm's and then the gripper's.
        time: (N,) physics clock [s].
        wall: (N,) the same moments on the host's monotonic clock, as `time.monotonic` reads it in every process [s].
        late: (N,) how much later the process came to simulate them [s]: with one that the host does not schedule,
            physics makes up for the time that was lost.
        stamp_ns: (N,) and on the clock of message stamps [ns].
        position, velocity: (N, J) measured after the step [rad, rad/s].
        command: (N, J) what the controllers asked the servos for.
        ctrl: (N, nu) as the actuators got it.
        accepted: (N,) commands accepted so far.
        contacts: (N,) pairs of bodies that touch.
        fault: (N,) names of the faults.
    """

    joints: tuple[str, ...]
    time: np.ndarray
    wall: np.ndarray
    late: np.ndarray
    stamp_ns: np.ndarray
    position: np.ndarray
    velocity: np.ndarray
    command: np.ndarray
    ctrl: np.ndarray
    accepted: np.ndarray
    contacts: np.ndarray
    fault: np.ndarray

    def between(self, begin: float, end: float = np.inf) -> "RobotRecord":
        """The steps with begin <= wall < end."""
        keep = (self.wall >= begin) & (self.wall < end)
        arrays = {f.name: getattr(self, f.name)[keep] for f in dataclasses.fields(self) if f.name != "joints"}
        return RobotRecord(self.joints, **arrays)

    def time_to_rest(self, after: float, speed: float = 0.01) -> float:
        """Seconds from wall time `after` until no joint moves faster than `speed` [rad/s] any more; inf if never."""
        later = self.between(after)
        moving = np.flatnonzero((np.abs(later.velocity) > speed).any(axis=1))
        if not len(moving):
            return 0.0
        last = int(moving[-1])
        return float(later.wall[last + 1] - after) if last + 1 < len(later.wall) else np.inf


class RobotLog:
    """Writes the log. Call `write` once per control step."""

    def __init__(self, path: Path, joints: Sequence[str], actuators: int, faults: Sequence[str]) -> None:
        head = {"format": FORMAT, "joints": list(joints), "actuators": actuators, "faults": list(faults)}
        try:
            self._file = path.open("wb", buffering=0)
            self._file.write(json.dumps(head).encode() + b"\n")
        except OSError as error:
            raise InputError(f"The log {path} cannot be written: {error.strerror}.") from None
        self._faults = {name: index for index, name in enumerate(faults)}
        self._row = np.zeros(1, _record(len(joints), actuators))
        self._block: list[bytes] = []
        self._flushed = time.monotonic()

    def write(self, fault: str, **values: float | np.ndarray) -> None:
        """One step; the names are those of `RobotRecord`."""
        row = self._row[0]
        for name, value in values.items():
            row[name] = value
        row["fault"] = self._faults[fault]
        self._block.append(self._row.tobytes())
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def flush(self) -> None:
        try:
            if not self._file.closed:
                self._file.write(b"".join(self._block))
        except OSError as error:  # the robot goes on without
            log.warning("%s ends here: %s", self._file.name, error)
            self._file.close()
        self._block, self._flushed = [], time.monotonic()

    def close(self) -> None:
        self.flush()
        self._file.close()


def read_robot_log(path: str | Path) -> RobotRecord:
    """A log, whole or cut off by a crash.

    Raises:
        InputError: the file is absent or no such log.
    """
    path = Path(path)
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        about = json.loads(head)
        if about["format"] != FORMAT:
            raise ValueError
    except OSError as error:
        raise InputError(f"The robot log {path} cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{path} is no log of the simulated robot.") from None
    kind = _record(len(about["joints"]), about["actuators"])
    rows = np.frombuffer(body, kind, len(body) // kind.itemsize)
    names = np.array(about["faults"])
    arrays = {name: rows[name] for name in kind.names or () if name != "fault"}
    return RobotRecord(tuple(about["joints"]), fault=names[rows["fault"]], **arrays)
