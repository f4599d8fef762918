"""Records episodes as rosbag2 MCAP bags, one folder each; `python -m embodied.robot_bridge.recorder --out DIR`.

An `episode_start` event on /bridge/event opens a bag (its field `bag` is the name), `episode_end` closes it, another
`episode_start` goes over to the next bag without a gap. The bundle's contract.json (the field `contract` of this event,
or of the policy's own before it) is kept as the metadata record `embodied_contract`, and what else is needed to read
the numbers (joints, limits, deadlines, code version) as `embodied_recording`, so that reading a bag needs nothing else.
Every bag begins with the last message of each latched topic.

Nothing that happens here reaches the robot. Messages wait in a queue of bounded size while the disk is slow; when it is
nearly full pictures are left out, when it is full everything is, and an event says how many. A disk that refuses ends
the bag, with an event; what was written can be recovered (`bag_recover`).
"""

import argparse
import collections
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embodied.contracts.errors import InputError
from embodied.contracts.provenance import code_version, hash_file, hash_json, package_versions
from embodied.robot_bridge import messages
from embodied.robot_bridge.bag_writer import BagWriter
from embodied.robot_bridge.messages import (
    BOOL,
    CLOCK,
    COMPRESSED_IMAGE,
    DIAGNOSTIC_ARRAY,
    IMAGE,
    JOINT_STATE,
    JOINT_TRAJECTORY,
    JOY,
    POSE_STAMPED,
    STRING,
)
from embodied.robot_bridge.node import EVENT_TOPIC, EventLog, Stop, arguments, open_transport, run_process
from embodied.robot_bridge.profile import Profile, profile_path
from embodied.robot_bridge.qos import EVENTS, LATCHED, LOG, QosProfile
from embodied.robot_bridge.safety_node import CHUNK_TOPIC, COMMAND_TOPIC, ESTOP_TOPIC, MODE_TOPIC, STATE_TOPIC

log = logging.getLogger("recorder")

CONTRACT_RECORD, RECORDING_RECORD = "embodied_contract", "embodied_recording"
QUEUE_BYTES = 64 << 20
PICTURES_SHARE = 0.75  # of the queue; the rest is kept for what an episode cannot be read without
REPORT_EVERY_S = 1.0
# Reliable, since what is sent here is ours and reliable; a KEEP_LAST publisher never waits for a recorder that hangs.
_BRIDGE = QosProfile(depth=2000)
_STATIC = QosProfile(depth=100, latched=True)
_PICTURES = QosProfile(depth=10, reliable=False)
_LATCHED_KEPT = 20  # of a latched topic: /tf_static may have many publishers


def recorded_topics(
    profile: Profile, poses: Sequence[str] = (), clock: bool = False
) -> dict[str, tuple[str, QosProfile]]:
    """Topic -> message type and the quality of service that the recorder requests.

    The topic that drives the robot is not among them: who subscribes to it counts as a robot. /bridge/command has what
    was sent.

    Args:
        poses: names under /sim/pose.
        clock: record the clock topic, which simulated time comes from.
    """
    names = profile.topics
    topics: dict[str, tuple[str, QosProfile]] = {
        EVENT_TOPIC: (STRING, EVENTS),
        STATE_TOPIC: (DIAGNOSTIC_ARRAY, LATCHED),
        names.joint_states: (JOINT_STATE, LOG),
        CHUNK_TOPIC: (JOINT_TRAJECTORY, _BRIDGE),
        COMMAND_TOPIC: (JOINT_TRAJECTORY, _BRIDGE),
        MODE_TOPIC: (STRING, _BRIDGE),
        ESTOP_TOPIC: (BOOL, _BRIDGE),
        names.deadman: (BOOL if profile.safety.deadman_button < 0 else JOY, LOG),
        "/diagnostics": (DIAGNOSTIC_ARRAY, LOG),
        "/tf": ("tf2_msgs/msg/TFMessage", LOG),
        "/tf_static": ("tf2_msgs/msg/TFMessage", _STATIC),
        "/robot_description": (STRING, LATCHED),
    }
    if profile.gripper and profile.gripper.joint_states:
        topics[profile.gripper.joint_states] = (JOINT_STATE, LOG)
    for topic in names.cameras.values():
        topics[topic] = (COMPRESSED_IMAGE if topic.endswith("/compressed") else IMAGE, _PICTURES)
        calibration = topic.removesuffix("/compressed").rpartition("/")[0] + "/camera_info"
        topics[calibration] = ("sensor_msgs/msg/CameraInfo", LOG)
    topics |= {f"/sim/pose/{name}": (POSE_STAMPED, LOG) for name in poses}
    return topics | ({names.clock: (CLOCK, LOG)} if clock else {})


