"""The bridge at one moment, as `watch` shows it; `Monitor` listens and makes it."""

import collections
import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages
from embodied.robot_bridge.joint_merge import JointMerge
from embodied.robot_bridge.messages import (
    COMPRESSED_IMAGE,
    DIAGNOSTIC_ARRAY,
    IMAGE,
    JOINT_STATE,
    JOINT_TRAJECTORY,
    STRING,
)
from embodied.robot_bridge.node import EVENT_TOPIC, now_ns
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT, EVENTS, LATCHED, LATEST, QosProfile
from embodied.robot_bridge.safety_node import CHUNK_TOPIC, COMMAND_TOPIC, STATE_TOPIC

WINDOW_S = 2.0  # over which rates are counted [s]
LATENCIES = 500  # the last so many of a kind are summed up
CHUNK_LATENCY = "observation to chunk"


@dataclasses.dataclass(frozen=True)
class Topic:
    """Rate over the last two seconds [Hz], and age of the newest message [s]: infinite before the first."""

    rate: float
    age: float


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Arrays have shape (J,), in the order of `names`; NaN is what nobody has said yet.

    Attributes:
        state, reason: the safety process's; empty before it speaks.
        counts: what else it says: clamps, refusals, missed deadlines, ages.
        gripper: bool, which joint is the gripper's.
        position, command: measured, and commanded last [rad, m].
        low, high: limits of the position [rad, m].
        topics: name -> rate and age.
        rare: topics that are silent unless something happens.
        latencies: name -> median and 99th percentile [s].
        events: (time of day, text), the oldest first.
    """

    robot: str
    state: str
    reason: str
    counts: Mapping[str, str]
    names: tuple[str, ...]
    gripper: np.ndarray
    position: np.ndarray
    command: np.ndarray
    low: np.ndarray
    high: np.ndarray
    topics: Mapping[str, Topic]
    rare: frozenset[str]
    latencies: Mapping[str, tuple[float, float]]
    events: tuple[tuple[str, str], ...]

    @property
    def at_limit(self) -> np.ndarray:
        """(J,) bool: measured or commanded within 2 % of the range from an end of it. A gripper's ends are its work."""
        near = 0.02 * (self.high - self.low)
        values = np.stack([self.position, self.command])
        return ((values < self.low + near) | (values > self.high - near)).any(0) & ~self.gripper


