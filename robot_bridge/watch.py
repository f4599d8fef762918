"""What the bridge is doing, for a person at a terminal: `Monitor` listens, `LiveView` shows.

    with LiveView(profile, transport) as view:
        while running:
            key = view.refresh()        # call it as often as you like: it draws at most five times a second

`refresh` returns the key that was pressed since the last call ("" for none, "space", "escape", or the letter), so that
the caller decides what a key does. Where standard output is no terminal it prints a line per second and per change of
state, and no key is ever pressed. The monitor has subscriptions of its own on the caller's transport; messages are only
counted as they arrive, and decoded when a picture of them is due.
"""

import collections
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

import numpy as np

from embodied.contracts.errors import InputError
from embodied.robot_bridge import messages
from embodied.robot_bridge.messages import DIAGNOSTIC_ARRAY, IMAGE, JOINT_STATE, JOINT_TRAJECTORY, STRING
from embodied.robot_bridge.node import EVENT_TOPIC, now_ns
from embodied.robot_bridge.profile import Profile
from embodied.robot_bridge.qos import COMMAND, DEFAULT, EVENTS, LATCHED, LATEST, QosProfile
from embodied.robot_bridge.safety_node import CHUNK_TOPIC, COMMAND_TOPIC, STATE_TOPIC

WINDOW_S = 2.0  # over which rates are counted [s]
LATENCIES = 500  # the last so many of a kind are summed up
DRAW_EVERY, LINE_EVERY = 0.2, 1.0  # [s]
COMPRESSED_IMAGE = "sensor_msgs/msg/CompressedImage"