def recording_metadata(profile: Profile, file: Path) -> dict[str, Any]:
    """What the numbers of a recording mean and what made it; JSON-able. `file`: the profile's YAML."""
    limits = {name: np.asarray(value).tolist() for name, value in vars(profile.read_limits()).items()}
    sources = [
        file,
        *((file.parent / name) for name in (profile.description.urdf, profile.description.joint_limits) if name),
    ]
    return {
        "robot": profile.name,
        "joints": list(profile.all_joints),
        "units": {"position": "rad, m", "velocity": "rad/s, m/s", "time": "ns"},
        "adapter": profile.adapter,
        "limits": limits,
        "limits_sha256": hash_json(limits),
        "files_sha256": {path.name: hash_file(path) for path in sources if path.is_file()},
        "profile": profile.fingerprint,
        "max_age_s": {"joint_states": profile.policy.joint_timeout, "images": profile.policy.image_timeout},
        "code_version": code_version(),
        "packages": package_versions(),
        "ros_distro": messages.DISTRO,
    }


class Inbox:
    """Messages on their way to the disk, at most `limit` bytes of them. `put` never waits.

    Args:
        pictures: topics whose messages are left out first.
    """

    def __init__(self, limit: int, pictures: frozenset[str]) -> None:
        self._limit, self._pictures = limit, pictures
        self._items: collections.deque[tuple[str, str, bytes, int]] = collections.deque()
        self._lock, self.waiting_bytes = threading.Lock(), 0
        self._dropped: collections.Counter[str] = collections.Counter()
        self.wake = threading.Event()

    def put(self, topic: str, kind: str, data: bytes, received_ns: int) -> None:
        room = self._limit * (PICTURES_SHARE if topic in self._pictures else 1.0)
        with self._lock:
            if self.waiting_bytes + len(data) > room:
                self._dropped[topic] += 1
                return
            self._items.append((topic, kind, data, received_ns))
            self.waiting_bytes += len(data)
        self.wake.set()

    def take(self) -> tuple[str, str, bytes, int] | None:
        with self._lock:
            if not self._items:
                return None
            item = self._items.popleft()
            self.waiting_bytes -= len(item[2])
            return item

    def dropped(self) -> dict[str, int]:
        """How many messages of each topic were left out since the last call."""
        with self._lock:
            found, self._dropped = dict(self._dropped), collections.Counter()
            return found