class Monitor:
    """Listens to the bridge. `snapshot` decodes what has come since the last one.

    Args:
        cameras: count pictures too. They are received for it, which costs what their bytes cost.
        stamp: ROS time [ns], to compare header stamps with.

    Attributes:
        contract: the policy's, once its process has told of it.
    """

    def __init__(
        self, profile: Profile, transport: Any, cameras: bool = False, stamp: Callable[[], int] = now_ns
    ) -> None:
        self._profile, self._stamp = profile, stamp
        self._limits = profile.read_limits()
        names = self._limits.names
        self._gripper = np.array([profile.gripper is not None and name == profile.gripper.joint for name in names])
        self._joints, self._command = JointMerge(names), np.full(len(names), np.nan)
        self._inbox: collections.deque[tuple[str, bytes, int]] = collections.deque(maxlen=20_000)
        self._arrivals: dict[str, collections.deque[int]] = {}
        self._values: dict[str, str] = {}
        self._chunk_latency: collections.deque[float] = collections.deque(maxlen=LATENCIES)
        self._events: collections.deque[tuple[str, str]] = collections.deque(maxlen=50)
        self.contract: dict[str, Any] | None = None
        topics = profile.topics
        self._states = [topics.joint_states]
        if profile.gripper and profile.gripper.joint_states:
            self._states.append(profile.gripper.joint_states)
        self._topics: dict[str, tuple[str, QosProfile]] = {
            **dict.fromkeys(self._states, (JOINT_STATE, LATEST)),
            CHUNK_TOPIC: (JOINT_TRAJECTORY, COMMAND),
            COMMAND_TOPIC: (JOINT_TRAJECTORY, DEFAULT),
            STATE_TOPIC: (DIAGNOSTIC_ARRAY, LATCHED),
            EVENT_TOPIC: (STRING, EVENTS),
        }
        self._pictures = set(topics.cameras.values()) if cameras else set()
        for topic in self._pictures:
            self._topics[topic] = (COMPRESSED_IMAGE if topic.endswith("/compressed") else IMAGE, LATEST)
        for topic, (kind, qos) in self._topics.items():
            self._arrivals[topic] = collections.deque(maxlen=4000)
            transport.subscriber(topic, kind, qos, lambda data, at, topic=topic: self._keep(topic, data, at))

    def _keep(self, topic: str, data: bytes, received_ns: int) -> None:
        self._arrivals[topic].append(received_ns)
        if topic not in self._pictures:
            self._inbox.append((topic, data, received_ns))

    def snapshot(self) -> Snapshot:
        """Take what came, and say how things stand."""
        now = time.monotonic_ns()
        newest: dict[str, bytes] = {}  # of joint states the last of each topic is enough
        while self._inbox:
            topic, data, received_ns = self._inbox.popleft()
            if topic in self._states:
                newest[topic] = data
            else:
                self._try(topic, data, now - received_ns)
        for topic, data in newest.items():
            self._try(topic, data, 0)
        limits = self._limits
        return Snapshot(
            robot=self._profile.name,
            state=self._values.get("state", ""),
            reason=self._values.get("reason", ""),
            counts={k: v for k, v in self._values.items() if k not in ("state", "reason", "message")},
            names=limits.names,
            gripper=self._gripper,
            position=self._joints.position.copy(),
            command=self._command,
            low=limits.low,
            high=limits.high,
            topics={topic: self._topic(topic, now) for topic in self._topics},
            rare=frozenset({EVENT_TOPIC, *((CHUNK_TOPIC,) if self._values.get("state") != "RUNNING" else ())}),
            latencies=self._latencies(),
            events=tuple(self._events),
        )

    def _topic(self, topic: str, now: int) -> Topic:
        arrivals = list(self._arrivals[topic])
        recent = sum(at > now - WINDOW_S * 1e9 for at in arrivals)
        return Topic(recent / WINDOW_S, (now - arrivals[-1]) * 1e-9 if arrivals else np.inf)

    def _latencies(self) -> dict[str, tuple[float, float]]:
        """Ours, and what the safety process measures: `<name>_p50_ms` and `<name>_p99_ms`."""
        found = {}
        if self._chunk_latency:
            p50, p99 = np.quantile(self._chunk_latency, [0.5, 0.99])
            found[CHUNK_LATENCY] = (float(p50), float(p99))
        for key, value in self._values.items():
            name = key.removesuffix("_p50_ms")
            if name != key and f"{name}_p99_ms" in self._values:
                found[name.replace("_", " ")] = (float(value) * 1e-3, float(self._values[f"{name}_p99_ms"]) * 1e-3)
        return found

    def _try(self, topic: str, data: bytes, ago_ns: int) -> None:
        try:
            self._take(topic, data, ago_ns)
        except (InputError, KeyError, ValueError) as error:
            self._event(f"{topic}: {error}")

    def _take(self, topic: str, data: bytes, ago_ns: int) -> None:
        if topic in self._states:
            self._joints.update(messages.read_joint_state(data), time.monotonic())
        elif topic == STATE_TOPIC:
            self._values = messages.read_diagnostics(data)
        elif topic == EVENT_TOPIC:
            event = messages.read_json(data)
            if isinstance(event.get("contract"), dict):
                self.contract = event["contract"]
            self._event(_event_text(event))
        elif topic == CHUNK_TOPIC:
            chunk = messages.read_joint_trajectory(data)
            self._chunk_latency.append((self._stamp() - ago_ns - chunk.stamp_ns) * 1e-9)
        elif topic == COMMAND_TOPIC:
            command = messages.read_joint_trajectory(data)
            if set(self._limits.names) <= set(command.names):  # a twist names axes
                order = [command.names.index(name) for name in self._limits.names]
                self._command = command.positions[0][order]

    def _event(self, text: str) -> None:
        if self._events and self._events[-1][1] == text:  # said again and again: once, with the newest time
            self._events.pop()
        self._events.append((time.strftime("%H:%M:%S"), text))


def _event_text(event: Mapping[str, Any]) -> str:
    """`source: what, its text, and the other fields`."""
    source, what = str(event.get("source", "?")), str(event.get("event", "?"))
    hidden = ("event", "source", "stamp_ns", "contract", "text")
    rest = [f"{key}={_short(value)}" for key, value in event.items() if key not in hidden]
    parts = [what if what != source else "", str(event.get("text", "")), *rest]
    return f"{source}: {' '.join(part for part in parts if part)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
