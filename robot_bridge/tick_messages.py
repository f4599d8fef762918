"""The messages of every safety tick, written and read faster than by walking their fields: bytes as messages.py gives.

The general codec takes about half of a tick's time. These three know their layout: a trajectory's points are records of
one size, a robot's joint states differ in numbers only, and a diagnostic is a list of texts.
"""

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embodied.robot_bridge import messages
from embodied.robot_bridge.messages import JointSample, Trajectory

_HEADER = bytes((0, 1, 0, 0))  # CDR, little endian


class TrajectoryWriter:
    """JointTrajectory of (K,) times and (K, J) positions and velocities of the same joints again and again."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names, self._count = tuple(names), len(names)
        numbers = ("<f8", (self._count,))
        self._record = np.dtype(
            [
                ("positions", "<u4"),
                ("gap", "<u4"),  # numbers of eight bytes stand at multiples of eight
                ("position", *numbers),
                ("velocities", "<u4"),
                ("gap2", "<u4"),
                ("velocity", *numbers),
                ("accelerations", "<u4"),
                ("efforts", "<u4"),
                ("seconds", "<i4"),
                ("nanoseconds", "<u4"),
            ]
        )
        self._prefixes: dict[str, bytes] = {}

    def _prefix(self, frame_id: str) -> bytes:
        """Everything before the number of points, with stamp 0."""
        if frame_id not in self._prefixes:
            if len(self._prefixes) > 8:  # every chunk has a frame_id of its own
                self._prefixes.clear()
            empty = np.zeros((0, self._count))
            none = Trajectory(0, frame_id, self._names, np.zeros(0), empty, empty)
            self._prefixes[frame_id] = messages.joint_trajectory(none)[:-4]
        return self._prefixes[frame_id]

    def encode(
        self, stamp_ns: int, frame_id: str, times: np.ndarray, positions: np.ndarray, velocities: np.ndarray
    ) -> bytes:
        """CDR bytes; positions and velocities (K, J)."""
        rows = np.zeros(len(times), self._record)
        rows["positions"] = rows["velocities"] = self._count
        rows["position"], rows["velocity"] = positions, velocities
        nanoseconds = np.round(times * 1e9).astype(np.int64)
        rows["seconds"], rows["nanoseconds"] = nanoseconds // 10**9, nanoseconds % 10**9
        prefix, points = self._prefix(frame_id), rows.tobytes()
        if len(prefix) % 8 == 4:  # the number of points ends where the first record's gap would: no gap is needed
            points = points[:4] + points[8:]
        seconds, rest = divmod(stamp_ns, 10**9)
        return b"".join(
            (_HEADER, struct.pack("<iI", seconds, rest), prefix[12:], struct.pack("<I", len(times)), points)
        )


class JointStateReader:
    """JointStates of few publishers, each with the same joints in every message."""

    def __init__(self) -> None:
        # Length of the message -> frame and names as bytes, their end, names, numbers in position, velocity, effort.
        self._known: dict[int, tuple[bytes, int, tuple[str, ...], tuple[int, int, int]]] = {}

    def read(self, data: bytes) -> JointSample:
        """As `messages.read_joint_state`, which it falls back on.

        Raises:
            InputError: the bytes are no JointState.
        """
        known = self._known.get(len(data))
        if known is None or data[:4] != _HEADER or data[12 : known[1]] != known[0]:
            return self._learn(data)
        _, end, names, counts = known
        places = []
        for count in counts:  # of positions, velocities, efforts
            if struct.unpack_from("<I", data, end)[0] != count:
                return self._learn(data)
            places.append(_after_count(end) if count else end + 4)
            end = places[-1] + 8 * count
        position = np.frombuffer(data, "<f8", counts[0], places[0])
        velocity = np.zeros(len(names))
        if counts[1]:
            velocity = np.frombuffer(data, "<f8", counts[1], places[1])
            if not np.isfinite(velocity).all():
                velocity = np.where(np.isfinite(velocity), velocity, 0.0)
        seconds, nanoseconds = struct.unpack_from("<iI", data, 4)
        return JointSample(seconds * 10**9 + nanoseconds, names, position, velocity)

    def _learn(self, data: bytes) -> JointSample:
        sample = messages.read_joint_state(data)
        if data[:4] == _HEADER:
            message = messages.decode(data, messages.JOINT_STATE)
            end = _names_end(data)
            if len(self._known) > 16:
                self._known.clear()
            counts = (len(message.position), len(message.velocity), len(message.effort))
            if counts[1] in (0, len(sample.names)):
                self._known[len(data)] = (data[12:end], end, sample.names, counts)
        return sample


def _after_count(place: int) -> int:
    """Where numbers of eight bytes begin whose count stands at `place`; four bytes of encapsulation come before all."""
    return place + 4 + (-(place + 4 - 4) % 8)


def _names_end(data: bytes) -> int:
    """Where the names of a sound JointState end: the place of the count of positions."""
    place = 12
    place += 4 + struct.unpack_from("<I", data, place)[0]  # frame_id
    place += -place % 4
    count = struct.unpack_from("<I", data, place)[0]
    place += 4
    for _ in range(count):
        place += -place % 4
        place += 4 + struct.unpack_from("<I", data, place)[0]
    return place + -place % 4


def diagnostics(stamp_ns: int, name: str, level: int, text: str, values: Mapping[str, Any]) -> bytes:
    """DiagnosticArray with one status; level 0 is OK, 1 a warning, 2 an error."""
    out = bytearray(struct.pack("<iI", *divmod(stamp_ns, 10**9)))
    _append_text(out, "")
    _append_count(out, 1)
    out.append(level)
    for part in (name, text, ""):
        _append_text(out, part)
    _append_count(out, len(values))
    for key, value in values.items():
        _append_text(out, key)
        _append_text(out, str(value))
    return _HEADER + bytes(out)


def _append_count(out: bytearray, count: int) -> None:
    out.extend(bytes(-len(out) % 4))
    out.extend(count.to_bytes(4, "little"))


def _append_text(out: bytearray, text: str) -> None:
    data = text.encode()
    _append_count(out, len(data) + 1)
    out.extend(data)
    out.append(0)