class Recorder:
    """Subscribes to what a bag holds and writes it while an episode runs. Call `step` in a loop.

    Args:
        out: folder of the bags.
        about: of the record `embodied_recording`.
        queue_bytes: memory for messages that wait for the disk.
        epoch_ns: the system clock less the clock of the receive times [ns].
    """

    def __init__(
        self,
        profile: Profile,
        transport: Any,
        out: Path,
        poses: tuple[str, ...] = (),
        clock: bool = False,
        about: Mapping[str, Any] | None = None,
        queue_bytes: int = QUEUE_BYTES,
        epoch_ns: Callable[[], int] = lambda: time.time_ns() - time.monotonic_ns(),
    ) -> None:
        self._out, self._transport, self._about, self._epoch = out, transport, dict(about or {}), epoch_ns
        self._writer: BagWriter | None = None
        self._events = EventLog(transport, "recorder")
        self._topics = recorded_topics(profile, poses, clock)
        pictures = frozenset(topic for topic, (kind, _) in self._topics.items() if kind in (IMAGE, COMPRESSED_IMAGE))
        self._inbox = Inbox(queue_bytes, pictures)
        self.wake = self._inbox.wake
        self._latched: dict[str, collections.deque[tuple[str, str, bytes]]] = {
            topic: collections.deque(maxlen=_LATCHED_KEPT if topic == "/tf_static" else 1)
            for topic, (_, qos) in self._topics.items()
            if qos.latched and topic != EVENT_TOPIC
        }
        self._contract: dict[str, Any] | None = None
        self._epoch_ns = 0
        self._lost: collections.Counter[str] = collections.Counter()
        self._reported = 0.0
        for topic, (kind, qos) in self._topics.items():
            transport.subscriber(
                topic, kind, qos, lambda data, at, topic=topic, kind=kind: self._inbox.put(topic, kind, data, at)
            )

    @property
    def waiting_bytes(self) -> int:
        """Of messages that wait for the disk."""
        return self._inbox.waiting_bytes

    def begin(self, bag: str) -> None:
        """Record from now on, without an `episode_start`. Raises InputError or OSError if the bag cannot be opened."""
        self._open({"bag": bag}, time.monotonic_ns())

    def step(self) -> None:
        """Write everything that has arrived."""
        self.wake.clear()
        while (item := self._inbox.take()) is not None:
            self._handle(*item)
            self._report_losses()
        self._report_losses()

    def _handle(self, topic: str, kind: str, data: bytes, received_ns: int) -> None:
        event = self._event(data) if topic == EVENT_TOPIC else {}
        if isinstance(event.get("contract"), dict):
            self._contract = event["contract"]
        try:
            if event.get("event") == "episode_start":
                self._open(event, received_ns)
            if topic in self._latched:
                self._latched[topic].append((topic, kind, data))
            if self._writer is not None:
                self._writer.write(topic, kind, data, received_ns + self._epoch_ns)
            if event.get("event") == "episode_end":
                self.close()
        except (OSError, InputError) as error:  # a full disk is the recorder's trouble, not the robot's
            self._give_up(error, str(event.get("bag", "")))

    def _report_losses(self, at_once: bool = False) -> None:
        """Say what was left out: at most once a second, and before a bag is closed."""
        self._lost.update(self._inbox.dropped())
        if self._lost and (at_once or time.monotonic() - self._reported > REPORT_EVERY_S):
            self._reported = time.monotonic()
            lost, self._lost = dict(self._lost), collections.Counter()
            if self._writer is not None:
                self._events.write("recording_dropped", bag=self._writer.path.parent.name, messages=lost)

    @staticmethod
    def _event(data: bytes) -> dict[str, Any]:
        try:
            return messages.read_json(data)
        except InputError as error:
            log.warning("%s: %s", EVENT_TOPIC, error)
            return {}

    def _open(self, event: Mapping[str, Any], received_ns: int) -> None:
        self.close()
        metadata = {CONTRACT_RECORD: self._contract} if self._contract else {}
        metadata |= {RECORDING_RECORD: self._about} if self._about else {}
        name = str(event.get("bag") or "")
        if not name:
            return  # an episode that nobody asked to record
        if "/" in name or name.startswith("."):
            raise InputError(f"'{name}' is no name for a bag: a plain folder name is needed.")
        self._epoch_ns = self._epoch()  # once per bag: its log times never go back
        self._writer = BagWriter(self._out / name, metadata, self._offered)
        for kept in self._latched.values():
            for topic, kind, data in kept:
                self._writer.write(topic, kind, data, received_ns + self._epoch_ns)
        self._events.write("recording", bag=name)

    def _offered(self, topic: str) -> list[QosProfile]:
        """What the publishers of a topic offer, as far as the graph says; at least that it is latched."""
        found = [end.qos for end in self._transport.graph().endpoints if end.topic == topic and end.publishes]
        requested = self._topics[topic][1]
        return list(dict.fromkeys(found)) or ([requested] if requested.latched else [])

    def _give_up(self, error: Exception, name: str) -> None:
        writer, self._writer = self._writer, None
        if writer is not None:
            name = writer.path.parent.name
            writer.abandon()
        self._events.write("recording_failed", bag=name, error=str(error))

    def close(self) -> None:
        """Finish the open bag, if there is one."""
        if self._writer is None:
            return
        self._report_losses(at_once=True)
        writer, name = self._writer, self._writer.path.parent.name
        try:
            writer.close()
        except OSError as error:
            self._give_up(error, name)
            return
        self._writer = None
        self._events.write("recorded", bag=name, messages=sum(writer.counts.values()))


def main(options: argparse.Namespace, profile: Profile, stop: Stop) -> None:
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    transport = open_transport("recorder", options)
    about = recording_metadata(profile, profile_path(options.profile))
    recorder = Recorder(profile, transport, out, tuple(options.poses), options.use_sim_time, about)
    try:
        if options.bag:
            recorder.begin(options.bag)
        while not stop.is_set():
            recorder.wake.wait(0.2)
            recorder.step()
            stop.wait(0.02)  # a batch at a time: waking for every message costs more than writing it
    finally:
        recorder.step()
        recorder.close()
        transport.close()


if __name__ == "__main__":
    parser = arguments("Record episodes as rosbag2 MCAP bags.")
    parser.add_argument("--out", required=True, help="folder that gets one bag per episode")
    parser.add_argument("--poses", nargs="*", default=[], help="names under /sim/pose to record")
    parser.add_argument("--bag", default="", help="name of a bag to begin at once, without an episode_start")
    run_process(main, parser)
