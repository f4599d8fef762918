"""What passes on topics while somebody listens for a second or two: counts, rates, ages, sizes, the last samples.

Preflight and `embodied robot doctor` look at the graph through this; neither sends anything.
"""

import collections
import dataclasses
import functools
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages
from embodied.robot_bridge.interfaces import typestore
from embodied.robot_bridge.node import now_ns
from embodied.robot_bridge.qos import QosProfile
from embodied.robot_bridge.transport import Endpoint, Graph

WATCH = QosProfile(depth=200, reliable=False)  # matches every publisher and is deep enough for 1 kHz
_KEPT, _SMALL = 64, 4096  # samples kept of a topic whose samples are small [bytes]; of others the last


def publishers(graph: Graph, topic: str) -> list[Endpoint]:
    return [end for end in graph.endpoints if end.topic == topic and end.publishes]


def subscriptions(graph: Graph, topic: str) -> list[Endpoint]:
    return [end for end in graph.endpoints if end.topic == topic and not end.publishes]


@dataclasses.dataclass(frozen=True)
class Stream:
    """The samples of one topic in the order of their arrival.

    Attributes:
        message_type: `package/msg/Name`.
        arrived: (N,) on the monotonic clock [s].
        age: (N,) arrival minus header stamp, on the ROS clock [s]; NaN for types without a header.
        stamp: (N,) header stamp, or the time in a Clock message [s]; NaN where there is none.
        size: (N,) [bytes].
        recent: the last samples, newest last.
        ended: when listening ended, on the monotonic clock [s].
        duration: how long it lasted [s].
    """

    message_type: str
    arrived: np.ndarray
    age: np.ndarray
    stamp: np.ndarray
    size: np.ndarray
    recent: tuple[bytes, ...]
    ended: float
    duration: float

    @property
    def count(self) -> int:
        return len(self.arrived)

    @property
    def rate_hz(self) -> float:
        """From the median interval, so that a late start or one hiccup does not count; 0 with fewer than 2 samples."""
        return 0.0 if self.count < 2 else 1.0 / max(float(np.median(np.diff(self.arrived))), 1e-9)

    @property
    def longest_gap(self) -> float:
        """Longest silence between two samples, or since the last [s]; all of the time if nothing came."""
        if not self.count:
            return self.duration
        return float(np.max(np.diff(self.arrived, append=self.ended)))

    @property
    def bytes_per_second(self) -> float:
        return float(self.size.sum()) / self.duration if self.duration > 0 else 0.0


@functools.cache
def _stamp_offset(message_type: str) -> bool:
    """Whether a type starts with a stamp: a header, or a Clock's time, right after the 4 encapsulation bytes."""
    definitions = typestore().fielddefs
    fields = definitions[message_type][1] if message_type in definitions else []
    return bool(fields) and fields[0][0] in ("header", "clock")


class Survey:
    """Subscribes to topics of a transport and keeps account of what arrives.

    Args:
        topics: name -> (message type, quality of service of the subscription).
        clock_ns: the clock of the transport's arrival times [ns].
        stamp: ROS time [ns].
    """

    def __init__(
        self,
        transport: Any,
        topics: Mapping[str, tuple[str, QosProfile]],
        clock_ns: Callable[[], int] = time.monotonic_ns,
        stamp: Callable[[], int] = now_ns,
    ) -> None:
        self._clock_ns, self._stamp, self._lock = clock_ns, stamp, threading.Lock()
        self._started_ns = clock_ns()
        self._types = {topic: kind for topic, (kind, _) in topics.items()}
        self._rows: dict[str, list[tuple[float, float, float, int]]] = {topic: [] for topic in topics}
        self._recent: dict[str, collections.deque[bytes]] = {t: collections.deque(maxlen=_KEPT) for t in topics}
        for topic, (kind, qos) in topics.items():
            transport.subscriber(topic, kind, qos, lambda data, at, topic=topic: self._keep(topic, data, at))

    def _keep(self, topic: str, data: bytes, received_ns: int) -> None:
        arrived_ros_ns = self._stamp() - (self._clock_ns() - received_ns)
        stamp = age = np.nan
        if _stamp_offset(self._types[topic]) and len(data) >= 12:
            seconds, nanoseconds = struct.unpack_from("<iI", data, 4)
            stamp = seconds + nanoseconds * 1e-9
            age = (arrived_ros_ns - seconds * 10**9 - nanoseconds) * 1e-9
        with self._lock:
            self._rows[topic].append((received_ns * 1e-9, age, stamp, len(data)))
            if len(data) > _SMALL:
                self._recent[topic].clear()
            self._recent[topic].append(data)

    def read(self) -> dict[str, Stream]:
        """What has arrived so far, by topic."""
        ended_ns = self._clock_ns()
        with self._lock:
            rows = {topic: np.array(list(r), np.float64).reshape(-1, 4).T for topic, r in self._rows.items()}
            recent = {topic: tuple(samples) for topic, samples in self._recent.items()}
        duration = (ended_ns - self._started_ns) * 1e-9
        return {
            topic: Stream(self._types[topic], row[0], row[1], row[2], row[3], recent[topic], ended_ns * 1e-9, duration)
            for topic, row in rows.items()
        }


@dataclasses.dataclass(frozen=True)
class Joints:
    """What the last JointState samples say, by joint; arm and gripper may come in messages of their own.

    Attributes:
        position: joint -> [rad, m]; NaN if the robot sends NaN or no number for it.
        velocity: joint -> [rad/s, m/s], 0 where the robot sends none.
        orders: each order of names that was seen.
        malformed: why the last sample that could not be read could not.
    """

    position: dict[str, float]
    velocity: dict[str, float]
    orders: tuple[tuple[str, ...], ...]
    malformed: str


def read_joints(streams: Sequence[Stream]) -> Joints:
    """Merge the recent samples of JointState topics, newest last."""
    position: dict[str, float] = {}
    velocity: dict[str, float] = {}
    orders: dict[tuple[str, ...], None] = {}
    malformed = ""
    for data in (sample for stream in streams for sample in stream.recent):
        try:
            sample = messages.read_joint_state(data)
        except InputError as error:
            malformed = str(error)
            continue
        orders[sample.names] = None
        position |= dict(zip(sample.names, sample.position.tolist(), strict=True))
        velocity |= dict(zip(sample.names, sample.velocity.tolist(), strict=True))
    return Joints(position, velocity, tuple(orders), malformed)
