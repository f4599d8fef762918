"""The messages of every safety tick, written and read faster than by walking their fields: bytes as messages.py gives.

The general codec took half of a tick's time. These know their layout: a trajectory's points are records of one size,
a robot's joint states differ in numbers only, and a diagnostic is a list of texts. What is laid out otherwise, or is
damaged, goes to the general codec, which reads it or says what is wrong.
"""

import functools
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embodied.robot_bridge import messages
from embodied.robot_bridge.messages import JointSample, Trajectory

_HEADER = bytes((0, 1, 0, 0))  # CDR, little endian
_STAMP = struct.Struct("<iI")
_COUNT = struct.Struct("<I")
_UNLIKE = (struct.error, IndexError, ValueError)  # what a layout that is another one comes to


def _aligned(place: int) -> int:
    """The next place for a number of eight bytes; four bytes of encapsulation come before all."""
    return place + (-(place - 4) % 8)


@functools.lru_cache(maxsize=4096)
def _text(text: str) -> bytes:
    """A string that begins at a multiple of four bytes, filled up to the next."""
    data = text.encode()
    return _COUNT.pack(len(data) + 1) + data + bytes(4 - len(data) % 4)


class TrajectoryWriter:
    """JointTrajectory of (K,) times and (K, J) positions and velocities of the same joints again and again."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = _COUNT.pack(len(names)) + b"".join(map(_text, names))
        self._count = count = len(names)
        # A point: count and gap, positions, count and gap, velocities, two counts of nothing, seconds and nanoseconds.
        self._row = np.zeros(2 * count + 4, "<f8")
        self._row.view("<u4")[[0, 2 * count + 2]] = count
        self._prefixes: dict[str, bytes] = {}

    def _prefix(self, frame_id: str) -> bytes:
        """Everything between the stamp and the number of points."""
        if frame_id not in self._prefixes:
            if len(self._prefixes) > 8:  # every chunk has a frame_id of its own
                self._prefixes.clear()
            self._prefixes[frame_id] = _text(frame_id) + self._names
        return self._prefixes[frame_id]

    def encode(
        self, stamp_ns: int, frame_id: str, times: np.ndarray, positions: np.ndarray, velocities: np.ndarray
    ) -> bytes:
        """CDR bytes; positions and velocities (K, J)."""
        rows, count = np.empty((len(times), len(self._row)), "<f8"), self._count
        rows[:] = self._row
        rows[:, 1 : count + 1] = positions
        rows[:, count + 2 : 2 * count + 2] = velocities
        seconds, nanoseconds = np.divmod(np.rint(times * 1e9).astype(np.int64), 10**9)
        ends = rows.view("<i4")
        ends[:, -2], ends[:, -1] = seconds, nanoseconds
        prefix, points = self._prefix(frame_id), rows.tobytes()
        if len(prefix) % 8 == 0:  # the number of points ends where the first record's gap would: no gap is needed
            points = points[:4] + points[8:]
        stamp = _STAMP.pack(*divmod(stamp_ns, 10**9))
        return b"".join((_HEADER, stamp, prefix, _COUNT.pack(len(times)), points))

    @staticmethod
    def stamped(data: bytes, stamp_ns: int) -> bytes:
        """A message that `encode` made, with another stamp."""
        return _HEADER + _STAMP.pack(*divmod(stamp_ns, 10**9)) + data[12:]


class JointStateReader:
    """JointStates of few publishers, each with the same joints in every message."""

    def __init__(self) -> None:
        # Length of the message -> frame and names as bytes, names, layout of the rest, numbers in position, velocity
        # and effort.
        self._known: dict[int, tuple[bytes, tuple[str, ...], struct.Struct, tuple[int, int, int]]] = {}

    def read(self, data: bytes) -> JointSample:
        """As `messages.read_joint_state`, which it falls back on.

        Raises:
            InputError: the bytes are no JointState.
        """
        known = self._known.get(len(data))
        if known is None or not (data.startswith(_HEADER) and data.startswith(known[0], 12)):
            return self._learn(data)
        _, names, layout, counts = known
        seconds, nanoseconds, first, *numbers = layout.unpack_from(data)
        middle, moving = counts[0], counts[1]
        if first != middle or numbers[middle] != moving or numbers[-1] != counts[2]:
            return self._learn(data)
        if moving:
            velocity = np.array(numbers[middle + 1 : -1])
            total = sum(numbers[middle + 1 : -1])
            if total - total != 0.0:  # a sum is not finite if one of its terms is not
                velocity = np.where(np.isfinite(velocity), velocity, 0.0)
        else:
            velocity = np.zeros(len(names))
        return JointSample(seconds * 10**9 + nanoseconds, names, np.array(numbers[:middle], np.float64), velocity)

    def _learn(self, data: bytes) -> JointSample:
        sample = messages.read_joint_state(data)
        if data[:4] == _HEADER:
            message = messages.decode(data, messages.JOINT_STATE)
            end = _names_end(data)
            if len(self._known) > 16:
                self._known.clear()
            counts = (len(message.position), len(message.velocity), len(message.effort))
            if counts[1] in (0, len(sample.names)):
                layout, place = f"<4xiI{end - 12}x", end
                for count in counts[:2]:
                    gap = _aligned(place + 4) - (place + 4) if count else 0
                    layout, place = f"{layout}I{gap}x{count}d", place + 4 + gap + 8 * count
                self._known[len(data)] = (data[12:end], sample.names, struct.Struct(f"{layout}I"), counts)
        return sample


def _names_end(data: bytes) -> int:
    """Where the names of a sound JointState end: the place of the count of positions."""
    place = 12
    place += 4 + _COUNT.unpack_from(data, place)[0]  # frame_id
    place += -place % 4
    count = _COUNT.unpack_from(data, place)[0]
    place += 4
    for _ in range(count):
        place += -place % 4
        place += 4 + _COUNT.unpack_from(data, place)[0]
    return place + -place % 4


class ChunkReader:
    """JointTrajectories of few publishers: positions alone, of the same joints in every message."""

    def __init__(self) -> None:
        self._names: dict[bytes, tuple[str, ...]] = {}  # as bytes -> as texts

    def read(self, data: bytes) -> Trajectory:
        """As `messages.read_joint_trajectory`, which it falls back on.

        Raises:
            InputError: the bytes are no JointTrajectory, or a point's length is not that of the names.
        """
        try:
            found = self._read(data)
        except _UNLIKE:
            found = None
        if found is not None:
            return found
        trajectory = messages.read_joint_trajectory(data)
        if data[:4] == _HEADER and trajectory.names:
            if len(self._names) > 16:
                self._names.clear()
            self._names[_COUNT.pack(len(trajectory.names)) + b"".join(map(_text, trajectory.names))] = trajectory.names
        return trajectory

    def _read(self, data: bytes) -> Trajectory | None:
        """What the layout gives, None where it is another."""
        length = _COUNT.unpack_from(data, 12)[0]
        place = 16 + length
        if not data.startswith(_HEADER) or not length or data[place - 1] or place > len(data):
            return None
        frame_id = data[16 : place - 1].decode()
        place += -place % 4
        block, names = next((pair for pair in self._names.items() if data.startswith(pair[0], place)), (b"", ()))
        place += len(block)
        count = len(names)
        rows = _COUNT.unpack_from(data, place)[0]
        place += 4
        least = 8 * count + 24
        if not count or not rows or "\0" in frame_id or len(data) - place < rows * least:
            return None
        numbers, tail, head = struct.Struct(f"<{count}d"), struct.Struct("<IIIiI"), _COUNT.unpack_from
        times, positions = [], []
        for _ in range(rows):
            if head(data, place)[0] != count:
                return None
            place = _aligned(place + 4)
            positions.append(numbers.unpack_from(data, place))
            place += 8 * count
            velocities, accelerations, efforts, seconds, nanoseconds = tail.unpack_from(data, place)
            if velocities or accelerations or efforts:
                return None
            times.append(seconds + nanoseconds * 1e-9)
            place += 20
        if len(data) - place > 3:  # more than what fills up the last four bytes
            return None
        seconds, nanoseconds = _STAMP.unpack_from(data, 4)
        stamp_ns = seconds * 10**9 + nanoseconds
        return Trajectory(stamp_ns, frame_id, names, np.array(times), np.array(positions))


def read_flag(data: bytes) -> bool:
    """As `messages.read_bool`, which it falls back on."""
    if len(data) in (5, 8) and data.startswith(_HEADER):
        return data[4] != 0
    return messages.read_bool(data)


def diagnostics(stamp_ns: int, name: str, level: int, text: str, values: Mapping[str, Any]) -> bytes:
    """DiagnosticArray with one status; level 0 is OK, 1 a warning, 2 an error."""
    parts = [_HEADER, _STAMP.pack(*divmod(stamp_ns, 10**9)), _text(""), _COUNT.pack(1), bytes((level, 0, 0, 0))]
    parts += map(_text, (name, text, ""))
    parts.append(_COUNT.pack(len(values)))
    last = ""
    for key, value in values.items():
        last = str(value)
        parts.append(_text(key))
        parts.append(_text(last))
    data = b"".join(parts)
    return data[: len(data) - 3 + len(last.encode()) % 4] if values else data