@dataclasses.dataclass(frozen=True)
class Topic:
    """Rate over the last two seconds [Hz], and age of the newest message [s]: infinite before the first."""

    rate: float
    age: float


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The bridge at one moment. Arrays have shape (J,), in the order of `names`; NaN is what nobody has said yet.

    Attributes:
        state, reason: the safety process's; empty before it speaks.
        counts: what else it says: clamps, refusals, missed deadlines, ages.
        position, command: measured, and commanded last [rad, m].
        low, high: limits of the position [rad, m].
        topics: name -> rate and age.
        latencies: name -> median and 99th percentile [s].
        events: (time of day, text), the oldest first.
    """

    robot: str
    state: str
    reason: str
    counts: Mapping[str, str]
    names: tuple[str, ...]
    position: np.ndarray
    command: np.ndarray
    low: np.ndarray
    high: np.ndarray
    topics: Mapping[str, Topic]
    latencies: Mapping[str, tuple[float, float]]
    events: tuple[tuple[str, str], ...]

    @property
    def at_limit(self) -> np.ndarray:
        """(J,) bool: measured or commanded within 2 % of the range from an end of it."""
        near = 0.02 * (self.high - self.low)
        values = np.stack([self.position, self.command])
        return ((values < self.low + near) | (values > self.high - near)).any(0)


class Monitor:
    """Listens to the bridge. `snapshot` decodes what has come since the last one.

    Args:
        cameras: count pictures too. They are received for it, which costs what their bytes cost.
        stamp: ROS time [ns], to compare header stamps with.
    """

    def __init__(
        self, profile: Profile, transport: Any, cameras: bool = False, stamp: Callable[[], int] = now_ns
    ) -> None:
        self._profile, self._stamp = profile, stamp
        self._limits = profile.read_limits()
        self._inbox: collections.deque[tuple[str, bytes, int]] = collections.deque(maxlen=20_000)
        self._arrivals: dict[str, collections.deque[int]] = {}
        self._values: dict[str, str] = {}
        blank = np.full(len(self._limits.names), np.nan)
        self._position, self._command = blank, blank
        self._chunk_stamps: collections.OrderedDict[str, int] = collections.OrderedDict()
        self._latency: dict[str, collections.deque[float]] = {
            name: collections.deque(maxlen=LATENCIES) for name in ("observation to chunk", "observation to command")
        }
        self._events: collections.deque[tuple[str, str]] = collections.deque(maxlen=50)
        self._topics: dict[str, tuple[str, QosProfile]] = {
            profile.topics.joint_states: (JOINT_STATE, LATEST),
            CHUNK_TOPIC: (JOINT_TRAJECTORY, COMMAND),
            COMMAND_TOPIC: (JOINT_TRAJECTORY, DEFAULT),
            STATE_TOPIC: (DIAGNOSTIC_ARRAY, LATCHED),
            EVENT_TOPIC: (STRING, EVENTS),
        }
        for topic in profile.topics.cameras.values() if cameras else ():
            self._topics[topic] = (COMPRESSED_IMAGE if topic.endswith("/compressed") else IMAGE, LATEST)
        for topic, (kind, qos) in self._topics.items():
            self._arrivals[topic] = collections.deque(maxlen=4000)
            transport.subscriber(topic, kind, qos, lambda data, at, topic=topic: self._keep(topic, data, at))

    def _keep(self, topic: str, data: bytes, received_ns: int) -> None:
        self._arrivals[topic].append(received_ns)
        if topic not in self._profile.topics.cameras.values():
            self._inbox.append((topic, data, received_ns))

    def snapshot(self) -> Snapshot:
        """Take what came, and say how things stand."""
        now = time.monotonic_ns()
        latest_joints = b""
        while self._inbox:
            topic, data, received_ns = self._inbox.popleft()
            if topic == self._profile.topics.joint_states:
                latest_joints = data
                continue
            try:
                self._take(topic, data, now - received_ns)
            except (InputError, KeyError, ValueError) as error:
                self._event(f"{topic}: {error}")
        if latest_joints:
            self._measure(latest_joints)
        return Snapshot(
            robot=self._profile.name,
            state=self._values.get("state", ""),
            reason=self._values.get("reason", ""),
            counts={k: v for k, v in self._values.items() if k not in ("state", "reason", "message")},
            names=self._limits.names,
            position=self._position,
            command=self._command,
            low=self._limits.low,
            high=self._limits.high,
            topics={topic: self._topic(topic, now) for topic in self._topics},
            latencies={
                name: (float(np.quantile(values, 0.5)), float(np.quantile(values, 0.99)))
                for name, values in self._latency.items()
                if values
            },
            events=tuple(self._events),
        )

    def _topic(self, topic: str, now: int) -> Topic:
        arrivals = list(self._arrivals[topic])
        recent = sum(at > now - WINDOW_S * 1e9 for at in arrivals)
        return Topic(recent / WINDOW_S, (now - arrivals[-1]) * 1e-9 if arrivals else np.inf)

    def _measure(self, data: bytes) -> None:
        try:
            self._position, _ = messages.read_joint_state(data).select(self._limits.names)
        except InputError as error:
            self._event(str(error))

    def _take(self, topic: str, data: bytes, ago_ns: int) -> None:
        if topic == STATE_TOPIC:
            self._values = messages.read_diagnostics(data)
        elif topic == EVENT_TOPIC:
            event = messages.read_json(data)
            hidden = ("event", "source", "stamp_ns", "contract")
            rest = " ".join(f"{k}={_short(v)}" for k, v in event.items() if k not in hidden)
            self._event(f"{event.get('source', '?')}: {event.get('event', '?')} {rest}".rstrip())
        elif topic == CHUNK_TOPIC:
            chunk = messages.read_joint_trajectory(data)
            self._chunk_stamps[chunk.frame_id] = chunk.stamp_ns
            if len(self._chunk_stamps) > LATENCIES:
                self._chunk_stamps.popitem(last=False)
            self._latency["observation to chunk"].append((self._stamp() - ago_ns - chunk.stamp_ns) * 1e-9)
        elif topic == COMMAND_TOPIC:
            command = messages.read_joint_trajectory(data)
            observed_ns = self._chunk_stamps.pop(command.frame_id, None)  # the first command of a chunk
            if observed_ns is not None:
                self._latency["observation to command"].append((command.stamp_ns - observed_ns) * 1e-9)
            self._command = command.positions[0][[command.names.index(name) for name in self._limits.names]]

    def _event(self, text: str) -> None:
        self._events.append((time.strftime("%H:%M:%S"), text))


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def line(snapshot: Snapshot) -> str:
    """The snapshot in one line, for a log or a pipe."""
    joints = next(iter(snapshot.topics.values()))
    parts = [snapshot.state or "no word from the safety process", snapshot.reason]
    parts += [f"joints {joints.rate:.0f} Hz"]
    parts += [f"{name} {p50 * 1e3:.0f}/{p99 * 1e3:.0f} ms" for name, (p50, p99) in snapshot.latencies.items()]
    stuck = [name for name, at in zip(snapshot.names, snapshot.at_limit, strict=True) if at]
    parts += [f"at a limit: {', '.join(stuck)}"] if stuck else []
    return " · ".join(part for part in parts if part)


class LiveView:
    """Shows a monitor's snapshots on a terminal, and reads its keys. See the head of this file."""

    def __init__(
        self,
        profile: Profile,
        transport: Any,
        keys: str = "space stop · q quit",
        cameras: bool = False,
        out: TextIO | None = None,
    ) -> None:
        self.monitor = Monitor(profile, transport, cameras)
        self._keys, self._out = keys, out or sys.stdout
        self._drawn, self._last_state = 0.0, ""

    def __enter__(self) -> "LiveView":
        return self

    def __exit__(self, *_: object) -> None: ...

    def refresh(self) -> str:
        """Draw if it is time to, and return the key pressed, if any."""
        now = time.monotonic()
        if now - self._drawn < DRAW_EVERY:
            return ""
        snapshot = self.monitor.snapshot()
        if now - self._drawn >= LINE_EVERY or snapshot.state != self._last_state:
            self._drawn, self._last_state = now, snapshot.state
            print(line(snapshot), file=self._out, flush=True)
        return ""
